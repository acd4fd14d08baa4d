"""The pair sweep's element-wise work on the CPU: one pass over a tile's products.

Every row of a tile is worked on in small buffers, quantity by quantity, so that the compiler can
vectorise each loop; the logarithm and the exponential are written out for the same reason. Squared
distances that cancelled in the products are computed anew from the vectors, in place.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from ncbatch.stats.elementary import FAST, exponentials
from ncbatch.stats.pair_loops import (
    count_coincident,
    keep_top,
    nearest_of,
    repair,
    square_distances,
    sum_cdnv,
    sum_corrected,
    sum_cosine,
    sum_directed,
    sum_distance,
    sum_inner,
    sum_log,
)
from ncbatch.stats.pair_outputs import (
    CDNV,
    CDNV_RANGE,
    CORRECTED,
    COSINE_RANGE,
    DIRECTED,
    DIRECTIONS_APART,
    DIST,
    INNER,
    LOG,
    PAIRS,
    RIESZ,
    RIESZ2,
)


@njit(cache=True, nogil=True, fastmath=FAST, error_model="numpy")
def sweep_tile(
    gram: Any,
    gram_w: Any,
    i0: int,
    j0: int,
    rows: Any,
    columns: Any,
    center: Any,
    square: Any,
    size: Any,
    inverse: Any,
    variance: Any,
    corrected: Any,
    error: Any,
    square_w: Any,
    numbers: Any,
    refs: Any,
    wants: Any,
    out: Any,
) -> None:
    """Tally the pairs i < j of one tile into the arrays of `out`.

    Parameters
    ----------
    gram : array (R, C)
        Products of centred means, rows i0.. and columns j0..; float32 or float64.
    gram_w : array (R, C) or (0, 0)
        The same of means times a root of S_W.
    rows, columns : tuple of array (R, D) and (C, D)
        What lost distances are computed from: the tile's own means, and their products with the
        root of S_W, which may be empty.
    center : array (D,)
        m_G.
    square, size, inverse, variance, corrected, error, square_w : array (K,)
        |Mc|^2, |m|^2 times the share that counts as zero, 1/|Mc| or 0, V or -1, V n/(n-1) or -1,
        the error of the mean V/(n-1), and |m|^2 along S_W.
    numbers : tuple of float
        CDNV exponent, Riesz exponent, 1/(K-1), the share below which digits are lost, and that
        below which a square is zero.
    refs : array (N_SUMS,)
        Numbers near the means, subtracted before sums of squares are formed.
    wants : tuple of bool
        cdnv, sphere (distances and logarithms), riesz, cosine, corrected, directed, nearest.
    out : tuple of array
        From `outputs`.
    """
    p, riesz_s, coherence, lost, zero = numbers
    want_cdnv, want_sphere, want_riesz, want_cosine, want_corrected, want_directed, want_near = (
        wants
    )
    (means_a, within_a), (means_b, within_b) = rows, columns
    sums, counts, extremes, scales, near, near_at, cnear, cnear_at, histogram, top, top_at = out
    n_columns, bins = gram.shape[1], histogram.shape[0]
    buffers = np.empty((6, n_columns))
    for a in range(gram.shape[0]):
        i = i0 + a
        b = max(0, i + 1 - j0)
        n = n_columns - b
        if n <= 0:
            continue
        g = buffers[0, :n]
        d2, r2 = buffers[1, :n], buffers[2, :n]
        x, y, z = buffers[3, :n], buffers[4, :n], buffers[5, :n]
        g[:] = gram[a, b:]
        j = j0 + b
        here = slice(j, j + n)
        counts[a, PAIRS] = n
        if square_distances(g, square[here], inverse[here], square[i], inverse[i], lost, d2, r2):
            repair(
                means_a[a], means_b, b, center, square[i], square[here], inverse[i], inverse[here],
                lost, d2, r2,
            )  # fmt: skip
        count_coincident(d2, size[here], size[i], counts[a])
        sum_inner(g, refs[INNER], sums[a], extremes[a])
        if want_cdnv:
            sum_cdnv(
                d2, size[here], variance[here], size[i], variance[i], p, refs[CDNV],
                x, sums[a], counts[a], extremes[a],
            )  # fmt: skip
            if extremes[a, CDNV_RANGE + 1] > top[0].min():
                keep_top(x, x, i, j, top[0], top_at[0])
        if want_corrected:
            sum_corrected(
                d2, size[here], corrected[here], error[here], size[i], corrected[i], error[i], p,
                refs[CORRECTED], sums[a], counts[a],
            )  # fmt: skip
        if want_directed:
            g[:] = gram_w[a, b:]
            sum_directed(
                g, square_w[i], square_w[here], within_a[a], within_b, b, center, lost, d2,
                size[here], size[i],
                refs[DIRECTED], x, sums[a], counts[a],
            )  # fmt: skip
        if want_near:
            near_at[a] = nearest_of(d2, i, j, near[a], cnear[0, b:], cnear_at[b:])
        if inverse[i] == 0.0 or not (want_sphere or want_riesz or want_cosine or want_near):
            continue
        sum_distance(
            r2, inverse[here], refs[DIST], near[a], cnear[1, b:], sums[a], counts[a], extremes[a]
        )
        if want_sphere or want_riesz:
            hi = sum_log(
                r2, zero, riesz_s, refs[LOG], x, x.view(np.int64), y, sums[a], counts[a],
                extremes[a],
            )  # fmt: skip
            if want_riesz and counts[a, DIRECTIONS_APART] > 0:
                scales[a] = hi
                x -= hi
                exponentials(x, y, y.view(np.int64), z, z.view(np.int64))
                sums[a, RIESZ], sums[a, RIESZ2] = x.sum(), (x * x).sum()
        if want_cosine:
            np.multiply(r2, -2.0, x)
            exponentials(np.minimum(x, 0.0, x), y, y.view(np.int64), z, z.view(np.int64))
            sum_cosine(r2, coherence, refs, x, y, sums[a], extremes[a])
            if extremes[a, COSINE_RANGE + 1] > top[1].min():
                keep_top(y, r2, i, j, top[1], top_at[1])
            for t in range(n):
                if r2[t] >= 0.0:
                    at = int((y[t] + 1.0) * (0.5 * bins))
                    histogram[max(0, min(at, bins - 1))] += 1
