"""What the field reports beside the base set equals the oracle, through a store."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ncbatch as nc
from tests import oracles
from tests.measurement.stores import make_store, outside
from tests.strategies import REGIMES, Features, each_regime, feature_sets


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


def assert_equal(ds, values: dict[str, float], floor: float = 0.0):
    """Compare, undefined values too; `floor` is for data that have exact zeros for values."""
    assert len(values) >= 35
    for name, value in values.items():
        expected = value if np.isfinite(value) else np.nan
        got = float(ds[name][0, 0])
        assert got == pytest.approx(expected, rel=1e-6, abs=floor, nan_ok=True), name


@each_regime
def test_every_regime_equals_the_oracle(tmp_path, regime: str):
    data = REGIMES[regime](11)
    W, b, test, _ = outside(data)
    ds = nc.measure(make_store(tmp_path / "s.zarr", data, W=W, b=b, splits={"test": test}))
    assert_equal(ds, expected(data, W, b))


@pytest.mark.parametrize(
    "options", [{"weighted": True}, {"dist_exp": 2.0}, {"min_count": 4}], ids=str
)
def test_options_equal_the_oracle(tmp_path, options):
    data = REGIMES["zipf"](5)
    W, b, *_ = outside(data)
    ds = nc.measure(make_store(tmp_path / "s.zarr", data, W=W, b=b), **options)
    assert_equal(ds, expected(data, W, b, **options))


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(feature_sets(), st.integers(0, 9))
def test_any_features_equal_the_oracle(tmp_path_factory, data: Features, seed: int):
    rng = np.random.default_rng(seed)
    W, b = rng.normal(size=(data.n_classes, data.X.shape[1])), rng.normal(size=data.n_classes)
    store = make_store(tmp_path_factory.mktemp("any") / "s.zarr", data, W=W, b=b)
    values = expected(data, W, b)
    if a_corrected_distance_is_rounding(data):
        del values["nc1_cdnv_corrected"]
    assert_equal(nc.measure(store), values, floor=1e-9)


def a_corrected_distance_is_rounding(data: Features) -> bool:
    """Whether d^2 - V'_i/n_i - V'_j/n_j of some pair is 0 but for float64, so of either sign."""
    several = oracles.select(data.y, data.n_classes, min_count=2)
    if len(several) < 2:
        return False
    train = oracles.geometry(data.X, data.y, several)
    i, j = oracles.pairs(len(train.means))
    own, sizes = train.variances / (train.counts - 1), (train.means**2).sum(axis=1)
    d2 = oracles.squared_distances(train.means) - own[i] - own[j]
    return bool((np.abs(d2) <= 1e-9 * (sizes[i] + sizes[j])).any())


def degenerate() -> dict[str, Features]:
    """Return samples that leave classes, pairs or a whole part of S_T without a value."""
    rng, y = np.random.default_rng(0), np.repeat(np.arange(5), 4)
    X = rng.normal(size=(20, 3))
    corners = np.array([[1, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0], [0, 0, 0]])
    crosses = np.tile([[0.1, 0, 0], [-0.1, 0, 0], [0, 0.1, 0], [0, -0.1, 0]], (5, 1))
    return {
        "all_singletons": Features(X[:5], np.arange(5), 5),
        "no_spread": Features(X[::4][y], y, 5),
        "two_coincide": Features(np.where(y[:, None] == 1, np.roll(X, 4, axis=0), X), y, 5),
        "mean_without_direction": Features(corners[y] + crosses, y, 5),
        "two_classes": Features(X, y // 3 % 2, 5),
        "one_feature": Features(X[:, :1], y, 5),
        "all_means_equal": Features(crosses + 2.0, y, 5),
        "all_samples_equal": Features(np.ones((20, 3)), y, 5),
    }


@pytest.mark.parametrize("case", degenerate())
def test_degenerate_classes_equal_the_oracle(tmp_path, case: str):
    data = degenerate()[case]
    W, b, *_ = outside(data)
    ds = nc.measure(make_store(tmp_path / "s.zarr", data, W=W, b=b))
    assert_equal(ds, expected(data, W, b), floor=1e-12)


def test_equal_means_have_all_of_their_variance_within(tmp_path):
    data = degenerate()["all_means_equal"]
    ds = nc.measure(make_store(tmp_path / "s.zarr", data)).isel(store=0, layer=0)
    assert float(ds.nc1_trace_share) == 1.0
    assert float(ds.nc1_vci) == 1.0
    assert int(ds.n_coincident_pairs) == 10


@pytest.mark.parametrize("metric", ["nc2g_log", "nc2_interference_var", "nc1_cdnv_corrected"])
def test_coincident_pairs_are_counted_by_any_sweep(tmp_path, metric: str):
    data = degenerate()["two_coincide"]
    ds = nc.measure(make_store(tmp_path / "s.zarr", data), metrics=[metric])
    assert int(ds.n_coincident_pairs[0, 0]) == 1


@pytest.mark.parametrize("by_predictions", [False, True], ids=["weights", "predictions"])
@pytest.mark.parametrize(
    "options", [{}, {"weighted": True}, {"min_count": 8}, {"classes": [1, 3, 5, 7]}], ids=str
)
def test_second_reads_count_the_samples_of_agreement(tmp_path, options, by_predictions: bool):
    data = REGIMES["zipf"](5)
    W, b, (X, y), _ = outside(data)
    y[:30] = np.repeat([57, -1], 15)  # a class that train has not, and no samples
    rng = np.random.default_rng(0)
    given = {name: rng.integers(0, 60, n) for name, n in {"train": 2000, "test": len(y)}.items()}
    store = make_store(
        tmp_path / "s.zarr", data, W=W, b=b, splits={"test": (X, y)},
        predictions=given if by_predictions else None,
    )  # fmt: skip
    names = ["nc4_agree", "nc4_ncc_accuracy", "nc4_clf_accuracy", "nc1_test_to_train"]
    ds = nc.measure(store, metrics=names, **options)
    chosen = oracles.select(data.y, 60, options.get("min_count", 1), classes=options.get("classes"))
    means = oracles.geometry(data.X, data.y, chosen).means
    rows = np.isin(y, chosen) if options.keys() & {"min_count", "classes"} else y >= 0
    near = oracles.nearest_means(X[rows], means, chosen)
    said = given["test"][rows] if by_predictions else oracles.classifier_decisions(X[rows], W, b)
    off = [
        ((oracles.wide(X[y == c]) - means[k]) ** 2).sum(axis=1).mean()
        for k, c in enumerate(chosen)
        if (y == c).any()
    ]
    shares = [np.mean(near == said), np.mean(near == y[rows]), np.mean(said == y[rows])]
    got = [float(ds[name][0, 0]) for name in names]
    assert got == pytest.approx([*shares, float(np.mean(off))], rel=1e-9)


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
