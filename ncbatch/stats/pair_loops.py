"""The loops of the compiled pair sweep: one quantity over one row of a tile at a time.

Numba compiles them into `pair_kernel.sweep_tile`, and what it keeps on disk goes by the date of that
file alone: after a change here or in `elementary`, `touch` it.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit

from ncbatch.stats.elementary import FAST, logarithms
from ncbatch.stats.pair_outputs import (
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
    SQUARE_RANGE,
    UNIFORM,
    UNIFORM2,
    VARIED,
)

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
