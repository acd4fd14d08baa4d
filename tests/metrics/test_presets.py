"""Presets give the numbers of the papers' own code, written anew here in a few lines."""

import numpy as np
import pytest
import xarray as xr
from sklearn.datasets import load_digits

import ncbatch as nc
from ncbatch.measurement.options import PRESETS
from tests.measurement.stores import make_store
from tests.strategies import Features


def digits():
    """Images as features, and a classifier near their class means."""
    X, y = load_digits(return_X_y=True)
    X = X / 16
    W = np.stack([X[y == c][:40].mean(axis=0) for c in range(10)])
    return X, y, W, -np.sum(W * W, axis=1) / 2


def notebook(X, y, W, b) -> dict[str, float]:
    """Compute what the notebook to Papyan, Han & Donoho 2020 does of a trained network."""
    C, N = W.shape[0], len(X)
    M = np.stack([X[y == c].mean(axis=0) for c in range(C)])
    Sw = sum((X[y == c] - M[c]).T @ (X[y == c] - M[c]) for c in range(C)) / N
    M_ = M - M.mean(axis=0)
    left, values, _ = np.linalg.svd(M_.T @ M_ / C)
    left, values = left[:, : C - 1], values[: C - 1]
    of_M, of_W = np.linalg.norm(M_, axis=1), np.linalg.norm(W, axis=1)
    cosines = (M_ / of_M[:, None]) @ (M_ / of_M[:, None]).T + 1 / (C - 1)
    np.fill_diagonal(cosines, 0.0)
    said = np.argmax(X @ W.T + b, axis=1)
    near = np.argmin(np.linalg.norm(X[:, None] - M, axis=2), axis=1)
    return {
        "Sw_invSb": np.trace(Sw @ left @ np.diag(1 / values) @ left.T),
        "norm_M_CoV": of_M.std(ddof=1) / of_M.mean(),
        "norm_W_CoV": of_W.std(ddof=1) / of_W.mean(),
        "cos_M": np.abs(cosines).sum() / (C * (C - 1)),
        "W_M_dist": np.sum((W / np.linalg.norm(W) - M_ / np.linalg.norm(M_)) ** 2),
        "NCC_mismatch": 1 - np.mean(near == said),
        "accuracy": np.mean(said == y),
    }


def in_the_notebooks_names(ds: xr.Dataset) -> dict[str, float]:
    found = ds.isel(store=0, layer=0)
    assert float(found.nc1_pinv) == pytest.approx(float(found.nc1_svd), rel=1e-9)
    return {
        "Sw_invSb": float(found.nc1_svd),
        "norm_M_CoV": float(found.nc2_norm_cv),
        "norm_W_CoV": float(found.nc2_weight_norm_cv),
        "cos_M": float(found.nc2_cos_dev_mean),
        "W_M_dist": float(found.nc3_papyan),
        "NCC_mismatch": 1 - float(found.nc4_agree),
        "accuracy": float(found.nc4_clf_accuracy),
    }


@pytest.fixture
def store(tmp_path):
    """Digits of unequal frequency, with a test split that the notebook would not look at."""
    X, y, W, b = digits()
    kept = np.random.default_rng(0).random(len(y)) < 0.2 + 0.08 * y
    train = Features(X[kept], y[kept], 10)
    store = make_store(tmp_path / "s.zarr", train, W=W, b=b, splits={"test": (X[~kept], y[~kept])})
    return store, notebook(X[kept], y[kept], W, b)


def test_papyan2020_gives_the_notebooks_numbers(store):
    made, expected = store
    ds = nc.measure(made, **PRESETS["papyan2020"])
    assert in_the_notebooks_names(ds) == pytest.approx(expected, rel=1e-9)
    assert ds.attrs["nc1_division"] == "none"
    assert (ds.attrs["ddof"], ds.attrs["class_ddof"]) == (0, 1)
    plain = in_the_notebooks_names(nc.measure(made))
    assert plain["Sw_invSb"] == pytest.approx(expected["Sw_invSb"] / 10, rel=1e-9)
    assert plain["NCC_mismatch"] != pytest.approx(expected["NCC_mismatch"], rel=1e-3)


@pytest.mark.slow
def test_the_preset_follows_the_split_of_the_class_means(ncbatch, tmp_path):
    X, y, W, b = digits()
    train = nc.FeatureStore.create("s.zarr", 10, {"h": 64}, "float64")
    for split in ("fit", "test"):
        with train.writer(split) as writer:
            writer.append({"h": X}, y)
    train.set_classifier("h", W, b)
    answer = ncbatch(
        "measure", "s.zarr", "--preset", "papyan2020", "--train", "fit", "--out", "r.json",
        "--metrics", "nc4_agree,nc1_svd",
    )  # fmt: skip
    assert answer.code == 0, answer.err
    answer = ncbatch("plan", "s.zarr", "--preset", "papyan2020", "--train", "fit")
    assert answer.code == 0, answer.err
    answer = ncbatch(
        "measure", "s.zarr", "--preset", "papyan2020", "--train", "fit", "--divide-by-k",
        "--test", "test", "--out", "r.nc",
    )  # fmt: skip
    assert answer.code == 0, answer.err
    ds = xr.open_dataset("r.nc")
    assert ds.attrs["nc1_division"] == "by K"
    expected = notebook(X, y, W, b)
    assert float(ds.nc1_svd[0, 0]) == pytest.approx(expected["Sw_invSb"] / 10)


def test_wu2024_takes_the_squared_exponent(store):
    made, _ = store
    preset = nc.measure(made, metrics=["nc1_cdnv"], **PRESETS["wu2024"])
    by_hand = nc.measure(made, metrics=["nc1_cdnv"], dist_exp=2.0)
    assert float(preset.nc1_cdnv[0, 0]) == float(by_hand.nc1_cdnv[0, 0])
