"""Results by class and by decile add up to the results over all classes."""

import numpy as np
import pytest

import ncbatch as nc
from ncbatch.measurement.options import PRESETS
from ncbatch.store import FeatureStore
from tests.oracles import nearest_means
from tests.strategies import REGIMES


@pytest.fixture
def measured(tmp_path):
    data = REGIMES["zipf"](4)
    K = data.n_classes + 2
    X, W = data.X.astype(np.float64), np.random.default_rng(0).normal(size=(K, data.X.shape[1]))
    store = FeatureStore.create(tmp_path / "s.zarr", K, {"h": X.shape[1]}, "float64")
    with store.writer("train") as writer:
        writer.append({"h": X}, data.y)
    store.set_classifier("h", W)
    return X, data.y, W, nc.measure(store, per_class=True).isel(store=0, layer=0)


def test_classes_equal_loops(measured):
    X, y, W, ds = measured
    ids = np.unique(y[y >= 0])
    means = np.stack([X[y == c].mean(axis=0) for c in ids])
    centred = means - means.mean(axis=0)
    near, chosen = nearest_means(X, means, ids), np.argmax(X @ W.T, axis=1)
    apart = np.sum((means[:, None] - means) ** 2, axis=-1) + np.diag(np.full(len(ids), np.inf))
    assert ds.sizes["class"] == len(W)
    assert np.isnan(ds.class_norm.values[np.setdiff1d(np.arange(len(W)), ids)]).all()
    for k, c in enumerate(ids):
        mine = y == c
        row = {str(n): float(v[c]) for n, v in ds.data_vars.items() if str(n).startswith("class_")}
        assert row["class_n_samples"] == row["class_n_decided"] == mine.sum()
        assert row["class_norm"] == pytest.approx(np.linalg.norm(centred[k]))
        spread = np.mean(np.sum((X[mine] - means[k]) ** 2, axis=1))
        assert row["class_variance"] == pytest.approx(spread, abs=1e-12)
        assert row["class_nearest"] == ids[apart[k].argmin()]
        assert row["class_nearest_distance"] == pytest.approx(np.sqrt(apart[k].min()))
        cosine = W[c] @ centred[k] / np.linalg.norm(W[c]) / np.linalg.norm(centred[k])
        assert row["class_cos"] == pytest.approx(cosine)
        assert row["class_agreement"] == pytest.approx(np.mean(near[mine] == chosen[mine]))
        assert row["class_ncc_accuracy"] == pytest.approx(np.mean(near[mine] == c))
        assert row["class_clf_accuracy"] == pytest.approx(np.mean(chosen[mine] == c))


def test_deciles_add_up(measured):
    *_, ds = measured
    decided = ds.decile_n_decided
    assert ds.decile.values.tolist() == list(range(1, 11))
    assert float(decided.sum()) == float(ds.n_decided)
    assert np.all(np.diff(ds.decile_n_samples.values) >= 0)
    for rate, whole in (
        ("agreement", "nc4_agree"),
        ("ncc_accuracy", "nc4_ncc_accuracy"),
        ("clf_accuracy", "nc4_clf_accuracy"),
    ):
        mean = float((ds[f"decile_{rate}"] * decided).sum() / decided.sum())
        assert mean == pytest.approx(float(ds[whole]))


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_the_options_that_they_stand_for(measured, tmp_path, name: str):
    ds = nc.measure(tmp_path / "s.zarr", metrics=["nc1_cdnv", "nc1_quot"], **PRESETS[name])
    assert ds.attrs["dist_exp"] == PRESETS[name]["dist_exp"]
    assert ("samples" in ds.attrs["global_mean"]) == PRESETS[name]["weighted"]


def test_results_with_classes_and_deciles_are_saved(measured, tmp_path):
    *_, ds = measured
    single = [name for name, array in ds.items() if not array.dims]
    whole = ds.drop_vars(single[1:]).expand_dims(["store", "layer"])
    for ending in ("nc", "zarr"):
        nc.save_results(whole, tmp_path / f"r.{ending}")
        assert nc.load_results(tmp_path / f"r.{ending}").equals(whole)


def test_top_pairs_and_histogram_name_classes_by_id(measured):
    X, y, _, ds = measured
    ids = np.unique(y[y >= 0])
    means = np.stack([X[y == c].mean(axis=0) for c in ids])
    u = means - means.mean(axis=0)
    u /= np.linalg.norm(u, axis=1, keepdims=True)
    cosines = np.triu(u @ u.T, 1) - 2 * np.tril(np.ones((len(ids), len(ids))))
    i, j = np.unravel_index(np.argmax(cosines), cosines.shape)
    assert (float(ds.top_cosine_i[0]), float(ds.top_cosine_j[0])) == (ids[i], ids[j])
    assert float(ds.top_cosine[0]) == pytest.approx(cosines[i, j])
    assert float(ds.cosine_histogram.sum()) == len(ids) * (len(ids) - 1) / 2
    above = ds.cosine_histogram.sel(bin=slice(0, None)).sum()
    assert float(above) == np.sum(cosines >= 0)
