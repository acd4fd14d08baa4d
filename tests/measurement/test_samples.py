"""Samples: rows are read as they are stored, and refused or counted where they are not finite."""

from __future__ import annotations

import numpy as np
import pytest

import ncbatch as nc
from ncbatch.errors import DataError
from ncbatch.measurement.options import Options
from ncbatch.measurement.samples import Samples, count_labels, select_classes
from tests.measurement.stores import (
    assert_equals_oracle,
    make_store,
)
from tests.oracles import base_metrics
from tests.strategies import REGIMES, Features


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_stored_dtypes_are_exact_numbers(tmp_path, dtype: str, small_chunks):
    data = REGIMES["k_less_d"](0)
    store = make_store(tmp_path / "s.zarr", data, dtype=dtype)
    stored = store.split("train").read("h", 0, len(data.y)).astype(np.float64)
    assert_equals_oracle(nc.measure(store), base_metrics(stored, data.y, data.n_classes))


def test_nonfinite_rows_are_refused_or_counted(tmp_path, small_chunks):
    data = REGIMES["k_greater_d"](0)
    X = data.X.copy()
    X[17, 1], X[40, 0], X[41] = np.nan, np.inf, -np.inf
    X[data.y == data.y[5]] = np.nan  # a class of which nothing is left
    bad = ~np.isfinite(X).all(axis=1)
    store = make_store(tmp_path / "s.zarr", Features(X, data.y, data.n_classes))
    first = int(np.flatnonzero(bad)[0])
    with pytest.raises(DataError, match=rf"split 'train', layer 'h', row {first} "):
        nc.measure(store)
    ds = nc.measure(store, skip_nonfinite=True)
    oracle = base_metrics(X[~bad], data.y[~bad], data.n_classes)
    assert_equals_oracle(ds, oracle)
    assert int(ds.n_rows_skipped[0, 0]) == bad.sum()


def test_classes_are_those_seen_and_within_the_filters():
    counts = np.array([5, 0, 1, 9, 3])
    for options, classes, filtered in (
        ({}, [0, 2, 3, 4], False),
        ({"min_count": 3}, [0, 3, 4], True),
        ({"min_count": 2, "max_count": 5}, [0, 4], True),
        ({"classes": [4, 1, 3]}, [3, 4], True),
    ):
        selection = select_classes(counts, Options(**options))
        assert selection.classes.tolist() == classes
        assert selection.filtered is filtered
        assert selection.drops_classes is (len(classes) < 4)
        assert [int(selection.index[c]) for c in classes] == list(range(len(classes)))
        assert (np.delete(selection.index, classes) == -1).all()
    with pytest.raises(DataError, match="class -1 in the list of classes"):
        select_classes(counts, Options(classes=[0, -1]))


def test_blocks_are_every_sample_used_once(tmp_path, small_chunks):
    data = REGIMES["zipf"](2)
    split = make_store(tmp_path / "s.zarr", data).split("train")
    counts = count_labels(split)
    assert counts.tolist() == np.bincount(data.y, minlength=data.n_classes).tolist()
    selection = select_classes(counts, Options(min_count=3))
    samples = Samples(split, "h", selection.index)
    items = samples.items
    assert [item.start for item in items[1:]] == [item.stop for item in items[:-1]]
    assert (items[0].start, items[-1].stop) == (0, len(data.y))
    blocks = [block for item in items for block in samples.blocks(item)]
    assert max(len(block.labels) for block in blocks) <= samples.block_rows
    numbers = np.concatenate([block.numbers for block in blocks])
    assert numbers.tolist() == np.flatnonzero(counts[data.y] >= 3).tolist()
    labels = np.concatenate([block.labels for block in blocks])
    assert selection.classes[labels].tolist() == data.y[numbers].tolist()
    np.testing.assert_array_equal(
        np.concatenate([block.features for block in blocks]), data.X[numbers]
    )
