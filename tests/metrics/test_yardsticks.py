"""Yardsticks: floors hold, random values are those of random means, null values those of chance."""

import math
from dataclasses import replace

import numpy as np
import pytest

import ncbatch as nc
from ncbatch.metrics import CATALOGUE, Statistics
from ncbatch.states.moments import Moments
from ncbatch.states.null import null_labels
from ncbatch.states.pairs.sweep import sweep_pairs
from ncbatch.store import format as store_format
from tests.measurement.stores import make_store
from tests.oracles import select
from tests.strategies import REGIMES, Features


def gaussian(
    K: int, D: int, seed: int, sigma: float = 0.5, tau: float = 1.7, **conventions
) -> Statistics:
    """Class means from N(0, tau^2 I), S_W = sigma^2 I in every class, and rows that know neither."""
    rng = np.random.default_rng(seed)
    means = tau * rng.normal(size=(K, D))
    n = np.full(K, 50)
    moments = Moments(n, means, np.full(K, 50 * D * sigma**2), np.eye(D) * sigma**2 * 50 * K)
    s = Statistics(
        moments, weight=rng.normal(size=(K, D)), ood_mean=rng.normal(size=D), **conventions
    )
    pairs = sweep_pairs(
        means, s.global_mean, s.variances, counts=n, within=moments.within_covariance,
        dist_exp=s.dist_exp, ddof=s.ddof,
    )  # fmt: skip
    return replace(s, pairs=pairs)


# Their random values are medians and not means over draws.
HEAVY = {"nc2g_riesz_mean", "nc2g_riesz_log_mean"}
# What is no mean over pairs differs from that of one pair by so much, relative, for K = 3 and 10.
FEW = {
    "nc2g_dist": (0.03, 0.0),
    "nc2g_log": (0.06, 0.0),
    "nc2_cos_std": (0.15, 0.01),
    "nc2_uniformity": (0.1, 0.01),
}
WITH_RANDOM = [name for name, metric in CATALOGUE.items() if metric.random]


def assert_random_value(name: str, draws: list[Statistics], slack: float = 0.0):
    """Compare the mean of a metric over draws with the mean of its random value."""
    metric = CATALOGUE[name]
    got = np.array([metric.compute(s) for s in draws])
    claimed = np.array([metric.random(s) for s in draws])
    error = np.std(got - claimed) / math.sqrt(len(draws))
    # A metric that is right for any K still differs by what 512 quantiles leave.
    slack = max(slack, 1e-4)
    assert abs(got.mean() - claimed.mean()) < 4.5 * error + slack * abs(claimed.mean()), (
        name, got.mean(), claimed.mean(), error,
    )  # fmt: skip
    assert error < 0.05 * abs(claimed.mean()) or not claimed.any(), "too few draws to tell"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("K", "D", "n"),
    [
        pytest.param(3, 9, 1000, marks=pytest.mark.slow),
        (10, 16, 300),
        (10, 64, 100),
        (100, 24, 25),
    ],
)
def test_random_values_are_those_of_random_means(K: int, D: int, n: int):
    draws = [gaussian(K, D, seed) for seed in range(n)]
    for name in set(WITH_RANDOM) - HEAVY:
        if math.isfinite(CATALOGUE[name].random(draws[0])):
            slack = FEW.get(name, (0.0, 0.0))[(3, 10, 100).index(K)] if K < 100 else 0.0
            slack = max(
                slack,
                {
                    "nc2_etf_err": 0.01,
                    "nc3_dual_err": 0.005,
                    "spec_between_participation": 0.03,
                }.get(name, 0.0),
            )
            assert_random_value(name, draws, slack)


CONVENTIONS = [
    {"ddof": 1}, {"class_ddof": 0}, {"divide_by_k": False}, {"dist_exp": 2.0}, {"dist_exp": 1.5}
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("conventions", CONVENTIONS, ids=str)
def test_random_values_follow_the_conventions(conventions: dict):
    changed = 0
    for K, D, n in ((6, 14, 250), (40, 14, 60)):
        draws = [gaussian(K, D, seed, **conventions) for seed in range(n)]
        plain = gaussian(K, D, 0)
        for name in set(WITH_RANDOM) - HEAVY - set(FEW):
            if CATALOGUE[name].random(draws[0]) != CATALOGUE[name].random(plain):
                changed += 1
                assert_random_value(name, draws, 0.002)
    assert changed >= 2


def test_random_cdnv_takes_the_variances_of_classes_and_not_of_samples():
    draws = []
    for seed in range(60):
        s = gaussian(30, 14, seed)
        n = np.where(np.arange(30) % 3, 1, 90)  # most classes are singletons without any spread
        traces = np.where(n > 1, n * 14 * 0.25, 0.0)
        moments = Moments(n, s.moments.means, traces, s.moments.scatter)
        s = replace(s, moments=moments)
        pairs = sweep_pairs(moments.means, s.global_mean, s.variances, counts=n)
        draws.append(replace(s, pairs=pairs))
    for name in ("nc1_cdnv", "nc1_v_ratio_mean"):
        assert_random_value(name, draws)


def test_random_cdnv_needs_distances_that_have_the_moment():
    assert math.isnan(CATALOGUE["nc1_cdnv"].random(gaussian(9, 24, 0, dist_exp=12.0)))
    # Two classes are at a distance that the trace of S_B gives.
    s = gaussian(2, 3, 0, dist_exp=2.0)
    assert CATALOGUE["nc1_cdnv"].random(s) == pytest.approx(CATALOGUE["nc1_cdnv"].compute(s))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("K", "D", "n"), [(3, 3, 400), (3, 64, 400), (10, 30, 300), (60, 64, 150), (200, 16, 60), (400, 300, 20)]
)  # fmt: skip
def test_random_riesz_energy_is_the_median_of_random_means(K: int, D: int, n: int):
    """The expectation would be off by ten standard deviations and more for many dimensions."""
    metric, found = CATALOGUE["nc2g_riesz_log_mean"], []
    for seed in range(n):
        means = np.random.default_rng(seed).normal(size=(K, D))
        s = Statistics(Moments(np.full(K, 2), means, np.ones(K)))
        s = replace(s, pairs=sweep_pairs(means, s.global_mean, quantities=["riesz"]))
        found.append(metric.compute(s))
    claimed, spread = metric.random(s), np.std(found)
    # The documented quarter, and the error of a median of n draws.
    allowed = 0.25 * spread + 3 * 1.25 * spread / math.sqrt(n)
    assert claimed == pytest.approx(np.median(found), abs=allowed)
    assert CATALOGUE["nc2g_riesz_mean"].random(s) == pytest.approx(math.exp(claimed))


# What holds for any point that Mc and u are taken about.
ABOUT_ANY_POINT = {
    "nc1_cdnv", "nc1_cdnv_directional", "nc3_dual_err", "nc3u_uni_dual", "nc3_dot_mean", "nc3_dot_var",
    "nc3_cos_mean", "nc3_cos_var", "nc3_distance_mean", "nc3_distance_var", "nc3_papyan", "nc5_ood_dev",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("K", [10, 40])
def test_random_values_about_a_weighted_mean_are_right_or_absent(K: int):
    counts, draws = np.array([1000] + [10] * (K - 1)), []
    for seed in range(150):
        s = gaussian(K, 14, seed)
        scatter = np.eye(14) * 0.25 * counts.sum()
        moments = Moments(counts, s.moments.means, counts * 14 * 0.25, scatter)
        s = replace(s, moments=moments, weighted=True, pairs=None)
        pairs = sweep_pairs(
            moments.means, s.global_mean, s.variances, counts=counts,
            within=moments.within_covariance,
        )  # fmt: skip
        draws.append(replace(s, pairs=pairs))
    for name in WITH_RANDOM:
        assert math.isfinite(CATALOGUE[name].random(draws[0])) == (name in ABOUT_ANY_POINT), name
    for name in ("nc1_cdnv", "nc1_cdnv_directional"):
        assert_random_value(name, draws)
    for name in ABOUT_ANY_POINT:
        off = np.array([CATALOGUE[name].compute(s) - CATALOGUE[name].random(s) for s in draws])
        assert abs(off.mean()) < 4.5 * off.std() / math.sqrt(len(off)), name


def test_weighing_classes_of_one_size_leaves_random_values_as_they_are():
    s = gaussian(12, 14, 0)
    weighted = replace(s, weighted=True)
    for name in WITH_RANDOM:
        random = CATALOGUE[name].random
        assert random(weighted) == pytest.approx(random(s), nan_ok=True), name


@pytest.mark.parametrize("name", ["nc2g_log", "nc2g_log_mean", "nc2g_riesz_mean", "nc2_uniformity"])
def test_random_values_of_two_classes_and_of_one_feature(name: str):
    metric = CATALOGUE[name]
    for K, D in ((2, 5), (2, 1), (4, 1)):
        draws = [gaussian(K, D, seed) for seed in range(20 if D == 1 and K > 2 else 1)]
        if name != "nc2_uniformity" or K == 2:
            got = np.mean([metric.compute(s) for s in draws])
            assert metric.random(draws[0]) == pytest.approx(got, abs=1e-12), (K, D)


@pytest.mark.parametrize("K", [64, 65, 66])
def test_no_random_value_where_the_inverse_has_no_expectation(K: int):
    for name in ("nc1_pinv", "nc1_svd"):
        random = CATALOGUE[name].random
        assert math.isnan(random(gaussian(K, 64, 0)))
        assert random(gaussian(63, 64, 0)) > 0
        assert random(gaussian(67, 64, 0)) > 0


@pytest.mark.parametrize(("K", "D"), [(5, 8), (9, 8), (10, 8), (200, 8)])
def test_floors_are_not_undercut(K: int, D: int):
    s = gaussian(K, D, 0)
    for metric in CATALOGUE.values():
        if metric.floor is not None:
            assert metric.compute(s) >= metric.floor(s) - 1e-9, metric.name
    expected = math.sqrt(2 - 2 * math.sqrt(D / (K - 1))) if K - 1 > D else 0.0
    assert CATALOGUE["nc2_etf_err"].floor(s) == pytest.approx(expected)


def test_floor_of_coherence_is_attained_by_a_tight_frame():
    # Six lines through opposite vertices of the icosahedron: equiangular, cos 1/sqrt(5).
    g = (1 + math.sqrt(5)) / 2
    lines = np.array([[0, 1, g], [0, 1, -g], [1, g, 0], [1, -g, 0], [g, 0, 1], [-g, 0, 1]])
    moments = Moments(np.full(6, 2), lines, np.ones(6), np.eye(3))
    s = Statistics(moments, pairs=sweep_pairs(lines, 0.0))
    assert CATALOGUE["nc2_coherence"].floor(s) == pytest.approx(1 / math.sqrt(5))
    assert CATALOGUE["nc2_coherence"].compute(s) == pytest.approx(1 / math.sqrt(5))


def collapsed(K=300, D=20, n=15, seed=0, shuffled=True) -> Features:
    rng = np.random.default_rng(seed)
    y = np.repeat(np.arange(K), n)
    if shuffled:
        y = rng.permutation(y)
    X = 100 * rng.normal(size=(K, D))[y] + 1e-3 * rng.normal(size=(K * n, D))
    return Features(X, y, K)


NULL_OPTIONS = [
    {"min_count": 10},
    {"max_count": 40},
    {"classes": range(0, 40, 3), "min_count": 2},
    {"weighted": True, "dist_exp": 2.0},
]


@pytest.mark.parametrize("options", NULL_OPTIONS, ids=str)
def test_null_draws_among_the_chosen_classes_for_their_rows_alone(tmp_path, options):
    data = REGIMES["zipf"](3)
    X, y = data.X.astype(np.float64), data.y.copy()
    foreign = np.random.default_rng(0).random(len(y)) < 0.2
    X[foreign] *= 50
    y[foreign] = -1
    filters = {k: v for k, v in options.items() if k in {"min_count", "max_count", "classes"}}
    chosen = select(y, 60, **filters)
    rows = np.flatnonzero(np.isin(y, chosen))
    drawn = np.full(len(y), -1)
    drawn[rows] = chosen[null_labels(rows, np.bincount(y[y >= 0], minlength=60)[chosen], 4)]
    store = make_store(tmp_path / "s.zarr", Features(X, y, 60))
    ds = nc.measure(store, null=True, null_seed=4, **options)
    rest = {k: v for k, v in options.items() if k not in filters}
    direct = nc.measure(make_store(tmp_path / "null.zarr", Features(X, drawn, 60)), **rest)
    nulls = [str(name) for name in ds if str(name).endswith("_null")]
    assert len(nulls) > 40
    for name in nulls:
        want = float(direct[name.removesuffix("_null")][0, 0])
        assert float(ds[name][0, 0]) == pytest.approx(want, rel=1e-6, abs=1e-12, nan_ok=True), name


@pytest.mark.parametrize("shuffled", [True, False], ids=["shuffled", "sorted"])
def test_null_of_collapsed_classes_is_chance(tmp_path, shuffled: bool):
    K, D, n = 300, 20, 15
    store = make_store(tmp_path / "s.zarr", collapsed(K, D, n, shuffled=shuffled))
    ds = nc.measure(store, null=True).isel(store=0, layer=0)
    assert float(ds.nc1_quot) < 1e-8
    # Null classes differ in size (Poisson), which adds a few per cent.
    assert float(ds.nc1_quot_null) == pytest.approx((n - 1) * K / (K - 1), rel=0.15)
    assert float(ds.nc1_pinv_null) == pytest.approx((n - 1) * D / (K - D - 2), rel=0.2)
    assert float(ds.nc1_cdnv_null) == pytest.approx((n - 1) * D / (2 * (D - 2)), rel=0.2)


def test_null_equals_measuring_the_null_labels_and_not_the_chunks(tmp_path, monkeypatch):
    data = collapsed(40, 6, 12)
    null = null_labels(np.arange(len(data.y)), np.bincount(data.y), seed=7)
    direct = nc.measure(make_store(tmp_path / "null.zarr", Features(data.X, null, 40)))
    monkeypatch.setattr(store_format, "CHUNK_BYTES", 2048)
    chunked = make_store(tmp_path / "chunked.zarr", data)
    ds = nc.measure(chunked, null=True, null_seed=7)
    compared = 0
    for name, metric in CATALOGUE.items():
        if metric.has_null and f"{name}_null" in ds:
            got, want = float(ds[f"{name}_null"][0, 0]), float(direct[name][0, 0])
            assert got == pytest.approx(want, rel=1e-6, abs=1e-9), name
            compared += 1
    assert compared > 40
    again = nc.measure(chunked, null=True, null_seed=8)
    assert float(again.nc1_quot_null[0, 0]) != float(ds.nc1_quot_null[0, 0])
    assert "nc1_quot_null" not in direct
