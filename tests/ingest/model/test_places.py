"""Modules by their names, samples among positions, and dimensions that are averaged."""

from __future__ import annotations

import numpy as np
import pytest

import ncbatch as nc
from ncbatch.errors import DataError, UnknownNameError
from ncbatch.ingest.model.places import Batch
from tests.ingest.model.models import (
    Cnn,
    K,
    Mlp,
    by_hand,
    mlp_batches,
    rows_of,
    seeded,
)

torch = pytest.importorskip("torch")
nn = torch.nn


@pytest.mark.parametrize("pool", ["flatten", "mean"])
def test_convolution_maps(tmp_path, pool):
    model = seeded(Cnn)
    images = torch.randn(10, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    batches = [(images, torch.arange(10) % K)]
    store = nc.dump(
        model,
        batches,
        tmp_path / "s.zarr",
        "train",
        ["conv", "fc:input"],
        pool=pool,
        dtype="float32",
    )
    maps = by_hand(model, batches, lambda m, x: m.conv(x))
    rows = maps.flatten(1) if pool == "flatten" else maps.mean((2, 3))
    np.testing.assert_array_equal(rows_of(store, "conv"), rows.numpy())
    assert store.classifiers == ["fc:input"]


def test_mean_of_sequences_and_volumes(tmp_path):
    class Reshapes(nn.Module):
        def __init__(self):
            super().__init__()
            self.sequence, self.volume, self.flat = nn.Identity(), nn.Identity(), nn.Identity()

        def forward(self, x):
            self.sequence(x.reshape(4, 6, 4))
            self.volume(x.reshape(4, 3, 2, 2, 2))
            return self.flat(x)

    x = torch.arange(96.0).reshape(4, 24)
    store = nc.dump(
        Reshapes(), [(x, [0, 1, 2, 0])], tmp_path / "s.zarr", "train",
        ["sequence", "volume", "flat"], pool="mean", dtype="float32", n_classes=3,
    )  # fmt: skip
    np.testing.assert_array_equal(rows_of(store, "sequence"), x.reshape(4, 6, 4).mean(1))
    np.testing.assert_array_equal(rows_of(store, "volume"), x.reshape(4, 3, 8).mean(2))
    np.testing.assert_array_equal(rows_of(store, "flat"), x)


def test_mean_refuses_shapes_it_cannot_average(tmp_path):
    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.heads = nn.Identity()

        def forward(self, x):
            return self.heads(x.reshape(2, 2, 2, 2))

    with pytest.raises(DataError, match="pool='flatten'"):
        nc.dump(
            Deep(), [(torch.zeros(2, 8), torch.zeros((2, 2), dtype=int))], tmp_path / "s.zarr",
            "train", ["heads"], pool="mean", n_classes=2,
        )  # fmt: skip


def test_unknown_modules_are_refused_before_anything_runs(tmp_path):
    model = seeded(Mlp)
    with pytest.raises(UnknownNameError, match="did you mean 'act1'"):
        nc.dump(model, mlp_batches(), tmp_path / "s.zarr", "train", ["fc1", "act_1:input"])
    with pytest.raises(UnknownNameError, match="no module 'head'"):
        nc.dump(model, mlp_batches(), tmp_path / "s.zarr", "train", ["fc1"], head="head")
    with pytest.raises(DataError, match="head 'act1' is a ReLU"):
        nc.dump(model, mlp_batches(), tmp_path / "s.zarr", "train", ["fc1"], head="act1")
    with pytest.raises(DataError, match="head 'fc' has 5 outputs"):
        nc.dump(model, mlp_batches(), tmp_path / "s.zarr", "train", ["fc1"], head="fc", n_classes=9)
    assert model.passes == 0
    assert not (tmp_path / "s.zarr").exists()


def test_positions_go_to_a_device_once_per_batch(monkeypatch):
    batch = Batch.of(np.array([0, -1, 2]), 0)
    made, copy = [], torch.from_numpy
    monkeypatch.setattr(torch, "from_numpy", lambda x: made.append(1) or copy(x))
    for _ in range(3):
        assert batch.select(torch.tensor([5, 6, 7])).tolist() == [5, 7]
    assert made == [1]
