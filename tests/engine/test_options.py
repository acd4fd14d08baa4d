"""From a declaration follow signature, docstring and checks."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import pytest

from ncbatch.engine.options import Declared, Limits, takes
from ncbatch.errors import UnknownNameError, UsageError


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
        ({"size": 0}, "size 0; expected an integer, at least 1"),
        ({"size": 1.5}, "size 1.5; expected an integer, at least 1"),
        ({"share": 0.0}, "share 0.0; expected a number above 0, at most 1"),
        ({"share": float("nan")}, "share nan; expected a number above 0, at most 1"),
        ({"kind": "d"}, "kind 'd'; expected a, b or c"),
    ],
)
def test_values_that_are_not_declared_are_refused(options, message):
    with pytest.raises(UsageError) as refused:
        make("x", **options)
    assert str(refused.value) == message


def test_a_wrong_name_is_answered_with_the_nearest():
    with pytest.raises(UnknownNameError, match="did you mean 'share'"):
        make("x", shares=1)


def test_what_can_be_read_once_is_kept():
    assert make("x", ids=iter([1, 2]), share=0.5).ids == (1, 2)
    assert make("x", ids=np.array([4, 5])).ids == (4, 5)
