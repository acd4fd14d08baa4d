"""Plain arrays: ``.npy``, ``.npz``, values without a header, and files of vectors.

Notes
-----
Vector files are those of nearest-neighbour benchmarks. ``.?bin``: two 32-bit integers N and D, then
N x D values (big-ann-benchmarks.com). ``.?vecs``: every row begins with D as a 32-bit integer
(corpus-texmex.irisa.fr). All little-endian.
"""

from __future__ import annotations

import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from ncbatch.errors import DataError, UsageError
from ncbatch.ingest.files.formats import shard
from ncbatch.ingest.files.formats.shard import BFLOAT16, Block, Blocks, Index, Shard

BINS = {".fbin": "<f4", ".ibin": "<i4", ".u8bin": "u1", ".i8bin": "i1"}
VECS = {".fvecs": "<f4", ".ivecs": "<i4", ".bvecs": "u1"}
_FLOATS = ("float16", "bfloat16", "float32", "float64")
_INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
_RAW_TYPES = (*_FLOATS, *_INTEGERS)


def refuse_key(path: str, key: str | None) -> None:
    """Refuse a name where a file holds a single array."""
    if key is not None:
        raise DataError(
            f"'{path}:{key}', but that file holds one array without a name", f"'{path}'"
        )


# ------------------------------------------------------------------------------------------ NumPy


def open_npy(path: str, key: str | None, what: str) -> Shard:
    """Open a ``.npy`` file; the key ``bfloat16`` names values that NumPy saved without a name."""
    with open(path, "rb") as file:  # np.load would take what is no array for a pickle
        shape, fortran, dtype = _npy_header(file)
        start = file.tell()
    if key == BFLOAT16.name and dtype.kind == "V" and dtype.itemsize == BFLOAT16.itemsize:
        dtype = BFLOAT16
    else:
        refuse_key(path, key)
    return shard.mapped_shard(path, shape, dtype, start, fortran=fortran)


def npz_keys(path: str) -> list[str]:
    """Name the arrays of a ``.npz`` file."""
    with zipfile.ZipFile(path) as archive:
        return [n.removesuffix(".npy") for n in archive.namelist() if n.endswith(".npy")]


def open_npz(path: str, key: str | None, what: str) -> Shard:
    """Open an array of a ``.npz`` file; read in order, since it may be compressed."""
    members = npz_keys(path)
    if not members:
        raise DataError(f"'{path}' holds no array", "an archive made by numpy.savez")
    key = shard.choose_key(path, key, members)
    with zipfile.ZipFile(path) as archive, archive.open(f"{key}.npy") as file:
        shape, fortran, dtype = _npy_header(file)
    shard.check_array(path, shape, dtype)
    if fortran and len(shape) > 1:
        raise DataError(
            f"'{path}:{key}' is stored by columns", "rows in order", "save it as .npy, or by rows"
        )

    def blocks(n: int) -> Blocks:
        row_bytes = math.prod(shape[1:]) * dtype.itemsize
        with zipfile.ZipFile(path) as archive, archive.open(f"{key}.npy") as file:
            _npy_header(file)
            for start in range(0, shape[0], n):
                rows = min(n, shape[0] - start)
                data = file.read(rows * row_bytes)
                if len(data) != rows * row_bytes:
                    raise DataError(f"'{path}:{key}' ends in row {start}", f"{shape[0]} rows")
                yield np.frombuffer(data, dtype).reshape(rows, *shape[1:])

    return Shard(f"{path}:{key}", shape, dtype, blocks)


def _npy_header(file: Any) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    return np.lib.format.read_array_header_2_0(file)


# ------------------------------------------------------------------------- values without a header


def names_raw(key: str | None) -> bool:
    """Tell whether a key names the type of values without a header."""
    return (key or "").partition(":")[0].lstrip("<>") in _RAW_TYPES


def open_raw(path: str, key: str | None, what: str) -> Shard:
    """Open values without a header: ``path:dtype`` (N,) or ``path:dtype:DxD...`` (N, D, ...)."""
    name, _, widths = (key or "").partition(":")
    is_big = name.startswith(">")
    kind = name.lstrip("<>")
    if not names_raw(key) or (is_big and kind == "bfloat16"):
        raise UsageError(
            f"'{path}' without a known type: '{key or ''}'",
            "path:dtype:width, with a dtype of " + ", ".join(_RAW_TYPES),
            f"write '{path}:float32:768' for rows of 768 features, '{path}:int64' for labels",
        )
    dtype = BFLOAT16 if kind == "bfloat16" else np.dtype(kind).newbyteorder(">" if is_big else "<")
    sizes = widths.split("x") if widths else []
    if not all(size.isdecimal() and int(size) for size in sizes):
        raise UsageError(
            f"the width '{widths}' of '{path}'", "a number, or numbers such as 12x768 for layers"
        )
    row = tuple(int(size) for size in sizes)
    row_bytes = math.prod(row) * dtype.itemsize
    file_bytes = Path(path).stat().st_size
    rows, rest = divmod(file_bytes, row_bytes)
    if rest:
        raise DataError(
            f"{what} '{path}' of {file_bytes} bytes: {rows} rows and {rest} bytes",
            f"whole rows of {row_bytes} bytes ({key})",
        )
    return shard.mapped_shard(path, (rows, *row), dtype)


# ---------------------------------------------------------------------------------------- vectors


def open_bin(path: str, key: str | None, what: str) -> Shard:
    """Open a file of the ``.fbin`` kind."""
    refuse_key(path, key)
    dtype = np.dtype(BINS[Path(path).suffix])
    file_bytes = Path(path).stat().st_size
    head = np.fromfile(path, "<u4", 2)
    if len(head) < 2:
        raise DataError(f"{what} '{path}' of {file_bytes} bytes", "a header of 8 bytes")
    rows, width = (int(number) for number in head)
    expected = 8 + rows * width * dtype.itemsize
    if file_bytes != expected:
        raise DataError(
            f"{what} '{path}' of {file_bytes} bytes",
            f"{expected}, for the {rows} rows of {width} values that its header names",
        )
    return shard.mapped_shard(path, _flat_labels((rows, width), what), dtype, 8)


def open_vecs(path: str, key: str | None, what: str) -> Shard:
    """Open a file of the ``.fvecs`` kind."""
    refuse_key(path, key)
    dtype = np.dtype(VECS[Path(path).suffix])
    file_bytes = Path(path).stat().st_size
    head = np.fromfile(path, "<i4", 1)
    width = int(head[0]) if len(head) else 0
    row_bytes = 4 + width * dtype.itemsize
    if width < 1 or file_bytes % row_bytes:
        raise DataError(
            f"{what} '{path}' of {file_bytes} bytes, whose first row has {width} values",
            "rows of one width" if width > 0 else "a width of at least 1",
        )
    record = np.dtype([("width", "<i4"), ("values", dtype, (width,))])
    shape = _flat_labels((file_bytes // row_bytes, width), what)

    def read(index: Index) -> Block:
        part = np.array(np.memmap(path, record, "r")[index[0]])
        if np.any(part["width"] != width):
            raise DataError(f"'{path}' with a row of another width", f"{width} values in every row")
        values: Block = part["values"]
        if len(shape) == 1:
            return np.ascontiguousarray(values[..., 0])
        return np.ascontiguousarray(values[(slice(None), *index[1:])])

    return shard.shard_of_parts(path, shape, dtype, read)


def _flat_labels(shape: tuple[int, int], what: str) -> tuple[int, ...]:
    """Labels have no second axis; here they are rows of one value."""
    return shape[:1] if what != "features" and shape[1] == 1 else shape
