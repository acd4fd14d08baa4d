"""Yardsticks in closed form: what geometry allows, and what chance gives.

Chance: K class means drawn from N(0, tau^2 I) and within-class covariance sigma^2 I, where sigma and
tau give the measured traces of S_W and S_B. Directions are then uniform on the sphere, and a squared
distance r^2 between two of them has r^2/4 ~ Beta(a, a) with a = (D-1)/2.
"""

from __future__ import annotations

import math

from scipy.special import betaln, digamma, gammaln, hyp0f1, polygamma

from ncbatch.metrics.statistics import Statistics


def structure_floor(s: Statistics) -> float:
    """Bound the distance from a simplex ETF: above 0 where K - 1 > D leaves no room for one."""
    k, d = s.n_classes, s.n_features
    return math.sqrt(2.0 - 2.0 * math.sqrt(d / (k - 1))) if k - 1 > d else 0.0


def coherence_floor(s: Statistics) -> float:
    """Bound the greatest |cosine|, as Welch does."""
    k, d = s.n_classes, s.n_features
    return math.sqrt((k - d) / (d * (k - 1))) if k > d else 0.0


def covariance_ratio(s: Statistics) -> float:
    """Give the expectation of nc1_pinv."""
    k, d = s.n_classes, s.n_features
    noise = _noise(s)
    if k > d + 2:
        return noise * d / (k - d - 2)
    return noise * (k - 1) / (d - k) if d > k else math.nan


def cdnv(s: Statistics) -> float:
    """Give the expectation of (V_i + V_j) / (2 d_ij^(2p)), d_ij^2 = 2 tau^2 chi^2_D."""
    d, p = s.n_features, s.dist_exp
    if d <= 2.0 * p:
        return math.nan
    within = s.within_trace
    tau2 = _tau2(s)
    log = gammaln(d / 2.0 - p) - gammaln(d / 2.0) - p * math.log(4.0 * tau2)
    return float(within * math.exp(log))


def etf_error(s: Statistics) -> float:
    """Give the value of nc2_etf_err that Gaussian means concentrate on."""
    k, d = s.n_classes, s.n_features
    return math.sqrt(2.0 - 2.0 * math.sqrt(d / (d + k)))


def distance_mean(s: Statistics) -> float:
    """E r."""
    return _moment(s, 1.0)


def distance_variance(s: Statistics) -> float:
    """Var r = 2 - (E r)^2."""
    return 2.0 - _moment(s, 1.0) ** 2


def log_mean(s: Statistics) -> float:
    """E log(1/r)."""
    a = _a(s)
    return float(-(math.log(4.0) + digamma(a) - digamma(2.0 * a)) / 2.0) if a > 0 else math.nan


def log_variance(s: Statistics) -> float:
    """Var log(1/r)."""
    a = _a(s)
    return float((polygamma(1, a) - polygamma(1, 2.0 * a)) / 4.0) if a > 0 else math.nan


def riesz_mean(s: Statistics) -> float:
    """E sign(s) r^(-s), s = D - 2; its variance is infinite."""
    exponent = s.n_features - 2
    return math.copysign(1.0, exponent) * _moment(s, -float(exponent)) if exponent else 0.0


def cosine_mean(s: Statistics) -> float:
    """E cos(u_i, u_j) of centred means."""
    return -1.0 / (s.n_classes - 1)


def cosine_std(s: Statistics) -> float:
    """Give the standard deviation of cos(u_i, u_j)."""
    return 1.0 / math.sqrt(s.n_features)


def cosine_variance(s: Statistics) -> float:
    """Var cos(w_c, u_c)."""
    return 1.0 / s.n_features


def deviation_mean(s: Statistics) -> float:
    """E |cos + 1/(K-1)|, for large D."""
    return math.sqrt(2.0 / (math.pi * s.n_features))


def cosine_size(s: Statistics) -> float:
    """E |cos| between directions."""
    d = s.n_features
    return float(math.exp(gammaln(d / 2.0) - gammaln((d + 1) / 2.0)) / math.sqrt(math.pi))


def uniformity(s: Statistics) -> float:
    """Log E exp(-2 r^2) = -4 + log E exp(4 cos)."""
    return -4.0 + math.log(float(hyp0f1(s.n_features / 2.0, 4.0)))


def zero(_: Statistics) -> float:
    """Give what nothing aligned has."""
    return 0.0


def two(_: Statistics) -> float:
    """Give the squared distance of two orthogonal unit vectors."""
    return 2.0


def root_two(_: Statistics) -> float:
    """Give the distance of two orthogonal unit vectors."""
    return math.sqrt(2.0)


def _a(s: Statistics) -> float:
    return (s.n_features - 1) / 2.0


def _moment(s: Statistics, k: float) -> float:
    """E r^k."""
    a = _a(s)
    if a <= 0 or a + k / 2.0 <= 0:
        return math.nan
    return math.exp(k * math.log(2.0) + float(betaln(a + k / 2.0, a) - betaln(a, a)))


def _tau2(s: Statistics) -> float:
    return s.between_trace * s.n_classes / ((s.n_classes - 1) * s.n_features)


def _noise(s: Statistics) -> float:
    """sigma^2 / tau^2."""
    return s.within_trace / s.n_features / _tau2(s)
