"""NC2: how near the class means are to a simplex equiangular tight frame (ETF)."""

from __future__ import annotations

import math
from collections.abc import Iterator

from array_api_compat import device

from ncbatch.arrays.namespace import Array, as_float64, namespace, scalar
from ncbatch.arrays.rows import (
    block_rows,
    float64_blocks,
    product_rows,
    row_blocks,
    symmetric_product,
    take_rows,
)
from ncbatch.errors import DataError

# Classes of a tile's side where K x K products are summed.
_LEAST_SIDE, _MOST_SIDE = 256, 1024


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
