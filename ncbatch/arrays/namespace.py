"""Which library an array belongs to, and the few conversions between libraries."""

from __future__ import annotations

import sys
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from array_api_compat import array_namespace, device, is_numpy_array

from ncbatch.errors import DataError

# An array of any array-API library; no static type spans NumPy, CuPy and torch.
Array: TypeAlias = Any

# The bits of an infinity; without the sign, those of what is not finite are no less.
_INFINITY = {"float16": 0x7C00, "bfloat16": 0x7F80}
_PIECE_VALUES = 2**17


def namespace(*arrays: Array) -> Any:
    """Find the array-API namespace that all `arrays` share.

    Parameters
    ----------
    *arrays : array
        Arrays of one library; numbers and ``None`` are ignored.

    Returns
    -------
    module
        The namespace, as in ``xp = namespace(X)``.

    Raises
    ------
    DataError
        When the arrays come from different libraries.
    """
    shaped = [a for a in arrays if hasattr(a, "shape")]
    try:
        return array_namespace(*shaped)
    except TypeError as error:
        kinds = dict.fromkeys(f"{type(a).__module__}.{type(a).__name__}" for a in shaped)
        raise DataError(f"arrays of {' and '.join(kinds)}", "arrays of one library") from error


def as_float64(values: Array) -> Array:
    """Convert to float64 without a copy where there is nothing to convert.

    float16, bfloat16 and float32 are exact in float64.
    """
    xp = namespace(values)
    if is_numpy_array(values):
        return np.asarray(values, dtype=np.float64)
    return xp.astype(values, xp.float64, copy=False)


def to_numpy(values: Array) -> npt.NDArray[Any]:
    """Copy an array to the host as NumPy; a NumPy array is returned as it is.

    Parameters
    ----------
    values : array
        A NumPy, CuPy or torch array, or anything ``numpy.asarray`` takes.

    Returns
    -------
    numpy.ndarray
        The same values; torch's bfloat16 becomes ``ml_dtypes.bfloat16``.
    """
    if isinstance(values, np.ndarray):
        return values
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(values, torch.Tensor):
        host = values.detach().cpu()
        # torch gives NumPy no bfloat16; its bits travel as int16.
        if host.dtype == torch.bfloat16:
            import ml_dtypes

            bits = np.asarray(host.contiguous().view(torch.int16).numpy())
            return bits.view(ml_dtypes.bfloat16)
        return np.asarray(host.numpy())
    if hasattr(values, "get") and type(values).__module__.startswith("cupy"):
        return np.asarray(values.get())
    strict = sys.modules.get("array_api_strict")
    if strict is not None and isinstance(values, strict._array_object.Array):
        # Its other devices refuse NumPy, as a GPU would.
        values = values.to_device(strict.Device("CPU_DEVICE"))
    return np.asarray(values)


def scalar(value: Array) -> float:
    """Bring a 0-d array (or a number) to the host as a float."""
    return float(value)


def first_nonfinite_row(rows: Array) -> int | None:
    """Find the first row that holds a NaN or an infinity.

    Parameters
    ----------
    rows : array (N, D)
        Floating-point values.

    Returns
    -------
    int or None
        The row's index, ``None`` when every value is finite.
    """
    if is_numpy_array(rows) and rows.dtype.name in _INFINITY and rows.dtype.isnative:
        return _first_nonfinite_half(np.ascontiguousarray(rows))
    xp = namespace(rows)
    finite = xp.isfinite(rows)
    if bool(xp.all(finite)):
        return None
    return int(xp.argmin(xp.astype(xp.all(finite, axis=1), xp.int8)))


def _first_nonfinite_half(rows: npt.NDArray[Any]) -> int | None:
    """Look at the bits, piece by piece in the cache: at memory's speed, unlike ``isfinite``."""
    bits = rows.view(np.uint16).reshape(-1)
    infinity = _INFINITY[rows.dtype.name]
    piece = np.empty(min(bits.size, _PIECE_VALUES), np.uint16)
    for start in range(0, bits.size, _PIECE_VALUES):
        part = bits[start : start + _PIECE_VALUES]
        # Without the sign, infinities and NaNs are the greatest bit patterns.
        magnitudes = np.bitwise_and(part, np.uint16(0x7FFF), out=piece[: part.size])
        if magnitudes.max() >= infinity:
            return int(start + np.argmax(magnitudes >= infinity)) // int(rows.shape[1])
    return None


def zeros(shape: tuple[int, ...], like: Array, dtype: str = "float64") -> Array:
    """Make an array of zeros in the library and on the device of `like`."""
    xp = namespace(like)
    return xp.zeros(shape, dtype=getattr(xp, dtype), device=device(like))
