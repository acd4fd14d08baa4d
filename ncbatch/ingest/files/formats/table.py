"""Which ending is read by what."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ncbatch.errors import DataError
from ncbatch.ingest.files.formats import (
    arrow,
    hdf5,
    numpy_files,
    safetensors_files,
    torch_files,
    vectors,
    zarr_arrays,
)
from ncbatch.ingest.files.formats.shard import Shard, readable


@dataclass(frozen=True)
class Format:
    """A kind of file.

    Attributes
    ----------
    form : str
        How it is written on the command line.
    open : callable
        ``open(path, key, what)`` opens the array `key` of a file; None: the only one.
    keys : callable
        ``keys(path)`` names the arrays of a file; none where it holds a single one.
    """

    form: str
    open: Callable[[str, str | None, str], Shard]
    keys: Callable[[str], list[str]] = numpy_files.no_keys


def _open_bin(path: str, key: str | None, what: str) -> Shard:
    """Open values without a header, or a checkpoint: ``pytorch_model.bin`` is of the ``.pt`` kind."""
    if _is_checkpoint(path) and not numpy_files.names_raw(key):
        return torch_files.open_torch(path, key, what)
    return numpy_files.open_raw(path, key, what)


def _bin_keys(path: str) -> list[str]:
    return torch_files.torch_keys(path) if _is_checkpoint(path) else []


def _is_checkpoint(path: str) -> bool:
    with open(path, "rb") as file:
        return file.read(4) == b"PK\x03\x04"


_RAW = Format(".bin:dtype:width", _open_bin, _bin_keys)
_TORCH = Format(".pt:key", torch_files.open_torch, torch_files.torch_keys)
_HDF5 = Format(".h5:dataset", hdf5.open_hdf5, hdf5.hdf5_keys)
_ARROW = Format(".arrow:column", arrow.open_arrow, arrow.arrow_keys)

FORMATS: dict[str, Format] = {
    ".npy": Format(".npy", numpy_files.open_npy),
    ".npz": Format(".npz:key", numpy_files.open_npz, numpy_files.npz_keys),
    ".safetensors": Format(
        ".safetensors:key",
        safetensors_files.open_safetensors,
        safetensors_files.safetensors_keys,
    ),
    ".safetensors.index.json": Format(
        ".safetensors.index.json:key", safetensors_files.open_index, safetensors_files.index_keys
    ),
    ".pt": _TORCH, ".pth": _TORCH,
    ".parquet": Format(".parquet:column", arrow.open_parquet, arrow.parquet_keys),
    ".arrow": _ARROW, ".feather": _ARROW,
    ".h5": _HDF5, ".hdf5": _HDF5,
    ".bin": _RAW, ".raw": _RAW, ".dat": _RAW, ".memmap": _RAW, ".mmap": _RAW,
    **{ending: Format(".fbin", vectors.open_bin) for ending in vectors.BINS},
    **{ending: Format(".fvecs", vectors.open_vecs) for ending in vectors.VECS},
}  # fmt: skip

_ZARR = Format("a Zarr array", zarr_arrays.open_zarr, zarr_arrays.zarr_keys)
_DATASET = Format("a folder of datasets:column", arrow.open_dataset, arrow.dataset_keys)


def find_format(path: str, what: str) -> Format:
    """Find how a path that exists is read.

    Raises
    ------
    DataError
        When no format has its ending.
    """
    if Path(path).is_dir():
        return _DATASET if arrow.is_dataset(path) else _ZARR
    name = Path(path).name.lower()
    ending = max((e for e in FORMATS if name.endswith(e)), key=len, default="")
    if ending:
        return FORMATS[ending]
    forms = list(dict.fromkeys(f.form for f in FORMATS.values()))
    raise DataError(
        f"{what} '{path}' of an unknown kind",
        f"a {forms[0]} file, {', '.join(forms[1:])}, {_DATASET.form} or {_ZARR.form}",
    )


def open_shard(path: str, key: str | None, what: str) -> Shard:
    """Open the array of a path that exists.

    Parameters
    ----------
    path : str
        A file or folder.
    key : str or None
        The array in it; None where it holds a single one.
    what : str
        What it is, for messages.

    Raises
    ------
    DataError
        When it cannot be read, or holds no such array.
    UnknownNameError
        When nothing in it has that name.
    """
    with readable(path, what):
        shard = find_format(path, what).open(path, key, what)
    if shard.dtype.kind == "b" and not what.endswith("mask"):
        raise DataError(f"'{shard.path}' holds values of type {shard.dtype}", "numbers")
    return shard


def array_names(path: str, what: str) -> list[str]:
    """Name the arrays in a path that exists; none where it holds a single one."""
    with readable(path, what):
        return find_format(path, what).keys(path)
