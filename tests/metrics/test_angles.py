"""Angles between centred means at random: equal to draws, and to closed forms where there are any."""

import math

import numpy as np
import pytest
from scipy.special import polygamma, psi

from ncbatch.metrics.yardsticks import RandomAngles


def draws(K: int, D: int, n: int) -> np.ndarray:
    """Squared distances between directions of centred Gaussian means (n, pairs)."""
    means = np.random.default_rng(K * 100 + D).normal(size=(n, K, D))
    means -= means.mean(axis=1, keepdims=True)
    u = means / np.linalg.norm(means, axis=2, keepdims=True)
    i, j = np.triu_indices(K, 1)
    return np.sum((u[:, i] - u[:, j]) ** 2, axis=2)


def assert_mean(values: np.ndarray, claimed: float):
    """Compare the mean of draws (n, pairs), of which those in a row depend on each other."""
    error = values.mean(axis=1).std() / math.sqrt(len(values))
    assert abs(values.mean() - claimed) < 4.5 * error + 1e-12


@pytest.mark.parametrize(("K", "n"), [(3, 40_000), (10, 8000), (100, 60)])
@pytest.mark.parametrize("D", [2, 3, 8, 64])
def test_moments_are_those_of_draws(K: int, n: int, D: int):
    squares = draws(K, D, n // (8 if D == 64 else 1) + 20)
    angles = RandomAngles.of(K, D)
    assert angles.mean(np.ones_like(angles.squares)) == pytest.approx(1, rel=1e-12)
    for function in (
        np.sqrt,
        lambda r2: -0.5 * np.log(r2),
        lambda r2: 1 - r2 / 2,
        lambda r2: np.abs(1 - r2 / 2 + 1 / (K - 1)),
        lambda r2: np.exp(-2 * r2),
    ):
        values, at_nodes = function(squares), function(angles.squares)
        mean = angles.mean(at_nodes)
        assert_mean(values, mean)
        assert_mean((values - mean) ** 2, angles.variance(at_nodes))


@pytest.mark.parametrize("D", [2, 3, 17, 64, 4096])
def test_many_classes_have_the_angles_of_independent_directions(D: int):
    angles, a = RandomAngles.of(10**10, D), (D - 1) / 2
    logs = -0.5 * np.log(angles.squares)
    mean, variance = (
        -(math.log(4) + psi(a) - psi(2 * a)) / 2,
        (polygamma(1, a) - polygamma(1, 2 * a)) / 4,
    )
    assert angles.mean(logs) == pytest.approx(mean, rel=1e-7, abs=1e-8)
    assert angles.variance(logs) == pytest.approx(variance, rel=1e-7)
    assert angles.variance(angles.cosines) == pytest.approx(1 / D, rel=1e-9)
    size = math.exp(math.lgamma(D / 2) - math.lgamma((D + 1) / 2)) / math.sqrt(math.pi)
    assert angles.mean(np.abs(angles.cosines)) == pytest.approx(size, rel=1e-3)
    if D == 64:
        assert angles.mean(logs) == pytest.approx(-0.342574, abs=5e-7)
        assert angles.variance(logs) == pytest.approx(0.0040639, abs=5e-8)


def test_ten_classes_are_farther_apart_than_independent_directions():
    angles = RandomAngles.of(10, 64)
    assert angles.mean(np.sqrt(angles.squares)) == pytest.approx(1.488, abs=5e-4)


def test_two_classes_are_opposite_and_one_dimension_has_two_directions():
    assert RandomAngles.of(2, 7).squares.tolist() == [4.0]
    line = RandomAngles.of(4, 1)
    signs = np.random.default_rng(0).normal(size=(200_000, 4))
    signs = np.sign(signs - signs.mean(axis=1, keepdims=True))
    assert line.mean(line.cosines) == pytest.approx(np.mean(signs[:, 0] * signs[:, 1]), abs=0.01)
    assert line.apart().mean(line.apart().squares) == 4.0


def test_the_energy_of_many_features_does_not_overflow():
    for K, D in ((3, 20_000), (50_000, 20_000)):
        angles = RandomAngles.of(K, D)
        energy = angles.log_mean_exp(-0.5 * (D - 2) * np.log(angles.squares))
        assert math.isfinite(energy)
    # Independent directions: E r^-s = 2^-s B(a - s/2, a) / B(a, a), and a - s/2 = 1/2.
    a, s = (D - 1) / 2, D - 2
    exact = (
        -s * math.log(2)
        + math.lgamma(0.5)
        - math.lgamma(a + 0.5)
        - math.lgamma(a)
        + math.lgamma(2 * a)
    )
    far = RandomAngles.of(10**12, D)
    assert far.log_mean_exp(-0.5 * s * np.log(far.squares)) == pytest.approx(exact, abs=1e-6)
