"""NC1: variability within classes against distances between them."""

from __future__ import annotations

import math

from ncbatch.arrays import Array, CentredRows, as_float64, mean_of_rows, namespace, scalar
from ncbatch.errors import UsageError
from ncbatch.metrics.kernels import pair_grid
from ncbatch.metrics.spectrum import between_class_spectrum
from ncbatch.metrics.structure import square_norms
from ncbatch.stats.pair_tiles import PairTiles, sweep_pairs


def covariance_ratio(
    V_intra: Array, M: Array, m_G: Array | float = 0, metric: str = "pinv"
) -> float:
    """Relate the within-class to the between-class covariance.

    Parameters
    ----------
    V_intra : array (D, D)
        Within-class covariance S_W.
    M : array (K, D)
        Class means.
    m_G : array (D,) or 0, optional
        Global mean.
    metric : {"pinv", "svd", "quotient"}, optional
        ``pinv``: tr(pinv(S_B) S_W) / K (Papyan et al. 2020); ``svd``: the same with the leading
        min(K - 1, D, rank) eigenpairs (Han et al. 2022); ``quotient``: tr S_W / tr S_B (Tirer et
        al. 2023).

    Returns
    -------
    float
        The ratio; NaN when all means equal `m_G`.

    Raises
    ------
    UsageError
        For another `metric`.

    Examples
    --------
    >>> import numpy as np
    >>> M = np.array([[1.0, 0.0], [-1.0, 0.0]])
    >>> round(covariance_ratio(0.5 * np.eye(2), M), 12)
    0.25
    """
    if metric not in ("pinv", "svd", "quotient"):
        raise UsageError(f"covariance ratio '{metric}'", "pinv, svd or quotient")
    within, centred = as_float64(V_intra), CentredRows(M, m_G)
    xp = namespace(within, centred)
    n_classes = centred.shape[0]
    if metric == "quotient":
        between = scalar(xp.sum(square_norms(centred))) / n_classes
        return scalar(xp.linalg.trace(within)) / between if between else math.nan
    spectrum = between_class_spectrum(centred)
    if not spectrum.rank:
        return math.nan
    limit = n_classes - 1 if metric == "svd" else None
    return spectrum.inverse_trace(within, limit) / n_classes


def variability_cdnv(
    V_norms: Array, M: Array, dist_exp: float = 1.0, tile_size: int | None = None
) -> float:
    """Average the class-distance normalised variance (CDNV) over all pairs of classes.

    Parameters
    ----------
    V_norms : array (K,)
        V_c, mean squared distance to the class mean.
    M : array (K, D)
        Class means.
    dist_exp : float, optional
        p in (V_i + V_j) / (2 d_ij^(2p)).
    tile_size : int, optional
        Classes of a tile's side; no K x K array is held in any case.

    Returns
    -------
    float
        Mean over pairs of distinct means (Galanti et al. 2021); NaN without any.
    """
    stats = sweep_pairs(
        M, mean_of_rows(M), V_norms,
        quantities=["cdnv"], dist_exp=dist_exp, tile_classes=tile_size,
    )  # fmt: skip
    mean: float = stats.cdnv.mean
    return mean if stats.cdnv.n else math.nan


def class_dist_norm_vars(
    V_norms: Array, M: Array, dist_exp: float = 1.0, tile_size: int | None = None
) -> Array:
    """Compute the K x K grid of CDNVs of an array in memory.

    Parameters
    ----------
    V_norms, M, dist_exp, tile_size
        As for `variability_cdnv`.

    Returns
    -------
    array (K, K) of float64
        Infinite where means coincide, the diagonal included, and 0 / 0 there counts as infinite.
    """
    xp = namespace(M)
    variances = as_float64(V_norms)
    pairs = PairTiles(M, mean_of_rows(M), variances, quantities=["cdnv"], dist_exp=dist_exp)

    def tile(rows: slice, columns: slice) -> Array:
        squares = pairs.square_distances(rows, columns)
        spread = 0.5 * (variances[rows][:, None] + variances[columns][None, :])
        apart = squares > 0.0
        power = xp.where(apart, squares, xp.ones_like(squares)) ** dist_exp
        return xp.where(apart, spread / power, xp.inf)

    return pair_grid(M, tile, tile_size)
