"""One declaration of an option: signature, checks, help, types and record in results follow from it."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Annotated, Literal

import numpy as np
import pytest

import ncbatch as nc
from ncbatch.engine.options import Declared, Limits, options_of, takes
from ncbatch.errors import UnknownNameError, UsageError
from ncbatch.measurement.options import (
    PRESETS,
    MeasureRequest,
    Options,
    PlanRequest,
    Recorded,
    conventions,
    records,
)


@dataclass(frozen=True, kw_only=True)
class Wanted(Declared):
    """What a function made here may be asked."""

    size: Annotated[int, "How many; see `kind`.", Limits(1)] = 3
    kind: Annotated[Literal["a", "b", "c"], "Which."] = "a"
    share: Annotated[float | None, "How much.", Limits(0, 1)] = None
    ids: Annotated[Iterable[int] | None, "Which of them."] = None


@takes(Wanted)
def make(path: str, *, progress: object = None, **options: object) -> Wanted:
    """Make something.

    Parameters
    ----------
    path : str
        Where.

    Returns
    -------
    Wanted
        What was asked.
    """
    return Wanted.of(options)


def test_signature_and_docstring_list_what_is_declared():
    assert str(inspect.signature(make)).replace("'", "") == (
        "(path: str, *, size: int = 3, kind: Literal[a, b, c] = a, share: float | None = None, "
        "ids: collections.abc.Iterable[int] | None = None, progress: object = None) -> Wanted"
    )
    said = inspect.getdoc(make)
    assert "\nkind : {'a', 'b', 'c'}, default 'a'\n    Which.\n" in said
    assert said.index("path : str") < said.index("share : float, optional") < said.index("Returns")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "size 0; expected an integer from 1 on"),
        ({"size": 1.5}, "size 1.5; expected an integer from 1 on"),
        ({"share": 0.0}, "share 0.0; expected a number above 0, at most 1"),
        ({"share": float("nan")}, "share nan; expected a number above 0, at most 1"),
        ({"kind": "d"}, "kind 'd'; expected a, b or c"),
    ],
)
def test_values_that_are_not_declared_are_refused(options, message):
    with pytest.raises(UsageError) as refused:
        make("x", **options)
    assert str(refused.value) == message


def test_a_wrong_name_is_answered_with_the_nearest(tmp_path):
    with pytest.raises(UnknownNameError, match="did you mean 'share'"):
        make("x", shares=1)
    for function in (nc.measure, nc.plan):
        with pytest.raises(UnknownNameError, match="did you mean 'dist_exp'"):
            function(tmp_path / "no store", dist_expp=2)  # type: ignore[call-arg]


def test_what_can_be_read_once_is_kept():
    assert make("x", ids=iter([1, 2]), share=0.5).ids == (1, 2)
    assert make("x", ids=np.array([4, 5])).ids == (4, 5)


@pytest.mark.parametrize(
    ("function", "request_type"), [(nc.measure, MeasureRequest), (nc.plan, PlanRequest)]
)
def test_every_option_is_in_signature_and_help(function, request_type):
    parameters = inspect.signature(function).parameters
    for option in options_of(request_type):
        assert parameters[option.name].default == option.default
        assert parameters[option.name].kind is inspect.Parameter.KEYWORD_ONLY
        assert f"\n{option.name} : " in function.__doc__
        assert option.help.endswith(".")
    assert set(parameters) - {"progress"} == {
        "stores", "layers", *(option.name for option in options_of(request_type))
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "fp16"}, "precision 'fp16'; expected exact, fp32 or tf32"),
        ({"dist_exp": 17}, "dist_exp 17; expected a number above 0, at most 16"),
        ({"ddof": 2}, "ddof 2; expected 0 or 1"),
        ({"class_ddof": 0.5}, "class_ddof 0.5; expected 0 or 1"),
        ({"ncc": "annoy"}, "ncc 'annoy'; expected exact or faiss"),
        ({"collapse_below": 0}, "collapse_below 0; expected a number above 0"),
    ],
)
def test_bad_values_are_refused_before_a_store_is_opened(options, message):
    with pytest.raises(UsageError) as refused:
        nc.measure("no store", **options)
    assert str(refused.value) == message


def test_the_part_for_workers_holds_what_values_depend_on():
    asked = MeasureRequest(dist_exp=2.0, classes=[3, 1], state="kept", memory="1GiB")
    assert asked.options == Options(dist_exp=2.0, classes=(3, 1))
    assert type(asked.options) is Options


def test_results_record_every_convention():
    assert conventions(Options()) == {
        "train": "train",
        "min_count": 1,
        "global_mean": "unweighted mean of class means",
        "dist_exp": 1.0,
        "ddof": 0,
        "class_ddof": 1,
        "nc1_division": "by K",
        "skip_nonfinite": 0,
        "precision": "exact",
        "null_seed": "no null",
        "ncc": "exact",
    }
    chosen = conventions(Options(classes=[5, 2, 2], max_count=9, null=True, null_seed=4))
    assert chosen["class_filter"] == "2 listed, sha256 " + _sha256(np.array([2, 5]))
    assert (chosen["max_count"], chosen["null_seed"]) == (9, 4)
    assert set(records()) < {field.name for field in fields(Options)}
    assert Recorded() in [mark for option in options_of(Options) for mark in option.marks]


def _sha256(ids: np.ndarray) -> str:
    import hashlib

    return hashlib.sha256(ids.astype(np.int64).tobytes()).hexdigest()[:32]


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_options(name):
    assert {**PRESETS[name]}.items() <= vars(Options(**PRESETS[name])).items()


def test_options_load_nothing_heavy():
    code = (
        "import sys, ncbatch.measurement.options\n"
        "print([m for m in ('zarr', 'xarray', 'numpy', 'dask', 'numba') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
