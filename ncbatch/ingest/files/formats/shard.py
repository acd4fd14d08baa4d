"""Shard: one array in a file, and what all formats share to read one."""

from __future__ import annotations

import importlib
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ncbatch.errors import DataError, NcbatchError, unknown_name
from ncbatch.store.format import DTYPES

Block = npt.NDArray[Any]
Blocks = Iterator[Block]
Index = tuple[slice | int, ...]
BFLOAT16 = np.dtype(DTYPES["bfloat16"])
# What NumPy, h5py, pyarrow, torch and zarr raise for files that are cut short or altered.
_PLAIN_DAMAGE = (OSError, ValueError, EOFError, RuntimeError, KeyError)
_DAMAGE = (*_PLAIN_DAMAGE, struct.error, pickle.UnpicklingError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True)
class Shard:
    """One array in a file.

    Attributes
    ----------
    path : str
        Where it is, as named by the user.
    shape : tuple of int
        Its shape.
    dtype : numpy.dtype
        Its dtype.
    blocks : callable
        ``blocks(n)`` reads it in order along the first axis, n or so at a time.
    read : callable, optional
        ``read(index)`` copies a part given by slices and integers, for formats that need not be
        read in order.
    chunks : tuple of int, optional
        What is decoded at once along each axis; nothing by default.
    """

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    blocks: Callable[[int], Blocks]
    read: Callable[[Index], Block] | None = None
    chunks: tuple[int, ...] = ()


def shard_of_parts(
    path: str,
    shape: Sequence[int],
    dtype: np.dtype[Any],
    read: Callable[[Index], Block],
    chunks: tuple[int, ...] = (),
) -> Shard:
    """Make a shard of an array of which any part can be read."""
    check_array(path, shape, dtype)
    sizes = tuple(int(size) for size in shape)

    def blocks(n: int) -> Blocks:
        # Whole chunks, so that none is decoded twice.
        step = max(n // chunks[0], 1) * chunks[0] if chunks else n
        for start in range(0, sizes[0], step):
            block = read((slice(start, start + step),))
            for part in range(0, len(block), n):
                yield block[part : part + n]

    return Shard(path, sizes, dtype, blocks, read, chunks)


def mapped_shard(
    path: str,
    shape: Sequence[int],
    dtype: np.dtype[Any],
    offset: int = 0,
    *,
    fortran: bool = False,
    name: str | None = None,
) -> Shard:
    """Make a shard of plain values that begin at byte `offset` of a file."""
    sizes = tuple(int(size) for size in shape)

    def read(index: Index) -> Block:
        if 0 in sizes:
            return np.empty(sizes, dtype)[index]
        # A fresh map per block lets the pages of earlier ones go.
        return np.array(np.memmap(path, dtype, "r", offset, sizes, "F" if fortran else "C")[index])

    check_array(name or path, sizes, dtype)
    if 0 not in sizes:
        np.memmap(path, dtype, "r", offset, sizes)  # a file that is too short is noticed here
    return shard_of_parts(name or path, sizes, dtype, read)


def check_array(path: str, shape: Sequence[int], dtype: np.dtype[Any]) -> None:
    """Refuse what is no array of numbers."""
    if not len(shape):
        raise DataError(f"'{path}' holds a single value", "an array of rows")
    if dtype.kind not in "fiubV" or (dtype.kind == "V" and dtype != BFLOAT16):
        remedy = (
            "bfloat16 saved by numpy loses its name: save it as float32, or as a Zarr array, or "
            f"write '{path}:bfloat16' (.npy) if that is what it is"
        )
        raise DataError(
            f"'{path}' holds values of type {dtype}", "numbers", remedy if dtype.kind == "V" else ""
        )


def choose_key(path: str, key: str | None, names: Iterable[str], kind: str = "array") -> str:
    """Choose the array that is meant, the only one where none is named.

    Raises
    ------
    DataError
        When there are several and none is named, or none at all.
    UnknownNameError
        When there is none of that name.
    """
    known = list(names)
    if not known:
        raise DataError(f"'{path}' holds no {kind}", f"at least one {kind}")
    if key is None and len(known) == 1:
        return known[0]
    if key is None:
        shown = ", ".join(known[:12]) + (f", ... ({len(known)} in all)" if len(known) > 12 else "")
        raise DataError(
            f"'{path}' holds {kind}s {shown}",
            "one of them to be named",
            f"write '{path}:{known[0]}'",
        )
    if key not in known:
        raise unknown_name(kind, key, known, f"'{path}'")
    return key


def library(name: str, extra: str, path: str) -> Any:
    """Import what a format is read with, or say what to install."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise DataError(
            f"'{path}' cannot be read without {package}, which is not installed",
            remedy=f'pip install "ncbatch[{extra}]"',
        ) from error


@contextmanager
def readable(path: str, what: str) -> Iterator[None]:
    """Turn what libraries raise for damaged files into an error of one line."""
    try:
        yield
    except NcbatchError:
        raise
    except _DAMAGE as error:
        reason = " ".join(str(error).split())
        if len(reason) > 300:
            reason = reason[:300] + " ..."
        raise DataError(f"{what} '{path}' cannot be read: {reason}", "an intact file") from error
