"""Errors say what was found, what was expected and what to do, and are errors of Python too."""

from __future__ import annotations

import pickle

import pytest
from tblib import pickling_support

from ncbatch import errors

BUILTINS = {
    errors.DataError: ValueError,
    errors.UsageError: ValueError,
    errors.StoreError: OSError,
    errors.CorruptionError: OSError,
    errors.BudgetError: MemoryError,
    errors.WorkerError: RuntimeError,
    errors.OutputError: OSError,
    errors.UnknownNameError: LookupError,
}


@pytest.mark.parametrize("kind", BUILTINS)
def test_an_error_comes_back_from_a_worker(kind):
    pickling_support.install()  # as Dask does
    error = pickle.loads(pickle.dumps(kind("a thing", "another", "do this")))
    assert (type(error), str(error)) == (kind, "a thing; expected another\ndo this")


@pytest.mark.parametrize("kind", BUILTINS)
def test_an_error_says_three_things_and_survives_pickling(kind):
    error = pickle.loads(pickle.dumps(kind("a thing", "another", "do this")))
    assert isinstance(error, BUILTINS[kind])
    assert isinstance(error, errors.NcbatchError)
    assert (error.found, error.expected, error.remedy) == ("a thing", "another", "do this")
    assert str(error) == "a thing; expected another\ndo this"
    assert str(kind("a thing")) == "a thing"
    assert str(kind("a thing", remedy="do this")) == "a thing\ndo this"


def test_an_unknown_name_lists_a_dozen_and_the_nearest():
    error = errors.unknown_name("layer", "h.3", [f"h.{i}" for i in range(10, 40)], "a store")
    assert error.found == "no layer 'h.3' in a store"
    assert error.expected.endswith("h.21, ... (30 in all)")
    assert error.remedy.startswith("did you mean 'h.3")
    none = errors.unknown_name("split", "x", [])
    assert str(none) == "no split 'x' (there is no split at all)"


def test_the_first_line_of_what_a_library_says():
    assert errors.first_line(ValueError(" bad\nand more")) == "bad"
    assert errors.first_line(ValueError()) == "ValueError"
