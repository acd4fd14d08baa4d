"""Grids on disk equal grids of differences, tile by tile, both triangles."""

import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr

import ncbatch.measurement.grid as module
from ncbatch.errors import BudgetError, OutputError, UnknownNameError, UsageError
from ncbatch.measurement.grid import GridRequest, write_grid
from ncbatch.states.moments import Moments
from ncbatch.store import FeatureStore


@pytest.fixture
def store(tmp_path) -> FeatureStore:
    rng = np.random.default_rng(0)
    y = np.repeat(np.arange(13), 4)
    y[y == 7] = 8  # a class without samples
    X = rng.normal(size=(13, 5))[y] + 0.3 * rng.normal(size=(len(y), 5))
    made = FeatureStore.create(tmp_path / "s.zarr", 13, {"h": 5}, "float64")
    with made.writer("train") as writer:
        writer.append({"h": X}, y)
    return made


def expected(store: FeatureStore, kind: str, ddof: int = 0) -> np.ndarray:
    split = store.split("train")
    X, y = split.read("h", 0, split.n_rows), split.labels()
    ids = np.unique(y)
    means = np.stack([X[y == c].mean(axis=0) for c in ids])
    V = np.array(
        [
            np.sum((X[y == c] - m) ** 2) / (np.sum(y == c) - ddof)
            for c, m in zip(ids, means, strict=True)
        ]
    )
    centred = means - means.mean(axis=0)
    u = centred / np.linalg.norm(centred, axis=1, keepdims=True)
    r = np.linalg.norm(u[:, None] - u, axis=-1)
    d2 = np.sum((means[:, None] - means) ** 2, axis=-1)
    with np.errstate(divide="ignore"):
        return {
            "cosine": u @ u.T,
            "distance": r,
            "log": -np.log(r),
            "riesz": r**-3.0,
            "cdnv": (V[:, None] + V) / 2 / d2**2,
            "interference": centred @ centred.T,
        }[kind]


@pytest.mark.parametrize("kind", ["cosine", "distance", "log", "riesz", "cdnv", "interference"])
def test_every_kind_equals_its_definition(tmp_path, store, monkeypatch, kind: str):
    monkeypatch.setattr(module, "_TILE_CLASSES", 5)
    out = tmp_path / "g.zarr"
    assert write_grid(GridRequest(store.path, kind, "h", str(out), dist_exp=2.0)) == 12
    group = zarr.open_group(str(out), mode="r")
    got, off = group["grid"][:], ~np.eye(12, dtype=bool)
    np.testing.assert_allclose(got[off], expected(store, kind)[off], rtol=1e-9, atol=1e-12)
    np.testing.assert_array_equal(got, got.T)
    assert group["class"][:].tolist() == [*range(7), *range(8, 13)]
    assert np.isnan(np.diag(got)).all() == (kind in ("log", "riesz", "cdnv"))


def test_finished_moments_serve_as_well_as_samples(tmp_path, store):
    split = store.split("train")
    moments = Moments.from_block(split.read("h", 0, split.n_rows), split.labels(), 13)
    seen = np.flatnonzero(moments.counts)
    arrays = {
        "class": seen,
        "count": moments.counts[seen],
        "mean": moments.means[seen],
        "trace": moments.traces[seen],
    }
    summed = FeatureStore.create(tmp_path / "summed.zarr", 13)
    summed.set_state("train", "h", "moments", arrays)
    out = tmp_path / "g.zarr"
    assert write_grid(GridRequest(summed.path, "cdnv", "h", str(out), dist_exp=2.0)) == 12
    off = ~np.eye(12, dtype=bool)
    got = zarr.open_group(str(out), mode="r")["grid"][:]
    np.testing.assert_allclose(got[off], expected(store, "cdnv")[off], rtol=1e-9)


def test_bad_requests_leave_nothing_behind(tmp_path, store):
    before = sorted(tmp_path.rglob("*"))
    for arguments, error in (
        ((store.path, "angle", "h", str(tmp_path / "g.zarr")), UsageError),
        ((store.path, "log", "hh", str(tmp_path / "g.zarr")), UnknownNameError),
        ((store.path, "log", "h", store.path), OutputError),
        ((store.path, "log", "h", str(tmp_path / "no" / "g.zarr")), OutputError),
        ((store.path, "log", "h", str(tmp_path / "g.npy")), OutputError),
    ):
        with pytest.raises(error):
            write_grid(GridRequest(*arguments))
    assert sorted(tmp_path.rglob("*")) == before


def test_conventions_are_kept_and_recorded(tmp_path, store):
    out = tmp_path / "g.zarr"
    write_grid(GridRequest(store.path, "cdnv", "h", str(out), dist_exp=2.0, ddof=1))
    group = zarr.open_group(str(out), mode="r")
    off = ~np.eye(12, dtype=bool)
    np.testing.assert_allclose(group["grid"][:][off], expected(store, "cdnv", 1)[off], rtol=1e-9)
    assert (group.attrs["ddof"], group.attrs["dist_exp"], group.attrs["split"]) == (1, 2.0, "train")


def test_a_class_of_one_sample_has_no_cdnv_of_ddof_one(tmp_path):
    made = FeatureStore.create(tmp_path / "s.zarr", 3, {"h": 2}, "float64")
    with made.writer("train") as writer:
        writer.append({"h": np.arange(10.0).reshape(5, 2)}, np.array([0, 0, 1, 1, 2]))
    write_grid(GridRequest(made.path, "cdnv", "h", str(tmp_path / "g.zarr"), ddof=1))
    got = zarr.open_group(str(tmp_path / "g.zarr"), mode="r")["grid"][:]
    assert np.isfinite(got).tolist() == [[False, True, False], [True, False, False], [False] * 3]


def test_the_plan_holds_what_writing_takes(tmp_path):
    K, D = 2500, 40
    made = FeatureStore.create(tmp_path / "s.zarr", K, {"h": D}, "float64")
    with made.writer("train") as writer:
        X = np.random.default_rng(0).normal(size=(2 * K, D))
        writer.append({"h": X}, np.arange(2 * K) % K)
    request = GridRequest(made.path, "riesz", "h", str(tmp_path / "g.zarr"))
    plan = request.plan()
    assert plan.disk_bytes == K * K * 8
    assert plan.bytes_read == 2 * K * (D * 8 + 4)
    assert f"of {K:,} x {K:,}" in str(plan)
    assert "free" in str(plan)
    tracemalloc.start()
    write_grid(request)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 0.3 * (plan.peak_bytes - plan.base_bytes) < peak < plan.peak_bytes - plan.base_bytes
    size = sum(p.stat().st_size for p in (tmp_path / "g.zarr").rglob("*") if p.is_file())
    assert 0.5 * plan.disk_bytes < size < 1.1 * plan.disk_bytes


def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path, store, monkeypatch):
    request = GridRequest(store.path, "cosine", "h", str(tmp_path / "g.zarr"))
    with pytest.raises(BudgetError, match="give at least --memory"):
        write_grid(replace(request, memory="1MiB"))
    usage = module.shutil.disk_usage(tmp_path)._replace(free=12 * 12 * 8 - 1)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(BudgetError, match=r"takes up to .* on disk"):
        write_grid(request)
    assert [p.name for p in tmp_path.iterdir()] == ["s.zarr"]


def test_the_command_says_what_it_needs_first(ncbatch, store):
    command = ["grid", store.path, "--kind", "log", "--layer", "h", "--out", "g.zarr"]
    answer = ncbatch(*command, "--dry-run")
    assert (answer.code, Path("g.zarr").exists()) == (0, False)
    assert "log grid of 12 x 12" in answer.out
    assert "peak memory" in answer.out
    answer = ncbatch(*command, "--memory", "1MiB")
    assert (answer.code, Path("g.zarr").exists()) == (1, False)
    assert "--memory" in answer.err
    answer = ncbatch(*command)
    assert (answer.code, Path("g.zarr").exists()) == (0, True)
