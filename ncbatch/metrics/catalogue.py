"""The table of metrics: what each is called, means, reads and comes from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from ncbatch.arrays import Array, namespace, scalar
from ncbatch.errors import unknown_name
from ncbatch.metrics.alignment import clf_ncc_agreement, orthogonality_deviation
from ncbatch.metrics.statistics import Statistics, Undefined
from ncbatch.metrics.structure import structure_error
from ncbatch.stats.tally import Tally

PAPYAN = "Papyan, Han & Donoho 2020, doi:10.1073/pnas.2015509117"
HAN = "Han, Papyan & Donoho 2022, arXiv:2106.02073"
TIRER = "Tirer, Huang & Niles-Weed 2023, PMLR 202"
GALANTI = "Galanti, György & Hutter 2021, arXiv:2112.15121"
KOTHAPALLI = "Kothapalli 2023, arXiv:2206.04041"
LIU = "Liu et al. 2023, arXiv:2303.06484"
WU = "Wu & Papyan 2024, arXiv:2405.17767"
AMMAR = "Ammar et al. 2024, arXiv:2310.06823"


@dataclass(frozen=True)
class Metric:
    """One entry of the table.

    Attributes
    ----------
    name : str
        The name in results.
    long_name : str
        What a person calls it.
    formula : str
        In the notation of ``docs/metrics.md``.
    source : str
        The paper.
    reads : frozenset of str
        The statistics it needs beside counts and means: ``traces``, ``scatter``, ``classifier``,
        ``decisions``, ``ood``, or ``pairs.<quantity>``.
    compute : callable
        ``compute(statistics) -> float``; raises `Undefined` where there is no value.
    units : str
        ``1`` for a ratio.
    """

    name: str
    long_name: str
    formula: str
    source: str
    reads: frozenset[str]
    compute: Callable[[Statistics], float]
    units: str = "1"

    @property
    def place(self) -> str:
        """NC1 to NC5."""
        return self.name[:3].upper()

    @property
    def pair_quantity(self) -> str | None:
        """The quantity of the pair sweep that it reads, if any."""
        return next((r.removeprefix("pairs.") for r in self.reads if r.startswith("pairs.")), None)


def find_metrics(names: Iterable[str] | None = None) -> list[Metric]:
    """Give the metrics of those `names`, all by default, in the table's order.

    Raises
    ------
    UnknownNameError
        For a name that is not in the table; suggests the nearest.

    Examples
    --------
    >>> [m.name for m in find_metrics(["nc1_quot", "nc1_pinv"])]
    ['nc1_pinv', 'nc1_quot']
    """
    if names is None:
        return list(CATALOGUE.values())
    wanted = list(names)
    for name in wanted:
        if name not in CATALOGUE:
            raise unknown_name("metric", name, CATALOGUE)
    return [metric for name, metric in CATALOGUE.items() if name in wanted]


def _finite(value: float, reason: str) -> float:
    if not math.isfinite(value):
        raise Undefined(reason)
    return value


def _mean(values: Array, what: str) -> float:
    if values.shape[0] == 0:
        raise Undefined(f"no class has {what}")
    return scalar(namespace(values).mean(values))


def _variance(values: Array, what: str) -> float:
    """Variance with ddof 1."""
    n: int = values.shape[0]
    if n < 2:
        raise Undefined(f"fewer than two classes have {what}")
    xp = namespace(values)
    return scalar(xp.sum((values - xp.mean(values)) ** 2)) / (n - 1)


def _tally(statistics: Statistics, quantity: str) -> Tally:
    found = getattr(statistics.pairs, quantity)
    if not isinstance(found, Tally) or not found.n:
        raise Undefined("no pair of classes is left: all coincide or have no direction")
    return found


def _inverse_trace(s: Statistics, limit: int | None = None) -> float:
    return s.spectrum.inverse_trace(s.moments.within_covariance, limit) / s.n_classes


def _structure_error(a: Array, b: Array, what: str) -> float:
    return _finite(structure_error(a, b), f"{what} is zero")


def _log_norms(s: Statistics) -> Array:
    return namespace(s.norms).log(s.norms[s.directed])


def _agreement(s: Statistics) -> float:
    if s.decisions is None:
        raise Undefined("no decisions")
    return _finite(clf_ncc_agreement(s.decisions), "no sample to decide")


def _riesz(s: Statistics, *, variance: bool) -> float:
    tally = _tally(s, "riesz")
    logarithm = tally.log_variance if variance else tally.log_abs_mean
    if logarithm == -math.inf:
        return 0.0
    if abs(logarithm) > 700.0:
        raise Undefined(f"exp({logarithm:.6g}) is beyond float64; the _log metrics hold it")
    value = math.exp(logarithm)
    return value if variance else math.copysign(value, tally.mean)


def _riesz_log(s: Statistics, *, variance: bool) -> float:
    tally = _tally(s, "riesz")
    return _finite(tally.log_variance if variance else tally.log_abs_mean, "the value is zero")


def _table(*rows: Metric) -> Mapping[str, Metric]:
    return {metric.name: metric for metric in rows}


def _reads(*names: str) -> frozenset[str]:
    return frozenset(names)


_ALIGNED = "a direction of both mean and classifier row"

CATALOGUE: Mapping[str, Metric] = _table(
    Metric(
        "nc1_pinv", "within- to between-class covariance", "tr(pinv(S_B) S_W) / K", PAPYAN,
        _reads("scatter"), _inverse_trace,
    ),
    Metric(
        "nc1_svd", "within- to between-class covariance, leading directions",
        "tr(pinv_r(S_B) S_W) / K, r = min(K-1, D, rank)", HAN,
        _reads("scatter"), lambda s: _inverse_trace(s, s.n_classes - 1),
    ),
    Metric(
        "nc1_quot", "within- to between-class variance", "tr S_W / tr S_B", TIRER,
        _reads("traces"), lambda s: s.within_trace / s.between_trace,
    ),
    Metric(
        "nc1_cdnv", "class-distance normalised variance",
        "mean over pairs of (V_i + V_j) / (2 d_ij^(2p))", GALANTI,
        _reads("traces", "pairs.cdnv"), lambda s: _tally(s, "cdnv").mean,
    ),
    Metric(
        "nc2_etf_err", "distance of class means from a simplex ETF",
        "|G/|G|_F - (I - 11^T/K)/sqrt(K-1)|_F, G = Mc Mc^T", KOTHAPALLI,
        _reads(), lambda s: _structure_error(s.centred, s.centred, "Mc Mc^T"),
    ),
    Metric(
        "nc2g_dist", "variance of distances between directions of means",
        "var over pairs of |u_i - u_j|", LIU,
        _reads("pairs.distance"), lambda s: _tally(s, "distance").variance,
    ),
    Metric(
        "nc2g_dist_mean", "mean distance between directions of means",
        "mean over pairs of |u_i - u_j|", LIU,
        _reads("pairs.distance"), lambda s: _tally(s, "distance").mean,
    ),
    Metric(
        "nc2g_log", "variance of logarithmic energies between directions of means",
        "var over pairs of log(1/|u_i - u_j|)", LIU,
        _reads("pairs.log"), lambda s: _tally(s, "log").variance,
    ),
    Metric(
        "nc2g_log_mean", "mean logarithmic energy between directions of means",
        "mean over pairs of log(1/|u_i - u_j|)", LIU,
        _reads("pairs.log"), lambda s: _tally(s, "log").mean,
    ),
    Metric(
        "nc2g_riesz", "variance of Riesz energies between directions of means",
        "var over pairs of sign(s) |u_i - u_j|^(-s), s = D - 2", LIU,
        _reads("pairs.riesz"), lambda s: _riesz(s, variance=True),
    ),
    Metric(
        "nc2g_riesz_mean", "mean Riesz energy between directions of means",
        "mean over pairs of sign(s) |u_i - u_j|^(-s), s = D - 2", LIU,
        _reads("pairs.riesz"), lambda s: _riesz(s, variance=False),
    ),
    Metric(
        "nc2g_riesz_log", "logarithm of the variance of Riesz energies",
        "log nc2g_riesz, free of overflow", LIU,
        _reads("pairs.riesz"), lambda s: _riesz_log(s, variance=True),
    ),
    Metric(
        "nc2g_riesz_log_mean", "logarithm of the mean Riesz energy",
        "log |nc2g_riesz_mean|, free of overflow", LIU,
        _reads("pairs.riesz"), lambda s: _riesz_log(s, variance=False),
    ),
    Metric(
        "nc2_norm_mean", "mean norm of centred class means", "mean over classes of |Mc_c|", WU,
        _reads(), lambda s: _mean(s.norms, "samples"), "feature",
    ),
    Metric(
        "nc2_norm_var", "variance of norms of centred class means",
        "var over classes of |Mc_c|, ddof 1", WU,
        _reads(), lambda s: _variance(s.norms, "samples"), "feature^2",
    ),
    Metric(
        "nc2_lognorm_mean", "mean log-norm of centred class means",
        "mean over classes of log |Mc_c|", WU,
        _reads(), lambda s: _mean(_log_norms(s), "a mean that differs from m_G"),
    ),
    Metric(
        "nc2_lognorm_var", "variance of log-norms of centred class means",
        "var over classes of log |Mc_c|, ddof 1", WU,
        _reads(), lambda s: _variance(_log_norms(s), "a mean that differs from m_G"),
    ),
    Metric(
        "nc2_interference_mean", "mean interference of centred class means",
        "mean over pairs of Mc_i . Mc_j", WU,
        _reads("pairs.interference"), lambda s: _tally(s, "interference").mean, "feature^2",
    ),
    Metric(
        "nc2_interference_var", "variance of interference of centred class means",
        "var over pairs of Mc_i . Mc_j", WU,
        _reads("pairs.interference"), lambda s: _tally(s, "interference").variance, "feature^4",
    ),
    Metric(
        "nc3_dual_err", "distance of classifier and means from a simplex ETF",
        "|G/|G|_F - (I - 11^T/K)/sqrt(K-1)|_F, G = W Mc^T", KOTHAPALLI,
        _reads("classifier"), lambda s: _structure_error(s.classifier_rows, s.centred, "W Mc^T"),
    ),
    Metric(
        "nc3u_uni_dual", "uniform duality: variance of classifier-mean products",
        "var over classes of w_c . Mc_c, ddof 1", WU,
        _reads("classifier"), lambda s: _variance(s.dots, "samples"), "weight^2 feature^2",
    ),
    Metric(
        "nc3_dot_mean", "mean classifier-mean product", "mean over classes of w_c . Mc_c", WU,
        _reads("classifier"), lambda s: _mean(s.dots, "samples"), "weight feature",
    ),
    Metric(
        "nc3_dot_var", "variance of classifier-mean products",
        "var over classes of w_c . Mc_c, ddof 1", WU,
        _reads("classifier"), lambda s: _variance(s.dots, "samples"), "weight^2 feature^2",
    ),
    Metric(
        "nc3_cos_mean", "mean cosine of classifier row and class mean",
        "mean over classes of cos(w_c, Mc_c)", WU,
        _reads("classifier"), lambda s: _mean(s.cosines, _ALIGNED),
    ),
    Metric(
        "nc3_cos_var", "variance of cosines of classifier rows and class means",
        "var over classes of cos(w_c, Mc_c), ddof 1", WU,
        _reads("classifier"), lambda s: _variance(s.cosines, _ALIGNED),
    ),
    Metric(
        "nc3_distance_mean", "mean distance of classifier and mean directions",
        "mean over classes of |w_c/|w_c| - u_c|", WU,
        _reads("classifier"), lambda s: _mean(s.direction_distances, _ALIGNED),
    ),
    Metric(
        "nc3_distance_var", "variance of distances of classifier and mean directions",
        "var over classes of |w_c/|w_c| - u_c|, ddof 1", WU,
        _reads("classifier"), lambda s: _variance(s.direction_distances, _ALIGNED),
    ),
    Metric(
        "nc4_agree", "agreement of nearest class mean and classifier",
        "share of samples with argmin_c |x - m_c| = argmax_k (W x + b)_k", PAPYAN,
        _reads("decisions"), _agreement,
    ),
    Metric(
        "nc5_ood_dev", "alignment of class means with outside data",
        "mean over classes of |cos(m_c, m_G^ood)|", AMMAR,
        _reads("ood"), lambda s: orthogonality_deviation(s.moments.means, s.ood_mean),
    ),
)  # fmt: skip
