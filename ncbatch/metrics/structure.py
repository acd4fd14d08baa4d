"""NC2: how near the class means are to a simplex equiangular tight frame (ETF)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

from array_api_compat import device

from ncbatch.arrays import (
    Array,
    CentredRows,
    as_float64,
    block_rows,
    float64_blocks,
    namespace,
    product_rows,
    row_blocks,
    scalar,
    symmetric_product,
    take_rows,
)
from ncbatch.errors import DataError
from ncbatch.metrics.kernels import pair_grid

# Classes of a tile's side where K x K products are summed.
_LEAST_SIDE, _MOST_SIDE = 256, 1024


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


def interference_grid(M: Array, m_G: Array | float = 0) -> Array:
    """Compute the K x K grid of inner products of centred means, of an array in memory."""
    xp, centred = namespace(M), CentredRows(M, m_G)

    def tile(rows: slice, columns: slice) -> Array:
        return xp.matmul(centred[rows], xp.matrix_transpose(centred[columns]))

    return pair_grid(centred, tile)


def structure_error(A: Array, B: Array) -> float:
    """Measure how far G = A B^T is from a simplex ETF (Kothapalli 2023).

    Parameters
    ----------
    A, B : array (K, D) or view of rows
        Two sets of vectors, one per class.

    Returns
    -------
    float
        ``|| G/|G|_F - (I - 1 1^T/K)/sqrt(K-1) ||_F``; NaN when G is zero.

    Raises
    ------
    DataError
        When shapes differ.

    Notes
    -----
    Nothing of size K x K or K x D is held. For K <= D + 1 the difference is summed tile by tile.
    For more classes G has rank D < K - 1, the error has a floor far from 0, and it follows without
    loss from <A^T A, B^T B> and two sums.

    Examples
    --------
    >>> import numpy as np
    >>> etf = np.eye(3) - 1 / 3
    >>> round(structure_error(etf, etf), 12)
    0.0
    """
    if A.shape != B.shape:
        raise DataError(f"arrays of shapes {tuple(A.shape)} and {tuple(B.shape)}", "equal shapes")
    n_classes, n_features = A.shape
    if n_classes <= n_features + 1:
        return _error_by_tiles(A, B)
    xp = namespace(A, B)
    sums_a, sums_b, diagonal = 0.0, 0.0, 0.0
    gram_a: Array = None
    gram_b: Array = None
    for part, a in float64_blocks(A, product_rows(n_features)):
        b = a if B is A else as_float64(take_rows(B, part))
        sums_a, sums_b = sums_a + xp.sum(a, axis=0), sums_b + xp.sum(b, axis=0)
        diagonal += scalar(xp.sum(a * b))
        gram_a = _added(gram_a, symmetric_product(a))
        gram_b = gram_a if B is A else _added(gram_b, symmetric_product(b))
    norm = math.sqrt(max(scalar(xp.sum(gram_a * gram_b)), 0.0))
    if norm == 0.0:
        return math.nan
    total = scalar(xp.sum(sums_a * sums_b))
    match = (diagonal - total / n_classes) / (norm * math.sqrt(n_classes - 1))
    return math.sqrt(max(2.0 - 2.0 * match, 0.0))


def _error_by_tiles(A: Array, B: Array) -> float:
    xp = namespace(A, B)
    n_classes = A.shape[0]
    norm = math.sqrt(sum(scalar(xp.sum(tile * tile)) for _, _, tile in _products(A, B)))
    if norm == 0.0:
        return math.nan
    ids = xp.arange(n_classes, device=device(A))
    square = 0.0
    for rows, columns, tile in _products(A, B):
        unit = xp.astype(ids[rows][:, None] == ids[columns][None, :], xp.float64)
        ideal = (unit - 1.0 / n_classes) / math.sqrt(n_classes - 1)
        square += scalar(xp.sum((tile / norm - ideal) ** 2))
    return math.sqrt(square)


def _products(A: Array, B: Array) -> Iterator[tuple[slice, slice, Array]]:
    """Compute A B^T tile by tile."""
    xp = namespace(A, B)
    side = min(_MOST_SIDE, block_rows(A.shape[1], _LEAST_SIDE))
    for rows in row_blocks(A.shape[0], side):
        a = as_float64(take_rows(A, rows))
        for columns in row_blocks(B.shape[0], side):
            b = as_float64(take_rows(B, columns))
            yield rows, columns, xp.matmul(a, xp.matrix_transpose(b))


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


def square_norms(rows: Array) -> Array:
    """Compute the squared norms (K,) of rows (K, D), block by block."""
    xp = namespace(rows)
    return xp.concat([xp.sum(block * block, axis=1) for _, block in float64_blocks(rows)])


def symmetric_sum(rows: Array, weights: Array | None = None) -> Array:
    """Compute ``sum_c w_c row_c row_c^T`` of tall rows (K, D) block by block; w_c is 1 by default."""
    xp = namespace(rows)
    total = None
    for part, block in float64_blocks(rows, product_rows(rows.shape[1])):
        scaled = block if weights is None else block * xp.sqrt(weights[part])[:, None]
        total = _added(total, symmetric_product(scaled))
    return total


def _added(total: Array | None, product: Array) -> Array:
    """Add in place: only two of a sum's D x D arrays are held."""
    if total is None:
        return product
    total += product
    return total
