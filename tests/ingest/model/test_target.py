"""The store that a dump fills: made once, of one model, in one dtype."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

import ncbatch as nc
from ncbatch.errors import DataError, StoreError, UsageError
from ncbatch.ingest.model.target import make_store
from tests.ingest.model.models import (
    K,
    Mlp,
    mlp_batches,
    seeded,
    wide_batches,
)

torch = pytest.importorskip("torch")
nn = torch.nn


def test_two_models_do_not_mix_in_one_store(tmp_path):
    path = tmp_path / "s.zarr"
    model = seeded(Mlp)
    nc.dump(model, mlp_batches(), path, "train", ["fc:input"])
    nc.dump(model, mlp_batches(), path, "test", ["fc:input"])
    with torch.no_grad():
        model.fc.weight.mul_(2)
    with pytest.raises(DataError, match="differs from the classifier"):
        nc.dump(model, mlp_batches(), path, "ood", ["fc:input"])
    store = nc.dump(model, mlp_batches(), path, "test", ["fc:input"], overwrite=True)
    np.testing.assert_array_equal(store.classifier("fc:input")[0], model.fc.weight.detach().numpy())


def test_declared_layers_keep_their_spec(tmp_path):
    store = nc.FeatureStore.create(tmp_path / "s.zarr", K, {"fc1": 16, "fc2": 16}, "float32")
    again = nc.dump(seeded(Mlp), mlp_batches(), store, "train", ["fc2"])
    assert again is store
    assert store.split("train").spec("fc2").dtype == "float32"
    nc.dump(seeded(Mlp), mlp_batches(), store, "test", ["fc2", "act1"])
    assert store.split("test").layers == ["fc2", "act1"]
    assert store.split("test").spec("act1").dtype == "float32"  # as what it is written with
    nc.dump(seeded(Mlp), mlp_batches(), store, "more", ["act2"], dtype="float16")
    with pytest.raises(UsageError, match="several dtypes: fc2 float32, act2 float16"):
        nc.dump(seeded(Mlp), mlp_batches(), store, "both", ["fc2", "act2"])


def test_a_dtype_that_was_asked_for_replaces_a_declared_one_without_rows(tmp_path):
    store = nc.FeatureStore.create(tmp_path / "s.zarr", K, {"fc2": 16}, "float16")
    nc.dump(seeded(Mlp), mlp_batches(), store, "train", ["fc2"], dtype="float32")
    assert store.split("train").spec("fc2").dtype == "float32"
    with pytest.raises(UsageError, match="dtype float16 for layer 'fc2'; expected float32, as in"):
        nc.dump(seeded(Mlp), mlp_batches(), store, "test", ["fc2"], dtype="float16")
    nc.dump(seeded(Mlp), mlp_batches(), store, "train", ["fc2"], dtype="float16", overwrite=True)
    assert store.split("train").spec("fc2").dtype == "float16"


def test_n_classes_must_be_those_of_the_store(tmp_path):
    store = nc.FeatureStore.create(tmp_path / "s.zarr", K)
    with pytest.raises(UsageError, match="n_classes=7"):
        nc.dump(seeded(Mlp), mlp_batches(), store, "train", ["fc1"], n_classes=7)


def test_a_dump_goes_on_with_the_same_weights_and_data_only(tmp_path, small_chunks):
    class Stop(Exception):
        pass

    def stopped():
        yield from mlp_batches(400)[:8]
        raise Stop

    def go(batches, model, **options):
        given = (model, batches, tmp_path / "s.zarr", "train", ["fc1"])
        return nc.dump(*given, head=False, n_classes=K, **options)

    with pytest.raises(Stop):
        go(stopped(), seeded(Mlp), identity={"data": "one"})
    changed = seeded(Mlp)
    with torch.no_grad():
        changed.fc1.bias[0] += 1
    with pytest.raises(StoreError, match="was begun with weights"):
        go(mlp_batches(400), changed, resume=True)
    with pytest.raises(StoreError, match="begun with data one; expected two, as this dump was"):
        go(mlp_batches(400), seeded(Mlp), resume=True, identity={"data": "two"})
    assert go(mlp_batches(400), seeded(Mlp), resume=True).split("train").n_samples == 400


def test_a_store_made_by_many_at_once_is_one_store(tmp_path):
    for turn in range(10):
        path, barrier, found = tmp_path / f"{turn}.zarr", threading.Barrier(6), []

        def make(path=path, barrier=barrier, found=found):
            barrier.wait()
            found.append(make_store(path, K, {"x": 4}, "float32").id)

        threads = [threading.Thread(target=make) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 6
        assert set(found) == {nc.FeatureStore.open(path).id}
        assert nc.FeatureStore.open(path).n_classes == K
    assert len(list(tmp_path.iterdir())) == 10  # nothing else is left


def test_a_store_is_made_only_where_one_can_be(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match=r"'.*/file' is a file"):
        make_store(tmp_path / "file", K, {"x": 4}, "float32")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    with pytest.raises(StoreError, match="is no store"):
        make_store(tmp_path / "full", K, {"x": 4}, "float32")
    with pytest.raises(StoreError) as error:
        make_store(tmp_path / "file" / "s.zarr", K, {"x": 4}, "float32")
    assert "partial" not in str(error.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "full"]


def test_another_number_of_classes_made_meanwhile_is_refused(tmp_path):
    path = tmp_path / "s.zarr"

    def batches():
        nc.FeatureStore.create(path, 9)
        yield from wide_batches()

    with pytest.raises(UsageError, match=f"n_classes={K}; expected 9"):
        nc.dump(seeded(Mlp, 32), batches(), path, "train", ["act1"])


def test_paths_of_any_kind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = nc.dump(seeded(Mlp), mlp_batches(), "relative.zarr", "train", ["fc1"])
    assert store.path == "relative.zarr"
    assert Path("relative.zarr").is_dir()
