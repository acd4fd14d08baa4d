"""NC2: how near the class means are to a simplex equiangular tight frame (ETF)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from array_api_compat import device

from ncbatch.arrays import Array, as_float64, namespace, row_blocks, scalar, symmetric_product
from ncbatch.errors import DataError


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
    xp = namespace(M)
    centred = as_float64(M) - m_G
    result = xp.sqrt(xp.sum(centred * centred, axis=1))
    for apply in post_funcs:
        result = apply(result)
    return result


def interference_grid(M: Array, m_G: Array | float = 0) -> Array:
    """Compute the K x K grid of inner products of centred means, of an array in memory."""
    xp = namespace(M)
    centred = as_float64(M) - m_G
    return xp.matmul(centred, xp.matrix_transpose(centred))


def structure_error(A: Array, B: Array) -> float:
    """Measure how far G = A B^T is from a simplex ETF (Kothapalli 2023).

    Parameters
    ----------
    A, B : array (K, D)
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
    Nothing of size K x K is held. For K <= D + 1 the difference is summed row block by row block.
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
    a, b = as_float64(A), as_float64(B)
    n_classes, n_features = a.shape
    if n_classes <= n_features + 1:
        return _error_by_rows(a, b)
    xp = namespace(a, b)
    norm = math.sqrt(max(scalar(xp.sum(symmetric_sum(a) * symmetric_sum(b))), 0.0))
    if norm == 0.0:
        return math.nan
    total = scalar(xp.sum(xp.sum(a, axis=0) * xp.sum(b, axis=0)))
    diagonal = sum(scalar(xp.sum(a[p, :] * b[p, :])) for p in row_blocks(n_classes))
    match = (diagonal - total / n_classes) / (norm * math.sqrt(n_classes - 1))
    return math.sqrt(max(2.0 - 2.0 * match, 0.0))


def _error_by_rows(a: Array, b: Array) -> float:
    xp = namespace(a, b)
    n_classes = a.shape[0]
    columns = xp.arange(n_classes, device=device(a))

    def products(part: slice) -> Array:
        return xp.matmul(a[part, :], xp.matrix_transpose(b))

    blocks = list(row_blocks(n_classes))
    norm = math.sqrt(sum(scalar(xp.sum(products(part) ** 2)) for part in blocks))
    if norm == 0.0:
        return math.nan
    square = 0.0
    for part in blocks:
        unit = xp.astype(columns[part][:, None] == columns[None, :], xp.float64)
        ideal = (unit - 1.0 / n_classes) / math.sqrt(n_classes - 1)
        square += scalar(xp.sum((products(part) / norm - ideal) ** 2))
    return math.sqrt(square)


def simplex_etf_error(M: Array, m_G: Array | float = 0) -> float:
    """Measure how far the Gram matrix of centred means is from a simplex ETF (Kothapalli 2023).

    Parameters
    ----------
    M : array (K, D)
        Class means.
    m_G : array (D,) or 0, optional
        Global mean.
    """
    centred = as_float64(M) - m_G
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
    return structure_error(W, as_float64(M) - m_G)


def symmetric_sum(rows: Array) -> Array:
    """Compute ``rows^T rows`` of a tall array (K, D) block by block."""
    return sum(symmetric_product(as_float64(rows[part, :])) for part in row_blocks(rows.shape[0]))
