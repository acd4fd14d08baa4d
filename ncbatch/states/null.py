"""The null: labels at random, from the same read, so that a value can be seen against chance."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ncbatch.arrays.namespace import as_float64, namespace
from ncbatch.arrays.rows import row_blocks, symmetric_product
from ncbatch.errors import DataError
from ncbatch.states.moments import Moments


def null_labels(
    rows: npt.NDArray[np.int64], counts: npt.NDArray[np.int64], seed: int = 0
) -> npt.NDArray[np.int64]:
    """Draw a class for each row from the distribution of labels.

    Parameters
    ----------
    rows : array (B,) of int
        Row numbers; a row's draw depends on its number and the seed only, so any order and any
        chunking of the rows give the same labels.
    counts : array (K,) of int
        Samples per class.
    seed : int, optional
        Which draw.

    Returns
    -------
    array (B,) of int64
        Class ids, with probability proportional to `counts`.

    Notes
    -----
    The generator is SplitMix64 (Steele, Lea & Flood 2014) at the position of the row.
    """
    with np.errstate(over="ignore"):
        z = (rows.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z ^= _mix(np.array([seed % 2**64], np.uint64))
        z = _mix(_mix(z))
    ends = np.cumsum(counts)
    # 53 bits are all that a float64 in [0, 1) has.
    draws = (z >> np.uint64(11)).astype(np.float64) * 2.0**-53 * float(ends[-1])
    return np.searchsorted(ends, draws, side="right").astype(np.int64)


def null_scatter(moments: Moments, null: Moments) -> Moments:
    """Add to null moments their scatter, without a second sum of outer products.

    Parameters
    ----------
    moments : Moments
        Of the samples under their labels, with scatter.
    null : Moments
        Of the same samples under null labels, without.

    Notes
    -----
    The scatter about the sample mean x, T = S_W N + sum_c n_c (m_c - x)(m_c - x)^T, is the same
    under any labels; the null's within-class part is T less its own second term.
    """
    if moments.scatter is None or moments.n_samples != null.n_samples:
        raise DataError("moments of different samples, or without scatter", "the same samples")
    # T less the part between the null means, whatever the labels.
    scatter = moments.scatter + _between(moments) - _between(null)
    return replace(null, scatter=scatter)


def _between(moments: Moments) -> Any:
    """Sum n_c (m_c - x)(m_c - x)^T over classes, block by block: means may lie in a file."""
    xp = namespace(moments.counts)
    counts = as_float64(moments.counts)
    blocks = list(row_blocks(moments.means.shape[0]))
    center = sum(
        xp.matmul(counts[None, part], moments.means[part, :])[0, :] / moments.n_samples
        for part in blocks
    )
    total = 0.0
    for part in blocks:
        rows = (moments.means[part, :] - center) * xp.sqrt(counts[part])[:, None]
        total = total + symmetric_product(rows)
    return total


def _mix(z: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
