"""Tensors in files of ``torch.save``, loaded without running code that they hold."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from ncbatch.arrays.namespace import to_numpy
from ncbatch.errors import DataError
from ncbatch.ingest.files.formats.shard import (
    BFLOAT16,
    Block,
    Index,
    Shard,
    choose_key,
    library,
    shard_of_parts,
)


def torch_keys(path: str) -> list[str]:
    """Name the tensors of a file; nested names are joined by dots."""
    return list(_tensors(path))


def open_torch(path: str, key: str | None, what: str) -> Shard:
    """Open a tensor of a ``.pt`` or ``.pth`` file.

    It is mapped, not loaded, but for files of the format before PyTorch 1.6.
    """
    tensors = _tensors(path)
    if key is not None and key not in tensors and key.replace("/", ".") in tensors:
        key = key.replace("/", ".")
    key = choose_key(path, key, tensors, "tensor")
    tensor = tensors[key]
    dtype = BFLOAT16 if str(tensor.dtype) == "torch.bfloat16" else _numpy_dtype(tensor, path)

    def read(index: Index) -> Block:
        # Loaded anew per block: its map goes with the pages that were read.
        return np.array(to_numpy(_tensors(path)[key][index]))

    return shard_of_parts(f"{path}:{key}" if key else path, tensor.shape, dtype, read)


def _numpy_dtype(tensor: Any, path: str) -> np.dtype[Any]:
    try:
        return to_numpy(tensor.new_empty(0)).dtype
    except TypeError as error:
        raise DataError(f"'{path}' holds values of type {tensor.dtype}", "numbers") from error


def _tensors(path: str) -> dict[str, Any]:
    """Load the dense tensors of a file by name, '' for one by itself."""
    torch = library("torch", "torch", path)
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


def _named(torch: Any, content: Any, name: str) -> list[tuple[str, Any]]:
    if isinstance(content, torch.Tensor):
        return [(name, content)]
    items: Any = ()
    if isinstance(content, dict):
        items = content.items()
    elif isinstance(content, list | tuple):
        items = enumerate(content)
    prefix = f"{name}." if name else ""
    return [found for k, value in items for found in _named(torch, value, f"{prefix}{k}")]
