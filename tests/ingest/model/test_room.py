"""What a dump of moments takes of memory, and where it is folded."""

from __future__ import annotations

import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest

import ncbatch as nc
from ncbatch.errors import BudgetError
from ncbatch.ingest.model import room
from ncbatch.states import moments
from ncbatch.states.moments import MomentsAccumulator
from ncbatch.states.moments_fold import Scratch
from ncbatch.store import FeatureStore
from tests.ingest.model.folds import (
    SPLIT,
)
from tests.ingest.model.models import (
    Mlp,
    hooks_of,
    mlp_batches,
    seeded,
)

torch = pytest.importorskip("torch")
nn = torch.nn


def with_memory(monkeypatch, n_bytes):
    memory = SimpleNamespace(available=n_bytes)
    monkeypatch.setattr(room.psutil, "virtual_memory", lambda: memory)


def test_states_that_do_not_fit_are_refused_before_anything_is_stored(tmp_path, monkeypatch):
    with_memory(monkeypatch, 350 * 2**20)
    model, layers = seeded(Mlp, 512), {"h": "act1", "z": "fc2", "last": "fc:input"}
    # 12,000 classes of 512 features: 70 MiB each, as much again when it is stored, and a compiler.
    options = {"moments": True, "head": False, "n_classes": 12_000}
    with pytest.raises(BudgetError) as error:
        nc.dump(model, mlp_batches(), tmp_path / "s.zarr", SPLIT, layers, **options)
    assert "the moments of 3 layers need" in str(error.value)
    assert "1 fit; others can be added to the split by further calls" in str(error.value)
    assert hooks_of(model) == 0
    assert FeatureStore.open(tmp_path / "s.zarr").state_splits == []
    with_memory(monkeypatch, 100 * 2**20)
    with pytest.raises(BudgetError, match="give n_samples="):
        nc.dump(model, mlp_batches(), tmp_path / "t.zarr", SPLIT, {"h": "act1"}, **options)
    with_memory(monkeypatch, 350 * 2**20)  # there are no more classes than samples
    nc.dump(model, mlp_batches(), tmp_path / "u.zarr", SPLIT, layers, n_samples=100, **options)


def test_a_gpu_is_used_where_all_fits(monkeypatch):
    price = room.FoldPrice(held=100, passing=10)
    cuda, cpu = torch.device("cuda", 0), torch.device("cpu")
    with_memory(monkeypatch, 250)
    free = {"a": 110}
    monkeypatch.setattr(room, "_free_on", lambda device: free["a"])
    assert not room.choose_place({"x": price}, {"x": cuda})
    assert room.choose_place({"x": price, "y": price}, {"x": cuda, "y": cuda})
    assert room.choose_place({"x": price}, {"x": cpu})
    free["a"] = 109
    assert room.choose_place({"x": price}, {"x": cuda})
    with pytest.raises(BudgetError, match="2 fit"):
        room.choose_place(dict.fromkeys("xyz", price), dict.fromkeys("xyz", cpu))


@pytest.mark.slow  # compiles
def test_memory_that_layers_share_is_priced(tmp_path):
    """Of ten layers folded by compiled code one residual buffer is held, as `FoldPrice` says."""
    d, n, k, layers = 512, 8192, 13, 10
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(n, d)).astype("f4"), rng.integers(0, k, n)
    shared = Scratch()
    MomentsAccumulator(k, d, like=x).add(x, y)  # the compiler is not traced
    price = room.FoldPrice.of(k, (n, d), itemsize=4, n_samples=None, moments=True)
    tracemalloc.start()
    folds = [MomentsAccumulator(k, d, like=x, scratch=shared) for _ in range(layers)]
    for each in folds:
        each.add(x, y)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak <= layers * price.held + price.passing - moments._COMPILER_BYTES
    for each in folds[1:]:
        for name, values in each.arrays().items():
            np.testing.assert_array_equal(values, folds[0].arrays()[name])
