"""Classifiers of layers: what is stored is read back, what does not fit is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ncbatch.errors import DataError
from ncbatch.store import FeatureStore
from tests.conftest import make_toy, tree

pytestmark = pytest.mark.usefixtures("small_chunks")
TOY = make_toy(150)


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    store = FeatureStore.create(tmp_path / "s", 5, {"h": 4}, "float32")
    with store.writer("train") as writer:
        writer.append({"h": TOY.X}, TOY.y)
    return store


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", "int32"])
def test_a_classifier_is_read_back(store, dtype):
    import ml_dtypes

    W = np.round(TOY.W * 8).astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    assert store.classifier("h") is None
    store.set_classifier("h", W, TOY.b)
    weight, bias = FeatureStore.open(store.path).classifier("h")
    np.testing.assert_array_equal(weight.astype(np.float64), W.astype(np.float64))
    np.testing.assert_array_equal(bias, TOY.b)
    assert store.classifiers == ["h"]
    assert store.validate() == []


def test_a_later_classifier_replaces_the_earlier_and_its_bias(store):
    store.set_classifier("h", TOY.W, TOY.b)
    store.set_classifier("h", 2 * TOY.W)
    weight, bias = store.classifier("h")
    np.testing.assert_array_equal(weight, 2 * TOY.W)
    assert bias is None


NOT_FINITE = np.where(np.eye(5, 4, k=-2) > 0, np.nan, 1.0)
BAD_CLASSIFIERS = {
    "padded": (np.ones((7, 4)), None, r"shape \(7, 4\); expected \(5, D\).*\n.*--rows 5"),
    "too few": (np.ones((4, 4)), None, r"shape \(4, 4\); expected \(5, D\): one row per class$"),
    "a vector": (np.ones(5), None, r"shape \(5,\)"),
    "width": (np.ones((5, 6)), None, "layer 'h' with 6 features; expected 4, as in split 'train'"),
    "bias": (np.ones((5, 4)), np.ones(4), r"bias of shape \(4,\); expected \(5,\)"),
    "not finite": (NOT_FINITE, None, "weight is not finite in row 2"),
    "infinite bias": (np.ones((5, 4)), [0, 0, 0, np.inf, 0], "bias is not finite in row 3"),
    "text": (np.full((5, 4), "a"), None, "classifier weight of dtype <U1"),
}


@pytest.mark.parametrize("case", BAD_CLASSIFIERS)
def test_a_bad_classifier_is_refused_and_the_stored_one_kept(store, case):
    weight, bias, message = BAD_CLASSIFIERS[case]
    store.set_classifier("h", TOY.W, TOY.b)
    before = tree(Path(store.path))
    with pytest.raises(DataError, match=message):
        store.set_classifier("h", weight, None if bias is None else np.asarray(bias))
    assert tree(Path(store.path)) == before


def test_a_large_classifier_is_stored_in_several_chunks(tmp_path):
    k = 5000
    W = np.random.default_rng(0).standard_normal((k, 500))
    store = FeatureStore.create(tmp_path / "t", k)
    store.set_classifier("h", W)
    assert store.classifier_arrays("h")[0].nchunks == 2
    np.testing.assert_array_equal(store.classifier("h")[0], W)


def test_a_large_classifier_is_read_slice_by_slice(tmp_path, monkeypatch):
    monkeypatch.setattr("ncbatch.store.classifiers._CHUNK_BYTES", 64)
    store = FeatureStore.create(tmp_path / "t", 10)
    W = np.random.default_rng(0).standard_normal((10, 4))
    store.set_classifier("h", W)
    assert store.classifier_arrays("h")[0].nchunks == 5
    rows, bias = store.classifier("h", lazily=True)
    assert (len(rows), rows.shape, rows.dtype, bias) == (10, (10, 4), np.float64, None)
    np.testing.assert_array_equal(rows[3:8], W[3:8])
    np.testing.assert_array_equal(rows[[9, 0, 4, 4]], W[[9, 0, 4, 4]])
    np.testing.assert_array_equal(rows[:, :][1:2], W[1:2])
