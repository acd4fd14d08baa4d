"""One declaration of an option: signature, checks, help, types and record in results follow from it."""

from __future__ import annotations

import hashlib
import inspect
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

import ncbatch as nc
from ncbatch.engine.options import options_of
from ncbatch.errors import UnknownNameError, UsageError
from ncbatch.measurement.options import (
    PRESETS,
    MeasureRequest,
    Options,
    PlanRequest,
    conventions,
    records,
)


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


@pytest.mark.parametrize("function", [nc.measure, nc.plan])
def test_a_wrong_name_is_answered_with_the_nearest(function):
    with pytest.raises(UnknownNameError, match="did you mean 'dist_exp'"):
        function("no store", dist_expp=2)


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
    digest = hashlib.sha256(np.array([2, 5], np.int64).tobytes()).hexdigest()[:32]
    chosen = conventions(Options(classes=[5, 2, 2], max_count=9, null=True, null_seed=4))
    assert chosen["class_filter"] == f"2 listed, sha256 {digest}"
    assert (chosen["max_count"], chosen["null_seed"]) == (9, 4)
    assert set(records()) < {field.name for field in fields(Options)}


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


@pytest.mark.slow
def test_mypy_refuses_what_is_not_declared(tmp_path):
    api = pytest.importorskip("mypy.api")
    root = Path(__file__).parents[2]
    calls = (root / "tests" / "typed_calls.py").read_text(encoding="utf-8")
    n_wrong = calls.count("# type: ignore")
    # The project's own settings, but for what is checked.
    settings = (root / "pyproject.toml").read_text(encoding="utf-8")
    config = tmp_path / "pyproject.toml"
    lines = settings.splitlines(keepends=True)
    kept = [line for line in lines if not line.startswith(("packages = ", "modules = "))]
    config.write_text("".join(kept), encoding="utf-8")
    program = calls.replace("  # type: ignore", "  # ")
    out, err, _ = api.run(["--config-file", str(config), "-c", program])
    assert n_wrong == 5
    assert f"Found {n_wrong} errors" in out, out + err
