"""PairStats: equal to K x K grids of the oracle, without holding one."""

import functools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ncbatch.errors import DataError, UsageError
from ncbatch.stats import PairStats, Tally
from tests.libraries import Library, each_library


def grids(means, center, variances, p=1.0):
    """Every pair's values, from differences."""
    i, j = np.triu_indices(len(means), 1)
    d2 = np.sum((means[i] - means[j]).astype(np.longdouble) ** 2, axis=1)
    u = (means - center) / np.linalg.norm(means - center, axis=1, keepdims=True)
    r = np.sqrt(np.sum((u[i] - u[j]).astype(np.longdouble) ** 2, axis=1))
    s = means.shape[1] - 2
    return {
        "cdnv": (variances[i] + variances[j]) / 2 / d2**p,
        "distance": r,
        "log": -np.log(r),
        "riesz": np.sign(s) * r ** (-float(s)),
        "interference": np.sum((means - center)[i] * (means - center)[j], axis=1),
    }


@each_library
@pytest.mark.parametrize(("K", "D"), [(2, 3), (9, 4), (23, 3), (8, 30)])
@pytest.mark.parametrize("tile", [4, 64])
def test_sweep_equals_the_grids(library: Library, K: int, D: int, tile: int):
    rng = np.random.default_rng(K)
    means, V = rng.normal(size=(K, D)) + 3.0, rng.uniform(size=K)
    center = means.mean(axis=0)
    if K == 2:
        center = center + 0.1  # else the two directions are opposite to the last digit
    stats = PairStats.from_means(
        library.put(means), library.put(center), library.put(V), dist_exp=2.0, tile_classes=tile
    )
    for name, values in grids(means, center, V, 2.0).items():
        tally = getattr(stats, name)
        scale = math.exp(tally.log_scale)
        assert tally.n == K * (K - 1) // 2
        assert tally.mean * scale == pytest.approx(float(values.mean()), rel=1e-9)
        assert tally.variance * scale**2 == pytest.approx(float(values.var()), rel=1e-9, abs=1e-20)


@pytest.mark.parametrize(
    ("gap", "offset"), [(1e-3, 0), (1e-7, 0), (1e-10, 0), (1e-3, 1e4), (1e-6, 1e4)]
)
def test_nearly_coincident_means_keep_their_digits(gap: float, offset: float):
    rng = np.random.default_rng(0)
    means = rng.normal(size=(12, 6))
    means[7] = means[3] + gap * rng.normal(size=6)
    means = means + offset
    V = rng.uniform(size=12)
    center = means.mean(axis=0)
    stats = PairStats.from_means(means, center, V, tile_classes=5)
    values = grids(means, center, V)
    # The stored means themselves are only so exact: their rounding is not the sweep's.
    tolerance = max(1e-6, 1e-15 * (1 + offset) / gap)
    assert stats.cdnv.mean == pytest.approx(float(values["cdnv"].mean()), rel=tolerance)
    assert stats.log.mean == pytest.approx(float(values["log"].mean()), rel=tolerance)
    assert stats.coincident_means == 0


def test_coincident_means_are_left_out_and_counted():
    means = np.random.default_rng(0).normal(size=(6, 4))
    means[5] = means[1]
    V = np.ones(6)
    center = means.mean(axis=0)
    stats = PairStats.from_means(means, center, V)
    assert (stats.cdnv.n, stats.coincident_means) == (14, 1)
    assert (stats.log.n, stats.riesz.n, stats.coincident_directions) == (14, 14, 1)
    assert (stats.distance.n, stats.interference.n) == (15, 15)
    assert math.isfinite(stats.cdnv.mean + stats.log.mean + stats.riesz.mean)


def test_a_mean_at_the_center_has_no_direction():
    means = np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    stats = PairStats.from_means(means, 0.0, np.ones(5))
    assert (stats.distance.n, stats.log.n, stats.cdnv.n) == (6, 6, 10)


def test_riesz_energies_beyond_float64_are_tallied_in_logarithms():
    rng = np.random.default_rng(0)
    for D in (3000, 20_000):
        means = rng.normal(size=(20, D))
        u = means / np.linalg.norm(means, axis=1, keepdims=True)
        i, j = np.triu_indices(20, 1)
        logs = -(D - 2) * np.log(np.linalg.norm(u[i] - u[j], axis=1))
        tally = PairStats.from_means(means, 0.0, quantities=["riesz"], tile_classes=6).riesz
        top = logs.max()
        assert tally.log_abs_mean == pytest.approx(
            top + np.log(np.mean(np.exp(logs - top))), rel=1e-9
        )
        assert tally.log_variance == pytest.approx(
            2 * top + np.log(np.var(np.exp(logs - top))), rel=1e-9
        )


@given(st.lists(st.lists(st.floats(-1e6, 1e6), max_size=6), min_size=1, max_size=6), st.randoms())
def test_tallies_merge_in_any_order(parts, random):
    values = np.array([v for part in parts for v in part])
    tallies = [Tally.of(np.array(part)) for part in parts]
    random.shuffle(tallies)
    total = functools.reduce(Tally.merge, tallies, Tally())
    assert total.n == len(values)
    if len(values):
        scale = max(np.abs(values).max(), 1e-300)
        assert total.mean == pytest.approx(values.mean(), abs=1e-12 * scale)
        assert total.variance == pytest.approx(values.var(), abs=1e-10 * scale**2)


def test_tallies_of_different_scales_merge():
    a, b = Tally.of(np.array([1.0, 2.0]), 0.0), Tally.of(np.array([3.0, 5.0]), math.log(10.0))
    values = np.array([1.0, 2.0, 30.0, 50.0])
    for total in (a.merge(b), b.merge(a)):
        assert math.exp(total.log_abs_mean) == pytest.approx(values.mean())
        assert math.exp(total.log_variance) == pytest.approx(values.var())


def test_only_what_is_asked_for_is_computed():
    means = np.random.default_rng(0).normal(size=(5, 3))
    stats = PairStats.from_means(means, quantities=["log"])
    assert stats.log.n == 10
    assert stats.cdnv == stats.distance == stats.riesz == stats.interference == Tally()
    with pytest.raises(UsageError, match="no pair quantity 'cosine'"):
        PairStats.from_means(means, quantities=["cosine"])
    with pytest.raises(DataError, match="variances"):
        PairStats.from_means(means, quantities=["cdnv"])


def test_zero_is_neutral():
    stats = PairStats.from_means(np.random.default_rng(0).normal(size=(5, 3)), 0.0, np.ones(5))
    assert stats.merge(PairStats.zero()) == stats == PairStats.zero().merge(stats)
