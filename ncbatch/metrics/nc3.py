"""NC3, NC4 and NC5: the class means against the classifier, its decisions and outside data."""

from __future__ import annotations

import math

from ncbatch.arrays import Array, as_float64, namespace, scalar
from ncbatch.metrics import yardsticks
from ncbatch.metrics.alignment import orthogonality_deviation
from ncbatch.metrics.metric import (
    AMMAR,
    KOTHAPALLI,
    PAPYAN,
    WU,
    Metric,
    finite,
    mean,
    reads,
    variance,
)
from ncbatch.metrics.statistics import Statistics, Undefined
from ncbatch.metrics.structure import structure_error

_ALIGNED = "a direction of both mean and classifier row"


def _structure_error(a: Array, b: Array, what: str) -> float:
    return finite(structure_error(a, b), f"{what} is zero")


def _frobenius(rows: Array) -> float:
    return math.sqrt(scalar(namespace(rows).sum(rows * rows)))


def _papyan(s: Statistics) -> float:
    rows = s.classifier_rows
    xp = namespace(rows)
    sizes = _frobenius(rows), _frobenius(s.centred)
    if not sizes[0] or not s.n_directed:
        raise Undefined("W or S_B is zero")
    apart = rows / sizes[0] - s.centred / sizes[1]
    return scalar(xp.sum(apart * apart))


def _bias(s: Statistics) -> float:
    rows = s.classifier_rows
    xp = namespace(rows)
    logits = xp.matmul(rows, s.global_mean[:, None])[:, 0]
    return _frobenius(logits if s.bias is None else logits + as_float64(s.bias))


def _weight_norm_cv(s: Statistics) -> float:
    rows = s.classifier_rows
    xp = namespace(rows)
    norms = xp.sqrt(xp.sum(rows * rows, axis=1))
    average = mean(norms, "a classifier row")
    if average == 0.0:
        raise Undefined("W is zero")
    return math.sqrt(variance(norms, "a classifier row")) / average


def _ood_deviation(s: Statistics) -> float:
    if s.ood_mean is None:
        raise Undefined("no out-of-distribution row is left")
    xp, means = namespace(s.moments.means), s.moments.means
    if not scalar(xp.sum(s.ood_mean**2)) > 0.0:
        raise Undefined("the mean of the out-of-distribution data is zero")
    lengths = xp.sum(means * means, axis=1)
    if not bool(xp.any(lengths > 0.0)):
        raise Undefined("all class means are zero")
    return orthogonality_deviation(means[lengths > 0.0], s.ood_mean)


def _rate(s: Statistics, kind: str) -> float:
    if s.decisions is None:
        raise Undefined("no decisions")
    return finite(s.decisions.rate(kind), "no sample to decide")


NC3 = (
    Metric(
        "nc3_dual_err", "distance of classifier and means from a simplex ETF",
        "|G/|G|_F - (I - 11^T/K)/sqrt(K-1)|_F, G = W Mc^T", KOTHAPALLI,
        reads("classifier"), lambda s: _structure_error(s.classifier_rows, s.centred, "W Mc^T"), floor=yardsticks.structure_floor, random=yardsticks.root_two,
    ),
    Metric(
        "nc3u_uni_dual", "uniform duality: variance of classifier-mean products",
        "var over classes of w_c . Mc_c, ddof 1", WU,
        reads("classifier"), lambda s: variance(s.dots, "samples"), "weight^2 feature^2",
    ),
    Metric(
        "nc3_dot_mean", "mean classifier-mean product", "mean over classes of w_c . Mc_c", WU,
        reads("classifier"), lambda s: mean(s.dots, "samples"), "weight feature",
    ),
    Metric(
        "nc3_dot_var", "variance of classifier-mean products",
        "var over classes of w_c . Mc_c, ddof 1", WU,
        reads("classifier"), lambda s: variance(s.dots, "samples"), "weight^2 feature^2",
    ),
    Metric(
        "nc3_cos_mean", "mean cosine of classifier row and class mean",
        "mean over classes of cos(w_c, Mc_c)", WU,
        reads("classifier"), lambda s: mean(s.cosines, _ALIGNED), random=yardsticks.zero,
    ),
    Metric(
        "nc3_cos_var", "variance of cosines of classifier rows and class means",
        "var over classes of cos(w_c, Mc_c), ddof 1", WU,
        reads("classifier"), lambda s: variance(s.cosines, _ALIGNED), random=yardsticks.cosine_variance,
    ),
    Metric(
        "nc3_distance_mean", "mean distance of classifier and mean directions",
        "mean over classes of |w_c/|w_c| - u_c|", WU,
        reads("classifier"), lambda s: mean(s.direction_distances, _ALIGNED), random=yardsticks.distance_mean,
    ),
    Metric(
        "nc3_distance_var", "variance of distances of classifier and mean directions",
        "var over classes of |w_c/|w_c| - u_c|, ddof 1", WU,
        reads("classifier"), lambda s: variance(s.direction_distances, _ALIGNED), random=yardsticks.distance_variance,
    ),
    Metric(
        "nc3_papyan", "self-duality: distance of classifier and means",
        "|W/|W|_F - Mc/|Mc|_F|_F^2", PAPYAN, reads("classifier"), _papyan, random=yardsticks.two,
    ),
    Metric(
        "nc3_bias", "bias collapse", "norm over classes of W m_G + b", PAPYAN,
        reads("classifier"), _bias, "logit",
    ),
    Metric(
        "nc2_weight_norm_cv", "relative spread of norms of classifier rows",
        "std over classes of |w_c| (ddof 1) over their mean", PAPYAN,
        reads("classifier"), _weight_norm_cv,
    ),
    Metric(
        "nc4_agree", "agreement of nearest class mean and classifier",
        "share of samples with argmin_c |x - m_c| = argmax_k (W x + b)_k", PAPYAN,
        reads("decisions"), lambda s: _rate(s, "agreements"),
    ),
    Metric(
        "nc4_ncc_accuracy", "accuracy of the nearest class mean",
        "share of samples with argmin_c |x - m_c| = y", PAPYAN,
        reads("decisions"), lambda s: _rate(s, "ncc_hits"),
    ),
    Metric(
        "nc4_clf_accuracy", "accuracy of the classifier",
        "share of samples with argmax_k (W x + b)_k = y", PAPYAN,
        reads("decisions"), lambda s: _rate(s, "clf_hits"),
    ),
    Metric(
        "nc5_ood_dev", "alignment of class means with outside data",
        "mean over classes of |cos(m_c, m_G^ood)|", AMMAR,
        reads("ood"), _ood_deviation, random=yardsticks.cosine_size,
    ),
)  # fmt: skip
