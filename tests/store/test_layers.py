"""Layers and predictions added to a split that has rows, and classifiers of layers."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ncbatch.errors import DataError, StoreError, UnknownNameError, UsageError
from ncbatch.store import FeatureStore
from tests.conftest import make_toy, tree

pytestmark = pytest.mark.usefixtures("small_chunks")
TOY = make_toy(150)
WIDE = np.hstack([TOY.X, TOY.X, TOY.X])
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ncbatch.store.format.CHUNK_BYTES", 1024)
        store = FeatureStore.create(tmp_path_factory.mktemp("made") / "s", 5, {"h": 4}, "float32")
        with store.writer("train", head="h") as writer:
            writer.append({"h": TOY.X}, TOY.y, TOY.y)
    return store.path


@pytest.fixture
def store(made: str, tmp_path: Path) -> FeatureStore:
    return FeatureStore.open(shutil.copytree(made, tmp_path / "s"))


def add(store: FeatureStore, name: str = "fc", rows=WIDE, **options) -> None:
    with store.add_layers("train", {name: rows.shape[1]}, "float32", **options) as writer:
        for start in range(0, len(rows), 40):
            stop = min(start + 40, len(rows))
            writer.append({name: rows[start:stop]}, TOY.y[start:stop])


# ------------------------------------------------------------------------------------- visibility


def test_a_layer_is_invisible_until_all_its_rows_are_there(store):
    with store.add_layers("train", {"fc": 12}, "float32") as writer:
        writer.append({"fc": WIDE[:140]})
        assert store.layers("train") == ["h"]
        assert store.split("train").incomplete_layers == ["fc"]
        with pytest.raises(UnknownNameError, match="no layer 'fc'"):
            store.split("train").read("fc", 0, 1)
        assert store.validate() == []
        writer.append({"fc": WIDE[140:]})
    split = FeatureStore.open(store.path).split("train")
    assert (split.layers, split.incomplete_layers) == (["h", "fc"], [])
    np.testing.assert_array_equal(split.read("fc", 0, 150), WIDE)
    assert split.feature("fc").chunks == (16, 12)


def test_several_layers_come_in_the_order_written(store):
    add(store, "b")
    add(store, "a")
    with store.add_layers("train", {"d": 4, "c": 12}, "float64") as writer:
        writer.append({"c": WIDE, "d": TOY.X})
    assert store.layers("train") == ["h", "b", "a", "d", "c"]


def test_a_layer_with_a_row_too_few_is_refused(store):
    before = tree(Path(store.path))
    with pytest.raises(DataError, match="149 rows for split 'train'; expected 150"):
        add(store, rows=WIDE[:149])
    assert tree(Path(store.path)) == before


BAD_CALLS = {
    "a row too many": (dict(features={"fc": np.vstack([WIDE, WIDE])}), "300 rows for split"),
    "width": (dict(features={"fc": TOY.X}), r"shape \(150, 4\); expected \(150, 12\)"),
    "other layer": (dict(features={"fd": WIDE}), "features of layers fd; expected layers fc"),
    "other label": (dict(labels=np.append(TOY.y[:149], (TOY.y[149] + 1) % 5)), "label . in row 149"),
    "label of K": (dict(labels=np.full(150, 5)), "label 5 in row 0; expected labels below 5"),
    "labels short": (dict(labels=TOY.y[:1]), "1 labels for 150 rows"),
    "predictions": (dict(predictions=TOY.y), "predictions without a head layer"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_CALLS)
def test_a_bad_call_is_refused_and_leaves_nothing(store, case):
    arguments, message = BAD_CALLS[case]
    before = tree(Path(store.path))
    with (
        pytest.raises(DataError, match=message),
        store.add_layers("train", {"fc": 12}, "float32") as writer,
    ):
        writer.append(**({"features": {"fc": WIDE}} | arguments))
    assert tree(Path(store.path)) == before


def test_an_incomplete_layer_is_written_again_without_asking(store):
    add(store)
    wanted = tree(Path(store.path) / "train/layers/fc")
    store.add_layers("train", {"g": 12}, "float32").append({"g": WIDE[:100]})  # never closed
    assert store.split("train").incomplete_layers == ["g"]
    add(store, "g")
    found = tree(Path(store.path) / "train/layers/g")
    assert found.keys() == wanted.keys()
    np.testing.assert_array_equal(store.split("train").read("g", 0, 150), WIDE)


KILLED = """
import os, signal, sys
import ncbatch.store.format
ncbatch.store.format.CHUNK_BYTES = 1024
from tests.store import test_layers as t
store = t.FeatureStore.open(sys.argv[1])
writer = store.add_layers("train", {sys.argv[2]: 12}, "float32", head=sys.argv[2], overwrite=True)
writer.append({sys.argv[2]: t.WIDE[:130]}, predictions=t.TOY.y[:130])
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fc", "new"])
def test_a_killed_process_leaves_what_was_complete(store, name):
    add(store)
    before = store.split("train").fingerprint("fc")
    done = subprocess.run(
        [sys.executable, "-c", KILLED, store.path, name],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr
    split = FeatureStore.open(store.path).split("train")
    assert split.layers == ["h", "fc"]
    assert split.incomplete_layers == [name]
    assert split.fingerprint("fc") == before
    assert split.head == "h"
    np.testing.assert_array_equal(split.predictions(), TOY.y)
    assert store.validate() == []
    add(store, name, rows=-WIDE, overwrite=True)
    np.testing.assert_array_equal(store.split("train").read(name, 0, 150), -WIDE)
    assert store.split("train").incomplete_layers == []


# ------------------------------------------------------------------------------------ replacement


def test_a_complete_layer_is_replaced_only_when_asked(store):
    before = tree(Path(store.path))
    with pytest.raises(StoreError, match=r"layer 'h' exists in split 'train'.*\n.*--overwrite"):
        add(store, "h", rows=-TOY.X)
    assert tree(Path(store.path)) == before
    add(store, "h", rows=-TOY.X, overwrite=True)
    np.testing.assert_array_equal(store.split("train").read("h", 0, 150), -TOY.X)
    assert tree(Path(store.path)).keys() == before.keys()


def test_a_layer_stays_as_it_was_when_replacing_it_fails(store):
    before = tree(Path(store.path))
    with (  # noqa: PT012
        pytest.raises(ZeroDivisionError),
        store.add_layers("train", {"h": 4}, "float32", head="h", overwrite=True) as writer,
    ):
        writer.append({"h": -TOY.X[:100]}, predictions=TOY.y[:100])
        raise ZeroDivisionError
    assert tree(Path(store.path)) == before


def test_a_replaced_layer_may_have_another_width_and_dtype(store):
    with store.add_layers("train", {"h": 12}, "float64", overwrite=True) as writer:
        writer.append({"h": WIDE})
    assert store.split("train").spec("h").n_features == 12
    np.testing.assert_array_equal(store.split("train").read("h", 0, 150), WIDE)


def test_predictions_of_another_layer_replace_the_old_only_when_asked(store):
    with pytest.raises(StoreError, match="has predictions, of layer 'h'"):
        store.add_layers("train", {"fc": 12}, head="fc")
    others = (TOY.y + 1) % 5
    with store.add_layers("train", {"fc": 12}, head="fc", overwrite=True) as writer:
        for start in range(0, 150, 50):
            part = slice(start, start + 50)
            writer.append({"fc": WIDE[part]}, predictions=others[part])
            assert store.split("train").head == "h"
    assert store.split("train").head == "fc"
    np.testing.assert_array_equal(store.split("train").predictions(), others)
    assert store.validate() == []


@pytest.mark.parametrize(
    ("predictions", "message"),
    [
        (None, "no predictions; expected predictions in all calls"),
        (np.full(150, 7), "prediction 7 in row 0; expected predictions below 5"),
        (np.zeros(150), r"predictions of shape \(150,\), float64"),
        (np.zeros(149, int), "149 predictions for 150 rows"),
    ],
)
def test_predictions_that_do_not_fit_are_refused(tmp_path, predictions, message):
    store = FeatureStore.create(tmp_path / "t", 5, {"h": 4}, "float32")
    with store.writer("train") as writer:
        writer.append({"h": TOY.X}, TOY.y)
    before = tree(tmp_path / "t")
    with (
        pytest.raises(DataError, match=message),
        store.add_layers("train", {"fc": 12}, head="fc") as writer,
    ):
        writer.append({"fc": WIDE}, predictions=predictions)
    assert tree(tmp_path / "t") == before


def test_layers_are_added_to_complete_splits_only(store):
    with pytest.raises(KeyboardInterrupt), store.writer("test") as writer:  # noqa: PT012
        writer.append({"h": TOY.X}, TOY.y)
        raise KeyboardInterrupt
    with pytest.raises(StoreError, match=r"split 'test' of .* is not complete"):
        store.add_layers("test", {"fc": 12})


def test_one_layer_has_one_width_in_all_splits(store):
    with pytest.raises(DataError, match="layer 'h' with 12 features; expected 4, as in split 'tr"):
        store.writer("test", layers={"h": 12})
    with store.writer("test") as writer:
        writer.append({"h": TOY.X}, TOY.y)
    with pytest.raises(DataError, match="expected 4, as in split 'test'"):
        store.add_layers("train", {"h": 12}, overwrite=True)
    assert store.splits == ["test", "train"]


@pytest.mark.parametrize("name", ["a/b", "", ".hidden", "__x", "/"])
def test_names_that_are_no_part_of_a_path_are_refused(tmp_path, store, name):
    calls = [
        lambda: FeatureStore.create(tmp_path / "t", 5, {name: 4}),
        lambda: store.add_layers("train", {name: 4}),
        lambda: store.writer("test", layers={name: 4}),
        lambda: store.writer(name),
        lambda: store.set_classifier(name, np.ones((5, 4))),
    ]
    before = tree(Path(store.path))
    for call in calls:
        with pytest.raises(UsageError, match=r"name '.*'; expected a name without '/'"):
            call()
    assert tree(Path(store.path)) == before
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize("name", ["h.0", "fc:input", "a b", "blocks[0]", "ä", "c", "zarr", "label"])
def test_other_names_are_kept(store, name):
    add(store, name)
    assert FeatureStore.open(store.path).layers("train") == ["h", name]
    np.testing.assert_array_equal(store.split("train").read(name, 0, 150), WIDE)


def test_features_must_be_as_wide_as_the_classifier_that_is_stored(store):
    store.set_classifier("h", TOY.W)
    before = tree(Path(store.path))
    with pytest.raises(DataError, match="layer 'h' with 12 features; expected 4, as its classi"):
        store.add_layers("train", {"h": 12}, overwrite=True)
    with pytest.raises(DataError, match="expected 4, as its classifier"):
        store.writer("train", layers={"h": 12}, overwrite=True)
    assert tree(Path(store.path)) == before
