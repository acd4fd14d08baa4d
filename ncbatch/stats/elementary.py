"""Logarithm and exponential of arrays, written out so that the compiler vectorises them."""

from __future__ import annotations

from typing import Any

from numba import njit

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
