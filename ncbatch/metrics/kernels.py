"""Kernels between directions of class means: distances, logarithmic and Riesz energies."""

from __future__ import annotations

import math
from collections.abc import Callable

from array_api_compat import device

from ncbatch.arrays import Array, as_float64, mean_of_rows, namespace, row_blocks, scalar
from ncbatch.stats.pair_tiles import PairTiles, sweep_pairs

Kernel = Callable[..., Array]
# Classes of a tile's side where none is given.
_TILE_CLASSES = 512


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
    for rows in row_blocks(n_classes, tile_size or _TILE_CLASSES):
        for columns in row_blocks(n_classes, tile_size or _TILE_CLASSES):
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
    logs = 0.5 * exponent * xp.log(xp.where(apart, squares, xp.ones_like(squares)))
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
    apart = squares > 0.0
    sign = math.copysign(1.0, s) if s else 0.0
    logs = -0.5 * s * xp.log(xp.where(apart, squares, xp.ones_like(squares)))
    # Above 709.78 exp overflows; inf without a warning is what the formula gives.
    values = xp.where(logs > 709.0, xp.inf, xp.exp(xp.clip(logs, None, 709.0)))
    limit = math.inf if s > 0 else (0.0 if s < 0 else 1.0)
    return sign * xp.where(apart, values, limit) if s else xp.zeros_like(squares)


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
        return _grid_stats(kernel_grid(M, m_G, kernel, tile_size))
    stats = sweep_pairs(M, m_G, quantities=[quantity], tile_classes=tile_size)
    tally = getattr(stats, quantity)
    if not tally.n:
        return math.nan, math.nan
    mean = (
        math.copysign(_exp(tally.log_abs_mean), tally.mean) if quantity == "riesz" else tally.mean
    )
    return mean, _exp(tally.log_variance) if quantity == "riesz" else tally.variance


def directions(centred: Array) -> Array:
    """Scale rows to unit length; a zero row stays zero."""
    xp = namespace(centred)
    norms = xp.sqrt(xp.sum(centred * centred, axis=1))
    norms = xp.where(norms > 0.0, norms, xp.ones_like(norms))
    return centred / norms[:, None]


def _square_distances(data: Array, tile_size: int | None) -> Array:
    pairs = PairTiles(data, mean_of_rows(data), quantities=[])

    def tile(rows: slice, columns: slice) -> Array:
        return pairs.square_distances(rows, columns)

    return pair_grid(data, tile, tile_size)


def _grid_stats(grid: Array) -> tuple[float, float]:
    xp = namespace(grid)
    index = xp.arange(grid.shape[0], device=device(grid))
    values = grid[index[:, None] < index[None, :]]
    mean = scalar(xp.mean(values))
    return mean, scalar(xp.mean((values - mean) ** 2))


def _exp(logarithm: float) -> float:
    return math.exp(logarithm) if logarithm < 709.0 else math.inf
