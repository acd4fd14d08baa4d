"""Vector files of nearest-neighbour benchmarks: ``.fbin`` and ``.fvecs`` with their kin.

Notes
-----
``.?bin``: two 32-bit integers N and D, then N x D values (big-ann-benchmarks.com). ``.?vecs``: every row
begins with D as a 32-bit integer (corpus-texmex.irisa.fr). All little-endian.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ncbatch.errors import DataError
from ncbatch.ingest.files.formats.numpy_files import refuse_key
from ncbatch.ingest.files.formats.shard import (
    Block,
    Index,
    Shard,
    file_size,
    mapped_shard,
    shard_of_parts,
)

BINS = {".fbin": "<f4", ".ibin": "<i4", ".u8bin": "u1", ".i8bin": "i1"}
VECS = {".fvecs": "<f4", ".ivecs": "<i4", ".bvecs": "u1"}


def open_bin(path: str, key: str | None, what: str) -> Shard:
    """Open a file of the ``.fbin`` kind."""
    refuse_key(path, key)
    dtype = np.dtype(BINS[Path(path).suffix])
    head = np.fromfile(path, "<u4", 2)
    if len(head) < 2:
        raise DataError(f"{what} '{path}' of {file_size(path)} bytes", "a header of 8 bytes")
    rows, width = (int(number) for number in head)
    expected = 8 + rows * width * dtype.itemsize
    if file_size(path) != expected:
        raise DataError(
            f"{what} '{path}' of {file_size(path)} bytes",
            f"{expected}, for the {rows} rows of {width} values that its header names",
        )
    return mapped_shard(path, _flat_labels((rows, width), what), dtype, 8)


def open_vecs(path: str, key: str | None, what: str) -> Shard:
    """Open a file of the ``.fvecs`` kind."""
    refuse_key(path, key)
    dtype = np.dtype(VECS[Path(path).suffix])
    head = np.fromfile(path, "<i4", 1)
    width = int(head[0]) if len(head) else 0
    n_bytes = 4 + width * dtype.itemsize
    if width < 1 or file_size(path) % n_bytes:
        raise DataError(
            f"{what} '{path}' of {file_size(path)} bytes, whose first row has {width} values",
            "rows of one width" if width > 0 else "a width of at least 1",
        )
    record = np.dtype([("width", "<i4"), ("values", dtype, (width,))])
    rows = file_size(path) // n_bytes
    shape = _flat_labels((rows, width), what)

    def read(index: Index) -> Block:
        part = np.array(np.memmap(path, record, "r")[index[0]])
        odd = np.flatnonzero(np.atleast_1d(part["width"] != width))
        if odd.size:
            raise DataError(f"'{path}' with a row of another width", f"{width} values in every row")
        values: Block = part["values"]
        if len(shape) == 1:
            return np.ascontiguousarray(values[..., 0])
        return np.ascontiguousarray(values[(slice(None), *index[1:])])

    return shard_of_parts(path, shape, dtype, read)


def _flat_labels(shape: tuple[int, int], what: str) -> tuple[int, ...]:
    """Labels have no second axis; here they are rows of one value."""
    return shape[:1] if what != "features" and shape[1] == 1 else shape
