"""What the field reports beside the base set equals the oracle, through a store."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ncbatch as nc
from tests import oracles
from tests.strategies import REGIMES, Features, feature_sets
from tests.test_measurement import make_store, outside

# Regimes in which the oracle's plain pseudo-inverse of S_B + S_W has no digits to compare.
_NO_INVERSE = {"layernorm": {"nc1_vci", "nc1_lda"}, "collapsed": {"nc1_vci"}}


def expected(data: Features, W, b, *, weighted=False, dist_exp=1.0, **filters) -> dict[str, float]:
    X, y = data.X.astype(np.float64), data.y
    chosen = oracles.select(y, data.n_classes, **filters)
    train = oracles.geometry(X, y, chosen, weighted)
    return (
        oracles.more_collapse(train, dist_exp)
        | oracles.more_structure(train)
        | oracles.more_duality(train, W[chosen], b[chosen])
        | oracles.spectra(X[np.isin(y, chosen)], train)
    )


def assert_equal(ds, values: dict[str, float], without=frozenset()):
    for name, value in values.items():
        if name in without or np.isnan(value):
            continue
        got = float(ds[name][0, 0])
        assert got == pytest.approx(value, rel=1e-6, abs=1e-9), name


@pytest.mark.parametrize("regime", REGIMES)
def test_every_regime_equals_the_oracle(tmp_path, regime: str):
    data = REGIMES[regime](11)
    W, b, test, _ = outside(data)
    ds = nc.measure(make_store(tmp_path / "s.zarr", data, W=W, b=b, splits={"test": test}))
    assert_equal(ds, expected(data, W, b), _NO_INVERSE.get(regime, set()))


@pytest.mark.parametrize(
    "options", [{"weighted": True}, {"dist_exp": 2.0}, {"min_count": 4}], ids=str
)
def test_options_equal_the_oracle(tmp_path, options):
    data = REGIMES["zipf"](5)
    W, b, *_ = outside(data)
    ds = nc.measure(make_store(tmp_path / "s.zarr", data, W=W, b=b), **options)
    assert_equal(ds, expected(data, W, b, **options))


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(feature_sets(distributions=("uniform", "zipf", "negative")), st.integers(0, 9))
def test_any_features_equal_the_oracle(tmp_path_factory, data: Features, seed: int):
    rng = np.random.default_rng(seed)
    W, b = rng.normal(size=(data.n_classes, data.X.shape[1])), rng.normal(size=data.n_classes)
    store = make_store(tmp_path_factory.mktemp("any") / "s.zarr", data, W=W, b=b)
    values = expected(data, W, b)
    # Where samples span less than D, how much of S_T counts is a matter of rounding.
    singular = min(len(data.y), data.n_classes) <= 3 * data.X.shape[1]
    assert_equal(nc.measure(store), values, {"nc1_vci", "nc1_lda"} if singular else set())


def test_accuracies_and_test_scatter_equal_loops(tmp_path):
    data = REGIMES["k_less_d"](1)
    W, b, (X_test, y_test), _ = outside(data)
    store = make_store(tmp_path / "s.zarr", data, W=W, b=b, splits={"test": (X_test, y_test)})
    names = ["nc4_ncc_accuracy", "nc4_clf_accuracy", "nc1_test_to_train"]
    ds = nc.measure(store, metrics=[*names, "nc1_cdnv_directional_exact"])
    ids = np.unique(data.y)
    means = np.stack([data.X[data.y == c].mean(axis=0) for c in ids])
    near = oracles.nearest_means(X_test, means, ids)
    chosen = oracles.classifier_decisions(X_test, W, b)
    assert float(ds.nc4_ncc_accuracy[0, 0]) == pytest.approx(np.mean(near == y_test))
    assert float(ds.nc4_clf_accuracy[0, 0]) == pytest.approx(np.mean(chosen == y_test))
    scatter = [
        np.mean(np.sum((X_test[y_test == c] - means[k]) ** 2, axis=1))
        for k, c in enumerate(ids)
        if np.any(y_test == c)
    ]
    assert float(ds.nc1_test_to_train[0, 0]) == pytest.approx(np.mean(scatter), rel=1e-6)
    exact = []
    for k, c in enumerate(ids):
        own = data.X[data.y == c] - means[k]
        S = own.T @ own / len(own)
        for other in np.delete(means, k, axis=0):
            line = other - means[k]
            exact.append(line @ S @ line / (line @ line) ** 2)
    got = float(ds.nc1_cdnv_directional_exact[0, 0])
    assert got == pytest.approx(np.mean(exact), rel=1e-6)


def test_metrics_with_a_read_of_their_own_run_only_when_named(tmp_path):
    data = REGIMES["k_less_d"](0)
    ds = nc.measure(make_store(tmp_path / "s.zarr", data, splits={"test": (data.X, data.y)}))
    assert "nc1_test_to_train" not in ds
    assert "nc1_cdnv_directional_exact" not in ds


@pytest.mark.parametrize("sigma", [0.3, 1e-5])
def test_simplex_has_its_known_answers(tmp_path, sigma: float):
    K, D, s = 6, 9, 2.0
    X, y, known = oracles.simplex_etf(K, D, s, sigma)
    ds = nc.measure(make_store(tmp_path / "s.zarr", Features(X, y, K))).isel(store=0, layer=0)
    assert float(ds.nc1_cdnv_directional) == pytest.approx(known["nc1_cdnv"] / D)
    vci = sigma**2 / (sigma**2 + s**2 / (K - 1))
    assert float(ds.nc1_vci) == pytest.approx(vci, rel=1e-6, abs=0)
    for rank in ("erank", "participation", "stable_rank"):
        assert float(ds[f"spec_between_{rank}"]) == pytest.approx(K - 1)
        assert float(ds[f"spec_within_{rank}"]) == pytest.approx(D)
    assert float(ds.nc2_cos_mean) == pytest.approx(-1 / (K - 1))
    assert float(ds.nc2_cos_dev_max) == pytest.approx(0, abs=1e-12)
    assert float(ds.nc2_tammes) == pytest.approx(np.sqrt(2 * K / (K - 1)))
    assert float(ds.nc2_norm_cv) == pytest.approx(0, abs=1e-12)


def test_a_corrected_distance_of_exactly_zero_is_left_out(tmp_path):
    X = np.array([97.5, 100, 102, 99, 99, 100, 100, 100, 99, 97,
                  100.5, 102, 102, 100.5, 101.5, 100, 100, 102, 102, 102])[:, None]  # fmt: skip
    y = np.array([8, 6, 5, 2, 3, 0, 0, 0, 1, 8, 6, 9, 5, 6, 9, 7, 6, 5, 5, 9])
    ds = nc.measure(make_store(tmp_path / "s.zarr", Features(X, y, 10)))
    # In rational arithmetic classes 5 and 9 have none; in float64 it comes out as 1e-15.
    assert float(ds.nc1_cdnv_corrected[0, 0]) == pytest.approx(0.1209, abs=5e-5)
