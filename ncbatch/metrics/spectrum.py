"""The eigenvalues and eigenvectors of the between-class covariance."""

from __future__ import annotations

from dataclasses import dataclass

from ncbatch.arrays.namespace import Array, namespace, scalar
from ncbatch.arrays.rows import product_rows, triangular_factor

# The default of numpy.linalg.pinv and torch.linalg.pinv for a D x D matrix, per unit of D.
_RELATIVE_FLOOR = 2.220446049250313e-16
# Below this share of the largest, eigenvalues of S_W have few digits: sums leave an error of some
# 2e-16 of the largest. Layer normalisation of float32 leaves its lost direction about 1e-14.
_LEAST_WITHIN = 1e-12


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
        vectors, values = self.vectors[:kept, :], self.values[:kept]
        spread = xp.sum(xp.matmul(vectors, covariance) * vectors, axis=1)
        return scalar(xp.sum(spread / values))


def ridge_trace(matrix: Array, other: Array, ridge: float) -> float:
    """Compute tr(inv(A + ridge I) B) of covariances A and B (D, D), ridge above 0."""
    xp = namespace(matrix, other)
    values, vectors = xp.linalg.eigh(matrix)
    along = xp.sum(xp.matmul(other, vectors) * vectors, axis=0)
    return scalar(xp.sum(along / (xp.clip(values, 0.0, None) + ridge)))


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
    which layer normalisation drives beyond 1e9. Beside blocks of Mc arrays of min(K, D) x D are held.
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
