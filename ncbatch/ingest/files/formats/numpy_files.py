"""Arrays of NumPy: ``.npy``, ``.npz`` and raw memory maps."""

from __future__ import annotations

import math
import zipfile
from typing import Any

import numpy as np

from ncbatch.errors import DataError, UsageError
from ncbatch.ingest.files.formats.shard import (
    BFLOAT16,
    Block,
    Blocks,
    Index,
    Shard,
    check_array,
    choose_key,
    file_size,
    mapped_shard,
    shard_of_parts,
)

_RAW_TYPES = (
    "float16", "bfloat16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8",
    "uint16", "uint32", "uint64",
)  # fmt: skip


def no_keys(path: str) -> list[str]:
    """Name the arrays of a file that holds one, without a name."""
    return []


def open_npy(path: str, key: str | None, what: str) -> Shard:
    """Open a ``.npy`` file; the key ``bfloat16`` names values that NumPy saved without a name."""
    with open(path, "rb") as file:  # np.load would take what is no array for a pickle
        shape, _, dtype = _npy_header(file)
    if key == BFLOAT16.name and dtype.kind == "V" and dtype.itemsize == BFLOAT16.itemsize:
        dtype = BFLOAT16
    else:
        refuse_key(path, key)
    check_array(path, shape, dtype)
    np.load(path, mmap_mode="r", allow_pickle=False)

    def read(index: Index) -> Block:
        # A fresh map per block lets the pages of earlier ones go.
        block = np.array(np.load(path, mmap_mode="r", allow_pickle=False)[index])
        return block.view(BFLOAT16) if dtype == BFLOAT16 else block

    return shard_of_parts(path, shape, dtype, read)


def npz_keys(path: str) -> list[str]:
    """Name the arrays of a ``.npz`` file."""
    with zipfile.ZipFile(path) as archive:
        return [n.removesuffix(".npy") for n in archive.namelist() if n.endswith(".npy")]


def open_npz(path: str, key: str | None, what: str) -> Shard:
    """Open an array of a ``.npz`` file; read in order, since it may be compressed."""
    members = npz_keys(path)
    if not members:
        raise DataError(f"'{path}' holds no array", "an archive made by numpy.savez")
    key = choose_key(path, key, members)
    with zipfile.ZipFile(path) as archive, archive.open(f"{key}.npy") as file:
        shape, fortran, dtype = _npy_header(file)
    check_array(path, shape, dtype)
    if fortran and len(shape) > 1:
        raise DataError(
            f"'{path}:{key}' is stored by columns", "rows in order", "save it as .npy, or by rows"
        )

    def blocks(n: int) -> Blocks:
        width = math.prod(shape[1:]) * dtype.itemsize
        with zipfile.ZipFile(path) as archive, archive.open(f"{key}.npy") as file:
            _npy_header(file)
            for start in range(0, shape[0], n):
                rows = min(n, shape[0] - start)
                data = file.read(rows * width)
                if len(data) != rows * width:
                    raise DataError(f"'{path}:{key}' ends in row {start}", f"{shape[0]} rows")
                yield np.frombuffer(data, dtype).reshape(rows, *shape[1:])

    return Shard(f"{path}:{key}", shape, dtype, blocks)


def names_raw(key: str | None) -> bool:
    """Tell whether a key names the type of values without a header."""
    return (key or "").partition(":")[0].lstrip("<>") in _RAW_TYPES


def open_raw(path: str, key: str | None, what: str) -> Shard:
    """Open values without a header: ``path:dtype`` (N,) or ``path:dtype:DxD...`` (N, D, ...)."""
    name, _, widths = (key or "").partition(":")
    big = name.startswith(">")
    kind = name.lstrip("<>")
    if not names_raw(key) or (big and kind == "bfloat16"):
        raise UsageError(
            f"'{path}' without a known type: '{key or ''}'",
            "path:dtype:width, with a dtype of " + ", ".join(_RAW_TYPES),
            f"write '{path}:float32:768' for rows of 768 features, '{path}:int64' for labels",
        )
    dtype = BFLOAT16 if kind == "bfloat16" else np.dtype(kind).newbyteorder(">" if big else "<")
    sizes = widths.split("x") if widths else []
    if not all(size.isdecimal() and int(size) for size in sizes):
        raise UsageError(
            f"the width '{widths}' of '{path}'", "a number, or numbers such as 12x768 for layers"
        )
    row = tuple(int(size) for size in sizes)
    n_bytes = math.prod(row) * dtype.itemsize
    rows, rest = divmod(file_size(path), n_bytes)
    if rest:
        raise DataError(
            f"{what} '{path}' of {file_size(path)} bytes: {rows} rows and {rest} bytes",
            f"whole rows of {n_bytes} bytes ({key})",
        )
    return mapped_shard(path, (rows, *row), dtype)


def refuse_key(path: str, key: str | None) -> None:
    """Refuse a name where a file holds a single array."""
    if key is not None:
        raise DataError(
            f"'{path}:{key}', but that file holds one array without a name", f"'{path}'"
        )


def _npy_header(file: Any) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    return np.lib.format.read_array_header_2_0(file)
