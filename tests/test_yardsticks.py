"""Yardsticks: floors hold, random values are those of random means, null values those of chance."""

import math
from dataclasses import replace

import numpy as np
import pytest

import ncbatch as nc
from ncbatch.metrics import CATALOGUE, Statistics
from ncbatch.stats import Moments, null_labels, sweep_pairs
from ncbatch.store import format as store_format
from tests.oracles import select
from tests.strategies import REGIMES, Features
from tests.test_measurement import make_store


def gaussian(K: int, D: int, seed: int, sigma: float = 0.5) -> Statistics:
    rng = np.random.default_rng(seed)
    means = rng.normal(size=(K, D))
    n = np.full(K, 50)
    moments = Moments(n, means, np.full(K, 50 * D * sigma**2), np.eye(D) * sigma**2 * 50 * K)
    s = Statistics(moments, weight=rng.normal(size=(K, D)), ood_mean=rng.normal(size=D))
    pairs = sweep_pairs(
        means, s.global_mean, moments.variances, counts=n, within=moments.within_covariance
    )
    return Statistics(moments, pairs=pairs, weight=s.weight, ood_mean=s.ood_mean)


def with_random():
    return [
        name for name, metric in CATALOGUE.items() if metric.random and name != "nc2g_riesz_mean"
    ]


@pytest.mark.parametrize("name", with_random())
def test_random_value_is_that_of_random_means(name: str):
    metric = CATALOGUE[name]
    draws = [gaussian(400, 24, seed) for seed in range(4)]
    got = np.array([metric.compute(s) for s in draws])
    claimed = np.mean([metric.random(s) for s in draws])
    size = max(abs(claimed), {"nc3_cos_mean": 0.5, "nc2_cos_mean": 0.05}.get(name, 0.0))
    assert got.mean() == pytest.approx(claimed, abs=0.06 * size)


def test_random_riesz_energy_is_that_of_random_means():
    # Its tails are too heavy for a sample at more than a few dimensions.
    draws = [gaussian(600, 4, seed) for seed in range(8)]
    metric = CATALOGUE["nc2g_riesz_mean"]
    got = np.mean([metric.compute(s) for s in draws])
    assert got == pytest.approx(metric.random(draws[0]), rel=0.1)


def test_random_value_of_fewer_classes_than_features():
    draws = [gaussian(20, 120, seed) for seed in range(6)]
    metric = CATALOGUE["nc1_pinv"]
    got = np.mean([metric.compute(s) for s in draws])
    assert got == pytest.approx(np.mean([metric.random(s) for s in draws]), rel=0.05)


@pytest.mark.parametrize("K", [64, 65, 66])
def test_no_random_value_where_the_inverse_has_no_expectation(K: int):
    for name in ("nc1_pinv", "nc1_svd"):
        random = CATALOGUE[name].random
        assert math.isnan(random(gaussian(K, 64, 0)))
        assert random(gaussian(63, 64, 0)) > 0
        assert random(gaussian(67, 64, 0)) > 0


def test_random_mean_cosine_of_few_classes_is_that_of_centred_means():
    draws = [gaussian(6, 200, seed) for seed in range(20)]
    metric = CATALOGUE["nc2_cos_mean"]
    assert metric.random(draws[0]) == pytest.approx(-1 / 5)
    assert np.mean([metric.compute(s) for s in draws]) == pytest.approx(-1 / 5, rel=0.01)


@pytest.mark.parametrize("dist_exp", [1.0, 2.0, 1.5])
def test_random_cdnv_follows_the_exponent(dist_exp: float):
    draws = [replace(gaussian(400, 24, seed), dist_exp=dist_exp) for seed in range(3)]
    d2 = [
        np.sum((s.moments.means[i] - s.moments.means[j]) ** 2, axis=1)
        for s in draws
        for i, j in [np.triu_indices(400, 1)]
    ]
    got = np.mean([24 * 0.5**2 / d**dist_exp for d in d2])
    claimed = np.mean([CATALOGUE["nc1_cdnv"].random(s) for s in draws])
    assert claimed == pytest.approx(got, rel=0.03)
    assert math.isnan(CATALOGUE["nc1_cdnv"].random(replace(draws[0], dist_exp=12.0)))


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


def test_null_labels_follow_the_distribution_and_the_row_only():
    counts = np.array([700, 0, 200, 100])
    rows = np.arange(50_000)
    labels = null_labels(rows, counts, seed=3)
    shares = np.bincount(labels, minlength=4) / len(rows)
    np.testing.assert_allclose(shares, counts / 1000, atol=0.01)
    assert shares[1] == 0
    order = np.random.default_rng(0).permutation(len(rows))
    np.testing.assert_array_equal(null_labels(rows[order], counts, 3), labels[order])
    other = null_labels(rows, counts, seed=4)
    assert np.mean(other == labels) == pytest.approx(np.sum((counts / 1000) ** 2), abs=0.01)


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
