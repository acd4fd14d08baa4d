"""NC3, NC4 and NC5: class means against the classifier, its decisions and outside data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from array_api_compat import device

from ncbatch.arrays import (
    Array,
    CentredRows,
    as_float64,
    block_rows,
    namespace,
    row_blocks,
    scalar,
    take_rows,
)
from ncbatch.metrics.kernels import directions
from ncbatch.stats.decisions import Decisions


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
    found = []
    for weight, centred in _paired_blocks(W, M, m_G):
        if cos:
            weight, centred = directions(weight), directions(centred)
        found.append(xp.sum(weight * centred, axis=1))
    return xp.concat(found)


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
    found = []
    for weight, centred in _paired_blocks(W, M, m_G):
        if norm:
            weight, centred = directions(weight), directions(centred)
        found.append(xp.sqrt(xp.sum((weight - centred) ** 2, axis=1)))
    return xp.concat(found)


def _paired_blocks(W: Array, M: Array, m_G: Array | float) -> Iterator[tuple[Array, Array]]:
    """Give blocks of w_c and of m_c - m_G; a single row on one side goes with every other."""
    centred = CentredRows(M if len(M.shape) == 2 else M[None, :], m_G)
    sizes = W.shape[0], centred.shape[0]
    for part in row_blocks(max(sizes), block_rows(W.shape[1])):
        of_w, of_m = (slice(0, 1) if size == 1 else part for size in sizes)
        yield as_float64(take_rows(W, of_w)), centred[of_m]


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
