"""What can be created and opened, and what is said of everything else."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import zarr

import ncbatch as nc
from ncbatch.errors import CorruptionError, DataError, StoreError, UnknownNameError, UsageError
from ncbatch.store import FeatureStore
from tests.conftest import tree


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    store = FeatureStore.create(tmp_path_factory.mktemp("made") / "s", 5, {"h": 4}, "float32")
    with store.writer("train") as writer:
        writer.append({"h": np.ones((10, 4))}, np.arange(10) % 5)
    store.set_classifier("h", np.ones((5, 4)))
    return store.path


@pytest.fixture
def path(made, tmp_path):
    return shutil.copytree(made, tmp_path / "s")


def edit_header(path, **changes):
    file = path / "zarr.json"
    metadata = json.loads(file.read_text())
    metadata["attributes"]["ncbatch"] |= changes
    file.write_text(json.dumps(metadata))


def test_the_public_name_is_the_store():
    assert nc.FeatureStore is FeatureStore


def test_opening_reads_what_was_written(path):
    store = nc.FeatureStore.open(str(path))
    assert (store.n_classes, store.splits, store.layers()) == (5, ["train"], ["h"])
    assert "splits=['train']" in repr(store)


def test_opening_changes_nothing(path):
    before = tree(path)
    store = FeatureStore.open(path)
    store.validate()
    store.to_xarray("train", "h").compute(scheduler="synchronous")
    store.split("train").fingerprint("h")
    assert tree(path) == before


@pytest.mark.parametrize("number", [2, 99, "2", None])
def test_a_newer_format_is_refused(path, number):
    edit_header(path, format=number)
    with pytest.raises(StoreError, match=f"store format {number}; expected format 1 or older\n"):
        FeatureStore.open(path)


def test_what_a_newer_minor_version_adds_is_ignored(path):
    edit_header(path, later="something")
    assert FeatureStore.open(path).splits == ["train"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "nothing is there"),
        (lambda p: p.write_text("text"), "'.*' is a file; expected the directory of a store"),
        (lambda p: p.mkdir(), "is no store: no Zarr v3 group"),
        (lambda p: zarr.create_group(p), "is a Zarr group but no ncbatch store"),
        (lambda p: zarr.create_group(p, zarr_format=2), "is no store: no Zarr v3 group"),
        (lambda p: zarr.save_array(p, np.ones(3)), "is no store: no Zarr v3 group"),
        (lambda p: (p.mkdir(), (p / "zarr.json").write_text("{")), "is no store"),
    ],
)
def test_a_path_that_is_no_store_is_refused(tmp_path, make, message):
    make(tmp_path / "x")
    with pytest.raises(StoreError, match=message):
        FeatureStore.open(tmp_path / "x")


@pytest.mark.parametrize(
    "place", ["train", "train/label", "train/layers/h", "train/layers/h/feature", "classifier/h"]
)
@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"\xff\xff", b'{"a": 1}'])
def test_damaged_metadata_is_named(path, place, damage):
    (path / place / "zarr.json").write_bytes(damage)
    with pytest.raises(CorruptionError, match=f"metadata '.*s/{place}/zarr.json' cannot be read"):
        FeatureStore.open(path)


@pytest.mark.parametrize(("kind", "name"), [("split", "trian"), ("layer", "hh")])
def test_an_unknown_name_suggests_the_nearest(path, kind, name):
    store = FeatureStore.open(path)
    with pytest.raises(UnknownNameError, match=rf"no {kind} '{name}' in [^\n]*\ndid you mean '"):
        store.split(name) if kind == "split" else store.split("train").feature(name)


def test_create_refuses_what_exists_and_never_deletes_what_is_no_store(path, tmp_path):
    before = tree(tmp_path)
    with pytest.raises(StoreError, match="exists; expected a path that is free"):
        FeatureStore.create(path, 3)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("years of work")
    with pytest.raises(StoreError, match="is no store"):
        FeatureStore.create(tmp_path / "mine", 3, overwrite=True)
    assert (tmp_path / "mine/thesis.tex").exists()
    assert tree(path) == {k.removeprefix("s/"): v for k, v in before.items() if k != "s"}
    assert FeatureStore.create(path, 3, overwrite=True).splits == []


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        (dict(n_classes=0), UsageError, "a store of 0 classes"),
        (dict(n_classes=2**31), UsageError, "a store of 2147483648 classes"),
        (dict(n_classes=3, class_names=["a"]), DataError, "1 class names; expected 3"),
        (dict(n_classes=3, layers={"h": 0}), UsageError, "layer 'h' with 0 features"),
        (dict(n_classes=3, dtype="int8"), UsageError, "dtype 'int8'; expected one of: float16"),
    ],
)
def test_create_refuses_nonsense_before_it_writes(tmp_path, options, kind, message):
    with pytest.raises(kind, match=message):
        FeatureStore.create(tmp_path / "t", **options)
    assert list(tmp_path.iterdir()) == []


def test_create_names_a_place_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"no store can be made at '.*': Not a directory"):
        FeatureStore.create(tmp_path / "file/s", 3)


def test_labels_may_be_as_many_as_int32_holds(tmp_path):
    store = FeatureStore.create(tmp_path / "t", 2**31 - 1, {"h": 1}, "float32")
    with store.writer("train") as writer:
        writer.append({"h": np.ones((2, 1))}, np.array([2**31 - 2, 0]))
    np.testing.assert_array_equal(store.split("train").labels(), [2**31 - 2, 0])


def test_writers_write_declared_layers_by_default(path):
    store = FeatureStore.open(path)
    with pytest.raises(UnknownNameError, match="no layer 'g'"):
        store.writer("test", layers=["g"])
    empty = FeatureStore.create(path.with_name("t"), 5)
    with pytest.raises(UsageError, match="no layer to write; expected layers declared at create"):
        empty.writer("train")
    with pytest.raises(UsageError, match="split name 'classifier'"):
        store.writer("classifier")
