"""Datasets of HDF5 files."""

from __future__ import annotations

import numpy as np

from ncbatch.ingest.files.formats.shard import Block, Index, Shard, choose_key, shard_of_parts


def hdf5_keys(path: str) -> list[str]:
    """Name the datasets of a file by their paths."""
    import h5py

    found: list[str] = []

    def note(name: str, node: object) -> None:
        if isinstance(node, h5py.Dataset):
            found.append(name)

    with h5py.File(path, "r") as file:
        file.visititems(note)
    return found


def open_hdf5(path: str, key: str | None, what: str) -> Shard:
    """Open a dataset of an ``.h5`` or ``.hdf5`` file."""
    import h5py

    name = choose_key(path, None if key is None else key.strip("/"), hdf5_keys(path), "dataset")
    with h5py.File(path, "r") as file:
        dataset = file[name]
        shape, dtype, chunks = dataset.shape, np.dtype(dataset.dtype), dataset.chunks

    def read(index: Index) -> Block:
        with h5py.File(path, "r") as file:
            return np.asarray(file[name][index])

    return shard_of_parts(f"{path}:{name}", shape or (), dtype, read, tuple(chunks or ()))
