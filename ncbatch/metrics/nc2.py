"""NC2: how the class means are spread."""

from __future__ import annotations

import math

import numpy as np

from ncbatch.arrays.namespace import Array, namespace, to_numpy
from ncbatch.metrics import yardsticks
from ncbatch.metrics.geometry import structure_error
from ncbatch.metrics.metric import (
    KOTHAPALLI,
    LIU,
    PAPYAN,
    WU,
    Metric,
    finite,
    mean,
    reads,
    tally,
    variance,
)
from ncbatch.metrics.statistics import Statistics, Undefined

WELCH = "Welch 1974, doi:10.1109/TIT.1974.1055219"
WANG = "Wang & Isola 2020, arXiv:2005.10242"
JIANG = "Jiang et al. 2023, arXiv:2310.05351"


def _etf_error(s: Statistics) -> float:
    if not s.n_directed:
        raise Undefined("S_B is zero: all class means coincide")
    return structure_error(s.centred, s.centred)


def _log_norms(s: Statistics) -> Array:
    return namespace(s.norms).log(s.norms[s.directed])


def _cv(norms: Array, what: str, zero: str, ddof: int) -> float:
    """Relative spread of norms over classes; `zero` says what it means that all of them are."""
    average = mean(norms, what)
    if average == 0.0:
        raise Undefined(zero)
    return math.sqrt(variance(norms, what, ddof)) / average


def _coherence(s: Statistics) -> float:
    cosines = tally(s, "cosine")
    return max(abs(cosines.minimum), abs(cosines.maximum))


def _tammes_mean(s: Statistics) -> float:
    if s.pairs is None or s.pairs.nearest is None:
        raise Undefined("no pairs")
    squares = to_numpy(s.pairs.nearest.direction_square)
    return mean(np.sqrt(squares[np.isfinite(squares)]), "a direction")


def _riesz(s: Statistics, *, variance: bool) -> float:
    energies = tally(s, "riesz")
    logarithm = energies.log_variance if variance else energies.log_abs_mean
    if logarithm == -math.inf:
        return 0.0
    if abs(logarithm) > 700.0:
        raise Undefined("beyond float64, the _log metrics hold it")
    value = math.exp(logarithm)
    return value if variance else math.copysign(value, energies.mean)


def _riesz_log(s: Statistics, *, variance: bool) -> float:
    energies = tally(s, "riesz")
    return finite(energies.log_variance if variance else energies.log_abs_mean, "the value is zero")


def _weight_etf_error(s: Statistics) -> float:
    rows = s.classifier_rows
    return finite(structure_error(rows, rows), "W is zero")


def _weight_norm_cv(s: Statistics) -> float:
    norms = namespace(s.duality.squares).sqrt(s.duality.squares)
    return _cv(norms, "a classifier row", "W is zero", s.class_ddof)


NC2 = (
    Metric(
        "nc2_etf_err", "distance of class means from a simplex ETF",
        "|G/|G|_F - (I - 11^T/K)/sqrt(K-1)|_F, G = Mc Mc^T", KOTHAPALLI,
        reads(), _etf_error, floor=yardsticks.structure_floor, random=yardsticks.etf_error,
    ),
    Metric(
        "nc2g_dist", "variance of distances between directions of means",
        "var over pairs of |u_i - u_j|", LIU,
        reads("pairs.distance"), lambda s: tally(s, "distance").variance,
        random=yardsticks.distance_variance,
    ),
    Metric(
        "nc2g_dist_mean", "mean distance between directions of means",
        "mean over pairs of |u_i - u_j|", LIU,
        reads("pairs.distance"), lambda s: tally(s, "distance").mean,
        random=yardsticks.distance_mean,
    ),
    Metric(
        "nc2g_log", "variance of logarithmic energies between directions of means",
        "var over pairs of log(1/|u_i - u_j|)", LIU,
        reads("pairs.log"), lambda s: tally(s, "log").variance, random=yardsticks.log_variance,
    ),
    Metric(
        "nc2g_log_mean", "mean logarithmic energy between directions of means",
        "mean over pairs of log(1/|u_i - u_j|)", LIU,
        reads("pairs.log"), lambda s: tally(s, "log").mean, random=yardsticks.log_mean,
    ),
    Metric(
        "nc2g_riesz", "variance of Riesz energies between directions of means",
        "var over pairs of sign(s) |u_i - u_j|^(-s), s = D - 2", LIU,
        reads("pairs.riesz"), lambda s: _riesz(s, variance=True),
    ),
    Metric(
        "nc2g_riesz_mean", "mean Riesz energy between directions of means",
        "mean over pairs of sign(s) |u_i - u_j|^(-s), s = D - 2", LIU,
        reads("pairs.riesz"), lambda s: _riesz(s, variance=False), random=yardsticks.riesz_mean,
    ),
    Metric(
        "nc2g_riesz_log", "logarithm of the variance of Riesz energies",
        "log nc2g_riesz, free of overflow", LIU,
        reads("pairs.riesz"), lambda s: _riesz_log(s, variance=True),
    ),
    Metric(
        "nc2g_riesz_log_mean", "logarithm of the mean Riesz energy",
        "log |nc2g_riesz_mean|, free of overflow", LIU,
        reads("pairs.riesz"), lambda s: _riesz_log(s, variance=False),
        random=yardsticks.riesz_log_mean,
    ),
    Metric(
        "nc2_norm_mean", "mean norm of centred class means", "mean over classes of |Mc_c|", WU,
        reads(), lambda s: mean(s.norms, "samples"), "feature", random=yardsticks.norm_mean,
    ),
    Metric(
        "nc2_norm_var", "variance of norms of centred class means",
        "var over classes of |Mc_c|", WU,
        reads(), lambda s: variance(s.norms, "samples", s.class_ddof), "feature^2",
        random=yardsticks.norm_variance,
    ),
    Metric(
        "nc2_norm_cv", "relative spread of norms of centred class means",
        "std over classes of |Mc_c| over their mean", PAPYAN, reads(),
        lambda s: _cv(s.norms, "samples", "S_B is zero: all class means coincide", s.class_ddof),
        random=yardsticks.norm_cv,
    ),
    Metric(
        "nc2_lognorm_mean", "mean log-norm of centred class means",
        "mean over classes of log |Mc_c|", WU,
        reads(), lambda s: mean(_log_norms(s), "a mean that differs from m_G"),
    ),
    Metric(
        "nc2_lognorm_var", "variance of log-norms of centred class means",
        "var over classes of log |Mc_c|", WU,
        reads(), lambda s: variance(_log_norms(s), "a mean that differs from m_G", s.class_ddof),
        random=yardsticks.lognorm_variance,
    ),
    Metric(
        "nc2_interference_mean", "mean interference of centred class means",
        "mean over pairs of Mc_i . Mc_j", WU,
        reads("pairs.interference"), lambda s: tally(s, "interference").mean, "feature^2",
    ),
    Metric(
        "nc2_interference_var", "variance of interference of centred class means",
        "var over pairs of Mc_i . Mc_j", WU,
        reads("pairs.interference"), lambda s: tally(s, "interference").variance, "feature^4",
    ),
    Metric(
        "nc2_cos_mean", "mean cosine between centred class means",
        "mean over pairs of cos(u_i, u_j)", PAPYAN,
        reads("pairs.cosine"), lambda s: tally(s, "cosine").mean, random=yardsticks.cosine_mean,
    ),
    Metric(
        "nc2_cos_std", "equiangularity: spread of cosines between centred class means",
        "std over pairs of cos(u_i, u_j)", PAPYAN, reads("pairs.cosine"),
        lambda s: math.sqrt(tally(s, "cosine").variance), random=yardsticks.cosine_std,
    ),
    Metric(
        "nc2_cos_dev_mean", "mean distance of cosines from those of a simplex",
        "mean over pairs of |cos(u_i, u_j) + 1/(K-1)|", PAPYAN, reads("pairs.cosine"),
        lambda s: tally(s, "deviation").mean, random=yardsticks.deviation_mean,
    ),
    Metric(
        "nc2_cos_dev_max", "greatest distance of a cosine from those of a simplex",
        "max over pairs of |cos(u_i, u_j) + 1/(K-1)|", PAPYAN, reads("pairs.cosine"),
        lambda s: tally(s, "deviation").maximum,
    ),
    Metric(
        "nc2_coherence", "mutual coherence", "max over pairs of |cos(u_i, u_j)|", WELCH,
        reads("pairs.cosine"), _coherence, floor=yardsticks.coherence_floor,
    ),
    Metric(
        "nc2_uniformity", "uniformity of directions",
        "log mean over pairs of exp(-2 |u_i - u_j|^2)", WANG, reads("pairs.cosine"),
        lambda s: math.log(tally(s, "uniformity").mean), random=yardsticks.uniformity,
    ),
    Metric(
        "nc2_tammes", "least distance between directions", "min over pairs of |u_i - u_j|", JIANG,
        reads("pairs.distance"), lambda s: tally(s, "distance").minimum,
    ),
    Metric(
        "nc2_tammes_mean", "mean distance of a direction from its nearest",
        "mean over classes of min_j |u_c - u_j|", JIANG, reads("pairs.nearest"), _tammes_mean,
    ),
)  # fmt: skip

# The classifier's rows in the place of the class means; in results they follow NC3.
NC2_WEIGHT = (
    Metric(
        "nc2_weight_etf_err",
        "distance of classifier rows from a simplex ETF",
        "|G/|G|_F - (I - 11^T/K)/sqrt(K-1)|_F, G = W W^T",
        KOTHAPALLI,
        reads("classifier"),
        _weight_etf_error,
        floor=yardsticks.structure_floor,
    ),
    Metric(
        "nc2_weight_norm_cv",
        "relative spread of norms of classifier rows",
        "std over classes of |w_c| over their mean",
        PAPYAN,
        reads("classifier"),
        _weight_norm_cv,
    ),
)
