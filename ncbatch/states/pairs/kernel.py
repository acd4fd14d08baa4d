"""The pair sweep's element-wise work on the CPU: one pass over a tile's products.

Every row of a tile is worked on in small buffers, quantity by quantity, so that the compiler can
vectorise each loop; the logarithm and the exponential are written out for the same reason. Squared
distances that cancelled in the products are computed anew from the vectors, in place.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit

from ncbatch.states.pairs.outputs import (
    ALONG,
    CDNV,
    CDNV2,
    CDNV_RANGE,
    COINCIDENT,
    CORRECTABLE,
    CORRECTED,
    CORRECTED2,
    COS,
    COS2,
    COSINE_RANGE,
    DEV,
    DEV2,
    DIRECTED,
    DIRECTED2,
    DIRECTIONS,
    DIRECTIONS_APART,
    DIST,
    DIST2,
    INNER,
    INNER2,
    INNER_RANGE,
    LOG,
    LOG2,
    LOG_RANGE,
    PAIRS,
    RIESZ,
    RIESZ2,
    SQUARE_RANGE,
    UNIFORM,
    UNIFORM2,
    VARIED,
)

# Logarithm and exponential of arrays, written out so that the compiler vectorises them.


# Numbers are finite, or infinite where that is meant, but never NaN; sums may be reordered.
FAST = {"reassoc", "contract", "nsz", "arcp", "nnan"}
_EXACT_ORDER = {"contract", "nsz", "nnan"}
_LN2_HI, _LN2_LO = 6.93147180369123816490e-01, 1.90821492927058770002e-10
_LOG2_E, _SQRT2 = 1.4426950408889634, 1.4142135623730951
_MANTISSA, _ONE = 0x000FFFFFFFFFFFFF, 0x3FF0000000000000
# Adding it rounds a small number to the nearest integer, left in the low bits of the sum.
_ROUNDER = 6755399441055744.0


@njit(cache=True, fastmath=FAST, error_model="numpy")
def logarithms(x: Any, bits: Any, out: Any) -> None:
    """Write log(x) of positive normal numbers; `bits` views x as int64, and x is spent."""
    for t in range(x.shape[0]):
        out[t] = float((bits[t] >> 52) - 1023)
        bits[t] = (bits[t] & _MANTISSA) | _ONE
    for t in range(x.shape[0]):
        m, k = x[t], out[t]
        high = m > _SQRT2
        m = 0.5 * m if high else m
        k = k + 1.0 if high else k
        f = m - 1.0
        s = f / (2.0 + f)
        z = s * s
        # The minimax polynomial of fdlibm's e_log.
        r = 1.531383769920937332e-01 + z * 1.479819860511658591e-01
        r = 2.222219843214978396e-01 + z * (1.818357216161805012e-01 + z * r)
        r = 3.999999999940941908e-01 + z * (2.857142874366239149e-01 + z * r)
        r = z * (6.666666666666735130e-01 + z * r)
        h = 0.5 * f * f
        out[t] = k * _LN2_HI - ((h - (s * (h + r) + k * _LN2_LO)) - f)


@njit(cache=True, fastmath=_EXACT_ORDER, error_model="numpy")
def exponentials(x: Any, whole: Any, whole_bits: Any, scale: Any, scale_bits: Any) -> None:
    """Replace numbers x <= 0 by exp(x), those below -700 by about 1e-304; the rest is scratch."""
    for t in range(x.shape[0]):
        v = max(x[t], -700.0)
        rounded = v * _LOG2_E + _ROUNDER
        whole[t] = rounded
        k = rounded - _ROUNDER
        r = (v - k * _LN2_HI) - k * _LN2_LO
        p = 1.0 / 362880 + r * (1.0 / 3628800 + r * (1.0 / 39916800))
        p = 1.0 / 720 + r * (1.0 / 5040 + r * (1.0 / 40320 + r * p))
        p = 1.0 / 6 + r * (1.0 / 24 + r * (1.0 / 120 + r * p))
        x[t] = 1.0 + r * (1.0 + r * (0.5 + r * p))
    for t in range(x.shape[0]):
        scale_bits[t] = (whole_bits[t] + 1023) << 52
    for t in range(x.shape[0]):
        x[t] *= scale[t]


# The loops of the compiled pair sweep: one quantity over one row of a tile at a time.
#
# Numba compiles them into `pair_kernel.sweep_tile`, and what it keeps on disk goes by the date of that
# file alone: after a change here or in `elementary`, `touch` it.


# Below this share of its terms a corrected squared distance is rounding error.
NO_DIGITS = 1e-9


@njit(cache=True, fastmath=FAST, error_model="numpy")
def square_distances(
    g: Any, square: Any, inverse: Any, si: float, ui: float, lost: float, d2: Any, r2: Any
) -> bool:
    """Write |m_i - m_j|^2 and |u_i - u_j|^2 from products; say whether any lost its digits."""
    least = np.inf
    for t in range(g.shape[0]):
        whole = si + square[t]
        d = whole - 2.0 * g[t]
        r = 2.0 - 2.0 * (g[t] * ui * inverse[t])
        d2[t] = d
        r2[t] = r
        least = min(least, min(d - lost * whole, r - 2.0 * lost))
    return least < 0.0


@njit(cache=True, fastmath=FAST, error_model="numpy")
def _direct(x: Any, y: Any, fx: float, fy: float, center: Any, shift: float) -> float:
    """Compute |(x - shift c) fx - (y - shift c) fy|^2 from the vectors themselves."""
    total = 0.0
    for k in range(x.shape[0]):
        c = shift * center[k]
        apart = (x[k] - c) * fx - (y[k] - c) * fy
        total += apart * apart
    return total


@njit(cache=True, fastmath=FAST, error_model="numpy")
def repair(
    x: Any,
    others: Any,
    b: int,
    center: Any,
    si: float,
    square: Any,
    ui: float,
    inverse: Any,
    lost: float,
    d2: Any,
    r2: Any,
) -> None:
    """Compute lost distances of the mean x to others[b:] anew."""
    for t in range(d2.shape[0]):
        if d2[t] < lost * (si + square[t]):
            d2[t] = _direct(x, others[b + t], 1.0, 1.0, center, 0.0)
        if r2[t] < 2.0 * lost:
            r2[t] = _direct(x, others[b + t], ui, inverse[t], center, 1.0)


@njit(cache=True, fastmath=FAST, error_model="numpy")
def sum_inner(g: Any, reference: float, sums: Any, extremes: Any) -> None:
    """Tally inner products."""
    t1 = t2 = 0.0
    lo, hi = np.inf, -np.inf
    for t in range(g.shape[0]):
        v = g[t] - reference
        t1 += v
        t2 += v * v
        lo = min(lo, g[t])
        hi = max(hi, g[t])
    sums[INNER], sums[INNER2] = t1, t2
    extremes[INNER_RANGE], extremes[INNER_RANGE + 1] = lo, hi


@njit(cache=True, fastmath=FAST, error_model="numpy")
def count_coincident(d2: Any, size: Any, zi: float, counts: Any) -> None:
    """Count pairs whose means are one."""
    found = 0.0
    for t in range(d2.shape[0]):
        found += 0.0 if d2[t] > (zi + size[t]) else 1.0
    counts[COINCIDENT] = found


@njit(cache=True, fastmath=FAST, error_model="numpy")
def sum_cdnv(
    d2: Any, size: Any, variance: Any, zi: float, vi: float, p: float, reference: float,
    value: Any, sums: Any, counts: Any, extremes: Any,
) -> None:  # fmt: skip
    """Tally CDNVs; leaves them in `value`, -1 where there is none."""
    t1 = t2 = found = 0.0
    lo, hi = np.inf, -np.inf
    if vi < 0.0:
        return
    for t in range(d2.shape[0]):
        varied = (d2[t] > (zi + size[t])) and (variance[t] >= 0.0)
        q = 1.0 / d2[t] if varied else 0.0
        value[t] = q * q if p == 2.0 else q
    if p != 1.0 and p != 2.0:
        for t in range(d2.shape[0]):
            value[t] = value[t] ** p
    for t in range(d2.shape[0]):
        varied = value[t] > 0.0
        e = 0.5 * (vi + variance[t]) * value[t]
        v = e - reference if varied else 0.0
        value[t] = e if varied else -1.0
        t1 += v
        t2 += v * v
        found += 1.0 if varied else 0.0
        lo = min(lo, e if varied else np.inf)
        hi = max(hi, value[t])
    sums[CDNV], sums[CDNV2], counts[VARIED] = t1, t2, found
    if found > 0.0:
        extremes[CDNV_RANGE], extremes[CDNV_RANGE + 1] = lo, hi


@njit(cache=True, fastmath=FAST, error_model="numpy")
def sum_corrected(
    d2: Any, size: Any, corrected: Any, error: Any, zi: float, ci: float, ei: float, p: float,
    reference: float, sums: Any, counts: Any,
) -> None:  # fmt: skip
    """Tally CDNVs without the bias of finite samples."""
    t1 = t2 = found = 0.0
    if ci < 0.0:
        return
    for t in range(d2.shape[0]):
        d = d2[t] - ei - error[t]
        kept = max(zi + size[t], NO_DIGITS * (d2[t] + ei + error[t]))
        good = (corrected[t] >= 0.0) and (d > kept)
        q = 1.0 / d if good else 0.0
        if p != 1.0:
            q = q**p
        v = 0.5 * (ci + corrected[t]) * q - reference if good else 0.0
        t1 += v
        t2 += v * v
        found += 1.0 if good else 0.0
    sums[CORRECTED], sums[CORRECTED2], counts[CORRECTABLE] = t1, t2, found


@njit(cache=True, fastmath=FAST, error_model="numpy")
def sum_directed(
    g: Any, wi: float, square_w: Any, x: Any, others: Any, b: int, center: Any, lost: float, d2: Any,
    size: Any, zi: float, reference: float, along: Any, sums: Any, counts: Any,
) -> None:  # fmt: skip
    """Tally the variance along the line between two means over its squared length."""
    least = np.inf
    for t in range(d2.shape[0]):
        whole = wi + square_w[t]
        along[t] = whole - 2.0 * g[t]
        least = min(least, along[t] - lost * whole)
    if least < 0.0:
        for t in range(d2.shape[0]):
            if along[t] < lost * (wi + square_w[t]):
                along[t] = _direct(x, others[b + t], 1.0, 1.0, center, 0.0)
    t1 = t2 = found = 0.0
    for t in range(d2.shape[0]):
        apart = d2[t] > (zi + size[t])
        q = 1.0 / d2[t] if apart else 0.0
        v = along[t] * q * q - reference if apart else 0.0
        t1 += v
        t2 += v * v
        found += 1.0 if apart else 0.0
    sums[DIRECTED], sums[DIRECTED2], counts[ALONG] = t1, t2, found


@njit(cache=True, fastmath=FAST, error_model="numpy")
def nearest_of(d2: Any, i: int, j: int, near: Any, column: Any, column_at: Any) -> int:
    """Find the nearest class of i, and offer i to the columns."""
    lo = np.inf
    for t in range(d2.shape[0]):
        lo = min(lo, d2[t])
    for t in range(d2.shape[0]):
        closer = d2[t] < column[t]
        column[t] = d2[t] if closer else column[t]
        column_at[t] = i if closer else column_at[t]
    near[0] = lo
    for t in range(d2.shape[0]):
        if d2[t] == lo:
            return j + t
    return -1


@njit(cache=True, fastmath=FAST, error_model="numpy")
def sum_distance(
    r2: Any, inverse: Any, reference: float, near: Any, column: Any, sums: Any, counts: Any,
    extremes: Any,
) -> None:  # fmt: skip
    """Tally distances between directions; marks pairs without one by a square of -1."""
    t1 = t2 = found = 0.0
    lo, hi = np.inf, -np.inf
    for t in range(r2.shape[0]):
        yes = inverse[t] > 0.0
        r = max(r2[t], 0.0)
        v = math.sqrt(r) - reference if yes else 0.0
        t1 += v
        t2 += v * v
        found += 1.0 if yes else 0.0
        least = r if yes else np.inf
        lo = min(lo, least)
        hi = max(hi, r if yes else -np.inf)
        column[t] = min(column[t], least)
        r2[t] = r if yes else -1.0
    sums[DIST], sums[DIST2], counts[DIRECTIONS] = t1, t2, found
    extremes[SQUARE_RANGE], extremes[SQUARE_RANGE + 1] = lo, hi
    near[1] = lo


@njit(cache=True, fastmath=FAST, error_model="numpy")
def sum_log(
    r2: Any, zero: float, s: float, reference: float, x: Any, x_bits: Any, y: Any, sums: Any,
    counts: Any, extremes: Any,
) -> float:  # fmt: skip
    """Tally log(1/|u_i - u_j|); leaves s times it in x, and gives the greatest."""
    for t in range(r2.shape[0]):
        x[t] = r2[t] if r2[t] > 2.0 * zero else 1.0
    logarithms(x, x_bits, y)
    t1 = t2 = found = 0.0
    lo, hi = np.inf, -np.inf
    for t in range(r2.shape[0]):
        yes = r2[t] > 2.0 * zero
        v = -0.5 * y[t]
        x[t] = s * v if yes else -np.inf
        lo = min(lo, v if yes else np.inf)
        hi = max(hi, v if yes else -np.inf)
        v = v - reference if yes else 0.0
        t1 += v
        t2 += v * v
        found += 1.0 if yes else 0.0
    sums[LOG], sums[LOG2], counts[DIRECTIONS_APART] = t1, t2, found
    if found == 0.0:
        return -np.inf
    extremes[LOG_RANGE], extremes[LOG_RANGE + 1] = lo, hi
    return max(s * lo, s * hi)


@njit(cache=True, fastmath=FAST, error_model="numpy")
def sum_cosine(
    r2: Any, coherence: float, refs: Any, uniform: Any, cosine: Any, sums: Any, extremes: Any
) -> None:
    """Tally cosines, their distance from a simplex and uniformity; leaves cosines in `cosine`."""
    t1 = t2 = t3 = t4 = t5 = t6 = 0.0
    lo, hi = np.inf, -np.inf
    for t in range(r2.shape[0]):
        yes = r2[t] >= 0.0
        c = 1.0 - 0.5 * r2[t]
        v = c - refs[COS] if yes else 0.0
        t1 += v
        t2 += v * v
        v = abs(c + coherence) - refs[DEV] if yes else 0.0
        t3 += v
        t4 += v * v
        v = uniform[t] if yes else 0.0
        t5 += v
        t6 += v * v
        lo = min(lo, c if yes else np.inf)
        hi = max(hi, c if yes else -np.inf)
        cosine[t] = c
    sums[COS], sums[COS2], sums[DEV], sums[DEV2] = t1, t2, t3, t4
    sums[UNIFORM], sums[UNIFORM2] = t5, t6
    extremes[COSINE_RANGE], extremes[COSINE_RANGE + 1] = lo, hi


@njit(cache=True, error_model="numpy")
def keep_top(values: Any, usable: Any, i: int, j: int, top: Any, top_at: Any) -> None:
    """Put values in the place of the least of those kept, where they are greater."""
    least = top.argmin()
    for t in range(values.shape[0]):
        if values[t] > top[least] and usable[t] >= 0.0:
            top[least], top_at[least, 0], top_at[least, 1] = values[t], i, j + t
            least = top.argmin()


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
