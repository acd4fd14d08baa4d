"""NC3, NC4 and NC5: the class means against the classifier, its decisions and outside data."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

from ncbatch.arrays.namespace import as_float64, namespace, scalar
from ncbatch.arrays.rows import float64_blocks
from ncbatch.metrics import yardsticks
from ncbatch.metrics.geometry import directions, structure_error
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

_ALIGNED = "a direction of both mean and classifier row"


def _dual_error(s: Statistics) -> float:
    rows = s.classifier_rows
    if not s.n_directed:
        raise Undefined("W Mc^T is zero")
    return finite(structure_error(rows, s.centred), "W Mc^T is zero")


def _papyan(s: Statistics) -> float:
    """Sum |a w - b u|^2 = (a - b)^2 + a b |w - u|^2, w and u directions: no term cancels."""
    squares = s.duality.squares
    xp = namespace(squares)
    total = scalar(xp.sum(squares))
    if not total or not s.n_directed:
        raise Undefined("W or S_B is zero")
    a = xp.sqrt(squares / total)
    b = xp.sqrt(s.square_norms / scalar(xp.sum(s.square_norms)))
    return scalar(xp.sum((a - b) ** 2 + a * b * s.duality.distances**2))


def _bias(s: Statistics) -> float:
    logits = s.duality.logits
    if s.classifier_bias is not None:
        logits = logits + s.classifier_bias
    return math.sqrt(scalar(namespace(logits).sum(logits * logits)))


def _ood_deviation(s: Statistics) -> float:
    if s.ood_mean is None:
        raise Undefined("no out-of-distribution row is left")
    xp = namespace(s.sizes)
    if not scalar(xp.sum(s.ood_mean**2)) > 0.0:
        raise Undefined("the mean of the out-of-distribution data is zero")
    nonzero = s.sizes > 0.0
    if not bool(xp.any(nonzero)):
        raise Undefined("all class means are zero")
    outside = directions(as_float64(s.ood_mean)[None, :])
    cosines = [
        xp.sum(directions(block) * outside, axis=1) for _, block in float64_blocks(s.moments.means)
    ]
    return scalar(xp.mean(xp.abs(xp.concat(cosines)[nonzero])))


def _rate(s: Statistics, kind: str) -> float:
    if s.decisions is None:
        raise Undefined("no decisions")
    return finite(s.decisions.rate(kind), "no sample to decide")


UNIFORM_DUALITY = Metric(
    "nc3u_uni_dual",
    "uniform duality: variance of classifier-mean products",
    "var over classes of w_c . Mc_c",
    WU,
    reads("classifier"),
    lambda s: variance(s.duality.dots, "samples", s.class_ddof),
    "weight^2 feature^2",
    random=yardsticks.dot_variance,
)

NC3 = (
    Metric(
        "nc3_dual_err", "distance of classifier and means from a simplex ETF",
        "|G/|G|_F - (I - 11^T/K)/sqrt(K-1)|_F, G = W Mc^T", KOTHAPALLI,
        reads("classifier"), _dual_error,
        floor=yardsticks.structure_floor, random=yardsticks.dual_error,
    ),
    UNIFORM_DUALITY,
    Metric(
        "nc3_dot_mean", "mean classifier-mean product", "mean over classes of w_c . Mc_c", WU,
        reads("classifier"), lambda s: mean(s.duality.dots, "samples"), "weight feature",
        random=yardsticks.zero,
    ),
    # One formula under two names, which results have both carried from the start.
    replace(
        UNIFORM_DUALITY, name="nc3_dot_var", long_name="variance of classifier-mean products"
    ),
    Metric(
        "nc3_cos_mean", "mean cosine of classifier row and class mean",
        "mean over classes of cos(w_c, Mc_c)", WU,
        reads("classifier"), lambda s: mean(s.cosines, _ALIGNED), random=yardsticks.zero,
    ),
    Metric(
        "nc3_cos_var", "variance of cosines of classifier rows and class means",
        "var over classes of cos(w_c, Mc_c)", WU,
        reads("classifier"), lambda s: variance(s.cosines, _ALIGNED, s.class_ddof),
        random=yardsticks.row_cosine_variance,
    ),
    Metric(
        "nc3_distance_mean", "mean distance of classifier and mean directions",
        "mean over classes of |w_c/|w_c| - u_c|", WU,
        reads("classifier"), lambda s: mean(s.direction_distances, _ALIGNED),
        random=yardsticks.row_distance_mean,
    ),
    Metric(
        "nc3_distance_var", "variance of distances of classifier and mean directions",
        "var over classes of |w_c/|w_c| - u_c|", WU,
        reads("classifier"), lambda s: variance(s.direction_distances, _ALIGNED, s.class_ddof),
        random=yardsticks.row_distance_variance,
    ),
    Metric(
        "nc3_papyan", "self-duality: distance of classifier and means",
        "|W/|W|_F - Mc/|Mc|_F|_F^2", PAPYAN, reads("classifier"), _papyan, random=yardsticks.two,
    ),
    Metric(
        "nc3_bias", "bias collapse", "norm over classes of W m_G + b", PAPYAN,
        reads("classifier"), _bias, "logit",
    ),
)  # fmt: skip

NC4 = tuple(
    Metric(
        name, what, f"share of samples with {decided}", PAPYAN, reads("decisions"),
        partial(_rate, kind=kind),
    )
    for name, what, decided, kind in (
        (
            "nc4_agree", "agreement of nearest class mean and classifier",
            "argmin_c |x - m_c| = argmax_k (W x + b)_k", "agreements",
        ),
        (
            "nc4_ncc_accuracy", "accuracy of the nearest class mean",
            "argmin_c |x - m_c| = y", "ncc_hits",
        ),
        (
            "nc4_clf_accuracy", "accuracy of the classifier",
            "argmax_k (W x + b)_k = y", "clf_hits",
        ),
    )
)  # fmt: skip

NC5 = (
    Metric(
        "nc5_ood_dev",
        "alignment of class means with outside data",
        "mean over classes of |cos(m_c, m_G^ood)|",
        AMMAR,
        reads("ood"),
        _ood_deviation,
        random=yardsticks.cosine_size,
    ),
)
