"""Dask arrays of a layer: on the host, on a stand-in for a GPU, and on workers in other processes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import ml_dtypes
import numpy as np
import pytest

from ncbatch.arrays.namespace import to_numpy
from ncbatch.errors import UnknownNameError, UsageError
from ncbatch.store import FeatureStore
from tests.arrays.fake_cupy import FakeArray, install_fake_cupy

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def make_store(path: Path, dtype: str) -> tuple[FeatureStore, np.ndarray]:
    """Write 300 rows in several chunks; gives what was stored."""
    X = (
        np.random.default_rng(0)
        .normal(size=(300, 4))
        .astype(BFLOAT16 if dtype == "bfloat16" else dtype)
    )
    store = FeatureStore.create(path, n_classes=5, layers={"fc": 4}, dtype=dtype)
    with store.writer("train") as writer:
        writer.append({"fc": X}, np.arange(300) % 5)
    return store, X


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_chunks_are_arrays_of_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_chunks: None, dtype: str, device: str
):
    install_fake_cupy(monkeypatch)
    store, X = make_store(tmp_path / "s.zarr", dtype)
    array = store.to_dask("train", "fc", device=device)
    assert isinstance(array, da.Array)
    assert array.npartitions > 1
    assert array.dtype == ("float64" if dtype == "float64" else "float32")
    for asked in ("float16", "float32", "float64"):
        assert store.to_dask("train", "fc", device=device, dtype=asked).dtype == asked
    assert store.to_xarray("train", "fc").feature.dtype == array.dtype
    assert store.to_xarray("train", "fc", dtype=np.float64).feature.dtype == "float64"
    assert isinstance(array._meta, FakeArray) == (device == "cuda")
    with dask.config.set(scheduler="synchronous"):
        blocks = [block.compute() for block in array.blocks]
        total = (array.astype("float64") ** 2).sum(axis=0).compute()
    for block in blocks:
        assert isinstance(block, FakeArray) == (device == "cuda")
        assert block.dtype == array.dtype
    np.testing.assert_array_equal(np.concatenate(blocks)[:300], X.astype(array.dtype))
    np.testing.assert_allclose(total, (X.astype(np.float64) ** 2).sum(axis=0), rtol=1e-12)


def test_means_of_many_float16_rows_are_means(tmp_path: Path):
    rows = np.full((70_000, 1), 0.5, np.float16)  # whose float16 sum ends at 1,024
    store = FeatureStore.create(tmp_path / "s.zarr", n_classes=1, layers={"fc": 1}, dtype="float16")
    with store.writer("train") as writer:
        writer.append({"fc": rows}, np.zeros(len(rows), int))
    with dask.config.set(scheduler="synchronous"):
        assert float(store.to_dask("train", "fc").mean()) == 0.5
        assert float(store.to_xarray("train", "fc").feature.mean("sample")[0]) == 0.5


def test_cuda_without_cupy_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    store, _ = make_store(tmp_path / "s.zarr", "float32")
    with pytest.raises(UsageError, match=r"CuPy is not installed(.|\n)*ncbatch\[gpu\]"):
        store.to_dask("train", "fc", device="cuda")
    with pytest.raises(UsageError, match="device 'gpu'; expected cpu or cuda"):
        store.to_dask("train", "fc", device="gpu")  # type: ignore[arg-type]
    with pytest.raises(UnknownNameError, match="no layer 'fc2'"):
        store.to_dask("train", "fc2", device="cuda")


@pytest.mark.slow
def test_workers_in_other_processes_read_bfloat16(tmp_path: Path, small_chunks: None):
    from ncbatch.engine.cluster import open_cluster

    store, X = make_store(tmp_path / "s.zarr", "bfloat16")
    with open_cluster("processes:1") as client:
        total = client.compute(store.to_dask("train", "fc").sum()).result()
    assert float(total) == pytest.approx(float(X.astype(np.float64).sum()), rel=1e-4)


def test_the_pages_recipe_gives_class_means(tmp_path: Path, monkeypatch, small_chunks: None):
    _, X = make_store(tmp_path / "run.zarr", "float16")
    page = (Path(__file__).parents[2] / "docs" / "cluster.md").read_text(encoding="utf-8")
    recipe = page.split("## Your own graphs")[1].split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    with dask.config.set(scheduler="synchronous"):
        exec(recipe, names)
    means = np.stack([X[np.arange(300) % 5 == c].astype(float).mean(axis=0) for c in range(5)])
    np.testing.assert_allclose(names["means"], means, rtol=1e-12)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_chunks_are_on_the_gpu(tmp_path: Path, small_chunks: None, dtype: str):
    cupy = pytest.importorskip("cupy")
    store, X = make_store(tmp_path / "s.zarr", dtype)
    array = store.to_dask("train", "fc", device="cuda")
    assert isinstance(array._meta, cupy.ndarray)
    found = array.compute()
    assert isinstance(found, cupy.ndarray)
    np.testing.assert_array_equal(to_numpy(found)[:300], X.astype(array.dtype))
