"""Matrix products over tall arrays, block by block."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from array_api_compat import is_numpy_array

from ncbatch.arrays.namespace import Array, as_float64, namespace

# Rows of a block in passes over K x D arrays: enough for full-speed products, small in memory.
BLOCK_ROWS = 4096


def row_blocks(n_rows: int, block_rows: int = BLOCK_ROWS) -> Iterator[slice]:
    """Cut ``range(n_rows)`` into slices of at most `block_rows`.

    Examples
    --------
    >>> list(row_blocks(5, 2))
    [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
    """
    for start in range(0, n_rows, block_rows):
        yield slice(start, min(start + block_rows, n_rows))


def symmetric_product(rows: Array, out: Array | None = None) -> Array:
    """Compute ``rows^T rows`` for an array (B, D), as a (D, D) array of its dtype.

    NumPy sees that both operands are one array and calls syrk, half the work of a general product.
    `out`, of NumPy arrays only, is where the result is written; memory that is not new is faster.
    """
    xp = namespace(rows)
    if is_numpy_array(rows):
        return np.matmul(rows.T, rows, out=out)
    return xp.matmul(xp.matrix_transpose(rows), rows)


def triangular_factor(rows: Array, block_rows: int = BLOCK_ROWS) -> Array:
    """Factor a tall array A (K, D) as A = QR and return R (min(K, D), D) in float64.

    Notes
    -----
    R is folded over blocks of rows (the sequential TSQR), so that nothing of A's size is
    allocated. The singular values of A are those of R to full relative accuracy of the largest,
    which a D x D product ``A^T A`` would square.
    """
    xp = namespace(rows)
    block_rows = max(block_rows, rows.shape[1])
    factor = None
    for part in row_blocks(rows.shape[0], block_rows):
        block = as_float64(rows[part, :])
        stacked = block if factor is None else xp.concat([factor, block], axis=0)
        factor = _r_of_qr(stacked)
    return factor


def _r_of_qr(block: Array) -> Array:
    if is_numpy_array(block):  # the standard has no way to leave Q out
        return np.linalg.qr(block, mode="r")
    return namespace(block).linalg.qr(block, mode="reduced")[1]
