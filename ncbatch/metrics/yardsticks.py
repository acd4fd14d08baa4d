"""Yardsticks in closed form: what geometry allows, and what chance gives.

Chance: K class means drawn from N(m, tau^2 I), within-class covariance sigma^2 I, m_G the
unweighted mean of class means, and V_c and the traces of S_W and S_B as measured. Values hold for
any K and D: that subtracting m_G correlates the means, and that tr S_B is a measured number, is
part of them. A classifier by chance has rows whose directions know nothing of the means. Where m_G
weighs classes of unequal size, what is computed from Mc has no value: NaN.

Where a metric is a variance, a standard deviation or a logarithm of a mean over pairs, the value is
that of the distribution of one pair; see ``docs/metrics.md`` for how near K classes come to it. The
Riesz energies are typical ones, because their expectation is that of pairs that no set has.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, wraps

import numpy as np
import numpy.typing as npt
from scipy.special import betaincinv, betaln, gammaln, hyp2f1, polygamma

from ncbatch.arrays.namespace import namespace, scalar
from ncbatch.metrics.statistics import Statistics, Undefined

# The angle between two centred class means when all class means are drawn at random.


Values = npt.NDArray[np.float64]
Compute = Callable[["Statistics"], float]
# Nodes of a panel, and panels, which are half as wide as the density for any D.
_NODES = 16
_LEAST_PANELS = 32


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
        """Make the rule for K >= 2 classes in D >= 1 dimensions."""
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

    @property
    def distances(self) -> Values:
        """|u_i - u_j| at the nodes."""
        return np.sqrt(self.squares)

    @property
    def energies(self) -> Values:
        """log(1/|u_i - u_j|) at the nodes."""
        return -0.5 * np.log(self.squares)

    def mean(self, values: Values) -> float:
        """Return the expectation of what has these values at the nodes."""
        return float(np.sum(np.exp(self.logs) * values))

    def variance(self, values: Values) -> float:
        """Return its variance."""
        return self.mean((values - self.mean(values)) ** 2)

    def log_mean_exp(self, values: Values) -> float:
        """Return the logarithm of the expectation of its exponential, free of overflow."""
        return _log_sum(self.logs + values)

    def log_mean_exp_of(self, n_pairs: int, values: Values) -> float:
        """Return the logarithm of what the mean over `n_pairs` pairs typically is, near its median.

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
        """Return the distribution without coincident directions, which one dimension has."""
        kept = self.squares > 0.0
        logs = self.logs[kept]
        return RandomAngles(self.squares[kept], logs - _log_sum(logs))


def _rule(n_panels: int) -> tuple[Values, Values, Values]:
    """Return nodes in (0, pi), their sines, and weights, which bear logarithms at both ends."""
    nodes, weights = np.polynomial.legendre.leggauss(_NODES)
    points = (np.arange(n_panels)[:, None] + 0.5 + 0.5 * nodes).ravel() / n_panels
    share = np.tile(0.5 * weights, n_panels) / n_panels
    # Nodes crowd at the ends, where a logarithm times the slope of this map is smooth.
    half = np.minimum(points, 1.0 - points)
    lower = np.pi * half**3 * (10.0 - 15.0 * half + 6.0 * half * half)
    angles = np.where(points < 0.5, lower, np.pi - lower)
    return angles, np.sin(lower), share * np.pi * 30.0 * (points * (1.0 - points)) ** 2


def _log_sum(logs: Values) -> float:
    largest = float(np.max(logs))
    return largest + math.log(float(np.sum(np.exp(logs - largest))))


# Degrees of freedom above which the shape of S_B hardly varies, and quantiles taken below.
_MANY_DEGREES = 500
_QUANTILES = 512


def _unless_recentred(value: Compute) -> Compute:
    """Return NaN where m_G is not the unweighted mean, which `value` takes for granted."""

    @wraps(value)
    def checked(s: Statistics) -> float:
        return math.nan if s.recentred else value(s)

    return checked


def structure_floor(s: Statistics) -> float:
    """Bound the distance from a simplex ETF: above 0 where K - 1 > D leaves no room for one."""
    k, d = s.shape
    return math.sqrt(2.0 - 2.0 * math.sqrt(d / (k - 1))) if k - 1 > d else 0.0


def coherence_floor(s: Statistics) -> float:
    """Bound the greatest |cosine|, as Welch does."""
    k, d = s.shape
    return math.sqrt((k - d) / (d * (k - 1))) if k > d else 0.0


# ---------------------------------------------------------------------------------------- NC1


@_unless_recentred
def covariance_ratio(s: Statistics) -> float:
    """Return the expectation of nc1_pinv: that of an inverse Wishart matrix."""
    k, d = s.shape
    # tr A / tau^2 is chi-square and independent of the shape of A = Mc^T Mc: Basu's theorem.
    noise = s.within_trace / d * ((k - 1) * d - 2) / s.unweighted_total
    if k > d + 2:
        ratio = noise * d / (k - d - 2)
    elif d > k:
        ratio = noise * (k - 1) / (d - k)
    else:
        return math.nan
    return ratio if s.divide_by_k else ratio * k


def cdnv(s: Statistics) -> float:
    """Return the expectation of (V_i + V_j) / (2 d_ij^(2p))."""
    return _mean_variance(s) * _inverse_distance(s, s.dist_exp)


def directional_cdnv(s: Statistics) -> float:
    """Return the expectation of u^T S_W u / d_ij^2, u uniform on the sphere, for any S_W."""
    return s.within_trace / s.n_features * _inverse_distance(s, 1.0)


@_unless_recentred
def variance_ratio(s: Statistics) -> float:
    """Return the expectation of V_c / |Mc_c|^2, |Mc_c|^2 = (1 - 1/K) tau^2 chi^2_D."""
    k = s.n_classes
    return _mean_variance(s) * _inverse_moment(s, 1.0) / ((1.0 - 1.0 / k) * s.unweighted_total)


def _mean_variance(s: Statistics) -> float:
    """Average V_c over the classes that have one: metrics weigh classes alike, S_W does not."""
    known = s.variances[s.moments.counts > s.ddof]
    if not known.shape[0]:
        raise Undefined("no class has a V_c")
    return scalar(namespace(known).mean(known))


def _inverse_distance(s: Statistics, p: float) -> float:
    """E d_ij^(-2p), d_ij^2 = 2 tau^2 chi^2_D."""
    return _inverse_moment(s, p) * math.exp(-p * math.log(2.0 * s.unweighted_total))


def _inverse_moment(s: Statistics, p: float) -> float:
    """E B^(-p), B ~ Beta(D/2, (K-2)D/2) the share of tr Mc^T Mc along one contrast of classes."""
    k, d = s.shape
    if k == 2:
        return 1.0
    if d <= 2.0 * p:
        return math.nan
    half = d / 2.0
    total = (k - 1) * half
    return math.exp(gammaln(half - p) - gammaln(half) + gammaln(total) - gammaln(total - p))


# ------------------------------------------------------------------------------- NC2: structure


@_unless_recentred
def etf_error(s: Statistics) -> float:
    """Return the expectation of nc2_etf_err, sqrt(2 - 2t).

    t = tr A / (|A|_F sqrt(K-1)), A a Wishart matrix of rank q. q |A|^2 / (tr A)^2 - 1 lies between
    0 and q - 1. Its expectation is exact; the share of q - 1 is taken to be Beta with half the
    degrees of freedom of a spherical A, which is exact for q = 2.
    """
    p = s.n_classes - 1
    d = s.n_features
    q = min(p, d)
    excess = np.zeros(1)
    if q > 1:
        mean = q * (p + d + 1) / (p * d + 2) - 1.0
        degrees = (q - 1) * (q + 2) / 2
        excess = np.array([mean])
        if degrees <= _MANY_DEGREES:
            share = mean / (q - 1)
            a = degrees / 2
            middles = (np.arange(_QUANTILES) + 0.5) / _QUANTILES
            excess = (q - 1) * betaincinv(a, a * (1.0 - share) / share, middles)
    match = math.sqrt(q / p) / np.sqrt(1.0 + excess)
    return float(np.mean(np.sqrt(np.maximum(2.0 - 2.0 * match, 0.0))))


@_unless_recentred
def participation(s: Statistics) -> float:
    """Return 1 / E(|A|^2 / (tr A)^2), A = Mc^T Mc."""
    p = s.n_classes - 1
    d = s.n_features
    return (p * d + 2) / (p + d + 1)


@_unless_recentred
def norm_mean(s: Statistics) -> float:
    """E |Mc_c|."""
    return _norm_share(s) * math.sqrt(s.between_trace)


@_unless_recentred
def norm_variance(s: Statistics) -> float:
    """Return the variance of |Mc_c| over classes, of which the mean square is measured."""
    k = s.n_classes
    return _over_classes(s, (1.0 - _norm_share(s) ** 2) * k / (k - 1)) * s.between_trace


@_unless_recentred
def norm_cv(s: Statistics) -> float:
    """Return the standard deviation of |Mc_c| over the mean, less what few classes lose of it."""
    k = s.n_classes
    square = _over_classes(s, (_norm_share(s) ** -2 - 1.0) * k / (k - 1))
    few = math.exp(gammaln(k / 2.0) - gammaln((k - 1) / 2.0)) * math.sqrt(2.0 / (k - 1))
    return few * math.sqrt(max(square, 0.0))


@_unless_recentred
def lognorm_variance(s: Statistics) -> float:
    """Var log |Mc_c|, where two classes are correlated by 1/(K-1)^2."""
    share = 1.0 - 1.0 / (s.n_classes - 1) ** 2
    return _over_classes(s, float(polygamma(1, s.n_features / 2.0)) / 4.0 * share)


def _over_classes(s: Statistics, variance: float) -> float:
    """Bring a variance over classes of ddof 1 to the ddof in use."""
    return variance if s.class_ddof == 1 else variance * (s.n_classes - 1) / s.n_classes


def _norm_share(s: Statistics) -> float:
    """E |Mc_c| over the root of E |Mc_c|^2."""
    if s.n_classes == 2:
        return 1.0
    half = s.n_features / 2.0
    total = (s.n_classes - 1) * half
    logs = gammaln(half + 0.5) - gammaln(half) + gammaln(total) - gammaln(total + 0.5)
    return math.exp(logs + 0.5 * math.log(total / half))


# ---------------------------------------------------------------------------------- NC2: angles


def _over_angles(summary: Callable[[RandomAngles], float], *, apart: bool = False) -> Compute:
    """Make a yardstick of what `summary` says of random angles; `apart` leaves out equal ones."""

    @_unless_recentred
    def random(s: Statistics) -> float:
        angles = RandomAngles.of(s.n_classes, s.n_features)
        return summary(angles.apart() if apart else angles)

    return random


distance_mean = _over_angles(lambda angles: angles.mean(angles.distances))
distance_variance = _over_angles(lambda angles: angles.variance(angles.distances))
log_mean = _over_angles(lambda angles: angles.mean(angles.energies), apart=True)
log_variance = _over_angles(lambda angles: angles.variance(angles.energies), apart=True)
cosine_mean = _over_angles(lambda angles: angles.mean(angles.cosines))
cosine_std = _over_angles(lambda angles: math.sqrt(angles.variance(angles.cosines)))
uniformity = _over_angles(lambda angles: angles.log_mean_exp(-2.0 * angles.squares))


@_unless_recentred
def deviation_mean(s: Statistics) -> float:
    """E |cos(u_i, u_j) + 1/(K-1)|."""
    angles = RandomAngles.of(s.n_classes, s.n_features)
    return angles.mean(np.abs(angles.cosines + 1.0 / (s.n_classes - 1)))


@_unless_recentred
def riesz_log_mean(s: Statistics) -> float:
    """Return the typical log mean of |u_i - u_j|^(-s), s = D - 2; see `log_mean_exp_of`."""
    exponent = s.n_features - 2
    if not exponent:
        raise Undefined("the energy is zero")
    angles = RandomAngles.of(s.n_classes, s.n_features).apart()
    energies = -0.5 * exponent * np.log(angles.squares)
    return angles.log_mean_exp_of(s.n_classes * (s.n_classes - 1) // 2, energies)


@_unless_recentred
def riesz_mean(s: Statistics) -> float:
    """Return the typical mean of sign(s) |u_i - u_j|^(-s)."""
    exponent = s.n_features - 2
    if not exponent:
        return 0.0
    logarithm = riesz_log_mean(s)
    return math.copysign(math.exp(logarithm), exponent) if logarithm < 700.0 else math.inf


# ------------------------------------------------------------------------------------ NC3, NC5


def dual_error(s: Statistics) -> float:
    """E nc3_dual_err: t is nearly a coordinate on a sphere in K (K-1) dimensions."""
    return _sphere_distance(s.n_classes * (s.n_classes - 1))


def dot_variance(s: Statistics) -> float:
    """Return the mean of |w_c|^2 |Mc_c|^2 over D."""
    squares = s.duality.squares * s.square_norms
    return _over_classes(s, scalar(namespace(squares).mean(squares)) / s.n_features)


def row_distance_mean(s: Statistics) -> float:
    """Return the mean distance of two directions."""
    return _sphere_distance(s.n_features)


def row_distance_variance(s: Statistics) -> float:
    """Var r = 2 - (E r)^2."""
    return _over_classes(s, 2.0 - _sphere_distance(s.n_features) ** 2)


def row_cosine_variance(s: Statistics) -> float:
    """Var cos(w_c, u_c)."""
    return _over_classes(s, 1.0 / s.n_features)


def cosine_size(s: Statistics) -> float:
    """E |cos| between directions."""
    d = s.n_features
    return float(math.exp(gammaln(d / 2.0) - gammaln((d + 1) / 2.0)) / math.sqrt(math.pi))


def zero(_: Statistics) -> float:
    """Return what nothing aligned has."""
    return 0.0


def two(_: Statistics) -> float:
    """Return the squared distance of two orthogonal unit vectors."""
    return 2.0


def _sphere_distance(n_features: int) -> float:
    """E r of independent uniform directions: r^2/4 ~ Beta(a, a), a = (D-1)/2."""
    if n_features == 1:
        return 1.0
    a = (n_features - 1) / 2.0
    return 2.0 * math.exp(float(betaln(a + 0.5, a) - betaln(a, a)))
