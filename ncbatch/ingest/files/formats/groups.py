"""Arrays in groups: datasets of HDF5 files, and Zarr arrays of format 2 or 3."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import zarr

from ncbatch.errors import DataError, unknown_name
from ncbatch.ingest.files.formats.shard import Block, Index, Shard, choose_key, shard_of_parts


def hdf5_keys(path: str) -> list[str]:
    """Name the datasets of a file by their paths."""
    import h5py

    names: list[str] = []

    def note(name: str, node: object) -> None:
        if isinstance(node, h5py.Dataset):
            names.append(name)

    with h5py.File(path, "r") as file:
        file.visititems(note)
    return names


def open_hdf5(path: str, key: str | None, what: str) -> Shard:
    """Open a dataset of an ``.h5`` or ``.hdf5`` file."""
    import h5py

    name = choose_key(path, None if key is None else key.strip("/"), hdf5_keys(path), "dataset")

    def read(index: Index) -> Block:
        # Opened anew: a handle kept open would lock the file for those that write to it.
        with h5py.File(path, "r") as file:
            return np.asarray(file[name][index])

    with h5py.File(path, "r") as file:
        dataset = file[name]
        chunks = tuple(dataset.chunks or ())
        return shard_of_parts(
            f"{path}:{name}", dataset.shape or (), np.dtype(dataset.dtype), read, chunks
        )


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
