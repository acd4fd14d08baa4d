"""States in a store: any names, complete or absent, listed, checked and replaced."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from ncbatch.errors import CorruptionError, DataError, StoreError, UsageError
from ncbatch.store import FeatureStore, states
from tests.conftest import make_toy, run_here, tree

TOY = make_toy(60)
NAMES = ["h", "model.layers.3", "gpt_neox.layers.0:input", "lm_head:input"]


def arrays(n: int = 3, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "class": np.sort(rng.permutation(5)[:n]), "count": rng.integers(1, 9, n),
        "mean": rng.normal(size=(n, 4)), "trace": rng.random(n), "scatter": np.eye(4),
    }  # fmt: skip


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    return FeatureStore.create(tmp_path / "s.zarr", 5)


def assert_same(found, wanted) -> None:
    assert found is not None
    assert found[0].keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_array_equal(found[0][name], array)


@pytest.mark.parametrize("layer", NAMES)
def test_what_is_set_is_read(store, layer: str):
    store.set_state("train", layer, "moments", arrays(), {"who": "me", "n": 3})
    again = FeatureStore.open(store.path)
    assert_same(again.state("train", layer, "moments"), arrays())
    assert again.state("train", layer, "moments")[1] == {"who": "me", "n": 3}
    assert again.state_layers("train", "moments") == [layer]
    assert again.state_splits == ["train"]
    assert again.splits == []
    assert again.validate() == []


def test_absent_states_are_none(store):
    store.set_state("train", "h", "moments", arrays())
    assert store.state("train", "h", "decisions") is None
    assert store.state("train", "other", "moments") is None
    assert store.state("test", "h", "moments") is None
    assert store.state_layers("test", "moments") == []


def test_no_classes_are_a_state_too(store):
    store.set_state("train", "h", "moments.part-1", arrays(0))
    assert store.state("train", "h", "moments.part-1")[0]["mean"].shape == (0, 4)
    assert store.validate() == []


def test_a_state_replaces_the_earlier_one(store):
    store.set_state("train", "h", "moments", arrays(5), {"n": 1})
    before = store.state_fingerprint("train", "h", "moments")
    store.set_state("train", "h", "moments", {"class": np.arange(2)})
    assert_same(store.state("train", "h", "moments"), {"class": np.arange(2)})
    assert store.state_fingerprint("train", "h", "moments") != before
    store.set_state("train", "h", "moments", arrays(5), {"n": 2})
    assert store.state_fingerprint("train", "h", "moments") == before


def test_a_state_that_fails_leaves_the_earlier_one(store, monkeypatch):
    store.set_state("train", "h", "moments", arrays())
    before = tree(Path(store.path))
    stored = states.chunks.store_array

    def fails(group, name, *rest):
        stored(group, name, *rest)
        if name == "mean":
            raise OSError("No space left on device")

    monkeypatch.setattr(states.chunks, "store_array", fails)
    with pytest.raises(OSError, match="No space"):
        store.set_state("train", "h", "moments", arrays(4))
    assert tree(Path(store.path)) == before
    assert_same(store.state("train", "h", "moments"), arrays())


def test_a_kill_in_the_middle_leaves_it_absent(store, monkeypatch):
    monkeypatch.setattr(states, "rename", lambda *_: None)
    store.set_state("train", "h", "moments", arrays())
    assert store.state("train", "h", "moments") is None
    assert store.state_splits == []
    assert store.validate() == []
    monkeypatch.undo()
    store.set_state("train", "h", "moments", arrays(4))
    assert_same(store.state("train", "h", "moments"), arrays(4))


@pytest.mark.parametrize("name", ["mean/c/0/0", "class/c/0"])
@pytest.mark.parametrize("how", ["flipped", "deleted"])
def test_damage_is_named(store, name: str, how: str):
    store.set_state("train", "h", "moments", arrays())
    file = Path(store.path, "train/states/h/moments", name)
    content = bytearray(file.read_bytes())
    content[3] ^= 1
    if how == "flipped":
        file.write_bytes(content)
    else:
        file.unlink()
    assert [fault.file for fault in store.validate()] == [f"train/states/h/moments/{name}"]
    with pytest.raises(CorruptionError, match=name):
        store.state("train", "h", "moments")


def test_a_lost_array_is_named(store):
    store.set_state("train", "h", "moments", arrays())
    folder = Path(store.path, "train/states/h/moments/trace")
    for file in sorted(folder.rglob("*"), reverse=True):
        file.rmdir() if file.is_dir() else file.unlink()
    folder.rmdir()
    with pytest.raises(CorruptionError, match="trace' is missing"):
        store.state("train", "h", "moments")
    (fault,) = store.validate()
    assert "trace" in str(fault)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"layer": "a/b"}, UsageError, "layer name"),
        ({"kind": ".moments"}, UsageError, "kind of state name"),
        ({"split": "classifier"}, UsageError, "split name"),
        ({"arrays": {}}, DataError, "without arrays"),
        ({"arrays": {"x": np.array(["a"])}}, DataError, "array 'x'"),
        ({"arrays": {"x": np.float64(1)}}, DataError, "array 'x'"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_states_write_nothing(store, change, error, match: str):
    before = tree(Path(store.path))
    given = {"split": "train", "layer": "h", "kind": "moments", "arrays": arrays(), **change}
    with pytest.raises(error, match=match):
        store.set_state(**given)
    assert tree(Path(store.path)) == before


def test_beside_rows_states_change_nothing(store):
    with store.writer("train", layers={"h": 4}, dtype="float32") as writer:
        writer.append({"h": TOY.X}, TOY.y)
    before = store.split("train").fingerprint("h")
    store.set_state("train", "h", "moments", arrays())
    assert store.split("train").fingerprint("h") == before
    assert store.splits == store.state_splits == ["train"]
    assert store.split("train").layers == ["h"]
    store.delete_state("train", "h", "moments")
    assert store.state_splits == []


def test_features_are_not_written_into_a_split_of_states(store):
    store.set_state("train", "h", "moments", arrays())
    with pytest.raises(StoreError, match="holds states of samples that are not in the store"):
        store.writer("train", layers={"h": 4})
    with store.writer("train", layers={"h": 4}, dtype="float32", overwrite=True) as writer:
        writer.append({"h": TOY.X}, TOY.y)
    assert store.state_splits == []


def test_any_reader_opens_them(store):
    store.set_state("train", "h:input", "moments", arrays())
    group = Path(store.path, "train/states/h:input/moments")
    with xr.open_zarr(group, consolidated=False) as opened:
        np.testing.assert_array_equal(opened["mean"].values, arrays()["mean"])
        assert opened["mean"].dims == ("class", "unit")


def test_info_shows_them(store, tmp_path):
    store.set_state("train", "h", "moments", arrays())
    with store.writer("test", layers={"h": 4}, dtype="float32") as writer:
        writer.append({"h": TOY.X}, TOY.y)
    answer = run_here("info", store.path, cwd=tmp_path)
    (line,) = [x for x in answer.out.splitlines() if "moments" in x]
    assert "train" in line
    assert " h " in line
    answer = run_here("validate", store.path, cwd=tmp_path)
    assert answer.code == 0
    assert "states of train" in answer.out
