"""Labelled features for tests: hypothesis strategies, and the regimes in which naive tools fail."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import strategies as st

Array = npt.NDArray[Any]
DTYPES = (
    np.dtype(np.float64),
    np.dtype(np.float32),
    np.dtype(np.float16),
    np.dtype(ml_dtypes.bfloat16),
)


@dataclass(frozen=True)
class Features:
    """Features X (N, D) with labels y (N,) in 0..n_classes-1; a row with y < 0 is no sample."""

    X: Array
    y: Array
    n_classes: int


# ------------------------------------------------------------------------- label distributions


def _uniform(rng: np.random.Generator, n: int, n_classes: int) -> Array:
    """Every class as likely as any other."""
    return rng.integers(n_classes, size=n)


def _zipf(rng: np.random.Generator, n: int, n_classes: int) -> Array:
    """Class c with a probability proportional to 1 / (c + 1), as tokens have."""
    shares = 1 / np.arange(1, n_classes + 1)
    return rng.choice(n_classes, size=n, p=shares / shares.sum())


def _sorted(rng: np.random.Generator, n: int, n_classes: int) -> Array:
    """Sorted by class: most blocks hold few classes."""
    return np.sort(_uniform(rng, n, n_classes))


def _unseen(rng: np.random.Generator, n: int, n_classes: int) -> Array:
    """At most half of the inner classes, and the outer two: some classes have no sample."""
    inner = rng.permutation(np.arange(1, n_classes - 1))[: (n_classes - 2) // 2]
    return rng.choice(np.concatenate([[0, n_classes - 1], inner]), size=n)


def _singletons(rng: np.random.Generator, n: int, n_classes: int) -> Array:
    """Every class once, as far as the rows go; class 0 has what is left."""
    y = np.zeros(n, dtype=np.int64)
    once = min(n, n_classes)
    y[:once] = np.arange(once)
    return rng.permutation(y)


def _negative(rng: np.random.Generator, n: int, n_classes: int) -> Array:
    """Uniform, with about a quarter of the rows being no samples."""
    y = _uniform(rng, n, n_classes)
    y[rng.random(n) < 0.25] = -1
    return y


LABELS: dict[str, Callable[[np.random.Generator, int, int], Array]] = {
    "uniform": _uniform,
    "zipf": _zipf,
    "sorted": _sorted,
    "unseen": _unseen,
    "singletons": _singletons,
    "negative": _negative,
}


def labels(name: str, seed: int, n: int, n_classes: int) -> Array:
    """Return n >= 2 labels of the named distribution, with at least two classes seen."""
    y = LABELS[name](np.random.default_rng(seed), n, n_classes)
    if len(np.unique(y[y >= 0])) < 2:
        y[0], y[-1] = 0, n_classes - 1  # keeps sorted labels sorted
    return y


# ----------------------------------------------------------------------------------- strategies


@st.composite
def feature_sets(
    draw: st.DrawFn,
    dtypes: Sequence[npt.DTypeLike] = DTYPES,
    distributions: Sequence[str] = tuple(LABELS),
) -> Features:
    """Draw a small feature set: N in 2..200, D in 1..12, K in 2..15.

    Rows with a negative label are large, so that a metric which counts them is visibly wrong.
    """
    n = draw(st.integers(2, 200), label="N")
    D = draw(st.integers(1, 12), label="D")
    K = draw(st.integers(2, 15), label="K")
    dtype = np.dtype(draw(st.sampled_from(list(dtypes)), label="dtype"))
    name = draw(st.sampled_from(list(distributions)), label="labels")
    spread = draw(st.sampled_from([1.0, 0.1, 1e-3, 10.0]), label="spread")
    offset = draw(st.sampled_from([0.0, 1.0, 100.0]), label="offset")
    seed = draw(st.integers(0, 2**32 - 1), label="seed")
    y = labels(name, seed, n, K)
    rng = np.random.default_rng([seed, 1])
    X = offset + rng.standard_normal((K, D))[y] + spread * rng.standard_normal((n, D))
    X[y < 0] *= 100
    return Features(X.astype(dtype), y, K)


@st.composite
def partitions(draw: st.DrawFn, n: int) -> list[int]:
    """Draw sorted cut points in 0..n; ``np.split(X, cuts)`` gives the blocks, empty ones too."""
    return sorted(draw(st.lists(st.integers(0, n), max_size=8), label="cuts"))


def random_rotation(D: int, seed: int) -> Array:
    """Return a random rotation (D, D): orthogonal, determinant 1."""
    Q, R = np.linalg.qr(np.random.default_rng(seed).standard_normal((D, D)))
    Q = Q * np.sign(np.diag(R))
    Q[:, 0] *= np.sign(np.linalg.det(Q))
    return Q


# -------------------------------------------------------------------------------------- regimes


def _even(rng: np.random.Generator, n: int, n_classes: int) -> Array:
    """Return n labels in random order, with class counts that differ by one at most."""
    return rng.permutation(np.arange(n) % n_classes)


def _noise(rng: np.random.Generator, y: Array, D: int) -> Array:
    """Return standard normal residuals (N, D), shifted so that the mean of each class is 0."""
    noise = rng.standard_normal((len(y), D))
    for c in np.unique(y):
        noise[y == c] -= noise[y == c].mean(axis=0)
    return noise


def collapsed(seed: int) -> Features:
    """Within-class spread 1e-6 of the norm of the means; K = 10, D = 16, float64."""
    rng = np.random.default_rng(seed)
    y, means = _even(rng, 1000, 10), rng.standard_normal((10, 16))
    spread = 1e-6 * np.sqrt((means**2).sum(axis=1).mean() / 16)
    return Features(means[y] + spread * rng.standard_normal((1000, 16)), y, 10)


def offset(seed: int) -> Features:
    """Global mean 1e4 times the within-class spread; K = 12, D = 16, float64."""
    rng = np.random.default_rng(seed)
    y, direction = _even(rng, 1200, 12), rng.standard_normal(16)
    centre = 1e4 * direction * np.sqrt(16) / np.linalg.norm(direction)
    X = centre + rng.standard_normal((12, 16))[y] + rng.standard_normal((1200, 16))
    return Features(X, y, 12)


def near_coincident(seed: int) -> Features:
    """Means of classes 0 and 1 are 1e-7 of their norm apart; K = 24, D = 16, float64.

    K > D + 1, so that S_B has full rank whether or not the two count as one.
    """
    rng = np.random.default_rng(seed)
    y, means = _even(rng, 1200, 24), rng.standard_normal((24, 16))
    step = rng.standard_normal(16)
    means[1] = means[0] + 1e-7 * np.linalg.norm(means[0]) * step / np.linalg.norm(step)
    return Features(means[y] + 0.1 * _noise(rng, y, 16), y, 24)


def exactly_coincident(seed: int) -> Features:
    """Class 1 has the samples of class 0 twice, class 2 those of class 3; K = 8, D = 16, float32.

    Counts are powers of two and values multiples of 1/1024, so that float64 means are exact.
    """
    rng = np.random.default_rng(seed)
    y = np.repeat(np.arange(8), [64, 128, 64, 64, 128, 128, 64, 64])
    X = rng.standard_normal((8, 16))[y] + 0.5 * rng.standard_normal((len(y), 16))
    X = np.round(X * 1024) / 1024
    X[y == 1] = np.concatenate([X[y == 0][::-1], X[y == 0]])
    X[y == 2] = X[y == 3]
    order = rng.permutation(len(y))
    return Features(X[order].astype(np.float32), y[order], 8)


def k_less_d(seed: int) -> Features:
    """Fewer classes than features: S_B has rank K - 1; K = 6, D = 24, float32."""
    rng = np.random.default_rng(seed)
    y = _even(rng, 600, 6)
    X = rng.standard_normal((6, 24))[y] + rng.standard_normal((600, 24))
    return Features(X.astype(np.float32), y, 6)


def k_greater_d(seed: int) -> Features:
    """More classes than features: no simplex can exist; K = 40, D = 8, float32."""
    rng = np.random.default_rng(seed)
    y = _even(rng, 1600, 40)
    X = rng.standard_normal((40, 8))[y] + rng.standard_normal((1600, 8))
    return Features(X.astype(np.float32), y, 40)


def singletons(seed: int) -> Features:
    """Ten of twenty classes have one sample, hence V_c = 0; K = 20, D = 12, float64."""
    rng = np.random.default_rng(seed)
    y = rng.permutation(np.concatenate([np.arange(10), 10 + np.arange(500) % 10]))
    X = rng.standard_normal((20, 12))[y] + rng.standard_normal((510, 12))
    return Features(X, y, 20)


def zipf(seed: int) -> Features:
    """Zipf counts, the last five of sixty classes never seen; K = 60, D = 16, float16."""
    rng = np.random.default_rng(seed)
    y = _zipf(rng, 2000, 55)
    X = rng.standard_normal((60, 16))[y] + rng.standard_normal((2000, 16))
    return Features(X.astype(np.float16), y, 60)


def layernorm(seed: int) -> Features:
    """LayerNorm with an anisotropic scale, rounded to float16; K = 40, D = 16.

    Every row is orthogonal to 1 / scale but for the rounding: that direction of S_B is nearly
    null (condition about 1e9), and so is S_W there, as in a real transformer.
    """
    rng = np.random.default_rng(seed)
    y = _even(rng, 400, 40)
    X = rng.standard_normal((40, 16))[y] + rng.standard_normal((400, 16))
    X = (X - X.mean(axis=1, keepdims=True)) / X.std(axis=1, keepdims=True)
    scale = rng.permutation(np.geomspace(1, 4, 16))
    return Features((X * scale).astype(np.float16), y, 40)


def pilot_outlier(seed: int) -> Features:
    """First sample of every class is 1e4 spreads off its mean; K = 10, D = 16, float64."""
    rng = np.random.default_rng(seed)
    y = _even(rng, 1000, 10)
    X = rng.standard_normal((10, 16))[y] + rng.standard_normal((1000, 16))
    first = np.unique(y, return_index=True)[1]
    steps = rng.standard_normal((10, 16))
    X[first] += 1e4 * np.sqrt(16) * steps / np.linalg.norm(steps, axis=1, keepdims=True)
    return Features(X, y, 10)


def constant_columns(seed: int) -> Features:
    """Columns 0, 5 and 11 never vary: S_B and S_W are singular; K = 20, D = 12, float64."""
    rng = np.random.default_rng(seed)
    y = _even(rng, 1000, 20)
    X = rng.standard_normal((20, 12))[y] + rng.standard_normal((1000, 12))
    X[:, [0, 5, 11]] = [0.0, 1.0, -37.3]
    return Features(X, y, 20)


REGIMES: dict[str, Callable[[int], Features]] = {
    make.__name__: make
    for make in (
        collapsed,
        offset,
        near_coincident,
        exactly_coincident,
        k_less_d,
        k_greater_d,
        singletons,
        zipf,
        layernorm,
        pilot_outlier,
        constant_columns,
    )
}

# Where formulas break first; the others are slow, though each takes less than a second: there are many.
_FIRST = ("collapsed", "offset", "exactly_coincident", "zipf", "singletons")
each_regime = pytest.mark.parametrize(
    "regime",
    [pytest.param(name, marks=() if name in _FIRST else pytest.mark.slow) for name in REGIMES],
)
