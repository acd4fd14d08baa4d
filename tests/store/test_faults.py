"""Damage to stored chunks: each kind, at each place, is named by validate and refused by readers."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zarr

from ncbatch.errors import CorruptionError
from ncbatch.store import FeatureStore
from tests.conftest import make_toy, tree

TOY = make_toy(300)
# Which chunk is damaged, and which rows are in it.
PLACES = {
    "feature": ("train/layers/h/feature/c/1/0", "64..127"),
    "last feature": ("train/layers/h/feature/c/4/0", "256..299"),
    "label": ("train/label/c/1", "64..127"),
    "prediction": ("train/prediction/c/2", "128..191"),
    "weight": ("classifier/h/weight/c/0/0", "0..4"),
    "bias": ("classifier/h/bias/c/0", "0..4"),
}


def flip(position: int) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        content = bytearray(file.read_bytes())
        content[position] ^= 1
        file.write_bytes(content)

    return damage


DAMAGES: dict[str, Callable[[Path], object]] = {
    "first byte": flip(0),
    "byte in the middle": flip(16),
    "checksum": flip(-1),
    "cut short": lambda file: file.write_bytes(file.read_bytes()[:-8]),
    "two bytes": lambda file: file.write_bytes(file.read_bytes()[:2]),
    "no bytes": lambda file: file.write_bytes(b""),
    "too long": lambda file: file.write_bytes(file.read_bytes() + b"more"),
    "deleted": lambda file: file.unlink(),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sound") / "s"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ncbatch.store.format.CHUNK_BYTES", 1024)
        store = FeatureStore.create(path, 5, {"h": 4}, "float32")
        with store.writer("train", head="h") as writer:
            writer.append({"h": TOY.X}, TOY.y, TOY.y)
        store.set_classifier("h", TOY.W, TOY.b)
    return path


@pytest.fixture
def path(sound: Path, tmp_path: Path) -> Path:
    return shutil.copytree(sound, tmp_path / "s")


def read_everything(store: FeatureStore) -> None:
    split = store.split("train")
    split.check_chunks("h")
    for _ in split.label_blocks():
        pass
    split.read("h", 0, split.n_rows)
    split.predictions()
    store.classifier("h")


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_by_file_and_rows_and_refused(path, place, damage):
    file, rows = PLACES[place]
    DAMAGES[damage](path / file)
    store = FeatureStore.open(path)
    what = "chunk is missing" if damage == "deleted" else "checksum does not match its bytes"
    assert [str(fault) for fault in store.validate()] == [f"{file} (rows {rows}): {what}"]
    with pytest.raises(CorruptionError, match="bad chunk") as refused:
        read_everything(store)
    assert f"{file} (rows {rows})" in str(refused.value)
    assert "ncbatch validate" in refused.value.remedy


def test_every_fault_is_named_in_order(path):
    for file, _ in reversed(PLACES.values()):
        DAMAGES["first byte"](path / file)
    found = [fault.file for fault in FeatureStore.open(path).validate()]
    assert sorted(found) == sorted(file for file, _ in PLACES.values())
    assert [file for file in found if "feature" in file] == [
        "train/layers/h/feature/c/1/0",
        "train/layers/h/feature/c/4/0",
    ]


def test_a_sound_store_has_no_faults_and_is_not_changed(path):
    before = tree(path)
    assert FeatureStore.open(path).validate() == []
    assert tree(path) == before


def test_reading_rows_beside_the_damage_works(path):
    DAMAGES["first byte"](path / PLACES["feature"][0])
    split = FeatureStore.open(path).split("train")
    np.testing.assert_array_equal(split.read("h", 0, 64), TOY.X[:64])
    np.testing.assert_array_equal(split.read("h", 128, 300), TOY.X[128:])
    with pytest.raises(CorruptionError, match=r"rows 64\.\.127"):
        split.read("h", 127, 128)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("holes", [range(64, 128), range(256, 300), range(300)])
def test_a_missing_chunk_that_covers_holes_only_is_fine(tmp_path, holes):
    labels = TOY.y.copy()
    labels[list(holes)] = -1
    store = FeatureStore.create(tmp_path / "s", 5, {"h": 4}, "float32")
    with store.writer("train", head="h") as writer:
        writer.append({"h": TOY.X}, labels, TOY.y)
    index = holes[0] // 64
    (tmp_path / f"s/train/layers/h/feature/c/{index}/0").unlink()
    (tmp_path / f"s/train/prediction/c/{index}").unlink()
    store = FeatureStore.open(tmp_path / "s")
    assert store.validate() == []
    store.split("train").check_chunks("h")


@pytest.mark.usefixtures("small_chunks")
def test_one_row_among_holes_makes_its_chunk_needed(tmp_path):
    labels = np.full(300, -1)
    labels[200] = 0
    store = FeatureStore.create(tmp_path / "s", 5, {"h": 4}, "float32")
    with store.writer("train") as writer:
        writer.append({"h": TOY.X}, labels)
    for index in range(5):
        (tmp_path / f"s/train/layers/h/feature/c/{index}/0").unlink()
    assert [fault.start for fault in store.validate()] == [192]
    with pytest.raises(CorruptionError, match=r"c/3/0 \(rows 192\.\.255\): chunk is missing"):
        store.split("train").check_chunks("h")


@pytest.mark.parametrize("name", ["label", "prediction"])
def test_values_that_are_no_class_are_named(path, name):
    array = zarr.open_array(path / "train" / name)
    array[130] = 7
    faults = FeatureStore.open(path).validate()
    assert [str(fault) for fault in faults] == [
        f"train/{name}/c/2 (rows 128..191): {name} 7 in row 130, expected below 5"
    ]


def test_a_label_that_was_wiped_out_is_noticed_by_the_record(path):
    zarr.open_array(path / "train/label")[130] = -1
    [fault] = FeatureStore.open(path).validate()
    assert "299 samples, expected 300 as recorded" in str(fault)


def test_features_are_expected_everywhere_when_labels_are_damaged(path):
    DAMAGES["first byte"](path / PLACES["label"][0])
    DAMAGES["deleted"](path / "train/layers/h/feature/c/3/0")
    files = [fault.file for fault in FeatureStore.open(path).validate()]
    assert files == ["train/label/c/1", "train/layers/h/feature/c/3/0"]


def test_damage_is_found_in_every_split_and_classifier(path):
    store = FeatureStore.open(path)
    with store.writer("test", layers={"h": 4, "fc": 12}, dtype="float32") as writer:
        writer.append({"h": TOY.X, "fc": np.hstack([TOY.X] * 3)}, TOY.y)
    store.set_classifier("fc", np.ones((5, 12)))
    damaged = ["test/layers/fc/feature/c/0/0", "train/label/c/4", "classifier/fc/weight/c/0/0"]
    for file in damaged:
        DAMAGES["cut short"](path / file)
    assert [fault.file for fault in store.validate()] == damaged
