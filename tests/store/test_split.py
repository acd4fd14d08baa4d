"""The fingerprint changes with the content of a layer, and with nothing else."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import zarr

from ncbatch.store import FeatureStore
from tests.conftest import make_toy

pytestmark = pytest.mark.usefixtures("small_chunks")
TOY = make_toy(300)


def make(path: Path, X=TOY.X, y=TOY.y, n_classes=5, dtype="float32", step=300, name="train"):
    store = FeatureStore.create(path, n_classes, {"h": 4}, dtype)
    with store.writer(name) as writer:
        for start in range(0, len(y), step):
            writer.append({"h": X[start : start + step]}, y[start : start + step])
    return store


def fingerprint(store: FeatureStore, split: str = "train", *more: str) -> str:
    return FeatureStore.open(store.path).split(split).fingerprint("h", *more)


def test_equal_content_has_an_equal_fingerprint(tmp_path):
    first = make(tmp_path / "a")
    assert len(fingerprint(first)) == 32
    assert fingerprint(make(tmp_path / "b", step=17)) == fingerprint(first)
    shutil.copytree(tmp_path / "a", tmp_path / "c")
    assert fingerprint(FeatureStore.open(tmp_path / "c")) == fingerprint(first)


def test_what_does_not_concern_the_layer_does_not_change_it(tmp_path):
    store = make(tmp_path / "a")
    before = fingerprint(store)
    with store.add_layers("train", {"fc": 2}) as writer:
        writer.append({"fc": TOY.X[:, :2]})
    with store.writer("test") as writer:
        writer.append({"h": TOY.X}, TOY.y)
    store.set_classifier("h", TOY.W, TOY.b)
    assert fingerprint(store) == before
    assert fingerprint(store, "test") != before


def test_one_value_changes_it(tmp_path):
    store = make(tmp_path / "a")
    seen = {fingerprint(store)}
    array = zarr.open_array(tmp_path / "a/train/layers/h/feature")
    for row in (0, 130, 299):
        array[row, 3] = np.nextafter(array[row, 3], np.float32(np.inf))
        seen.add(fingerprint(store))
    assert len(seen) == 4


def test_one_label_changes_it(tmp_path):
    store = make(tmp_path / "a")
    before = fingerprint(store)
    labels = zarr.open_array(tmp_path / "a/train/label")
    labels[130] = (int(labels[130]) + 1) % 5
    assert fingerprint(store) != before


@pytest.mark.parametrize(
    "change",
    [
        dict(X=TOY.X[:299], y=TOY.y[:299]),
        dict(X=np.vstack([TOY.X, TOY.X[:1]]), y=np.append(TOY.y, 0)),
        dict(X=TOY.X[::-1]),
        dict(y=TOY.y[::-1]),
        dict(n_classes=6),
        dict(dtype="float64"),
    ],
)
def test_other_content_has_another_fingerprint(tmp_path, change):
    assert fingerprint(make(tmp_path / "a")) != fingerprint(make(tmp_path / "b", **change))


def test_swapped_chunks_change_it(tmp_path):
    store = make(tmp_path / "a")
    before = fingerprint(store)
    chunks = tmp_path / "a/train/layers/h/feature/c"
    (chunks / "0").rename(chunks / "x")
    (chunks / "1").rename(chunks / "0")
    (chunks / "x").rename(chunks / "1")
    assert store.validate() == []
    assert fingerprint(store) != before


def test_a_missing_chunk_changes_it(tmp_path):
    store = make(tmp_path / "a")
    before = fingerprint(store)
    (tmp_path / "a/train/layers/h/feature/c/2/0").unlink()
    assert fingerprint(store) != before


def test_it_names_the_split_and_the_classes_used(tmp_path):
    store, other = make(tmp_path / "a"), make(tmp_path / "b", name="test")
    assert fingerprint(store) != fingerprint(other, "test")
    assert len({fingerprint(store, "train", f) for f in ("", "classes a", "classes b")}) == 3
