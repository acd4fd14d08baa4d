"""The angle between two centred class means when all class means are drawn at random."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from scipy.special import hyp2f1

Values = npt.NDArray[np.float64]
# Nodes of a panel, and panels, which are half as wide as the density for any D.
_NODES, _LEAST_PANELS = 16, 32


@dataclass(frozen=True)
class RandomAngles:
    """Distribution of the angle between Mc_i and Mc_j, of K class means from N(m, tau^2 I_D).

    Attributes
    ----------
    squares : array (Q,)
        |u_i - u_j|^2 at the nodes of a quadrature rule.
    logs : array (Q,)
        Logarithms of the probabilities of the nodes, which add up to 1.

    Notes
    -----
    Subtracting m_G correlates two means: in each of the D coordinates they are a draw from a normal
    distribution with correlation rho = -1/(K-1). Their cosine is so distributed as the correlation
    coefficient of D + 1 samples (Fisher 1915; Hotelling 1953, eq. 25), in whose density n = D + 1.
    """

    squares: Values
    logs: Values

    @staticmethod
    @lru_cache(maxsize=16)
    def of(n_classes: int, n_features: int) -> RandomAngles:
        """Give the rule for K >= 2 classes in D >= 1 dimensions."""
        rho = -1.0 / (n_classes - 1)
        if n_classes == 2:
            return RandomAngles(np.array([4.0]), np.array([0.0]))
        if n_features == 1:
            opposite = 0.5 - math.asin(rho) / math.pi
            return RandomAngles(np.array([0.0, 4.0]), np.log([1.0 - opposite, opposite]))
        angles, sines, weights = _rule(_LEAST_PANELS + int(2.0 * math.sqrt(n_features)))
        cosines = np.cos(angles)
        logs = (
            np.log(weights)
            + (n_features - 2) * np.log(sines)
            - (n_features - 0.5) * np.log1p(-rho * cosines)
            + np.log(hyp2f1(0.5, 0.5, n_features + 0.5, 0.5 * (1.0 + rho * cosines)))
        )
        logs -= _log_sum(logs)
        return RandomAngles((2.0 * np.sin(0.5 * angles)) ** 2, logs)

    @property
    def cosines(self) -> Values:
        """cos(u_i, u_j) at the nodes."""
        return 1.0 - 0.5 * self.squares

    def mean(self, values: Values) -> float:
        """Give the expectation of what has these values at the nodes."""
        return float(np.sum(np.exp(self.logs) * values))

    def variance(self, values: Values) -> float:
        """Give its variance."""
        return self.mean((values - self.mean(values)) ** 2)

    def log_mean_exp(self, values: Values) -> float:
        """Give the logarithm of the expectation of its exponential, free of overflow."""
        return _log_sum(self.logs + values)

    def log_mean_exp_of(self, n_pairs: int, values: Values) -> float:
        """Give the logarithm of what the mean over `n_pairs` pairs typically is, near its median.

        Parameters
        ----------
        n_pairs : int
            Counted as independent.
        values : array (Q,)
            Logarithms of what is averaged, at the nodes.

        Notes
        -----
        The least of the distances is taken at its median, the others at the expectation beyond it.
        The expectation itself is that of nearer pairs, which hardly any set of so few has, where
        values rise steeply as the distance falls.
        """
        if len(values) == 1:
            return float(values[0])
        shares = np.exp(self.logs)
        reached = np.cumsum(shares)
        # P(R <= r) at which n pairs have an even chance of none nearer than r.
        nearest = -math.expm1(math.log(0.5) / n_pairs)
        first = int(np.searchsorted(reached, nearest, side="right"))
        beyond = self.logs[first:] + values[first:]
        beyond[0] += math.log((reached[first] - nearest) / shares[first])
        others = _log_sum(beyond) - math.log1p(-nearest) + math.log1p(-1.0 / n_pairs)
        # Values are nearly linear in log P.
        middles = np.log(np.maximum(reached - 0.5 * shares, np.finfo(np.float64).tiny))
        at_nearest = float(np.interp(math.log(nearest), middles, values))
        return float(np.logaddexp(at_nearest - math.log(n_pairs), others))

    def apart(self) -> RandomAngles:
        """Give the distribution without coincident directions, which one dimension has."""
        kept = self.squares > 0.0
        logs = self.logs[kept]
        return RandomAngles(self.squares[kept], logs - _log_sum(logs))


def _rule(n_panels: int) -> tuple[Values, Values, Values]:
    """Give nodes in (0, pi), their sines, and weights, which bear logarithms at both ends."""
    nodes, weights = np.polynomial.legendre.leggauss(_NODES)
    at = (np.arange(n_panels)[:, None] + 0.5 + 0.5 * nodes).ravel() / n_panels
    share = np.tile(0.5 * weights, n_panels) / n_panels
    # Nodes crowd at the ends, where a logarithm times the slope of this map is smooth.
    half = np.minimum(at, 1.0 - at)
    lower = np.pi * half**3 * (10.0 - 15.0 * half + 6.0 * half * half)
    angles = np.where(at < 0.5, lower, np.pi - lower)
    return angles, np.sin(lower), share * np.pi * 30.0 * (at * (1.0 - at)) ** 2


def _log_sum(logs: Values) -> float:
    largest = float(np.max(logs))
    return largest + math.log(float(np.sum(np.exp(logs - largest))))
