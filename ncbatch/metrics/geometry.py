"""Geometry of class means: eigenpairs of S_B, nearness to a simplex ETF, sums over tall rows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from array_api_compat import device

from ncbatch.arrays.namespace import Array, as_float64, namespace, scalar, zeros
from ncbatch.arrays.rows import (
    block_rows,
    float64_blocks,
    product_rows,
    row_blocks,
    symmetric_product,
    take_rows,
    triangular_factor,
)
from ncbatch.errors import DataError

# The default of numpy.linalg.pinv and torch.linalg.pinv for a D x D matrix, per unit of D.
_RELATIVE_FLOOR = 2.220446049250313e-16
# Below this share of the largest, eigenvalues of S_W have few digits: sums leave an error of some
# 2e-16 of the largest. Layer normalisation of float32 leaves its lost direction about 1e-14.
_LEAST_WITHIN = 1e-12
# Classes of a tile's side where K x K products are summed.
_LEAST_SIDE = 256
_MOST_SIDE = 1024


@dataclass(frozen=True)
class Spectrum:
    """Eigenpairs of S_B that count, in descending order.

    Attributes
    ----------
    values : array (r,)
        Eigenvalues above D * 2.2e-16 of the largest.
    vectors : array (r, D)
        Their eigenvectors, one per row.
    smallest_ratio : float
        The smallest kept eigenvalue over the largest; 0 when S_B is zero.
    """

    values: Array
    vectors: Array
    smallest_ratio: float

    @property
    def rank(self) -> int:
        """Eigenvalues kept."""
        return int(self.values.shape[0])

    def inverse_trace(self, covariance: Array, rank: int | None = None) -> float:
        """Compute tr(pinv(S_B) C) from the `rank` leading eigenpairs, all kept ones by default.

        Parameters
        ----------
        covariance : array (D, D)
            A symmetric matrix C, such as S_W.
        """
        xp = namespace(covariance)
        kept = self.rank if rank is None else min(rank, self.rank)
        vectors = self.vectors[:kept, :]
        spread = xp.sum(xp.matmul(vectors, covariance) * vectors, axis=1)
        return scalar(xp.sum(spread / self.values[:kept]))


def separation_eigenvalues(between: Spectrum, within: Array) -> Array:
    """Compute the eigenvalues of inv(S_W) S_B that are not 0 (r,), descending.

    Every eigenvalue of S_W counts as at least 1e-12 of its largest: smaller ones are rounding
    errors of sums, and a class separated where S_W vanishes has a large but finite eigenvalue.
    """
    xp = namespace(within)
    values, vectors = xp.linalg.eigh(within)
    tiny = _LEAST_WITHIN * scalar(xp.max(values))
    values = xp.clip(values, tiny if tiny > 0.0 else 1e-300, None)
    rows = between.vectors * xp.sqrt(between.values)[:, None]
    whitened = xp.matmul(rows, vectors) / xp.sqrt(values)[None, :]
    return xp.linalg.svdvals(whitened) ** 2


def between_class_spectrum(centred: Array) -> Spectrum:
    """Decompose S_B = Mc^T Mc / K.

    Parameters
    ----------
    centred : array (K, D) or view of rows
        Centred class means Mc.

    Notes
    -----
    The singular values of Mc itself are taken: forming S_B would square the condition number,
    which layer normalisation drives beyond 1e9. Beside blocks of Mc arrays of min(K, D) x D are
    held.
    """
    xp = namespace(centred)
    n_classes, n_features = centred.shape
    factor = triangular_factor(centred, product_rows(n_features))
    _, singular, vectors = xp.linalg.svd(factor, full_matrices=False)
    values = singular * singular / n_classes
    largest = scalar(values[0])
    kept = values > n_features * _RELATIVE_FLOOR * largest
    rank = int(xp.count_nonzero(kept))
    ratio = scalar(values[rank - 1]) / largest if rank else 0.0
    return Spectrum(values[:rank], vectors[:rank, :], ratio)


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
    sums_a = 0.0
    sums_b = 0.0
    diagonal = 0.0
    gram_a = zeros((n_features, n_features), A)
    gram_b = gram_a if B is A else zeros((n_features, n_features), A)
    for part, a in float64_blocks(A, product_rows(n_features)):
        b = a if B is A else as_float64(take_rows(B, part))
        sums_a = sums_a + xp.sum(a, axis=0)
        sums_b = sums_b + xp.sum(b, axis=0)
        diagonal += scalar(xp.sum(a * b))
        gram_a += symmetric_product(a)
        if B is not A:
            gram_b += symmetric_product(b)
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


def symmetric_sum(rows: Array, weights: Array | None = None) -> Array:
    """Compute ``sum_c w_c row_c row_c^T`` of rows (K, D) block by block; w_c is 1 by default."""
    xp = namespace(rows)
    total = zeros((rows.shape[1], rows.shape[1]), rows)
    for part, block in float64_blocks(rows, product_rows(rows.shape[1])):
        scaled = block if weights is None else block * xp.sqrt(weights[part])[:, None]
        # In place: only two of a sum's D x D arrays are held.
        total += symmetric_product(scaled)
    return total


def directions(centred: Array) -> Array:
    """Scale rows to unit length; a zero row stays zero."""
    xp = namespace(centred)
    norms = xp.sqrt(xp.sum(centred * centred, axis=1))
    norms = xp.where(norms > 0.0, norms, xp.ones_like(norms))
    return centred / norms[:, None]
