"""Tensors in ``.safetensors`` files, and in the sharded checkpoints that an index names.

Notes
-----
The header is read here, without the library: a 64-bit little-endian length, JSON of that length, then the
tensors by rows. So bfloat16 keeps its bits, and a tensor is mapped without its neighbours.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from ncbatch.errors import DataError
from ncbatch.ingest.files.formats.shard import BFLOAT16, Shard, choose_key, file_size, mapped_shard

_DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": BFLOAT16,
    "I64": np.dtype("<i8"), "I32": np.dtype("<i4"), "I16": np.dtype("<i2"), "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"), "U32": np.dtype("<u4"), "U16": np.dtype("<u2"), "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}  # fmt: skip


def safetensors_keys(path: str) -> list[str]:
    """Name the tensors of a file."""
    return sorted(_header(path)[0])


def open_safetensors(path: str, key: str | None, what: str) -> Shard:
    """Open a tensor of a ``.safetensors`` file."""
    tensors, data = _header(path)
    key = choose_key(path, key, sorted(tensors), "tensor")
    name, shape = tensors[key]["dtype"], tensors[key]["shape"]
    start, stop = tensors[key]["data_offsets"]
    if name not in _DTYPES:
        raise DataError(f"'{path}:{key}' holds values of type {name}", ", ".join(_DTYPES))
    dtype = _DTYPES[name]
    if stop - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"tensor '{key}' of shape {tuple(shape)} in bytes {start} to {stop}")
    return mapped_shard(path, shape, dtype, data + start, name=f"{path}:{key}")


def index_keys(path: str) -> list[str]:
    """Name the tensors of a sharded checkpoint."""
    return sorted(_weight_map(path))


def open_index(path: str, key: str | None, what: str) -> Shard:
    """Open a tensor of a sharded checkpoint, by its ``.safetensors.index.json``."""
    where = _weight_map(path)
    key = choose_key(path, key, sorted(where), "tensor")
    return open_safetensors(str(Path(path).parent / where[key]), key, what)


def _header(path: str) -> tuple[dict[str, Any], int]:
    """Read the table of tensors, and where their bytes begin."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if file_size(path) < 8 + length or length < 2:
            raise ValueError("its header is cut short")
        tensors = json.loads(file.read(length))
    if not isinstance(tensors, dict):
        raise ValueError("its header is no table of tensors")
    tensors.pop("__metadata__", None)
    end = max((int(tensor["data_offsets"][1]) for tensor in tensors.values()), default=0)
    if file_size(path) != 8 + length + end:
        raise ValueError(f"it has {file_size(path)} bytes, its header names {8 + length + end}")
    return tensors, 8 + length


def _weight_map(path: str) -> dict[str, str]:
    found = json.loads(Path(path).read_text(encoding="utf-8"))
    if not isinstance(found, dict) or "weight_map" not in found:
        raise ValueError("it holds no weight_map")
    return dict(found["weight_map"])
