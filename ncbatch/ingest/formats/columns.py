"""Arrow columns as arrays: scalars, and lists of one length, nested or not."""

from __future__ import annotations

from typing import Any

import numpy as np

from ncbatch.errors import DataError
from ncbatch.ingest.formats.shard import Block


def row_shape(
    pa: Any, where: str, kind: Any, first: Any | None
) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Find the shape of one row of a column, and the dtype of its values.

    Parameters
    ----------
    pa : module
        ``pyarrow``.
    where : str
        The column, for messages.
    kind : pyarrow.DataType
        The column's type.
    first : pyarrow.Array or None
        Rows of it, whose lists tell the lengths that the type leaves open.

    Raises
    ------
    DataError
        When values are no numbers.
    """
    if isinstance(kind, pa.FixedShapeTensorType):
        if kind.permutation not in (None, list(range(len(kind.shape)))):
            raise DataError(f"'{where}' holds permuted tensors", "tensors stored by rows")
        return tuple(kind.shape), _dtype(pa, where, kind.value_type)
    if isinstance(kind, pa.BaseExtensionType):
        storage = None if first is None else getattr(first, "storage", first)
        return row_shape(pa, where, kind.storage_type, storage)
    shape: list[int] = []
    values = first
    while _is_list(pa, kind):
        if pa.types.is_fixed_size_list(kind):
            shape.append(int(kind.list_size))
        else:
            shape.append(0 if values is None else _length(values))
        kind = kind.value_type
        values = None if values is None else values.flatten()
    return tuple(shape), _dtype(pa, where, kind)


def to_rows(pa: Any, where: str, array: Any, shape: tuple[int, ...], start: int) -> Block:
    """Copy rows of a column to NumPy.

    Parameters
    ----------
    pa : module
        ``pyarrow``.
    where : str
        The column, for messages.
    array : pyarrow.Array
        Some of its rows.
    shape : tuple of int
        What every row must have.
    start : int
        Number of the first row, for messages.

    Raises
    ------
    DataError
        When a row has another shape or values are missing; named by row.
    """
    n = len(array)
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    if isinstance(array.type, pa.FixedSizeListType) and len(shape) > 1:
        if not _is_list(pa, array.type.value_type):  # a tensor, whose values lie flat
            shape_of_lists: tuple[int, ...] = (int(np.prod(shape)),)
        else:
            shape_of_lists = shape
    else:
        shape_of_lists = shape
    inner = 1  # lists of this depth in one row
    for length in shape_of_lists:
        _refuse_missing(where, array, inner, start)
        if not pa.types.is_fixed_size_list(array.type):
            _check_lengths(where, array, length, inner, start)
        array = array.flatten()
        inner *= max(length, 1)
    _refuse_missing(where, array, inner, start)
    values = array.to_numpy(zero_copy_only=False)
    return np.array(values).reshape(n, *shape)


def _is_list(pa: Any, kind: Any) -> bool:
    types = pa.types
    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))


def _length(lists: Any) -> int:
    """Give the length of the first list that holds something; an odd row before it is found later."""
    return next((len(row) for row in lists if row.is_valid and len(row)), 0)


def _dtype(pa: Any, where: str, kind: Any) -> np.dtype[Any]:
    known = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
    if not known:
        raise DataError(f"'{where}' holds values of type {kind}", "numbers, or lists of numbers")
    dtype: np.dtype[Any] = np.dtype(kind.to_pandas_dtype())
    return dtype


def _refuse_missing(where: str, array: Any, inner: int, start: int) -> None:
    if array.null_count:
        missing = int(np.flatnonzero(array.is_null().to_numpy(zero_copy_only=False))[0])
        raise DataError(f"'{where}' has no value in row {start + missing // inner}", "no nulls")


def _check_lengths(where: str, array: Any, length: int, inner: int, start: int) -> None:
    lengths = np.diff(array.offsets.to_numpy(zero_copy_only=False))
    odd = np.flatnonzero(lengths != length)
    if odd.size:
        at = int(odd[0])
        raise DataError(
            f"'{where}' has {int(lengths[at])} values in row {start + at // inner}",
            f"{length}, as in its first row" + (" that holds some" if not lengths[0] else ""),
            "save rows of one length (padded, with a mask), or one row per token",
        )
