"""Naive neural-collapse metrics, written from the formulas alone, to compare the package with.

K classes, D features, N samples. Everything is done the slow and obvious way: a loop over classes,
every pair of classes, differences taken before they are squared. Accumulations run in
``np.longdouble``, because collapsed or far-off-centre features lose their digits in float64.
A metric that the data leave undefined is NaN. Nothing here imports the package.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.linalg import helmert

Array = npt.NDArray[Any]
SAME = 1e-24  # squared distance, relative to the squared norms, at which two means coincide


@dataclass(frozen=True)
class ClassMoments:
    """Moments of labelled features: float64, NaN where a class has no sample."""

    counts: Array  # (K,) samples of each class
    means: Array  # (K, D) class means m_c
    variances: Array  # (K,) V_c = mean |x - m_c|^2, ddof 0
    within: Array  # (D, D) S_W, the pooled within-class scatter over N


@dataclass(frozen=True)
class Geometry:
    """The chosen classes of the training samples, in ``np.longdouble``; K counts them alone."""

    counts: Array  # (K,)
    means: Array  # (K, D) uncentred m_c
    traces: Array  # (K,) sum of |x - m_c|^2
    variances: Array  # (K,) traces / (n_c - ddof), NaN where that is 0 / 0
    within: Array  # (D, D) pooled scatter / (N - ddof K)
    global_mean: Array  # (D,) m_G
    centred: Array  # (K, D) Mc = M - m_G
    directed: Array  # (K,) bool: Mc_c has a direction


# ---------------------------------------------------------------------------------- statistics


def wide(values: npt.ArrayLike) -> Array:
    """Return any real array, bfloat16 included, as ``np.longdouble`` without loss."""
    return np.asarray(values).astype(np.float64).astype(np.longdouble)


def _long_moments(X: Array, y: Array, n_classes: int) -> tuple[Array, Array, Array, Array]:
    """Return counts, means, variances and within-class covariance, in ``np.longdouble``."""
    X, n_features = wide(X), np.shape(X)[1]
    counts = np.zeros(n_classes, dtype=np.int64)
    means = np.full((n_classes, n_features), np.nan, dtype=np.longdouble)
    variances = np.full(n_classes, np.nan, dtype=np.longdouble)
    scatter = np.zeros((n_features, n_features), dtype=np.longdouble)
    for c in range(n_classes):
        rows = X[np.asarray(y) == c]
        counts[c] = len(rows)
        if len(rows) > 0:
            means[c] = rows.sum(axis=0) / len(rows)
            residuals = rows - means[c]
            variances[c] = (residuals**2).sum() / len(rows)
            scatter += residuals.T @ residuals
    return counts, means, variances, scatter / max(counts.sum(), 1)


def class_moments(X: Array, y: Array, n_classes: int) -> ClassMoments:
    """Return the moments of all rows with a label in 0..K-1, class by class, in two passes."""
    counts, means, variances, within = _long_moments(X, y, n_classes)
    return ClassMoments(counts, *(a.astype(np.float64) for a in (means, variances, within)))


def select(
    y: Array,
    n_classes: int,
    min_count: int = 1,
    max_count: int | None = None,
    classes: Iterable[int] | None = None,
) -> Array:
    """Return the sorted ids of the classes used: enough samples, not too many, and listed."""
    wanted = range(n_classes) if classes is None else {int(c) for c in classes}
    chosen = []
    for c in range(n_classes):
        count = int((np.asarray(y) == c).sum())
        enough = count >= max(min_count, 1)
        if enough and (max_count is None or count <= max_count) and c in wanted:
            chosen.append(c)
    return np.array(chosen, dtype=np.int64)


def geometry(X: Array, y: Array, chosen: Array, weighted: bool = False, ddof: int = 0) -> Geometry:
    """Return what the metrics need of the chosen classes; other rows do not count at all."""
    y, used = np.asarray(y), np.isin(y, chosen)
    relabelled = np.searchsorted(chosen, y[used])
    counts, means, variances, within = _long_moments(np.asarray(X)[used], relabelled, len(chosen))
    traces = variances * counts
    with np.errstate(invalid="ignore"):
        variances = traces / (counts - ddof)
        within = within * counts.sum() / (counts.sum() - ddof * len(chosen))
    weights = counts if weighted else np.ones_like(counts)
    m_G = (weights[:, None] * means).sum(axis=0) / weights.sum()
    centred = means - m_G
    nothing = SAME * ((means**2).sum(axis=1) + (m_G**2).sum())
    directed = (centred**2).sum(axis=1) > nothing
    if not directed.any():  # all means are one: S_B is 0, not the rounding errors of m_G
        centred = np.zeros_like(centred)
    return Geometry(counts, means, traces, variances, within, m_G, centred, directed)


# ------------------------------------------------------------------------------------- algebra


def mean_and_variance(values: Array, ddof: int) -> tuple[float, float]:
    """Return mean and variance; NaN where there are too few values."""
    n = len(values)
    if n == 0:
        return np.nan, np.nan
    with np.errstate(over="ignore", invalid="ignore"):
        mean = values.sum() / n
        variance = ((values - mean) ** 2).sum() / (n - ddof) if n > ddof else np.nan
    return float(mean), float(variance)


def pairs(n_points: int) -> tuple[Array, Array]:
    """Return i and j of all pairs i < j, in the order of `squared_distances`."""
    return np.triu_indices(n_points, k=1)


def squared_distances(points: Array) -> Array:
    """Return |p_i - p_j|^2 for all pairs i < j, from the differences."""
    rows = [((points[i + 1 :] - points[i]) ** 2).sum(axis=1) for i in range(len(points))]
    return np.concatenate([np.zeros(0, dtype=points.dtype), *rows])


def unit_rows(rows: Array) -> Array:
    """Return the rows divided by their norms."""
    return rows / np.sqrt((rows**2).sum(axis=1, keepdims=True))


def structure_error(A: Array, B: Array) -> float:
    """Return norm_F(G / norm_F(G) - (I - 11^T / K) / sqrt(K - 1)) with G = A B^T (K, K)."""
    A, B, K = wide(A), wide(B), len(A)
    G = A @ B.T
    size = np.sqrt((G**2).sum())
    if size == 0:
        return np.nan
    ideal = (np.eye(K) - np.ones((K, K), dtype=np.longdouble) / K) / np.sqrt(np.longdouble(K - 1))
    return float(np.sqrt(((G / size - ideal) ** 2).sum()))


def coincident(means: Array) -> Array:
    """Return, for all pairs i < j, whether the two uncentred means are the same point."""
    i, j = pairs(len(means))
    squares = (means**2).sum(axis=1)
    return squared_distances(means) <= SAME * (squares[i] + squares[j])


# ------------------------------------------------------------------------------ groups of metrics


def collapse(train: Geometry, dist_exp: float = 1.0, divide_by_k: bool = True) -> dict[str, float]:
    """Return NC1: pseudo-inverse, top singular triplets, quotient, CDNV."""
    K, D = train.centred.shape
    values = {"nc1_pinv": np.nan, "nc1_svd": np.nan, "nc1_quot": np.nan}
    if train.directed.any():
        # S_B = Mc^T Mc / K has the eigenvalues s^2 / K; its own eigh would lose the small ones.
        _, s, V = np.linalg.svd(train.centred.astype(np.float64), full_matrices=False)
        rank = int((s**2 > D * np.finfo(np.float64).eps * s[0] ** 2).sum())
        terms = np.array([(V[k] @ train.within @ V[k]) * K / s[k] ** 2 for k in range(rank)])
        divisor = K if divide_by_k else 1
        values["nc1_pinv"] = terms.sum() / divisor
        values["nc1_svd"] = terms[: min(K - 1, D)].sum() / divisor
        values["nc1_quot"] = np.trace(train.within) / ((train.centred**2).sum() / K)
    i, j = pairs(K)
    apart = ~coincident(train.means)
    d2 = squared_distances(train.means)[apart]
    ratios = (train.variances[i] + train.variances[j])[apart] / (2 * d2**dist_exp)
    values["nc1_cdnv"] = mean_and_variance(ratios[~np.isnan(ratios)], ddof=0)[0]
    values["n_coincident_pairs"] = int((~apart).sum())
    return values


def structure(train: Geometry, class_ddof: int = 1) -> dict[str, float]:
    """Return NC2 and GNC2: etf error, norms, interference, kernels on the sphere."""
    Mc, values = train.centred, {"nc2_etf_err": structure_error(train.centred, train.centred)}
    norms = np.sqrt((Mc**2).sum(axis=1))
    i, j = pairs(len(Mc))
    summaries = {
        "nc2_norm": mean_and_variance(norms, class_ddof),
        "nc2_lognorm": mean_and_variance(np.log(norms[train.directed]), class_ddof),
        "nc2_interference": mean_and_variance((Mc[i] * Mc[j]).sum(axis=1), ddof=0),
    }
    for name, (mean, variance) in summaries.items():
        values |= {f"{name}_mean": mean, f"{name}_var": variance}
    for name, kernel in sphere_kernels(unit_rows(Mc[train.directed])).items():
        values[f"{name}_mean"], values[name] = mean_and_variance(kernel, ddof=0)
    return values


def sphere_kernels(units: Array) -> dict[str, Array]:
    """Return distance, log and Riesz kernel of all pairs; the last two without coincident ones."""
    s = np.longdouble(units.shape[1] - 2)
    d2 = squared_distances(units)
    distances, apart = np.sqrt(d2), np.sqrt(d2[d2 > 2 * SAME])
    with np.errstate(over="ignore"):
        riesz = np.sign(s) * apart ** (-s)
    return {"nc2g_dist": distances, "nc2g_log": np.log(1 / apart), "nc2g_riesz": riesz}


def duality(train: Geometry, W: Array, class_ddof: int = 1) -> dict[str, float]:
    """Return NC3 for the classifier rows of the chosen classes, W (K, D)."""
    W, Mc = wide(W), train.centred
    dots = (W * Mc).sum(axis=1)
    directed = train.directed & (W != 0).any(axis=1)
    w, u = unit_rows(W[directed]), unit_rows(Mc[directed])
    summaries = {
        "nc3_dot": mean_and_variance(dots, class_ddof),
        "nc3_cos": mean_and_variance((w * u).sum(axis=1), class_ddof),
        "nc3_distance": mean_and_variance(np.sqrt(((w - u) ** 2).sum(axis=1)), class_ddof),
    }
    values = {"nc3_dual_err": structure_error(W, Mc)}
    for name, (mean, variance) in summaries.items():
        values |= {f"{name}_mean": mean, f"{name}_var": variance}
    values["nc3u_uni_dual"] = values["nc3_dot_var"]
    return values


def nearest_means(X: Array, means: Array, ids: Array) -> Array:
    """Return the id of the nearest of the means (K, D) for each row; ties to the lowest id."""
    X, means = wide(X), wide(means)
    d2 = np.array([((X - mean) ** 2).sum(axis=1) for mean in means])
    return ids[d2.argmin(axis=0)]


def classifier_decisions(X: Array, W: Array, b: Array | None = None) -> Array:
    """Return argmax(W x + b) over all classes for each row; ties to the lowest id."""
    scores = wide(X) @ wide(W).T + (0 if b is None else wide(b))
    return scores.argmax(axis=1)


def orthogonality_deviation(means: Array, X_ood: Array, y_ood: Array | None = None) -> float:
    """Return NC5: mean |cos(m_c, m_G^ood)| over uncentred class means that are not 0."""
    y_ood = np.zeros(len(X_ood), dtype=np.int64) if y_ood is None else np.asarray(y_ood)
    seen = np.unique(y_ood[y_ood >= 0])
    means = wide(means)[(means != 0).any(axis=1)]
    if len(seen) == 0 or len(means) == 0:
        return np.nan
    ood = np.mean([wide(X_ood)[y_ood == c].mean(axis=0) for c in seen], axis=0)
    if not ood.any():
        return np.nan
    return float(np.abs(unit_rows(means) @ unit_rows(ood[None])[0]).mean())


# ------------------------------------------------------------------------------- the whole set


def base_metrics(
    X: Array,
    y: Array,
    n_classes: int,
    *,
    W: Array | None = None,
    b: Array | None = None,
    X_test: Array | None = None,
    y_test: Array | None = None,
    X_ood: Array | None = None,
    y_ood: Array | None = None,
    predictions: Array | None = None,
    weighted: bool = False,
    min_count: int = 1,
    max_count: int | None = None,
    classes: Iterable[int] | None = None,
    dist_exp: float = 1.0,
    ddof: int = 0,
    class_ddof: int = 1,
    divide_by_k: bool = True,
) -> dict[str, float]:
    """Return every metric of the base set that the inputs allow, by name.

    X (N, D), y (N,), W (K, D), b (K,). `predictions` are the classifier's decisions on the test
    samples, or on the training samples where there is no test, and replace W and b in nc4.
    """
    if X_test is not None and y_test is None:
        raise ValueError("found X_test without y_test; expected both; pass the test labels")
    classes = None if classes is None else list(classes)
    chosen = select(y, n_classes, min_count, max_count, classes)
    if len(chosen) < 2:
        raise ValueError(
            f"found {len(chosen)} chosen classes; expected 2 or more; widen the filter"
        )
    filtered = min_count > 1 or max_count is not None or classes is not None
    train = geometry(X, y, chosen, weighted, ddof)
    values = {**collapse(train, dist_exp, divide_by_k), **structure(train, class_ddof)}
    if W is not None:
        values |= duality(train, np.asarray(W)[chosen], class_ddof)
    if W is not None or predictions is not None:
        samples = (X, y) if X_test is None else (X_test, y_test)
        values["nc4_agree"] = _agreement(train, chosen, *samples, W, b, predictions, filtered)
    if X_ood is not None:
        values["nc5_ood_dev"] = orthogonality_deviation(train.means, X_ood, y_ood)
    return {name: float(value) for name, value in values.items()}


def _agreement(
    train: Geometry,
    chosen: Array,
    X: Array,
    y: Array,
    W: Array | None,
    b: Array | None,
    predictions: Array | None,
    filtered: bool,
) -> float:
    """Return NC4: the share of samples whose nearest chosen mean is what the classifier says."""
    X, y = np.asarray(X), np.asarray(y)
    rows = np.isin(y, chosen) if filtered else y >= 0
    if not rows.any():
        return np.nan
    if predictions is None:
        said = classifier_decisions(X[rows], W, b)
    else:
        said = np.asarray(predictions)[rows]
    return float((nearest_means(X[rows], train.means, chosen) == said).mean())


# ------------------------------------------------------------------------ exactly known answers


def simplex_etf(
    K: int, D: int, s: float, sigma: float, n: int = 1, *, dist_exp: float = 1.0
) -> tuple[Array, Array, dict[str, float]]:
    """Return X, y and known metrics: a simplex ETF of norm s, S_W = sigma^2 I, D >= K - 1.

    Class c has n copies of the 2 D points m_c +- sigma sqrt(D) e_j, and m_G = 0.
    """
    if K < 2 or D < K - 1:
        raise ValueError(f"found K = {K}, D = {D}; expected 2 <= K <= D + 1")
    means = np.zeros((K, D))
    means[:, : K - 1] = s * np.sqrt(K / (K - 1)) * helmert(K).T
    return *_crosses(means, sigma, n), _simplex_answers(K, D, s, sigma, dist_exp)


def orthogonal_frame(
    K: int, D: int, s: float, sigma: float, n: int = 1, *, dist_exp: float = 1.0
) -> tuple[Array, Array, dict[str, float]]:
    """Return X, y and known metrics: means s e_c, S_W = sigma^2 I, D >= K; samples as above.

    Centred, the frame is a simplex ETF of squared norm s^2 (K - 1) / K.
    """
    if K < 2 or D < K:
        raise ValueError(f"found K = {K}, D = {D}; expected 2 <= K <= D")
    answers = _simplex_answers(K, D, s * np.sqrt((K - 1) / K), sigma, dist_exp)
    return *_crosses(s * np.eye(K, D), sigma, n), answers


def _crosses(means: Array, sigma: float, n: int) -> tuple[Array, Array]:
    """Return X and y: around each mean, n copies of a cross with covariance sigma^2 I."""
    K, D = means.shape
    arms = sigma * np.sqrt(D) * np.concatenate([np.eye(D), -np.eye(D)] * n)
    X = (means[:, None, :] + arms[None, :, :]).reshape(-1, D)
    return X, np.repeat(np.arange(K), len(arms))


def _simplex_answers(K: int, D: int, s: float, sigma: float, dist_exp: float) -> dict[str, float]:
    """Return the metrics of a simplex ETF of norm s with S_W = sigma^2 I, in closed form."""
    d2 = 2 * K * s**2 / (K - 1)
    on_sphere = np.sqrt(2 * K / (K - 1))
    nc1 = sigma**2 * (K - 1) ** 2 / (K * s**2)
    return {
        "nc1_pinv": nc1,
        "nc1_svd": nc1,
        "nc1_quot": D * sigma**2 / s**2,
        "nc1_cdnv": D * sigma**2 / d2**dist_exp,
        "n_coincident_pairs": 0.0,
        "nc2_etf_err": 0.0,
        "nc2_norm_mean": s,
        "nc2_norm_var": 0.0,
        "nc2_lognorm_mean": float(np.log(s)),
        "nc2_lognorm_var": 0.0,
        "nc2_interference_mean": -(s**2) / (K - 1),
        "nc2_interference_var": 0.0,
        "nc2g_dist_mean": float(on_sphere),
        "nc2g_dist": 0.0,
        "nc2g_log_mean": float(-np.log(on_sphere)),
        "nc2g_log": 0.0,
        "nc2g_riesz_mean": float(np.sign(D - 2) * on_sphere ** (2.0 - D)),
        "nc2g_riesz": 0.0,
    }


# ------------------------------------------------------- what the field reports beside the base set


def _collapse_index(within: Array, centred: Array) -> float:
    """Return 1 - tr(pinv(S_W + S_B) S_B) / min(D, K - 1) without the cancellation at collapse.

    In the range of S_B the inverse of S_T is that of A + S_B, with A the Schur complement of S_W.
    """
    K, D = centred.shape
    _, s, V = np.linalg.svd(centred.astype(np.float64), full_matrices=True)
    rank = int((s > D * np.finfo(np.float64).eps * s[0]).sum())
    S = V @ within.astype(np.float64) @ V.T
    own, cross, rest = S[:rank, :rank], S[:rank, rank:], S[rank:, rank:]
    values, Q = np.linalg.eigh(rest)
    varies = values > D * np.finfo(np.float64).eps * np.trace(S)
    reduced = cross @ Q[:, varies] / np.sqrt(values[varies])
    A = own - reduced @ reduced.T
    left = np.trace(np.linalg.solve(A + np.diag(s[:rank] ** 2 / K), A))
    full = min(D, K - 1)
    return float((full - rank + left) / full)


def _corrected_cdnv(train: Geometry, dist_exp: float) -> float:
    """Return the mean CDNV without the bias of small classes, over pairs where it exists."""
    i, j = pairs(len(train.means))
    n, several = train.counts, train.counts >= 2
    V = np.where(several, train.traces / np.maximum(n - 1, 1), 0)
    sizes = (train.means**2).sum(axis=1)
    whole, errors = squared_distances(train.means), V[i] / n[i] + V[j] / n[j]
    d2 = whole - errors
    good = several[i] & several[j] & (d2 > SAME * (sizes[i] + sizes[j]))
    good &= d2 > 1e-9 * (whole + errors)  # less is rounding error, where the exact value is 0
    return mean_and_variance((V[i] + V[j])[good] / 2 / d2[good] ** dist_exp, ddof=0)[0]


def _nearest_cdnv(train: Geometry, dist_exp: float) -> float:
    """Return the mean over classes of the CDNV with the nearest other mean."""
    values = []
    for c, m in enumerate(train.means):
        d2 = ((train.means - m) ** 2).sum(axis=1)
        d2[c] = np.inf
        k = int(d2.argmin())
        if d2[k] > SAME * ((m**2).sum() + (train.means[k] ** 2).sum()):
            values.append((train.variances[c] + train.variances[k]) / 2 / d2[k] ** dist_exp)
    known = np.array(values)
    return mean_and_variance(known[~np.isnan(known)], ddof=0)[0]


def more_collapse(train: Geometry, dist_exp: float = 1.0) -> dict[str, float]:
    """Return NC1 beside the base set."""
    K, D = train.centred.shape
    S_W, S_B = train.within, train.centred.T @ train.centred / K
    ratios = train.variances[train.directed] / (train.centred[train.directed] ** 2).sum(axis=1)
    ratios = ratios[~np.isnan(ratios)]
    quantiles = [np.nan] * 3
    if len(ratios):
        quantiles = [np.quantile(ratios.astype(np.float64), q) for q in (0.1, 0.5, 0.9)]
    i, j = pairs(K)
    apart = ~coincident(train.means)
    lines = (train.means[j] - train.means[i])[apart]
    along = ((lines @ S_W) * lines).sum(axis=1) / (lines**2).sum(axis=1) ** 2
    within, between = (np.asarray(S, np.float64) for S in (S_W, S_B))
    ridge = 1e-6 * np.trace(within) / D
    whole = np.trace(S_W) + np.trace(S_B)
    values = {
        "nc1_trace_share": np.trace(S_W) / whole if whole else np.nan,
        "nc1_vci": _collapse_index(S_W, train.centred),
        "nc1_lda": np.trace(np.linalg.solve(within + ridge * np.eye(D), between))
        if ridge > 0
        else np.nan,
        "nc1_v_ratio_mean": mean_and_variance(ratios, ddof=0)[0],
        "nc1_v_ratio_q10": quantiles[0],
        "nc1_v_ratio_median": quantiles[1],
        "nc1_v_ratio_q90": quantiles[2],
        "nc1_cdnv_nearest": _nearest_cdnv(train, dist_exp),
        "nc1_cdnv_corrected": _corrected_cdnv(train, dist_exp),
        "nc1_cdnv_directional": mean_and_variance(along, ddof=0)[0],
    }
    return {name: float(value) for name, value in values.items()}


def more_structure(train: Geometry, class_ddof: int = 1) -> dict[str, float]:
    """Return NC2 beside the base set."""
    K = len(train.means)
    norms = np.sqrt((train.centred**2).sum(axis=1))
    units = unit_rows(train.centred[train.directed])
    i, j = pairs(len(units))
    cos = (units[i] * units[j]).sum(axis=1)
    r = np.sqrt(squared_distances(units))
    grid = np.full((len(units), len(units)), np.inf)
    grid[i, j] = grid[j, i] = r
    s = np.longdouble(units.shape[1] - 2)
    apart = r[r**2 > 2 * SAME]
    with np.errstate(divide="ignore"):
        riesz = [np.log(np.abs(v)) for v in _moments_of(np.sign(s) * apart ** (-s))]
    dev = np.abs(cos + 1 / (K - 1))
    values = {
        "nc2g_riesz_log_mean": riesz[0],
        "nc2g_riesz_log": riesz[1],
        "nc2_norm_cv": norms.std(ddof=class_ddof) / norms.mean() if norms.any() else np.nan,
        "nc2_cos_mean": mean_and_variance(cos, ddof=0)[0],
        "nc2_cos_std": np.sqrt(mean_and_variance(cos, ddof=0)[1]),
        "nc2_cos_dev_mean": mean_and_variance(dev, ddof=0)[0],
        "nc2_cos_dev_max": dev.max(initial=-np.inf),
        "nc2_coherence": np.abs(cos).max(initial=-np.inf),
        "nc2_uniformity": np.log(mean_and_variance(np.exp(-2 * r**2), ddof=0)[0]),
        "nc2_tammes": r.min(initial=np.inf),
        "nc2_tammes_mean": mean_and_variance(grid.min(axis=1, initial=np.inf), ddof=0)[0],
    }
    return {name: float(value) for name, value in values.items()}


def _moments_of(values: Array) -> tuple[Any, Any]:
    """Return mean and variance in the dtype given, beyond the range of float64; NaN of nothing."""
    if not len(values):
        return np.nan, np.nan
    mean = values.sum() / len(values)
    return mean, ((values - mean) ** 2).sum() / len(values)


def more_duality(
    train: Geometry, W: Array, b: Array | None = None, class_ddof: int = 1
) -> dict[str, float]:
    """Return NC3 beside the base set, for the classifier rows of the classes used."""
    W = wide(W)
    norms = np.sqrt((W**2).sum(axis=1))
    size = np.sqrt((train.centred**2).sum())
    logits = W @ train.global_mean + (0 if b is None else wide(b))
    values = {
        "nc3_papyan": np.nan,
        "nc3_bias": np.sqrt((logits**2).sum()),
        "nc2_weight_norm_cv": norms.std(ddof=class_ddof) / norms.mean(),
        "nc2_weight_etf_err": structure_error(W, W),
    }
    if size:
        apart = W / np.sqrt((W**2).sum()) - train.centred / size
        values["nc3_papyan"] = (apart**2).sum()
    return {name: float(value) for name, value in values.items()}


def _entropy_rank(values: Array) -> float:
    shares = values[values > 0] / values.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def spectra(X: Array, train: Geometry) -> dict[str, float]:
    """Return ranks of S_W, S_B and the covariance of the samples X of the classes used."""
    X = np.asarray(X, np.float64)
    residuals = X - X.mean(axis=0)
    K = len(train.means)
    found = {"spec_rankme": _entropy_rank(np.linalg.svd(X, compute_uv=False))}
    for name, matrix in (
        ("within", train.within.astype(np.float64)),
        ("between", (train.centred.T @ train.centred / K).astype(np.float64)),
        ("total", residuals.T @ residuals / len(X)),
    ):
        values = np.maximum(np.linalg.eigvalsh(matrix), 0)
        found |= {f"spec_{name}_{of}": np.nan for of in ("erank", "participation", "stable_rank")}
        if not values.any():
            continue
        found[f"spec_{name}_erank"] = _entropy_rank(values)
        found[f"spec_{name}_participation"] = float(values.sum() ** 2 / (values**2).sum())
        found[f"spec_{name}_stable_rank"] = float(values.sum() / values.max())
    return found


# ------------------------------------------------------------------------------ the whole catalogue


def _test_to_train(train: Geometry, chosen: Array, X: Array, y: Array) -> float:
    """Return the mean over classes of the mean squared distance of test samples to train's mean."""
    apart = [
        ((wide(X[y == c]) - train.means[k]) ** 2).sum(axis=1).mean()
        for k, c in enumerate(chosen)
        if (y == c).any()
    ]
    return float(np.mean(apart)) if apart else np.nan


def _exact_directional(train: Geometry, chosen: Array, X: Array, y: Array) -> float:
    """Return the mean over ordered pairs i, j of u^T S_i u / d_ij^2."""
    values = []
    for i, c in enumerate(chosen):
        own = wide(X[y == c]) - train.means[i]
        for j in range(len(chosen)):
            line = train.means[j] - train.means[i]
            sizes = (train.means[i] ** 2).sum() + (train.means[j] ** 2).sum()
            if i != j and (line**2).sum() > SAME * sizes:
                values.append(((own @ line) ** 2).mean() / (line**2).sum() ** 2)
    return float(np.mean(values)) if values else np.nan


def every_metric(
    X: Array,
    y: Array,
    n_classes: int,
    *,
    W: Array,
    b: Array,
    X_test: Array,
    y_test: Array,
    X_ood: Array,
    y_ood: Array | None = None,
    weighted: bool = False,
    dist_exp: float = 1.0,
    ddof: int = 0,
    class_ddof: int = 1,
    divide_by_k: bool = True,
    **filters: Any,
) -> dict[str, float]:
    """Return every metric there is, by name; NaN where the samples leave it undefined.

    As `base_metrics`, with test and outside samples and a classifier.
    """
    conventions = {"weighted": weighted, "dist_exp": dist_exp, "ddof": ddof}
    conventions |= {"class_ddof": class_ddof, "divide_by_k": divide_by_k}
    chosen = select(y, n_classes, **filters)
    train = geometry(X, y, chosen, weighted, ddof)
    values = base_metrics(
        X, y, n_classes, W=W, b=b, X_test=X_test, y_test=y_test, X_ood=X_ood, y_ood=y_ood,
        **conventions, **filters,
    )  # fmt: skip
    values |= more_collapse(train, dist_exp) | more_structure(train, class_ddof)
    values |= more_duality(train, np.asarray(W)[chosen], np.asarray(b)[chosen], class_ddof)
    values |= spectra(np.asarray(X)[np.isin(y, chosen)], train)
    rows = np.isin(y_test, chosen) if filters else np.asarray(y_test) >= 0
    said = classifier_decisions(X_test[rows], W, b)
    near = nearest_means(X_test[rows], train.means, chosen)
    values["nc4_ncc_accuracy"] = float((near == y_test[rows]).mean())
    values["nc4_clf_accuracy"] = float((said == y_test[rows]).mean())
    values["nc1_test_to_train"] = _test_to_train(train, chosen, X_test, y_test)
    values["nc1_cdnv_directional_exact"] = _exact_directional(train, chosen, np.asarray(X), y)
    return {name: value if np.isfinite(value) else np.nan for name, value in values.items()}
