"""Sums of rows by class, without a one-hot array."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import import_module
from math import prod
from typing import Any

import numpy as np
from array_api_compat import device, is_cupy_array, is_numpy_array
from scipy import sparse

from ncbatch.arrays.namespace import Array, namespace

# Kernels in CUDA's C: sums of rows by class, the same bits in every run.


# Rows that one block of threads adds up: enough to be worth a block, and few enough that a class
# with a tenth of the rows is many blocks' work.
PIECE_ROWS = 256

# Threads of a block, each with a column: neighbours read neighbouring values.
_THREADS = 128

_SOURCE = r"""
// Adds the rows of a piece of a segment, in their order, a column per thread.
extern "C" __global__ void sum_pieces(
    const REAL* values, const long long* order, const long long* starts, const long long* firsts,
    const long long n_segments, const long long n_features, double* pieces)
{
    const long long piece = blockIdx.x;
    const long long column = (long long)blockIdx.y * blockDim.x + threadIdx.x;
    if (piece >= firsts[n_segments] || column >= n_features) return;
    long long segment = 0, end = n_segments;  // firsts[segment] <= piece < firsts[end]
    while (end - segment > 1) {
        const long long middle = (segment + end) / 2;
        if (firsts[middle] <= piece) segment = middle; else end = middle;
    }
    const long long start = starts[segment] + (piece - firsts[segment]) * PIECE_ROWS;
    const long long stop =
        start + PIECE_ROWS < starts[segment + 1] ? start + PIECE_ROWS : starts[segment + 1];
    double sum = 0;
    #pragma unroll 8
    for (long long row = start; row < stop; ++row)
        sum += (double)values[order[row] * n_features + column];
    pieces[piece * n_features + column] = sum;
}

// Adds the pieces of a segment, in their order.
extern "C" __global__ void sum_segments(
    const double* pieces, const long long* firsts, const long long n_features, REAL* sums)
{
    const long long segment = blockIdx.x;
    const long long column = (long long)blockIdx.y * blockDim.x + threadIdx.x;
    if (column >= n_features) return;
    double sum = 0;
    for (long long piece = firsts[segment]; piece < firsts[segment + 1]; ++piece)
        sum += pieces[piece * n_features + column];
    sums[segment * n_features + column] = (REAL)sum;
}
"""

_REALS = {"float32": "float", "float64": "double"}


def cuda_segment_sum(values: Array, index: Array, counts: Array) -> Array:
    """Sum rows by segment on a GPU.

    Parameters
    ----------
    values : cupy.ndarray (B, D) or (B,)
        float32 or float64.
    index : cupy.ndarray (B,) of int
        The segment of each row, 0..P-1.
    counts : cupy.ndarray (P,) of int64
        Rows of each segment.

    Returns
    -------
    cupy.ndarray (P, D) or (P,)
        The sums, accumulated in float64, in the dtype of `values`.

    Notes
    -----
    Rows are added in their order in pieces of `PIECE_ROWS`, and pieces in theirs: no atomics, so
    equal rows give equal bits, however the blocks of threads are scheduled. Needs
    ``(P + B / PIECE_ROWS) * D * 8`` bytes for the pieces.
    """
    cupy = import_module("cupy")
    n_rows = values.shape[0]
    n_segments = counts.shape[0]
    n_features = prod(values.shape[1:])
    rows = cupy.ascontiguousarray(values.reshape(n_rows, n_features))
    sums = cupy.empty((n_segments, n_features), values.dtype)
    if sums.size:
        # Rows of a segment in their order, or equal input would not give equal bits.
        order = cupy.argsort(index).astype(cupy.int64)  # CuPy's sort is stable
        starts, firsts = piece_table(counts)
        # No fewer than there are; the number itself would have to be fetched from the device.
        n_pieces = n_segments + n_rows // PIECE_ROWS
        pieces = cupy.empty((n_pieces, n_features), cupy.float64)
        strips = -(-n_features // _THREADS)
        real = _REALS[str(values.dtype)]
        sizes = (cupy.int64(n_segments), cupy.int64(n_features))
        summed = (rows, order, starts, firsts, *sizes, pieces)
        _kernel("sum_pieces", real)((n_pieces, strips), (_THREADS,), summed)
        joined = (pieces, firsts, sizes[1], sums)
        _kernel("sum_segments", real)((n_segments, strips), (_THREADS,), joined)
    return sums.reshape((n_segments, *values.shape[1:]))


def piece_table(counts: Array) -> tuple[Array, Array]:
    """Tell where segments begin among the sorted rows, and which pieces are theirs.

    Parameters
    ----------
    counts : array (P,) of int64
        Rows of each segment.

    Returns
    -------
    starts : array (P + 1,) of int64
        First row of each segment, and the number of rows.
    firsts : array (P + 1,) of int64
        First piece of each segment, and the number of pieces.
    """
    xp = namespace(counts)
    pieces = (counts + (PIECE_ROWS - 1)) // PIECE_ROWS
    return (
        xp.cumulative_sum(counts, include_initial=True),
        xp.cumulative_sum(pieces, include_initial=True),
    )


def kernel_source(real: str) -> str:
    """Return the kernels' text for ``float`` or ``double`` values."""
    return _SOURCE.replace("REAL", real).replace("PIECE_ROWS", str(PIECE_ROWS))


@cache
def _kernel(name: str, real: str) -> Any:
    # CuPy compiles it at the first call on a device and keeps the result on disk.
    return import_module("cupy").RawKernel(kernel_source(real), name)


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
        # Libraries differ in the shape of the inverse; counts of int64 add up without overflow.
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
    NumPy multiplies by a sparse one-hot, CuPy has a kernel of our own. Other libraries add
    neighbours pairwise in log2(rows) rounds over the sorted rows: O(B D) work, deterministic, and
    no library's scatter-add is trusted (CuPy's wraps bad labels, its ``add.reduceat`` cancels).

    Examples
    --------
    >>> import numpy as np
    >>> segment_sum(np.array([1.0, 2.0, 4.0]), Segments.of(np.array([7, 3, 7])))
    array([2., 5.])
    """
    n_segments = segments.present.shape[0]
    if is_numpy_array(values):
        n_rows = values.shape[0]
        # One entry a row, in the row of its class: such columns need no sorting.
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
    rows = xp.take(values, order, axis=0)
    index = xp.take(index, order, axis=0)
    while rows.shape[0] > n_segments:
        positions = xp.arange(rows.shape[0], dtype=index.dtype, device=device(index))
        # A round adds every second row of a class to the one before it: rows halve.
        first = xp.searchsorted(index, index)
        odd = (positions - xp.astype(first, index.dtype)) % 2 == 1
        before_odd = xp.concat([odd[1:], xp.zeros_like(odd[:1])])
        rows[before_odd] = rows[before_odd] + rows[odd]
        rows = rows[~odd]
        index = index[~odd]
    return rows


def add_at(target: Array, mask: Array, rows: Array) -> None:
    """Add `rows` in place to the rows of `target` that `mask` marks.

    Boolean masks are the one scattered assignment that every array library shares.
    """
    target[mask] = target[mask] + rows
