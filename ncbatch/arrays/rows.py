"""Tall arrays (K, D) that are never held whole: in a file, chosen or centred as they are read.

They have ``shape``, ``dtype``, ``device`` and a namespace, and give float blocks of whole rows:
``rows[start:stop]`` or ``rows[numbers]``. Arrays in memory are read the same way by
`take_rows` and `float64_blocks`, so that formulas are written once.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import array_api_compat.numpy
import numpy as np
import numpy.typing as npt
from array_api_compat import device, is_numpy_array

from ncbatch.arrays.namespace import Array, as_float64, namespace
from ncbatch.errors import DataError

# Rows of a block in passes over K x D arrays: enough for full-speed products, small in memory.
BLOCK_ROWS = 4096


def row_blocks(n_rows: int, block_rows: int = BLOCK_ROWS) -> Iterator[slice]:
    """Cut ``range(n_rows)`` into slices of at most `block_rows`.

    Examples
    --------
    >>> list(row_blocks(5, 2))
    [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
    """
    for start in range(0, n_rows, block_rows):
        yield slice(start, min(start + block_rows, n_rows))


def symmetric_product(rows: Array, out: Array | None = None) -> Array:
    """Compute ``rows^T rows`` for an array (B, D), as a (D, D) array of its dtype.

    NumPy sees that both operands are one array and calls syrk, half the work of a general product.
    `out`, of NumPy arrays only, is where the result is written; memory that is not new is faster.
    """
    xp = namespace(rows)
    if is_numpy_array(rows):
        # One array on both sides: NumPy calls syrk.
        return np.matmul(rows.T, rows, out=out)
    return xp.matmul(xp.matrix_transpose(rows), rows)


def triangular_factor(rows: Array, block_rows: int = BLOCK_ROWS) -> Array:
    """Factor a tall array A (K, D) as A = QR and return R (min(K, D), D) in float64.

    Notes
    -----
    R is folded over blocks of rows (the sequential TSQR), so that nothing of A's size is
    allocated. The singular values of A are those of R to full relative accuracy of the largest,
    which a D x D product ``A^T A`` would square.
    """
    xp = namespace(rows)
    block_rows = max(block_rows, rows.shape[1])
    factor = None
    for part in row_blocks(rows.shape[0], block_rows):
        block = as_float64(rows[part, :])
        # R of [R; block] is R of all rows so far: nothing of the size of A is held.
        factor = block if factor is None else xp.concat([factor, block], axis=0)
        if is_numpy_array(factor):  # the standard has no way to leave Q out
            factor = np.linalg.qr(factor, mode="r")
        else:
            factor = xp.linalg.qr(factor, mode="reduced")[1]
    return factor


# What stands for a block of rows: a slice or an array of row numbers, columns taken whole.
Rows = slice | npt.NDArray[np.int64] | tuple[Any, ...]
# A block of float64 rows stays in a processor's cache; more rows than this gain nothing.
_BLOCK_BYTES = 2 * 2**20
# Rows beyond those asked for are read too where that saves reading one by one.
_SPARSEST = 2


class StoredRows:
    """Rows (K, D) of float64 in a file; slices and arrays of row numbers are read into memory.

    Reading goes through the system's cache but maps nothing, so that what is read counts as
    memory of this process only while the result is held.

    Parameters
    ----------
    path : path
        The file, exactly K * D * 8 bytes; `create` makes one.
    shape : (int, int)
        K and D.
    """

    dtype = np.dtype(np.float64)
    device = "cpu"

    def __init__(self, path: str | os.PathLike[str], shape: tuple[int, int]) -> None:
        self.path = Path(path)
        self.shape = shape

    @classmethod
    def create(cls, path: str | os.PathLike[str], shape: tuple[int, int]) -> StoredRows:
        """Make a file of zeros, to be written slice by slice."""
        with Path(path).open("wb") as file:
            # Zeros that were never written take no room on the disk.
            file.truncate(shape[0] * shape[1] * 8)
        return cls(path, shape)

    @property
    def complete(self) -> bool:
        """Whether the file is there, and as long as its rows are."""
        size = self.shape[0] * self.shape[1] * 8
        return self.path.exists() and self.path.stat().st_size == size

    def __array_namespace__(self, api_version: str | None = None) -> Any:
        return array_api_compat.numpy

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Rows) -> npt.NDArray[np.float64]:
        """Read rows into an array of their own.

        Raises
        ------
        DataError
            When the file is shorter than K rows.
        """
        rows = _without_columns(rows)
        if isinstance(rows, slice):
            start, stop, _ = rows.indices(self.shape[0])
            return self._read_slice(start, max(start, stop))
        numbers = np.asarray(rows)
        return self._read_rows(np.flatnonzero(numbers) if numbers.dtype == np.bool_ else numbers)

    def _read_slice(self, start: int, stop: int) -> npt.NDArray[np.float64]:
        block = np.empty((stop - start, self.shape[1]))
        with self.path.open("rb", buffering=0) as file:
            self._fill(file, start, block)
        return block

    def _read_rows(self, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        block = np.empty((len(numbers), self.shape[1]))
        with self.path.open("rb", buffering=0) as file:
            for row, number in zip(block, numbers.tolist(), strict=True):
                self._fill(file, number, row)
        return block

    def _fill(self, file: Any, first: int, into: npt.NDArray[np.float64]) -> None:
        file.seek(first * self.shape[1] * 8)
        missing: Any = into.reshape(-1).view(np.uint8)
        while len(missing):  # one read gives at most 2 GiB
            n = file.readinto(missing)
            if not n:
                raise DataError(f"'{self.path}' is cut short", f"{self.shape} rows of float64")
            missing = missing[n:]

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


class StackedRows(StoredRows):
    """The rows of several files, one below the other; for reading.

    Parameters
    ----------
    parts : sequence of StoredRows
        The files, with equal D.
    """

    def __init__(self, parts: Sequence[StoredRows]) -> None:
        self.parts = [p for part in parts for p in getattr(part, "parts", [part])]
        self._starts = np.cumsum([0, *(len(part) for part in self.parts)])
        self.path = self.parts[0].path
        self.shape = int(self._starts[-1]), self.parts[0].shape[1]

    def _read_slice(self, start: int, stop: int) -> npt.NDArray[np.float64]:
        return self._read_rows(np.arange(start, stop))

    def _read_rows(self, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        block = np.empty((len(numbers), self.shape[1]))
        # The part whose first row is the last that is not beyond the number.
        homes = np.searchsorted(self._starts, numbers, side="right") - 1
        for home in np.unique(homes).tolist():
            here = homes == home
            # Neighbours are read at once, and others in as few reads as there may be.
            block[here] = take_rows(self.parts[home], numbers[here] - self._starts[home])
        return block

    def __setitem__(self, rows: Rows, values: npt.NDArray[np.float64]) -> None:
        """Refuse: rows are written part by part."""
        raise TypeError("stacked rows are written part by part")

    def __reduce__(self) -> tuple[Any, ...]:
        return StackedRows, (self.parts,)


class _View:
    """What views of rows share: they have the place of the rows that they look at."""

    rows: Array

    @property
    def shape(self) -> tuple[int, int]:
        """K and D."""
        return self.rows.shape[0], self.rows.shape[1]

    @property
    def device(self) -> Any:
        """Where blocks are."""
        return device(self.rows)

    def __array_namespace__(self, api_version: str | None = None) -> Any:
        return namespace(self.rows)

    def __len__(self) -> int:
        return self.shape[0]


class CentredRows(_View):
    """Rows minus a center, converted as they are read; holds nothing of the rows' size itself.

    Parameters
    ----------
    rows : array (K, D) or StoredRows
        The rows, of any floating-point dtype; they are subtracted from in float64.
    center : array (D,) or 0
        What is subtracted.
    dtype : optional
        Dtype that blocks are given in; float64 by default.
    """

    def __init__(self, rows: Array, center: Array | float = 0.0, dtype: Any = None) -> None:
        self.rows = rows
        self.center = center
        self.dtype = dtype or namespace(rows).float64

    def __getitem__(self, rows: Rows) -> Array:
        """Read a block: a slice, or an array of row numbers, of all columns."""
        block = as_float64(take_rows(self.rows, _without_columns(rows))) - self.center
        return namespace(self.rows).astype(block, self.dtype, copy=False)


class ChosenRows(_View):
    """Some of the rows, in any order; they are copied block by block only.

    Parameters
    ----------
    rows : array (M, D) or StoredRows
        Where rows are chosen from.
    numbers : array (K,) of int
        Which; a number may come more than once.
    """

    def __init__(self, rows: Array, numbers: Array) -> None:
        xp = namespace(rows)
        self.rows = rows
        self.dtype = rows.dtype
        self.numbers = xp.asarray(numbers, device=device(rows))

    @property
    def shape(self) -> tuple[int, int]:
        """K and D."""
        return self.numbers.shape[0], self.rows.shape[1]

    def __getitem__(self, rows: Rows) -> Array:
        """Read a block: a slice, or an array of row numbers, of all columns."""
        part = _without_columns(rows)
        if not isinstance(part, slice):
            part = namespace(self.rows).asarray(part, device=device(self.numbers))
        return take_rows(self.rows, self.numbers[part])


def take_rows(rows: Array, part: slice | Array) -> Array:
    """Read a block of an array in memory, of stored rows or of a view of either.

    Parameters
    ----------
    rows : array (K, D), or rows that are read by slices and by numbers
        The rows.
    part : slice or array (B,) of int
        Which.

    Returns
    -------
    array (B, D)
        In the dtype of `rows`; of an array in memory a slice is not copied.
    """
    if isinstance(part, slice):
        return rows[part, :]
    in_memory = hasattr(rows, "__dlpack__")
    if is_numpy_array(part) and part.size and not isinstance(rows, ChosenRows):
        first = int(part.min())
        last = int(part.max())
        # Neighbouring numbers are a slice: no copy of what is in memory, one read of a file.
        if last - first + 1 == len(part) and bool(np.all(part[1:] > part[:-1])):
            return rows[first : last + 1, :]
        # Twice as many rows are read faster than one seek for each.
        if not in_memory and last - first < _SPARSEST * len(part):
            return rows[first : last + 1, :][part - first]
    return namespace(rows).take(rows, part, axis=0) if in_memory else rows[part]


def take(values: Array, part: slice | Array) -> Array:
    """Read a slice, or the entries of some numbers, along the first axis of an array in memory."""
    if isinstance(part, slice):
        return values[part, ...]
    return namespace(values).take(values, part, axis=0)


def block_rows(n_features: int, least: int = 1) -> int:
    """Count the rows of a block that sums over K x D arrays work on.

    Parameters
    ----------
    n_features : int
        D.
    least : int, optional
        Rows below which the work is slow, such as products that fold into D x D arrays.
    """
    return max(1, min(BLOCK_ROWS, max(least, _BLOCK_BYTES // (8 * n_features))))


def product_rows(n_features: int) -> int:
    """Count the rows of a block whose products fold into a D x D array.

    Twice D where blocks are small, so that folding costs little beside the product.
    """
    return block_rows(n_features, 2 * n_features)


def float64_blocks(rows: Array, least: int = 1) -> Iterator[tuple[slice, Array]]:
    """Read rows block by block, in float64.

    Parameters
    ----------
    rows : array (K, D) or view
        The rows.
    least : int, optional
        As for `block_rows`.

    Yields
    ------
    tuple of slice and array (B, D)
        Where the block is, and the block. What blocks there are depends on the shape alone.
    """
    for part in row_blocks(rows.shape[0], block_rows(rows.shape[1], least)):
        yield part, as_float64(take_rows(rows, part))


def mean_of_rows(rows: Array) -> Array:
    """Average rows (K, D) into an array (D,) of float64, block by block."""
    xp = namespace(rows)
    total = 0.0
    for _, block in float64_blocks(rows):
        total = total + xp.sum(block, axis=0)
    return total / rows.shape[0]


def square_norms(rows: Array) -> Array:
    """Compute the squared norms (K,) of rows (K, D), block by block."""
    xp = namespace(rows)
    return xp.concat([xp.sum(block * block, axis=1) for _, block in float64_blocks(rows)])


def square_gaps(rows: Array, others: Array) -> Array:
    """Compute |rows_c - others_c|^2 (K,) of two arrays or views (K, D), block by block."""
    xp = namespace(rows)
    squares = []
    for part, block in float64_blocks(rows):
        apart = block - as_float64(take_rows(others, part))
        squares.append(xp.sum(apart * apart, axis=1))
    return xp.concat(squares)


def _without_columns(rows: Rows) -> Any:
    """Take the row part of an index; only all columns can be asked for."""
    if not isinstance(rows, tuple):
        return rows
    if len(rows) != 2 or rows[1] != slice(None):
        raise TypeError("rows are read whole: index by rows only")
    return rows[0]
