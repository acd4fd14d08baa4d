"""Tall arrays (K, D) that are never held whole: rows in a file, and rows centred as they are read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import array_api_compat.numpy
import numpy as np
import numpy.typing as npt

from ncbatch.arrays.namespace import Array, namespace

# What stands for a block of rows: a slice or an array of row numbers, columns taken whole.
Rows = slice | npt.NDArray[np.int64] | tuple[Any, slice]


class StoredRows:
    """Rows (K, D) of float64 in a file; slices and arrays of row numbers are read into memory.

    Reading goes through the system's cache but maps nothing, so that what is read counts as
    memory of this process only while the result is held.

    Parameters
    ----------
    path : path
        The file, exactly K * D * 8 bytes; made, full of zeros, when it is not there.
    shape : (int, int)
        K and D.
    """

    dtype = np.dtype(np.float64)
    device = "cpu"

    def __init__(self, path: str | os.PathLike[str], shape: tuple[int, int]) -> None:
        self.path, self.shape = Path(path), shape
        if not self.path.exists():
            with self.path.open("wb") as file:
                file.truncate(shape[0] * shape[1] * 8)

    def __array_namespace__(self, api_version: str | None = None) -> Any:
        return array_api_compat.numpy

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Rows) -> npt.NDArray[np.float64]:
        """Read rows into an array of their own."""
        rows = _without_columns(rows)
        width = self.shape[1]
        if isinstance(rows, slice):
            start, stop, _ = rows.indices(self.shape[0])
            found = np.fromfile(
                self.path, np.float64, max(stop - start, 0) * width, offset=start * width * 8
            )
            return found.reshape(-1, width)
        numbers = np.asarray(rows)
        if numbers.dtype == np.bool_:
            numbers = np.flatnonzero(numbers)
        found = np.empty((len(numbers), width))
        with self.path.open("rb", buffering=0) as file:
            for row, number in zip(found, numbers.tolist(), strict=True):
                os.preadv(file.fileno(), [row], number * width * 8)
        return found

    def __setitem__(self, rows: Rows, values: npt.NDArray[np.float64]) -> None:
        """Write a slice of rows."""
        part = _without_columns(rows)
        if not isinstance(part, slice):
            raise TypeError("stored rows are written slice by slice")
        start, stop, _ = part.indices(self.shape[0])
        if values.shape != (stop - start, self.shape[1]):
            raise ValueError(f"rows of shape {values.shape} for {stop - start} of {self.shape}")
        with self.path.open("r+b", buffering=0) as file:
            file.seek(start * self.shape[1] * 8)
            np.ascontiguousarray(values, np.float64).tofile(file)

    def __reduce__(self) -> tuple[Any, ...]:
        return StoredRows, (self.path, self.shape)


class CentredRows:
    """Rows minus a center, converted as they are read; holds nothing of the rows' size itself.

    Parameters
    ----------
    rows : array (K, D) or StoredRows
        The rows, of float64.
    center : array (D,) or 0
        What is subtracted.
    dtype : optional
        Dtype that blocks are given in; float64 by default.
    """

    def __init__(self, rows: Array, center: Array | float = 0.0, dtype: Any = None) -> None:
        self.rows, self.center = rows, center
        self.dtype = dtype or namespace(rows).float64

    @property
    def shape(self) -> tuple[int, int]:
        """K and D."""
        return self.rows.shape[0], self.rows.shape[1]

    @property
    def device(self) -> Any:
        """Where blocks are."""
        return self.rows.device

    def __array_namespace__(self, api_version: str | None = None) -> Any:
        return namespace(self.rows)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Rows) -> Array:
        """Give a block: a slice, or an array of row numbers, of all columns."""
        part, xp = _without_columns(rows), namespace(self.rows)
        if isinstance(part, slice) or isinstance(self.rows, StoredRows):
            block = self.rows[part, :]
        else:
            block = xp.take(self.rows, part, axis=0)
        return xp.astype(block - self.center, self.dtype, copy=False)


def _without_columns(rows: Rows) -> Any:
    """Take the row part of an index; only all columns can be asked for."""
    if not isinstance(rows, tuple):
        return rows
    if len(rows) != 2 or rows[1] != slice(None):
        raise TypeError("rows are read whole: index by rows only")
    return rows[0]
