"""Sums of rows by class, without a one-hot array."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from array_api_compat import device, is_cupy_array, is_numpy_array
from scipy import sparse

from ncbatch.arrays.cuda_kernels import cuda_segment_sum
from ncbatch.arrays.namespace import Array, namespace


@dataclass(frozen=True)
class Segments:
    """The rows of a block grouped by the classes present in it.

    Attributes
    ----------
    present : array (P,)
        Class ids that occur in the block, ascending.
    index : array (B,)
        For each row, the position of its class in `present`.
    counts : array (P,)
        Rows of each present class, at least 1.
    """

    present: Array
    index: Array
    counts: Array

    @classmethod
    def of(cls, labels: Array) -> Segments:
        """Group the rows of a block by their `labels`, an array (B,) of class ids."""
        xp = namespace(labels)
        present, index = xp.unique_inverse(labels)
        counts = xp.unique_counts(labels).counts
        return cls(present, xp.reshape(index, (-1,)), xp.astype(counts, xp.int64))

    def mask(self, n_classes: int) -> Array:
        """Mark the present classes in a boolean array (K,)."""
        xp = namespace(self.present)
        ids = xp.arange(n_classes, dtype=self.present.dtype, device=device(self.present))
        place = xp.searchsorted(self.present, ids)
        place = xp.clip(place, 0, self.present.shape[0] - 1)
        return xp.take(self.present, place, axis=0) == ids


def segment_sum(values: Array, segments: Segments) -> Array:
    """Sum rows by class.

    Parameters
    ----------
    values : array (B, D) or (B,)
        float32 or float64.
    segments : Segments
        The grouping of the B rows.

    Returns
    -------
    array (P, D) or (P,)
        One sum per class present, in the dtype of `values`.

    Notes
    -----
    NumPy multiplies by a sparse one-hot, CuPy has a kernel of our own. Other libraries add neighbours pairwise in log2(rows)
    rounds over the sorted rows: O(B D) work, deterministic, and no library's scatter-add is
    trusted (CuPy's wraps bad labels, its ``add.reduceat`` cancels).

    Examples
    --------
    >>> import numpy as np
    >>> segment_sum(np.array([1.0, 2.0, 4.0]), Segments.of(np.array([7, 3, 7])))
    array([2., 5.])
    """
    n_segments = segments.present.shape[0]
    if is_numpy_array(values):
        if values.ndim == 1:
            return np.bincount(segments.index, weights=values, minlength=n_segments)
        n_rows = values.shape[0]
        one_hot = sparse.csc_array(
            (np.ones(n_rows, values.dtype), segments.index, np.arange(n_rows + 1)),
            shape=(n_segments, n_rows),
        )
        return one_hot @ values
    if is_cupy_array(values):
        return cuda_segment_sum(values, segments.index, segments.counts)
    return _pairwise_segment_sum(values, segments.index, n_segments)


def _pairwise_segment_sum(values: Array, index: Array, n_segments: int) -> Array:
    xp = namespace(values, index)
    order = xp.argsort(index, stable=True)
    rows, index = xp.take(values, order, axis=0), xp.take(index, order, axis=0)
    while rows.shape[0] > n_segments:
        positions = xp.arange(rows.shape[0], dtype=index.dtype, device=device(index))
        first = xp.searchsorted(index, index)
        odd = (positions - xp.astype(first, index.dtype)) % 2 == 1
        before_odd = xp.concat([odd[1:], xp.zeros_like(odd[:1])])
        rows[before_odd] = rows[before_odd] + rows[odd]
        rows, index = rows[~odd], index[~odd]
    return rows


def add_at(target: Array, mask: Array, rows: Array) -> None:
    """Add `rows` in place to the rows of `target` that `mask` marks.

    Boolean masks are the one scattered assignment that every array library shares.
    """
    target[mask] = target[mask] + rows
