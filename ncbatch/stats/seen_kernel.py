# mypy: disallow-untyped-decorators=False
"""Merging of `SeenMoments` in memory on the CPU: one compiled pass over the union of classes.

Every class is one thread's work, and products take the same rows whatever the threads, so that the
result does not depend on how many there are.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

from ncbatch.arrays import symmetric_product
from ncbatch.stats.moments import Moments
from ncbatch.stats.moments_kernel import add_square, in_threads, shares

# Differences of means are multiplied so many rows, or bytes of them, at a time.
_PRODUCT_ROWS, _PRODUCT_BYTES = 2048, 32 * 2**20


@njit(cache=True, nogil=True, error_model="numpy")
def merge_classes(
    first: int,
    stop: int,
    rows: Any,
    counts: Any,
    means_a: Any,
    means_b: Any,
    traces: Any,
    means: Any,
    apart: Any,
) -> None:
    """Merge classes ``first..stop-1`` of a union of U classes.

    Parameters
    ----------
    first, stop : int
        Which of the union.
    rows : array (2, U) of int64
        Where each class stands in `means_a` and in `means_b`; any number where it does not.
    counts : array (2, U) of int64
        Its samples on both sides.
    means_a, means_b : array (P_a, D), (P_b, D)
        Class means of both sides.
    traces : array (U,)
        The sum of both sides' traces; what lies between their means is added.
    means : array (U, D)
        Written.
    apart : array (B, D) or (0, D)
        Written where it has rows, one for each of the classes that both sides hold: the
        difference of its means times the root of n_a n_b / (n_a + n_b).
    """
    n_features = means.shape[1]
    difference = np.empty(n_features)
    at = 0
    for p in range(first, stop):
        n_a, n_b, mean = np.float64(counts[0, p]), np.float64(counts[1, p]), means[p]
        if n_a == 0.0 or n_b == 0.0:  # one side's mean, to the bit
            known = means_b[rows[1, p]] if n_a == 0.0 else means_a[rows[0, p]]
            for j in range(n_features):
                mean[j] = known[j]
            continue
        mean_a, mean_b = means_a[rows[0, p]], means_b[rows[1, p]]
        share = n_b / (n_a + n_b)
        square = 0.0
        for j in range(n_features):
            difference[j] = mean_b[j] - mean_a[j]
            square = add_square(square, difference[j])
        for j in range(n_features):
            mean[j] = difference[j] * share + mean_a[j]
        traces[p] += n_a * share * square
        if apart.shape[0] > 0:
            row, root = apart[at], np.sqrt(n_a * share)
            at += 1
            for j in range(n_features):
                row[j] = difference[j] * root


def merge_seen(
    classes: npt.NDArray[np.int64],
    a: tuple[npt.NDArray[np.int64], Moments],
    b: tuple[npt.NDArray[np.int64], Moments],
) -> Moments:
    """Merge the moments of two sets of classes, each with its ids, over their union `classes`.

    Beside the operands and the result, `_PRODUCT_BYTES` and two arrays (D, D) are held.
    """
    n, n_features = classes.shape[0], a[1].means.shape[1]
    rows, counts = np.zeros((2, 2, n), np.int64)
    traces = np.zeros(n)
    for side, (ids, moments) in enumerate((a, b)):
        place = np.searchsorted(classes, ids)
        rows[side, place] = np.arange(ids.shape[0])
        counts[side, place] = moments.counts
        traces[place] += moments.traces
    means = np.empty((n, n_features))
    scatter = None
    ends = np.concatenate([[0], np.cumsum((counts[0] > 0) & (counts[1] > 0))])
    apart, product = np.empty((0, n_features)), None
    if a[1].scatter is not None and b[1].scatter is not None:
        scatter = a[1].scatter + b[1].scatter
        apart = np.empty((min(int(ends[-1]), _piece_rows(n_features)), n_features))
        product = np.empty_like(scatter)
    operands = (rows, counts, _frozen(a[1].means), _frozen(b[1].means), traces, means)
    for piece in _pieces(ends, apart.shape[0]):

        def merge(part: slice, first: int = piece.start) -> None:
            p, q = first + part.start, first + part.stop
            merge_classes(p, q, *operands, apart[ends[p] - ends[first] : ends[q] - ends[first]])

        in_threads(merge, shares(np.arange(piece.stop - piece.start + 1)))
        if scatter is not None:
            both = ends[piece.stop] - ends[piece.start]
            scatter += symmetric_product(apart[:both], out=product)
    return Moments(counts[0] + counts[1], means, traces, scatter)


def _piece_rows(n_features: int) -> int:
    return min(_PRODUCT_ROWS, max(256, _PRODUCT_BYTES // (8 * n_features)))


def _pieces(ends: npt.NDArray[np.int64], size: int) -> list[slice]:
    """Cut the union into runs of at most `size` classes that both sides hold; 0 is for no limit."""
    limits = np.arange(size, ends[-1], size) if size else np.empty(0, np.int64)
    cuts = [0, *np.searchsorted(ends, limits).tolist(), len(ends) - 1]
    return [slice(p, q) for p, q in pairwise(cuts)]


def _frozen(means: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Give a view that cannot be written, as what was sent may be: one type to compile for."""
    view = np.ascontiguousarray(means).view()
    view.flags.writeable = False
    return view
