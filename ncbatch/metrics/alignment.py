"""NC3, NC4 and NC5: class means against the classifier, its decisions and outside data."""

from __future__ import annotations

from collections.abc import Sequence

from ncbatch.arrays import Array, as_float64, namespace, scalar
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
    weight, centred = as_float64(W), as_float64(M) - m_G
    if len(centred.shape) == 1:
        centred = centred[None, :]
    if cos:
        weight, centred = directions(weight), directions(centred)
    return xp.sum(weight * centred, axis=1)


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
    weight, centred = as_float64(W), as_float64(M) - m_G
    if norm:
        weight, centred = directions(weight), directions(centred)
    return xp.sqrt(xp.sum((weight - centred) ** 2, axis=1))


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
        m_G_ood = xp.zeros_like(as_float64(M)[0, :]) + m_G_ood
    return scalar(xp.mean(xp.abs(similarities(M, m_G_ood, cos=True))))
