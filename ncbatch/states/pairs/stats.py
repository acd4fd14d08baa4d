"""PairStats: statistics over all unordered pairs of class means, in one sweep over tiles."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from ncbatch.arrays.named_arrays import NamedArrays
from ncbatch.arrays.namespace import Array, namespace, scalar

# Tally: count, mean, spread and extremes of numbers, mergeable and free of overflow.


@dataclass(frozen=True)
class Tally:
    """Count, mean, sum of squared deviations and extremes of numbers.

    All numbers are scaled by ``exp(-log_scale)``, so that quantities beyond the range of float64
    can be tallied; the scale is 0 for all others.
    """

    n: int = 0
    mean: float = 0.0
    m2: float = 0.0
    minimum: float = math.inf
    maximum: float = -math.inf
    log_scale: float = 0.0

    @classmethod
    def of(cls, values: Array, log_scale: float = 0.0) -> Tally:
        """Tally an array of any shape."""
        xp = namespace(values)
        n = math.prod(values.shape)
        if n == 0:
            return cls()
        mean = scalar(xp.mean(values))
        return cls(
            n,
            mean,
            scalar(xp.sum((values - mean) ** 2)),
            scalar(xp.min(values)),
            scalar(xp.max(values)),
            log_scale,
        )

    @classmethod
    def of_sums(
        cls,
        n: int,
        total: float,
        squares: float,
        reference: float = 0.0,
        extremes: tuple[float, float] = (-math.inf, math.inf),
        log_scale: float = 0.0,
    ) -> Tally:
        """Make a tally from sums of (value - reference) and of its squares."""
        if n == 0:
            return cls()
        mean = total / n
        # Little cancels: values are taken relative to a number near their mean.
        m2 = max(squares - total * mean, 0.0)
        return cls(n, reference + mean, m2, *extremes, log_scale)

    def merge(self, other: Tally) -> Tally:
        """Combine with the tally of other numbers."""
        if not self.n or not other.n:
            return self if self.n else other
        scale = max(self.log_scale, other.log_scale)
        a = self._rescaled(scale)
        b = other._rescaled(scale)
        n = a.n + b.n
        apart = b.mean - a.mean
        return Tally(
            n,
            a.mean + apart * (b.n / n),
            a.m2 + b.m2 + apart * apart * (a.n / n) * b.n,
            min(a.minimum, b.minimum),
            max(a.maximum, b.maximum),
            scale,
        )

    def _rescaled(self, log_scale: float) -> Tally:
        f = math.exp(self.log_scale - log_scale)
        return Tally(
            self.n, self.mean * f, self.m2 * f * f, self.minimum * f, self.maximum * f, log_scale
        )

    @property
    def variance(self) -> float:
        """Variance with ddof 0, of the scaled numbers."""
        return self.m2 / self.n if self.n else math.nan

    @property
    def log_abs_mean(self) -> float:
        """Logarithm of the absolute mean, free of overflow."""
        return math.log(abs(self.mean)) + self.log_scale if self.mean else -math.inf

    @property
    def log_variance(self) -> float:
        """Logarithm of the variance, free of overflow."""
        return math.log(self.variance) + 2.0 * self.log_scale if self.m2 > 0.0 else -math.inf


PAIR_QUANTITIES = (
    "cdnv",
    "cdnv_corrected",
    "cdnv_directional",
    "distance",
    "log",
    "riesz",
    "interference",
    "cosine",
    "nearest",
)
# Bins of the histogram of cosines, from -1 to 1; pairs kept as the greatest of a kind.
COSINE_BINS = 200
TOP_PAIRS = 10


@dataclass(frozen=True)
class Nearest:
    """For each class the nearest other class mean.

    Attributes
    ----------
    index : array (K,) of int64
        Which class, -1 while none was compared; the lowest of equally near ones.
    square : array (K,)
        Squared distance of the means.
    direction_square : array (K,)
        Least squared distance between directions, of whichever class.
    """

    index: npt.NDArray[np.int64]
    square: npt.NDArray[np.float64]
    direction_square: npt.NDArray[np.float64]

    @classmethod
    def none(cls, n_classes: int) -> Nearest:
        """Make the state before any pair was compared."""
        return cls(
            np.full(n_classes, -1, np.int64),
            np.full(n_classes, np.inf),
            np.full(n_classes, np.inf),
        )

    def merge(self, other: Nearest) -> Nearest:
        """Combine with what other pairs gave."""
        closer = (other.square < self.square) | (
            (other.square == self.square) & (other.index < self.index) & (other.index >= 0)
        )
        return Nearest(
            np.where(closer, other.index, self.index),
            np.where(closer, other.square, self.square),
            np.minimum(self.direction_square, other.direction_square),
        )


@dataclass(frozen=True)
class TopPairs:
    """The pairs of classes with the greatest values, in descending order.

    Attributes
    ----------
    values : array (T,)
        The values; at most `TOP_PAIRS`.
    classes : array (T, 2) of int64
        The pairs.
    """

    values: npt.NDArray[np.float64]
    classes: npt.NDArray[np.int64]

    @classmethod
    def none(cls) -> TopPairs:
        """Make the state of no pairs."""
        return cls(np.empty(0), np.empty((0, 2), np.int64))

    def merge(self, other: TopPairs) -> TopPairs:
        """Keep the greatest of both; equal values in the order of their classes."""
        values = np.concatenate([self.values, other.values])
        classes = np.concatenate([self.classes, other.classes])
        order = np.lexsort((classes[:, 1], classes[:, 0], -values))[:TOP_PAIRS]
        return TopPairs(values[order], classes[order])


@dataclass(frozen=True)
class PairStats(NamedArrays):
    """Statistics over unordered pairs of classes i < j; u is the direction of a centred mean.

    Attributes
    ----------
    cdnv : Tally
        (V_i + V_j) / (2 d_ij^(2p)), without coincident means and classes that have no V.
    cdnv_corrected : Tally
        The same without the bias of small classes; pairs of classes with at least two samples
        whose corrected squared distance is positive.
    cdnv_directional : Tally
        u^T S_W u / d_ij^2 along the line between two means.
    distance, log, riesz : Tally
        |u_i - u_j|, log(1/|u_i - u_j|) and sign(s) |u_i - u_j|^(-s) with s = D - 2; the latter
        two without coincident directions.
    interference : Tally
        Inner products of the centred means.
    cosine, deviation, uniformity : Tally
        cos(u_i, u_j), |cos + 1/(K-1)| and exp(-2 |u_i - u_j|^2).
    n_pairs : int
        Pairs compared, whatever was left out.
    coincident_means, coincident_directions : int
        Pairs whose d_ij, or |u_i - u_j|, is zero; directions are counted for the energies.
    histogram : array (COSINE_BINS,) of int64
        Pairs per bin of the cosine, from -1 to 1.
    nearest : Nearest or None
        Per class, the nearest other.
    top_cdnv, top_cosine : TopPairs
        The most confusable pairs.
    """

    cdnv: Tally = field(default_factory=Tally)
    cdnv_corrected: Tally = field(default_factory=Tally)
    cdnv_directional: Tally = field(default_factory=Tally)
    distance: Tally = field(default_factory=Tally)
    log: Tally = field(default_factory=Tally)
    riesz: Tally = field(default_factory=Tally)
    interference: Tally = field(default_factory=Tally)
    cosine: Tally = field(default_factory=Tally)
    deviation: Tally = field(default_factory=Tally)
    uniformity: Tally = field(default_factory=Tally)
    n_pairs: int = 0
    coincident_means: int = 0
    coincident_directions: int = 0
    histogram: npt.NDArray[np.int64] = field(
        default_factory=lambda: np.zeros(COSINE_BINS, np.int64)
    )
    nearest: Nearest | None = None
    top_cdnv: TopPairs = field(default_factory=TopPairs.none)
    top_cosine: TopPairs = field(default_factory=TopPairs.none)
    called = "pair statistics"

    @classmethod
    def zero(cls) -> PairStats:
        """Make the state of no pairs, neutral under `merge`."""
        return cls()

    def merge(self, other: PairStats) -> PairStats:
        """Combine with the state of other pairs; neither operand changes."""

        def both(name: str) -> Any:
            mine = getattr(self, name)
            theirs = getattr(other, name)
            if mine is None or theirs is None:
                return mine if theirs is None else theirs
            return mine.merge(theirs) if hasattr(mine, "merge") else mine + theirs

        return PairStats(**{f.name: both(f.name) for f in fields(self)})
