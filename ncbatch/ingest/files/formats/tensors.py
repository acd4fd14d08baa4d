"""Tensors of checkpoints: ``.safetensors``, alone or sharded, and files of ``torch.save``.

Notes
-----
The header of ``.safetensors`` is read here, without the library: a 64-bit little-endian length,
JSON of that length, then the tensors by rows. So bfloat16 keeps its bits, and a tensor is mapped
without its neighbours. Files of ``torch.save`` are loaded without running code that they hold.
"""

from __future__ import annotations

import json
import math
import pickle
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ncbatch.arrays.namespace import to_numpy
from ncbatch.errors import DataError
from ncbatch.ingest.files.formats import shard
from ncbatch.ingest.files.formats.shard import BFLOAT16, Block, Index, Shard

_DTYPES: dict[str, np.dtype[Any]] = {
    f"{kind.upper()}{8 * size}": np.dtype(f"<{kind}{size}")
    for kind, sizes in {"f": (8, 4, 2), "i": (8, 4, 2, 1), "u": (8, 4, 2, 1)}.items()
    for size in sizes
} | {"BF16": BFLOAT16, "BOOL": np.dtype("?")}

# ------------------------------------------------------------------------------------ safetensors


def safetensors_keys(path: str) -> Iterable[str]:
    """Name the tensors of a file."""
    return _header(path)[0]


def open_safetensors(path: str, key: str | None, what: str) -> Shard:
    """Open a tensor of a ``.safetensors`` file."""
    tensors, data_start = _header(path)
    key = shard.choose_key(path, key, sorted(tensors), "tensor")
    kind = tensors[key]["dtype"]
    shape = tensors[key]["shape"]
    start, stop = tensors[key]["data_offsets"]
    if kind not in _DTYPES:
        raise DataError(f"'{path}:{key}' holds values of type {kind}", ", ".join(_DTYPES))
    # A header that lies would have neighbours' bytes read as this tensor's.
    if stop - start != math.prod(shape) * _DTYPES[kind].itemsize:
        raise ValueError(f"tensor '{key}' of shape {tuple(shape)} in bytes {start} to {stop}")
    return shard.mapped_shard(path, shape, _DTYPES[kind], data_start + start, name=f"{path}:{key}")


def open_index(path: str, key: str | None, what: str) -> Shard:
    """Open a tensor of a sharded checkpoint, by its ``.safetensors.index.json``."""
    files = weight_map(path)
    key = shard.choose_key(path, key, sorted(files), "tensor")
    return open_safetensors(str(Path(path).parent / files[key]), key, what)


def _header(path: str) -> tuple[dict[str, Any], int]:
    """Read the table of tensors, and where their bytes begin."""
    file_bytes = Path(path).stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if file_bytes < 8 + length or length < 2:
            raise ValueError("its header is cut short")
        tensors = json.loads(file.read(length))
    if not isinstance(tensors, dict):
        raise ValueError("its header is no table of tensors")
    tensors.pop("__metadata__", None)
    end = max((int(tensor["data_offsets"][1]) for tensor in tensors.values()), default=0)
    if file_bytes != 8 + length + end:
        raise ValueError(f"it has {file_bytes} bytes, its header names {8 + length + end}")
    return tensors, 8 + length


def weight_map(path: str) -> dict[str, str]:
    """Name the tensors of a sharded checkpoint, and the file that holds each."""
    index = json.loads(Path(path).read_text(encoding="utf-8"))
    if not isinstance(index, dict) or "weight_map" not in index:
        raise ValueError("it holds no weight_map")
    return dict(index["weight_map"])


# ------------------------------------------------------------------------------------------ torch


def open_torch(path: str, key: str | None, what: str) -> Shard:
    """Open a tensor of a ``.pt`` or ``.pth`` file.

    It is mapped, not loaded, but for files of the format before PyTorch 1.6.
    """
    tensors = load_tensors(path)
    if key is not None and key not in tensors and key.replace("/", ".") in tensors:
        key = key.replace("/", ".")
    key = shard.choose_key(path, key, tensors, "tensor")
    tensor = tensors[key]
    try:
        dtype = to_numpy(tensor.new_empty(0)).dtype
    except TypeError as error:
        raise DataError(f"'{path}' holds values of type {tensor.dtype}", "numbers") from error

    def read(index: Index) -> Block:
        # Loaded anew per block: its map goes with the pages that were read.
        return np.array(to_numpy(load_tensors(path)[key][index]))

    return shard.shard_of_parts(f"{path}:{key}" if key else path, tensor.shape, dtype, read)


def load_tensors(path: str) -> dict[str, Any]:
    """Load the dense tensors of a file by name, nested ones joined by dots; '' for one alone."""
    torch = shard.library("torch", "torch", path)
    try:
        with warnings.catch_warnings():  # about pickles of other protocols, which it then refuses
            warnings.simplefilter("ignore")
            content = _load(torch, path)
    except (IndexError, AttributeError, TypeError, AssertionError) as error:
        raise ValueError(f"no file of torch.save, or cut short ({error})") from error
    except pickle.UnpicklingError as error:
        if not Path(path).stat().st_size or "weights_only" not in str(error).lower():
            raise
        raise DataError(
            f"'{path}' holds more than tensors, or is damaged; it could run code when it is loaded",
            "tensors, in dicts and lists",
            "save its tensors alone: torch.save({'features': features}, path)",
        ) from error
    return {name: t.detach() for name, t in _named(torch, content, "") if t.layout == torch.strided}


def _load(torch: Any, path: str) -> Any:
    """Map a file; one of the format before PyTorch 1.6 is loaded whole."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "_use_new_zipfile_serialization" not in str(error):
            raise
    return torch.load(path, map_location="cpu", weights_only=True)


def _named(torch: Any, content: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(content, torch.Tensor):
        yield name, content
    elif isinstance(content, dict | list | tuple):
        items = content.items() if isinstance(content, dict) else enumerate(content)
        for key, value in items:
            yield from _named(torch, value, f"{name}.{key}" if name else f"{key}")
