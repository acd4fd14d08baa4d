"""NC1: how far the samples of a class have shrunk onto their mean."""

from __future__ import annotations

import numpy as np

from ncbatch.arrays.namespace import Array, as_float64, namespace, scalar, to_numpy
from ncbatch.arrays.rows import square_gaps
from ncbatch.metrics import yardsticks
from ncbatch.metrics.geometry import separation_eigenvalues, symmetric_sum
from ncbatch.metrics.metric import (
    GALANTI,
    HAN,
    HUI,
    PAPYAN,
    TIRER,
    Compute,
    Metric,
    mean,
    reads,
    tally,
)
from ncbatch.metrics.statistics import Statistics, Undefined

_XU = "Xu & Liu 2023, arXiv:2306.03440"
_FISHER = "Fisher 1936; ridge eps = 1e-6 tr S_W / D"
_LUTHRA = "Luthra, Galanti et al. 2025, arXiv:2506.04411"
_CORRECTED = "Galanti 2021, without the bias of finite samples"


def _inverse_trace(s: Statistics, limit: int | None = None) -> float:
    trace = s.spectrum.inverse_trace(s.within_covariance, limit)
    return trace / s.n_classes if s.divide_by_k else trace


def _vci(s: Statistics) -> float:
    """Sum 1 / (1 + mu) over eigenvalues mu of inv(S_W) S_B: 1 - mu / (1 + mu) has no digits."""
    if not s.n_directed:
        return 1.0
    most = min(s.n_features, s.n_classes - 1)
    rank = min(s.spectrum.rank, most)
    separations = separation_eigenvalues(s.spectrum, s.within_covariance)[:rank]
    xp = namespace(separations)
    # Integers first: a sum of 1e-12 added to them would lose its digits.
    return (scalar(xp.sum(1.0 / (1.0 + separations))) + (most - rank)) / most


def _lda(s: Statistics) -> float:
    within = s.within_covariance
    xp = namespace(within)
    ridge = 1e-6 * scalar(xp.linalg.trace(within)) / s.n_features
    if ridge <= 0.0:
        raise Undefined("S_W is zero")
    values, vectors = xp.linalg.eigh(within)
    between = symmetric_sum(s.centred) / s.n_classes
    along = xp.sum(xp.matmul(between, vectors) * vectors, axis=0)
    return scalar(xp.sum(along / (xp.clip(values, 0.0, None) + ridge)))


def _trace_share(s: Statistics) -> float:
    within = s.within_trace
    between = s.between_trace if s.n_directed else 0.0
    if not within + between:
        raise Undefined("S_W and S_B are zero")
    return within / (within + between)


def _ratios(s: Statistics) -> Array:
    """V_c / |Mc_c|^2 of the classes with a direction and a V_c."""
    known = s.directed & (s.moments.counts > s.ddof)
    if not bool(namespace(known).any(known)):
        raise Undefined("no class with a V_c has a mean that differs from m_G")
    return s.variances[known] / s.square_norms[known]


def _nearest_mean(s: Statistics) -> float:
    values, exists = s.nearest_cdnv
    return mean(values[exists], "a nearest class mean that is not its own, and a V_c")


def _at_quantile(q: float) -> Compute:
    return lambda s: float(np.quantile(to_numpy(_ratios(s)), q))


def _test_to_train(s: Statistics) -> float:
    if s.test is None:
        raise Undefined("no test split")
    seen = s.test.counts > 0
    spread = s.test.traces[seen] / as_float64(s.test.counts[seen])
    return mean(spread + square_gaps(s.test.means, s.moments.means)[seen], "test samples")


def _directional_exact(s: Statistics) -> float:
    if s.directional is None:
        raise Undefined("no second read")
    xp = namespace(s.directional.sums)
    per_class = s.directional.sums / as_float64(s.moments.counts)
    apart = 0 if s.pairs is None else s.pairs.n_pairs - s.pairs.coincident_means
    if not apart:
        raise Undefined("all class means coincide")
    return scalar(xp.sum(per_class)) / (2 * apart)


NC1 = (
    Metric(
        "nc1_pinv", "within- to between-class covariance", "tr(pinv(S_B) S_W) / K", PAPYAN,
        reads("traces", "scatter"), _inverse_trace, random=yardsticks.covariance_ratio,
    ),
    Metric(
        "nc1_svd", "within- to between-class covariance, leading directions",
        "tr(pinv_r(S_B) S_W) / K, r = min(K-1, D, rank)", HAN,
        reads("traces", "scatter"), lambda s: _inverse_trace(s, s.n_classes - 1),
        random=yardsticks.covariance_ratio,
    ),
    Metric(
        "nc1_quot", "within- to between-class variance", "tr S_W / tr S_B", TIRER,
        reads("traces"), lambda s: s.within_trace / s.between_trace,
    ),
    Metric(
        "nc1_cdnv", "class-distance normalised variance",
        "mean over pairs of (V_i + V_j) / (2 d_ij^(2p))", GALANTI,
        reads("traces", "pairs.cdnv"), lambda s: tally(s, "cdnv").mean, random=yardsticks.cdnv,
    ),
    Metric(
        "nc1_cdnv_corrected", "the same, corrected for small classes",
        "mean over pairs, n >= 2, of (V'_i + V'_j) / (2 (d_ij^2 - V'_i/n_i - V'_j/n_j)^p), "
        "V' = V n/(n-1)",
        _CORRECTED, reads("traces", "pairs.cdnv_corrected"),
        lambda s: tally(s, "cdnv_corrected").mean,
    ),
    Metric(
        "nc1_cdnv_nearest", "class-distance normalised variance with the nearest class",
        "mean over classes of the CDNV with the class of least d_ij", GALANTI,
        reads("traces", "pairs.nearest"), _nearest_mean,
    ),
    Metric(
        "nc1_cdnv_directional", "normalised variance along the line between two means",
        "mean over pairs of u^T S_W u / d_ij^2, u = (m_j - m_i) / d_ij", _LUTHRA,
        reads("scatter", "pairs.cdnv_directional"),
        lambda s: tally(s, "cdnv_directional").mean * s.within_scale,
        random=yardsticks.directional_cdnv,
    ),
    Metric(
        "nc1_cdnv_directional_exact", "the same with the covariance of each class itself",
        "mean over ordered pairs of u^T S_i u / d_ij^2, S_i of class i", _LUTHRA,
        reads("traces", "pairs.cdnv", "directional"), _directional_exact, only_named=True,
    ),
    Metric(
        "nc1_trace_share", "share of the variance that is within classes",
        "tr S_W / (tr S_W + tr S_B)", TIRER, reads("traces"), _trace_share,
    ),
    Metric(
        "nc1_vci", "variability collapse index",
        "1 - tr(pinv(S_T) S_B) / min(D, K-1), S_T = S_W + S_B", _XU, reads("scatter"), _vci,
    ),
    Metric(
        "nc1_lda", "separation in the metric of S_W", "tr(inv(S_W + eps I) S_B)", _FISHER,
        reads("scatter"), _lda,
    ),
    Metric(
        "nc1_v_ratio_mean", "mean variance over squared norm of a class",
        "mean over classes of V_c / |Mc_c|^2", TIRER,
        reads("traces"), lambda s: mean(_ratios(s), "a mean that differs from m_G"),
        random=yardsticks.variance_ratio,
    ),
    *(
        Metric(
            f"nc1_v_ratio_{name}", f"{what} of variance over squared norm of a class",
            f"{what} over classes of V_c / |Mc_c|^2", TIRER,
            reads("traces"), _at_quantile(q),
        )
        for name, what, q in (
            ("q10", "10 % quantile", 0.1), ("median", "median", 0.5), ("q90", "90 % quantile", 0.9)
        )
    ),
    Metric(
        "nc1_test_to_train", "scatter of test samples about train means",
        "mean over classes of V_c^test + |m_c^test - m_c|^2", HUI,
        reads("test"), _test_to_train, "feature^2", only_named=True,
    ),
)  # fmt: skip
