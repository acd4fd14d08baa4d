"""Grids on disk equal grids of differences, tile by tile, both triangles."""

import numpy as np
import pytest
import zarr

import ncbatch.grid as module
from ncbatch.errors import OutputError, UnknownNameError, UsageError
from ncbatch.grid import KINDS, write_grid
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


def expected(store: FeatureStore, kind: str) -> np.ndarray:
    split = store.split("train")
    X, y = split.read("h", 0, split.n_rows), split.labels()
    ids = np.unique(y)
    means = np.stack([X[y == c].mean(axis=0) for c in ids])
    V = np.array(
        [np.mean(np.sum((X[y == c] - m) ** 2, axis=1)) for c, m in zip(ids, means, strict=True)]
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


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_equals_its_definition(tmp_path, store, monkeypatch, kind: str):
    monkeypatch.setattr(module, "_TILE_CLASSES", 5)
    out = tmp_path / "g.zarr"
    assert write_grid(store.path, kind, "h", str(out), dist_exp=2.0) == 12
    group = zarr.open_group(str(out), mode="r")
    got, off = group["grid"][:], ~np.eye(12, dtype=bool)
    np.testing.assert_allclose(got[off], expected(store, kind)[off], rtol=1e-9, atol=1e-12)
    np.testing.assert_array_equal(got, got.T)
    assert group["class"][:].tolist() == [*range(7), *range(8, 13)]
    assert np.isnan(np.diag(got)).all() == (kind in ("log", "riesz", "cdnv"))


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
            write_grid(*arguments)
    assert sorted(tmp_path.rglob("*")) == before
