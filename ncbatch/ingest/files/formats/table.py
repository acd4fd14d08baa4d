"""Which ending is read by what."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ncbatch.errors import DataError
from ncbatch.ingest.files.formats import arrow, binary, groups, tensors
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
    keys: Callable[[str], Iterable[str]] = lambda path: ()


def _open_bin(path: str, key: str | None, what: str) -> Shard:
    """Open values without a header, or a checkpoint: ``pytorch_model.bin`` is one like ``.pt``."""
    if _is_checkpoint(path) and not binary.names_raw(key):
        return tensors.open_torch(path, key, what)
    return binary.open_raw(path, key, what)


def _bin_keys(path: str) -> Iterable[str]:
    return tensors.load_tensors(path) if _is_checkpoint(path) else ()


def _is_checkpoint(path: str) -> bool:
    with open(path, "rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _columns(form: str, read: Callable[[str], arrow.Table]) -> Format:
    return Format(form, partial(arrow.open_column, read=read), lambda path: read(path).schema.names)


_RAW = Format(".bin:dtype:width", _open_bin, _bin_keys)
_SHARDED = Format(".safetensors.index.json:key", tensors.open_index, tensors.weight_map)
_DATASET = _columns("a folder of datasets:column", arrow.read_dataset)
_ZARR = Format("a Zarr array", groups.open_zarr, groups.zarr_keys)

FORMATS: dict[str, Format] = {
    ".npy": Format(".npy", binary.open_npy),
    ".npz": Format(".npz:key", binary.open_npz, binary.npz_keys),
    ".safetensors": Format(".safetensors:key", tensors.open_safetensors, tensors.safetensors_keys),
    ".safetensors.index.json": _SHARDED,
    **dict.fromkeys((".pt", ".pth"), Format(".pt:key", tensors.open_torch, tensors.load_tensors)),
    ".parquet": _columns(".parquet:column", arrow.read_parquet),
    **dict.fromkeys((".arrow", ".feather"), _columns(".arrow:column", arrow.read_arrow)),
    **dict.fromkeys((".h5", ".hdf5"), Format(".h5:dataset", groups.open_hdf5, groups.hdf5_keys)),
    **dict.fromkeys((".bin", ".raw", ".dat", ".memmap", ".mmap"), _RAW),
    **dict.fromkeys(binary.BINS, Format(".fbin", binary.open_bin)),
    **dict.fromkeys(binary.VECS, Format(".fvecs", binary.open_vecs)),
}


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
        return list(find_format(path, what).keys(path))
