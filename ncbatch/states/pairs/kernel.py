"""The pair sweep's element-wise work on the CPU: one pass over a tile's products.

Every row of a tile is worked on in small buffers, quantity by quantity, so that the compiler can
vectorise each loop; the logarithm and the exponential are written out for the same reason. Squared
distances that cancelled in the products are computed anew from the vectors, in place.

The loops and the kernel that calls them stand in one file: numba's cache of the kernel goes by the
date of this file alone.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Self

import numpy as np
from numba import njit

from ncbatch.arrays.namespace import Array

# Sums per row of a tile: columns of the result.
CDNV, CDNV2, DIST, DIST2, LOG, LOG2, RIESZ, RIESZ2, INNER, INNER2 = range(10)
COS, COS2, DEV, DEV2, UNIFORM, UNIFORM2 = range(10, 16)
CORRECTED, CORRECTED2, DIRECTED, DIRECTED2 = range(16, 20)
N_SUMS = 20
# Counts per row.
PAIRS, VARIED, DIRECTIONS, DIRECTIONS_APART, CORRECTABLE, ALONG, COINCIDENT = range(7)
N_COUNTS = 7
# Extremes: columns of (minimum, maximum).
CDNV_RANGE, SQUARE_RANGE, COSINE_RANGE, INNER_RANGE, LOG_RANGE = range(0, 10, 2)
N_EXTREMES = 10
# Names of tallies, their first column of sums, and the count that goes with it.
TALLIES = {
    "cdnv": (CDNV, VARIED),
    "cdnv_corrected": (CORRECTED, CORRECTABLE),
    "cdnv_directional": (DIRECTED, ALONG),
    "distance": (DIST, DIRECTIONS),
    "log": (LOG, DIRECTIONS_APART),
    "interference": (INNER, PAIRS),
    "cosine": (COS, DIRECTIONS),
    "deviation": (DEV, DIRECTIONS),
    "uniformity": (UNIFORM, DIRECTIONS),
}


class Side(NamedTuple):
    """What lost distances are computed from: means (R, D), and their products with a root of S_W.

    The latter may be empty.
    """

    means: Array
    within: Array


class ClassVectors(NamedTuple):
    """What the kernel knows of each class, arrays (K,); of one class, numbers.

    |Mc|^2, |m|^2 times the share that counts as zero, 1/|Mc| or 0, V or -1, V n/(n-1) or -1, the
    error of the mean V/(n-1), and |m|^2 along S_W.
    """

    square: Array
    size: Array
    inverse: Array
    variance: Array
    corrected: Array
    error: Array
    square_within: Array


class Numbers(NamedTuple):
    """Exponents, 1/(K-1), and the shares below which digits are lost and a square is zero."""

    dist_exp: float
    riesz_exponent: float
    coherence: float
    lost: float
    zero: float


class Wanted(NamedTuple):
    """Which quantities to tally; `sphere` are distances and logarithms."""

    cdnv: bool
    sphere: bool
    riesz: bool
    cosine: bool
    cdnv_corrected: bool
    cdnv_directional: bool
    nearest: bool


class Row(NamedTuple):
    """What the loops write of a row of a tile: a row of each array of `Outputs`."""

    sums: Array
    counts: Array
    extremes: Array
    near: Array


class Outputs(NamedTuple):
    """What the kernel writes, per row of a tile unless said otherwise.

    `near` are the squares to the nearest mean and direction (R, 2), `near_at` the class of the
    former; `column_near` (2, C) and `column_near_at` (C,) are the same per column. `top` holds the
    greatest CDNVs and cosines of the tile (2, T), `top_at` their classes (2, T, 2).
    """

    sums: Array
    counts: Array
    extremes: Array
    scales: Array
    near: Array
    near_at: Array
    column_near: Array
    column_near_at: Array
    histogram: Array
    top: Array
    top_at: Array

    @classmethod
    def empty(cls, n_rows: int, n_columns: int, bins: int, n_top: int) -> Self:
        """Make the arrays of a tile without pairs."""
        extremes = np.empty((n_rows, N_EXTREMES))
        extremes[:, ::2] = np.inf
        extremes[:, 1::2] = -np.inf
        return cls(
            sums=np.zeros((n_rows, N_SUMS)),
            counts=np.zeros((n_rows, N_COUNTS), np.int64),
            extremes=extremes,
            scales=np.full(n_rows, -np.inf),
            near=np.full((n_rows, 2), np.inf),
            near_at=np.full(n_rows, -1, np.int64),
            column_near=np.full((2, n_columns), np.inf),
            column_near_at=np.full(n_columns, -1, np.int64),
            histogram=np.zeros(bins, np.int64),
            top=np.full((2, n_top), -np.inf),
            top_at=np.zeros((2, n_top, 2), np.int64),
        )


# Logarithm and exponential of arrays, written out so that the compiler vectorises them.


# Numbers are finite, or infinite where that is meant, but never NaN; sums may be reordered.
FAST = {"reassoc", "contract", "nsz", "arcp", "nnan"}
_EXACT_ORDER = {"contract", "nsz", "nnan"}
_LN2_HI = 6.93147180369123816490e-01
_LN2_LO = 1.90821492927058770002e-10
_LOG2_E = 1.4426950408889634
_SQRT2 = 1.4142135623730951
# The bits of a float64's mantissa, and those of 1.0.
_MANTISSA = 0x000FFFFFFFFFFFFF
_ONE = 0x3FF0000000000000
# Adding it rounds a small number to the nearest integer, left in the low bits of the sum.
_ROUNDER = 6755399441055744.0


@njit(cache=True, fastmath=FAST, error_model="numpy")
def logarithms(x, bits, out):
    """Write log(x) of positive normal numbers; `bits` views x as int64, and x is spent."""
    for t in range(x.shape[0]):
        out[t] = float((bits[t] >> 52) - 1023)
        bits[t] = (bits[t] & _MANTISSA) | _ONE
    for t in range(x.shape[0]):
        m = x[t]
        k = out[t]
        high = m > _SQRT2
        m = 0.5 * m if high else m
        k = k + 1.0 if high else k
        # x = 2^k m with m in [1/sqrt 2, sqrt 2]; log x = k ln 2 + log1p f.
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
def exponentials(x, whole, whole_bits, scale, scale_bits):
    """Replace numbers x <= 0 by exp(x), those below -700 by about 1e-304; the rest is scratch."""
    for t in range(x.shape[0]):
        v = max(x[t], -700.0)
        rounded = v * _LOG2_E + _ROUNDER
        whole[t] = rounded
        # exp x = 2^k exp r with |r| <= ln 2 / 2; ln 2 in two parts keeps the digits of r.
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


@njit(cache=True)
def _write(columns, first, a, b):
    """Write two numbers side by side: a sum and that of squares, or a minimum and a maximum."""
    columns[first] = a
    columns[first + 1] = b


# The loops: one quantity over one row of a tile at a time, the class `me` with each of `others`.

# Below this share of its terms a corrected squared distance is rounding error.
NO_DIGITS = 1e-9


@njit(cache=True, fastmath=FAST, error_model="numpy")
def square_distances(g, me, others, lost, d2, r2):
    """Write |m_i - m_j|^2 and |u_i - u_j|^2 from products; return whether any lost its digits."""
    least = np.inf
    for t in range(g.shape[0]):
        both = me.square + others.square[t]
        d = both - 2.0 * g[t]
        r = 2.0 - 2.0 * (g[t] * me.inverse * others.inverse[t])
        d2[t] = d
        r2[t] = r
        least = min(least, min(d - lost * both, r - 2.0 * lost))
    return least < 0.0


@njit(cache=True, fastmath=FAST, error_model="numpy")
def _direct(x, y, fx, fy, center, shift):
    """Compute |(x - shift c) fx - (y - shift c) fy|^2 from the vectors themselves."""
    total = 0.0
    for k in range(x.shape[0]):
        c = shift * center[k]
        apart = (x[k] - c) * fx - (y[k] - c) * fy
        total += apart * apart
    return total


@njit(cache=True, fastmath=FAST, error_model="numpy")
def repair(x, means, center, me, others, lost, d2, r2):
    """Compute lost distances of the mean x to each of `means` anew."""
    for t in range(d2.shape[0]):
        if d2[t] < lost * (me.square + others.square[t]):
            d2[t] = _direct(x, means[t], 1.0, 1.0, center, 0.0)
        if r2[t] < 2.0 * lost:
            r2[t] = _direct(x, means[t], me.inverse, others.inverse[t], center, 1.0)


@njit(cache=True, fastmath=FAST, error_model="numpy")
def sum_inner(g, reference, row):
    """Tally inner products."""
    t1 = t2 = 0.0
    lo = np.inf
    hi = -np.inf
    for t in range(g.shape[0]):
        v = g[t] - reference
        t1 += v
        t2 += v * v
        lo = min(lo, g[t])
        hi = max(hi, g[t])
    _write(row.sums, INNER, t1, t2)
    _write(row.extremes, INNER_RANGE, lo, hi)


@njit(cache=True, fastmath=FAST, error_model="numpy")
def count_coincident(d2, me, others, row):
    """Count pairs whose means are one."""
    n = 0.0
    for t in range(d2.shape[0]):
        n += 0.0 if d2[t] > (me.size + others.size[t]) else 1.0
    row.counts[COINCIDENT] = n


@njit(cache=True, fastmath=FAST, error_model="numpy")
def sum_cdnv(d2, me, others, p, reference, value, row):
    """Tally CDNVs; leaves them in `value`, -1 where there is none."""
    t1 = t2 = n = 0.0
    lo = np.inf
    hi = -np.inf
    if me.variance < 0.0:
        return
    for t in range(d2.shape[0]):
        varied = (d2[t] > (me.size + others.size[t])) and (others.variance[t] >= 0.0)
        q = 1.0 / d2[t] if varied else 0.0
        value[t] = q * q if p == 2.0 else q
    # The usual exponents need no power, which is not vectorised.
    if p != 1.0 and p != 2.0:
        for t in range(d2.shape[0]):
            value[t] = value[t] ** p
    for t in range(d2.shape[0]):
        varied = value[t] > 0.0
        e = 0.5 * (me.variance + others.variance[t]) * value[t]
        v = e - reference if varied else 0.0
        value[t] = e if varied else -1.0
        t1 += v
        t2 += v * v
        n += 1.0 if varied else 0.0
        lo = min(lo, e if varied else np.inf)
        hi = max(hi, value[t])
    _write(row.sums, CDNV, t1, t2)
    row.counts[VARIED] = n
    if n > 0.0:
        _write(row.extremes, CDNV_RANGE, lo, hi)


@njit(cache=True, fastmath=FAST, error_model="numpy")
def sum_corrected(d2, me, others, p, reference, row):
    """Tally CDNVs without the bias of finite samples."""
    t1 = t2 = n = 0.0
    if me.corrected < 0.0:
        return
    for t in range(d2.shape[0]):
        d = d2[t] - me.error - others.error[t]
        kept = max(me.size + others.size[t], NO_DIGITS * (d2[t] + me.error + others.error[t]))
        good = (others.corrected[t] >= 0.0) and (d > kept)
        q = 1.0 / d if good else 0.0
        if p != 1.0:
            q = q**p
        v = 0.5 * (me.corrected + others.corrected[t]) * q - reference if good else 0.0
        t1 += v
        t2 += v * v
        n += 1.0 if good else 0.0
    _write(row.sums, CORRECTED, t1, t2)
    row.counts[CORRECTABLE] = n


@njit(cache=True, fastmath=FAST, error_model="numpy")
def sum_directed(g, x, within, center, me, others, lost, d2, reference, along, row):
    """Tally the variance along the line between two means over its squared length."""
    least = np.inf
    for t in range(d2.shape[0]):
        both = me.square_within + others.square_within[t]
        along[t] = both - 2.0 * g[t]
        least = min(least, along[t] - lost * both)
    if least < 0.0:
        for t in range(d2.shape[0]):
            if along[t] < lost * (me.square_within + others.square_within[t]):
                along[t] = _direct(x, within[t], 1.0, 1.0, center, 0.0)
    t1 = t2 = n = 0.0
    for t in range(d2.shape[0]):
        apart = d2[t] > (me.size + others.size[t])
        q = 1.0 / d2[t] if apart else 0.0
        v = along[t] * q * q - reference if apart else 0.0
        t1 += v
        t2 += v * v
        n += 1.0 if apart else 0.0
    _write(row.sums, DIRECTED, t1, t2)
    row.counts[ALONG] = n


@njit(cache=True, fastmath=FAST, error_model="numpy")
def nearest_of(d2, i, j, column, column_at, row):
    """Find the nearest class of i, and offer i to the columns."""
    lo = np.inf
    for t in range(d2.shape[0]):
        lo = min(lo, d2[t])
    for t in range(d2.shape[0]):
        closer = d2[t] < column[t]
        column[t] = d2[t] if closer else column[t]
        column_at[t] = i if closer else column_at[t]
    row.near[0] = lo
    for t in range(d2.shape[0]):
        if d2[t] == lo:
            return j + t
    return -1


@njit(cache=True, fastmath=FAST, error_model="numpy")
def sum_distance(r2, inverse, reference, column, row):
    """Tally distances between directions; marks pairs without one by a square of -1."""
    t1 = t2 = n = 0.0
    lo = np.inf
    hi = -np.inf
    for t in range(r2.shape[0]):
        yes = inverse[t] > 0.0
        r = max(r2[t], 0.0)
        v = math.sqrt(r) - reference if yes else 0.0
        t1 += v
        t2 += v * v
        n += 1.0 if yes else 0.0
        least = r if yes else np.inf
        lo = min(lo, least)
        hi = max(hi, r if yes else -np.inf)
        column[t] = min(column[t], least)
        r2[t] = r if yes else -1.0
    _write(row.sums, DIST, t1, t2)
    row.counts[DIRECTIONS] = n
    _write(row.extremes, SQUARE_RANGE, lo, hi)
    row.near[1] = lo


@njit(cache=True, fastmath=FAST, error_model="numpy")
def sum_log(r2, zero, s, reference, x, x_bits, y, row):
    """Tally log(1/|u_i - u_j|); leaves s times it in x, and returns the greatest."""
    for t in range(r2.shape[0]):
        x[t] = r2[t] if r2[t] > 2.0 * zero else 1.0
    logarithms(x, x_bits, y)
    t1 = t2 = n = 0.0
    lo = np.inf
    hi = -np.inf
    for t in range(r2.shape[0]):
        yes = r2[t] > 2.0 * zero
        v = -0.5 * y[t]
        x[t] = s * v if yes else -np.inf
        lo = min(lo, v if yes else np.inf)
        hi = max(hi, v if yes else -np.inf)
        v = v - reference if yes else 0.0
        t1 += v
        t2 += v * v
        n += 1.0 if yes else 0.0
    _write(row.sums, LOG, t1, t2)
    row.counts[DIRECTIONS_APART] = n
    if n == 0.0:
        return -np.inf
    _write(row.extremes, LOG_RANGE, lo, hi)
    return max(s * lo, s * hi)


@njit(cache=True, fastmath=FAST, error_model="numpy")
def sum_cosine(r2, coherence, references, uniform, cosine, row):
    """Tally cosines, their distance from a simplex and uniformity; leaves cosines in `cosine`."""
    t1 = t2 = t3 = t4 = t5 = t6 = 0.0
    lo = np.inf
    hi = -np.inf
    for t in range(r2.shape[0]):
        yes = r2[t] >= 0.0
        c = 1.0 - 0.5 * r2[t]
        v = c - references[COS] if yes else 0.0
        t1 += v
        t2 += v * v
        v = abs(c + coherence) - references[DEV] if yes else 0.0
        t3 += v
        t4 += v * v
        v = uniform[t] if yes else 0.0
        t5 += v
        t6 += v * v
        lo = min(lo, c if yes else np.inf)
        hi = max(hi, c if yes else -np.inf)
        cosine[t] = c
    _write(row.sums, COS, t1, t2)
    _write(row.sums, DEV, t3, t4)
    _write(row.sums, UNIFORM, t5, t6)
    _write(row.extremes, COSINE_RANGE, lo, hi)


@njit(cache=True, error_model="numpy")
def keep_top(values, usable, i, j, top, top_at):
    """Put values in the place of the least of those kept, where they are greater."""
    least = top.argmin()
    for t in range(values.shape[0]):
        if values[t] > top[least] and usable[t] >= 0.0:
            top[least] = values[t]
            top_at[least, 0] = i
            top_at[least, 1] = j + t
            least = top.argmin()


@njit(cache=True, nogil=True, fastmath=FAST, error_model="numpy")
def sweep_tile(
    gram, gram_within, i0, j0, rows, columns, center, classes, numbers, references, wanted, out
):
    """Tally the pairs i < j of one tile into `out`.

    Parameters
    ----------
    gram : array (R, C)
        Products of centred means, rows i0.. and columns j0..; float32 or float64.
    gram_within : array (R, C) or (0, 0)
        The same of means times a root of S_W.
    rows, columns : Side
    center : array (D,)
        m_G.
    classes : ClassVectors
    numbers : Numbers
    references : array (N_SUMS,)
        Numbers near the means, subtracted before sums of squares are formed.
    wanted : Wanted
    out : Outputs
    """
    directions = wanted.sphere or wanted.riesz or wanted.cosine or wanted.nearest
    buffers = np.empty((6, gram.shape[1]))
    for a in range(gram.shape[0]):
        i = i0 + a
        b = max(0, i + 1 - j0)
        n = gram.shape[1] - b
        if n <= 0:
            continue
        j = j0 + b
        me = _vectors_of(classes, i)
        others = _vectors_of(classes, slice(j, j + n))
        row = Row(out.sums[a], out.counts[a], out.extremes[a], out.near[a])
        row.counts[PAIRS] = n
        g = buffers[0, :n]
        d2 = buffers[1, :n]
        r2 = buffers[2, :n]
        x = buffers[3, :n]
        y = buffers[4, :n]
        z = buffers[5, :n]
        g[:] = gram[a, b:]
        if square_distances(g, me, others, numbers.lost, d2, r2):
            repair(rows.means[a], columns.means[b:], center, me, others, numbers.lost, d2, r2)
        count_coincident(d2, me, others, row)
        sum_inner(g, references[INNER], row)
        if wanted.cdnv:
            sum_cdnv(d2, me, others, numbers.dist_exp, references[CDNV], x, row)
            # Few rows hold one of the greatest: the others are not gone over again.
            if row.extremes[CDNV_RANGE + 1] > out.top[0].min():
                keep_top(x, x, i, j, out.top[0], out.top_at[0])
        if wanted.cdnv_corrected:
            sum_corrected(d2, me, others, numbers.dist_exp, references[CORRECTED], row)
        if wanted.cdnv_directional:
            g[:] = gram_within[a, b:]
            own = rows.within[a]
            theirs = columns.within[b:]
            reference = references[DIRECTED]
            sum_directed(g, own, theirs, center, me, others, numbers.lost, d2, reference, x, row)
        if wanted.nearest:
            column = out.column_near[0, b:]
            column_at = out.column_near_at[b:]
            out.near_at[a] = nearest_of(d2, i, j, column, column_at, row)
        if me.inverse > 0.0 and directions:
            sum_distance(r2, others.inverse, references[DIST], out.column_near[1, b:], row)
            _sum_angles(a, i, j, r2, (x, y, z), numbers, references, wanted, row, out)


@njit(cache=True, fastmath=FAST, error_model="numpy")
def _vectors_of(classes, i):
    """Take a class, or a slice of them."""
    return ClassVectors(
        classes.square[i],
        classes.size[i],
        classes.inverse[i],
        classes.variance[i],
        classes.corrected[i],
        classes.error[i],
        classes.square_within[i],
    )


@njit(cache=True, fastmath=FAST, error_model="numpy")
def _sum_angles(a, i, j, r2, scratch, numbers, references, wanted, row, out):
    """Tally energies and cosines of row `a` from the squares `r2` between directions."""
    x, y, z = scratch
    if wanted.sphere or wanted.riesz:
        s = numbers.riesz_exponent
        reference = references[LOG]
        hi = sum_log(r2, numbers.zero, s, reference, x, x.view(np.int64), y, row)
        if wanted.riesz and row.counts[DIRECTIONS_APART] > 0:
            out.scales[a] = hi
            x -= hi
            exponentials(x, y, y.view(np.int64), z, z.view(np.int64))
            _write(row.sums, RIESZ, x.sum(), (x * x).sum())
    if wanted.cosine:
        np.multiply(r2, -2.0, x)
        exponentials(np.minimum(x, 0.0, x), y, y.view(np.int64), z, z.view(np.int64))
        sum_cosine(r2, numbers.coherence, references, x, y, row)
        if row.extremes[COSINE_RANGE + 1] > out.top[1].min():
            keep_top(y, r2, i, j, out.top[1], out.top_at[1])
        bins = out.histogram.shape[0]
        for t in range(r2.shape[0]):
            if r2[t] >= 0.0:
                cell = int((y[t] + 1.0) * (0.5 * bins))
                out.histogram[max(0, min(cell, bins - 1))] += 1
