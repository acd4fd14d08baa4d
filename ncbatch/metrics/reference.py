"""Functions with the names, positional order and defaults of the field's reference package.

All that take class means take a `Moments` as first argument too, as in ``simplex_etf_error(state)``
or ``self_duality_error(state, W)``: in the place of means and variances, of the classes that have
samples. `m_G` then is the mean of those means, and of W (K, D) their rows are taken.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any, ParamSpec, Protocol, TypeVar, overload

from array_api_compat import device, is_array_api_obj

from ncbatch.arrays.namespace import Array, as_float64, namespace, scalar
from ncbatch.arrays.rows import (
    CentredRows,
    block_rows,
    mean_of_rows,
    row_blocks,
    square_norms,
    take_rows,
)
from ncbatch.errors import UsageError
from ncbatch.metrics.geometry import (
    between_class_spectrum,
    directions,
    structure_error,
)
from ncbatch.states.decisions import Decisions
from ncbatch.states.moments import Moments
from ncbatch.states.pairs.stats import Tally
from ncbatch.states.pairs.sweep import PairTiles, sweep_pairs

Kernel = Callable[..., Array]
# Classes of a tile's side where none is given.
_TILE_CLASSES = 512

Given = ParamSpec("Given")
Result = TypeVar("Result", covariant=True)

# What a `Moments` says of its classes, by the name of the parameter that takes it.
_OF_MOMENTS: dict[str, Callable[[Moments], Array]] = {
    "M": lambda moments: moments.means,
    "V_norms": lambda moments: moments.variances,
    "V_intra": lambda moments: moments.within_covariance,
}


class OfMeans(Protocol[Given, Result]):
    """A function of arrays, whose means and variances a `Moments` may give."""

    @overload
    def __call__(self, moments: Moments, /, *arguments: Any, **options: Any) -> Result: ...
    @overload
    def __call__(self, *arguments: Given.args, **options: Given.kwargs) -> Result: ...


def takes_moments(function: Callable[Given, Result]) -> OfMeans[Given, Result]:
    """Let a `Moments` stand for the arrays that follow from it, and refuse mixed libraries."""
    signature = inspect.signature(function)
    others = [name for name in signature.parameters if name not in _OF_MOMENTS]

    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        if arguments and isinstance(arguments[0], Moments):
            if len(arguments) > 1 + len(others):
                raise UsageError(
                    f"{len(arguments) - 1} arguments beside moments", ", ".join(others) or "none"
                )
            options |= dict(zip(others, arguments[1:], strict=False))
            options = _of_moments(arguments[0].seen(), signature, options)
            arguments = ()
        # What is read by blocks, or is no array, is looked at where it is used.
        if arrays := [a for a in (*arguments, *options.values()) if is_array_api_obj(a)]:
            namespace(*arrays)
        return function(*arguments, **options)

    return call


def _of_moments(
    moments: Moments, signature: inspect.Signature, options: dict[str, Any]
) -> dict[str, Any]:
    """Add what moments of seen classes give to the other arguments of a function."""
    given = {name: of(moments) for name, of in _OF_MOMENTS.items() if name in signature.parameters}
    if "m_G" in signature.parameters:
        given["m_G"] = mean_of_rows(moments.means)
    if isinstance(outside := options.get("m_G_ood"), Moments):
        given["m_G_ood"] = mean_of_rows(outside.seen().means)
        del options["m_G_ood"]
    if "W" in options and options["W"].shape[0] > moments.means.shape[0]:
        given["W"] = namespace(options["W"]).take(options["W"], moments.classes, axis=0)
        del options["W"]
    return given | options


# Kernels between directions of class means: distances, logarithmic and Riesz energies.


def pair_grid(
    data: Array, tile: Callable[[slice, slice], Array], tile_size: int | None = None
) -> Array:
    """Fill a K x K array of float64 tile by tile.

    Parameters
    ----------
    data : array (K, D)
        Gives K, the library and the device.
    tile : callable
        ``tile(rows, columns)`` gives the grid's entries there.
    tile_size : int, optional
        Classes of a tile's side.
    """
    xp = namespace(data)
    n_classes = data.shape[0]
    grid = xp.empty((n_classes, n_classes), dtype=xp.float64, device=device(data))
    for rows, columns in product(row_blocks(n_classes, tile_size or _TILE_CLASSES), repeat=2):
        grid[rows, columns] = tile(rows, columns)
    return grid


def dist_kernel(data: Array, tile_size: int | None = None) -> Array:
    """Compute the grid of Euclidean distances between the rows of `data`.

    Parameters
    ----------
    data : array (K, D)
        Vectors.
    tile_size : int, optional
        Rows of a tile's side.

    Returns
    -------
    array (K, K) of float64
        Distances; 0 on the diagonal.

    Examples
    --------
    >>> import numpy as np
    >>> dist_kernel(np.array([[0.0, 0.0], [3.0, 4.0]]))
    array([[0., 5.],
           [5., 0.]])
    """
    return namespace(data).sqrt(_square_distances(data, tile_size))


def log_kernel(data: Array, exponent: float = -1, tile_size: int | None = None) -> Array:
    """Compute the grid of log(distance^exponent) between the rows of `data` (Liu et al. 2023).

    Returns
    -------
    array (K, K) of float64
        ``-exponent`` times infinity where rows coincide, the diagonal included.
    """
    xp = namespace(data)
    squares = _square_distances(data, tile_size)
    apart = squares > 0.0
    logs = 0.5 * exponent * xp.log(xp.where(apart, squares, 1.0))
    return xp.where(apart, logs, -math.copysign(math.inf, exponent) if exponent else 0.0)


def riesz_kernel(data: Array, tile_size: int | None = None) -> Array:
    """Compute the grid of sign(s) distance^(-s), s = D - 2, between rows (Liu et al. 2023).

    Returns
    -------
    array (K, K) of float64
        Overflows for large D: `kernel_stats` and the metric ``nc2g_riesz_log_mean`` do not.
    """
    xp = namespace(data)
    s = data.shape[1] - 2
    squares = _square_distances(data, tile_size)
    if not s:
        return xp.zeros_like(squares)
    apart = squares > 0.0
    logs = -0.5 * s * xp.log(xp.where(apart, squares, 1.0))
    # Above 709.78 exp overflows; inf without a warning is what the formula gives.
    values = xp.where(logs > 709.0, xp.inf, xp.exp(xp.clip(logs, None, 709.0)))
    return math.copysign(1.0, s) * xp.where(apart, values, math.inf if s > 0 else 0.0)


@takes_moments
def kernel_grid(
    M: Array,
    m_G: Array | float = 0,
    kernel: Kernel = dist_kernel,
    tile_size: int | None = None,
) -> Array:
    """Apply a kernel to the directions u_c of the centred means.

    Parameters
    ----------
    M : array (K, D)
        Class means.
    m_G : array (D,) or 0, optional
        Global mean.
    kernel : callable, optional
        `dist_kernel`, `log_kernel`, `riesz_kernel`, or any ``kernel(data, tile_size=...)``.
    tile_size : int, optional
        Passed on.

    Returns
    -------
    array (K, K)
        The grid; a mean equal to `m_G` counts as the zero vector.
    """
    return kernel(directions(as_float64(M) - m_G), tile_size=tile_size)


@takes_moments
def kernel_stats(
    M: Array,
    m_G: Array | float = 0,
    kernel: Kernel = dist_kernel,
    tile_size: int | None = None,
) -> tuple[float, float]:
    """Give mean and variance (ddof 0) of a kernel over pairs of centred directions.

    Parameters
    ----------
    M, m_G, kernel, tile_size
        As for `kernel_grid`. The three kernels of this module are swept tile by tile; for any
        other callable its K x K grid is held.

    Returns
    -------
    tuple of float
        Mean and variance; without coincident directions for the logarithmic and Riesz kernels.
    """
    quantity = {dist_kernel: "distance", log_kernel: "log", riesz_kernel: "riesz"}.get(kernel)
    if quantity is None:
        grid = kernel_grid(M, m_G, kernel, tile_size)
        index = namespace(grid).arange(grid.shape[0], device=device(grid))
        tally = Tally.of(grid[index[:, None] < index[None, :]])
    else:
        stats = sweep_pairs(M, m_G, quantities=[quantity], tile_classes=tile_size)
        tally = getattr(stats, quantity)
    if not tally.n:
        return math.nan, math.nan
    if quantity == "riesz":
        mean = math.copysign(_exp(tally.log_abs_mean), tally.mean)
        return mean, _exp(tally.log_variance)
    return tally.mean, tally.variance


def _square_distances(data: Array, tile_size: int | None) -> Array:
    pairs = PairTiles(data, mean_of_rows(data), quantities=[])
    return pair_grid(data, pairs.square_distances, tile_size)


def _exp(logarithm: float) -> float:
    return math.exp(logarithm) if logarithm < 709.0 else math.inf


@takes_moments
def mean_norms(
    M: Array, m_G: Array | float = 0, post_funcs: Sequence[Callable[[Array], Array]] = ()
) -> Array:
    """Compute |m_c - m_G| per class, then apply `post_funcs` in turn.

    Parameters
    ----------
    M : array (K, D)
        Class means.
    m_G : array (D,) or 0, optional
        Global mean.
    post_funcs : sequence of callable, optional
        Functions of an array (K,), such as a logarithm.

    Returns
    -------
    array (K,)
        The norms.
    """
    result = namespace(M).sqrt(square_norms(CentredRows(M, m_G)))
    for apply in post_funcs:
        result = apply(result)
    return result


@takes_moments
def interference_grid(M: Array, m_G: Array | float = 0) -> Array:
    """Compute the K x K grid of inner products of centred means, of an array in memory."""
    return pair_grid(M, PairTiles(M, m_G, quantities=[]).interference)


@takes_moments
def simplex_etf_error(M: Array, m_G: Array | float = 0) -> float:
    """Measure how far the Gram matrix of centred means is from a simplex ETF (Kothapalli 2023).

    Parameters
    ----------
    M : array (K, D)
        Class means.
    m_G : array (D,) or 0, optional
        Global mean.
    """
    centred = CentredRows(M, m_G)
    return structure_error(centred, centred)


@takes_moments
def self_duality_error(W: Array, M: Array, m_G: Array | float = 0) -> float:
    """Measure how far W Mc^T is from a simplex ETF (Kothapalli 2023).

    Parameters
    ----------
    W : array (K, D)
        Classifier rows.
    M : array (K, D)
        Class means.
    m_G : array (D,) or 0, optional
        Global mean.
    """
    return structure_error(W, CentredRows(M, m_G))


# NC1: variability within classes against distances between them.


@takes_moments
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
    within = as_float64(V_intra)
    centred = CentredRows(M, m_G)
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


@takes_moments
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
        M,
        mean_of_rows(M),
        V_norms,
        quantities=["cdnv"],
        dist_exp=dist_exp,
        tile_classes=tile_size,
    )
    return stats.cdnv.mean if stats.cdnv.n else math.nan


@takes_moments
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
        power = xp.where(apart, squares, 1.0) ** dist_exp
        return xp.where(apart, spread / power, xp.inf)

    return pair_grid(M, tile, tile_size)


@takes_moments
def similarities(W: Array, M: Array, m_G: Array | float = 0, cos: bool = False) -> Array:
    """Compute w_c . (m_c - m_G), or its cosine, per class.

    Parameters
    ----------
    W : array (K, D)
        Classifier rows.
    M : array (K, D) or (D,)
        Class means.
    m_G : array (D,) or 0, optional
        Global mean.
    cos : bool, optional
        Cosines instead of inner products; 0 for a zero vector.

    Returns
    -------
    array (K,)
        One value per class.

    Examples
    --------
    >>> import numpy as np
    >>> similarities(np.array([[1.0, 1.0]]), np.array([[2.0, 0.0]]))
    array([2.])
    """
    xp = namespace(W, M)
    return xp.concat([xp.sum(w * m, axis=1) for w, m in _paired_blocks(W, M, m_G, cos)])


@takes_moments
def distance_norms(W: Array, M: Array, m_G: Array | float = 0, norm: bool = True) -> Array:
    """Compute |w_c - (m_c - m_G)| per class, of unit vectors unless `norm` is false.

    Parameters
    ----------
    W, M : array (K, D)
        Classifier rows and class means.
    m_G : array (D,) or 0, optional
        Global mean.
    norm : bool, optional
        Scale both to unit length first.

    Returns
    -------
    array (K,)
        One distance per class.
    """
    xp = namespace(W, M)
    squares = [xp.sum((w - m) ** 2, axis=1) for w, m in _paired_blocks(W, M, m_G, norm)]
    return xp.sqrt(xp.concat(squares))


def _paired_blocks(
    W: Array, M: Array, m_G: Array | float, unit: bool
) -> Iterator[tuple[Array, Array]]:
    """Give blocks of w_c and of m_c - m_G, scaled to `unit` length or not.

    A single row on one side goes with every other.
    """
    centred = CentredRows(M if len(M.shape) == 2 else M[None, :], m_G)
    sizes = W.shape[0], centred.shape[0]
    for part in row_blocks(max(sizes), block_rows(W.shape[1])):
        of_w, of_m = (slice(0, 1) if size == 1 else part for size in sizes)
        pair = (as_float64(take_rows(W, of_w)), centred[of_m])
        yield (directions(pair[0]), directions(pair[1])) if unit else pair


def clf_ncc_agreement(
    decisions: Decisions, indices: Sequence[int] | Array | None = None, weighted: bool = True
) -> float:
    """Give the share of samples whose nearest class mean is the classifier's decision.

    Parameters
    ----------
    decisions : Decisions
        Counts per class.
    indices : sequence of int, optional
        Only samples of these classes.
    weighted : bool, optional
        Weigh classes by their samples.

    Returns
    -------
    float
        Between 0 and 1 (Papyan et al. 2020); NaN without samples.
    """
    return decisions.rate("agreements", indices, weighted)


@takes_moments
def orthogonality_deviation(M: Array, m_G_ood: Array | float = 0) -> float:
    """Average |cos| between class means and the mean of out-of-distribution data.

    Parameters
    ----------
    M : array (K, D)
        Class means, uncentred.
    m_G_ood : array (D,)
        Mean of the OOD split's class means.

    Returns
    -------
    float
        0 when all are orthogonal (Ammar et al. 2024).
    """
    xp = namespace(M)
    if not hasattr(m_G_ood, "shape"):
        m_G_ood = xp.zeros((M.shape[1],), dtype=xp.float64, device=device(M)) + m_G_ood
    return scalar(xp.mean(xp.abs(similarities(M, m_G_ood, cos=True))))
