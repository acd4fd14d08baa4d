"""Zarr arrays, of format 2 or 3."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import zarr

from ncbatch.errors import DataError, unknown_name
from ncbatch.ingest.files.formats.shard import Block, Index, Shard, shard_of_parts


def zarr_keys(path: str) -> list[str]:
    """Name the arrays of a group; an array by itself has no name."""
    node = _open(path, "features")
    if isinstance(node, zarr.Array):
        return []
    return sorted(n for n, m in node.members(max_depth=None) if isinstance(m, zarr.Array))


def open_zarr(path: str, key: str | None, what: str) -> Shard:
    """Open a Zarr array: ``folder``, ``group/array`` or ``group:array``."""
    if key is not None:
        names = zarr_keys(path)
        if key.strip("/") not in names:
            raise unknown_name("array", key, names, f"'{path}'")
        path = str(Path(path) / key.strip("/"))
    node = _open(path, what)
    if isinstance(node, zarr.Group):
        arrays = [name for name, _ in node.arrays()]
        raise DataError(
            f"'{path}' is a Zarr group" + (f" of arrays {', '.join(arrays)}" if arrays else ""),
            f"a Zarr array of {what}",
            f"write '{path}/{arrays[0]}'" if arrays else "",
        )
    array = node

    def read(index: Index) -> Block:
        return np.asarray(array[index])

    return shard_of_parts(path, array.shape, np.dtype(array.dtype), read, tuple(array.chunks))


def _open(path: str, what: str) -> zarr.Array | zarr.Group:  # type: ignore[type-arg]
    try:
        return zarr.open(path, mode="r")
    except (FileNotFoundError, KeyError) as error:
        raise DataError(f"{what} '{path}' is a folder", "a file, or a Zarr array") from error
