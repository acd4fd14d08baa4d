"""Tally: count, mean, spread and extremes of numbers, mergeable and free of overflow."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ncbatch.arrays import Array, namespace, scalar


@dataclass(frozen=True)
class Tally:
    """Count, mean, sum of squared deviations and extremes of numbers.

    All numbers are scaled by ``exp(-log_scale)``, so that quantities beyond the range of float64 can
    be tallied; the scale is 0 for all others.
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
        m2 = max(squares - total * mean, 0.0)
        return cls(n, reference + mean, m2, *extremes, log_scale)

    def merge(self, other: Tally) -> Tally:
        """Combine with the tally of other numbers."""
        if not self.n or not other.n:
            return self if self.n else other
        scale = max(self.log_scale, other.log_scale)
        a, b = self._rescaled(scale), other._rescaled(scale)
        n, apart = a.n + b.n, b.mean - a.mean
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
