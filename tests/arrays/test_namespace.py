"""Conversions between libraries; the first row that is not finite, in every dtype of stores."""

import ml_dtypes
import numpy as np
import pytest

from ncbatch.arrays.namespace import first_nonfinite_row
from tests.libraries import Library, each_library
from tests.strategies import DTYPES


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("order", ["C", "F"])
def test_the_first_of_several_is_found(dtype, bad: float, order: str):
    rows = np.ones((3000, 100), dtype, order)  # more than a piece
    assert first_nonfinite_row(rows) is None
    for row in (2999, 1311, 0):
        rows[row, 99] = bad
        assert first_nonfinite_row(rows) == row


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_every_value_of_two_bytes_is_known(dtype):
    values = np.arange(2**16, dtype=np.uint16).view(dtype)
    with np.errstate(invalid="ignore"):
        finite = np.isfinite(values)
    assert first_nonfinite_row(values[finite][:, None]) is None
    for value in values[~finite]:
        assert first_nonfinite_row(np.array([[value]])) == 0


def test_byte_order_and_no_rows():
    assert first_nonfinite_row(np.ones((2, 3), ">f2")) is None
    assert first_nonfinite_row(np.array([[1.0], [np.nan]], ">f2")) == 1
    assert first_nonfinite_row(np.empty((0, 3), np.float16)) is None
    assert first_nonfinite_row(np.empty((3, 0), np.float16)) is None


@each_library
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_first_nonfinite_row(library: Library, bad: float):
    rows = np.zeros((5, 3))
    assert first_nonfinite_row(library.put(rows)) is None
    rows[3, 1] = rows[4, 0] = bad
    assert first_nonfinite_row(library.put(rows)) == 3
