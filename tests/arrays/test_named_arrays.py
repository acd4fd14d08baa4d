"""States become arrays and states again, whatever is in them."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from ncbatch.arrays.named_arrays import pack, unpack
from ncbatch.arrays.namespace import Array
from ncbatch.arrays.rows import StoredRows
from ncbatch.errors import DataError
from ncbatch.states.decisions import Decisions
from ncbatch.states.moments import Moments
from ncbatch.states.pairs.stats import PairStats
from ncbatch.states.pairs.sweep import sweep_pairs


@dataclass(frozen=True)
class Inner:
    number: float
    numbers: Array


@dataclass(frozen=True)
class Outer:
    inner: Inner
    missing: Inner | None
    there: Inner | None
    nothing: Array | None
    n: int


def same(a: Any, b: Any) -> bool:
    x, y = pack(a), pack(b)
    return x.keys() == y.keys() and all(
        x[k].dtype == y[k].dtype and np.array_equal(x[k], y[k], equal_nan=True) for k in x
    )


def test_nested_states_with_parts_left_out():
    inner = Inner(0.1, np.arange(3.0))
    outer = Outer(inner, None, inner, None, 7)
    found = unpack(Outer, pack(outer))
    assert same(found, outer)
    assert found.missing is None
    assert found.nothing is None
    assert isinstance(found.n, int)
    assert isinstance(found.inner.number, float)


def test_states_of_the_package():
    rng = np.random.default_rng(0)
    X, y = rng.standard_normal((60, 4)), rng.integers(0, 6, 60)
    for scatter in (True, False):
        moments = Moments.from_block(X, y, 6, scatter=scatter)
        assert same(unpack(Moments, pack(moments)), moments)
    pairs = sweep_pairs(moments.means, moments.means.mean(axis=0), moments.variances)
    found = unpack(PairStats, pack(pairs))
    assert same(found, pairs)
    assert same(found.merge(pairs), pairs.merge(pairs))
    assert found.nearest is not None
    assert unpack(PairStats, pack(PairStats.zero())).nearest is None
    assert same(unpack(Decisions, pack(Decisions.zero(3))), Decisions.zero(3))


def test_arrays_are_put_where_they_belong():
    found = unpack(Inner, pack(Inner(1.0, np.arange(2))), put=lambda array: array.tolist())
    assert found.numbers == [0, 1]


def test_stored_rows_stay_where_they_are(tmp_path):
    rows = StoredRows.create(tmp_path / "rows", (2, 3))
    rows[0:2] = np.arange(6.0).reshape(2, 3)
    found = unpack(Inner, pack(Inner(1.0, rows)))
    assert isinstance(found.numbers, StoredRows)
    assert found.numbers[0:2].tolist() == rows[0:2].tolist()
    arrays = pack(Inner(1.0, rows))
    rows.path.unlink()
    with pytest.raises(DataError):  # never made anew, full of zeros
        unpack(Inner, arrays)
    assert not rows.path.exists()
