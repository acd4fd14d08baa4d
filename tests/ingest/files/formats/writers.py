"""Files made by each format's own library, or by a few lines after its published layout."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import zarr

Array = npt.NDArray[Any]
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def save_npy(path: Path, array: Array) -> str:
    np.save(path.with_suffix(".npy"), array)
    return f"{path}.npy"


def save_npz(path: Path, array: Array) -> str:
    np.savez_compressed(path.with_suffix(".npz"), other=array[:1], x=array)
    return f"{path}.npz:x"


def save_raw(path: Path, array: Array) -> str:
    file = path.with_suffix(".bin")
    held = np.memmap(file, array.dtype, "w+", shape=array.shape)
    held[:] = array
    held.flush()
    widths = "x".join(str(size) for size in array.shape[1:])
    return f"{file}:{array.dtype.name}" + (f":{widths}" if widths else "")


def save_safetensors(path: Path, array: Array) -> str:
    import torch
    from safetensors.torch import save_file

    tensors = {"odd": torch.ones(3, dtype=torch.int8), "deep.name": to_torch(array)}
    save_file(tensors, path.with_suffix(".safetensors"), {"made": "by the library"})
    return f"{path}.safetensors:deep.name"


def save_safetensors_numpy(path: Path, array: Array) -> str:
    from safetensors.numpy import save_file

    save_file({"x": array}, path.with_suffix(".safetensors"))
    return f"{path}.safetensors"


def save_pt(path: Path, array: Array) -> str:
    import torch

    content = {"epoch": 3, "acts": {"h.0": to_torch(array), "list": [torch.ones(2)]}}
    torch.save(content, path.with_suffix(".pt"))
    return f"{path}.pt:acts.h.0"


def save_pt_alone(path: Path, array: Array) -> str:
    import torch

    torch.save(to_torch(array), path.with_suffix(".pth"))
    return f"{path}.pth"


def save_old_pt(path: Path, array: Array) -> str:
    import torch

    torch.save([to_torch(array)], path.with_suffix(".pt"), _use_new_zipfile_serialization=False)
    return f"{path}.pt:0"


def save_hdf5(path: Path, array: Array) -> str:
    import h5py

    with h5py.File(path.with_suffix(".h5"), "w") as file:
        chunks = tuple(min(size, 7) for size in array.shape)
        file.create_dataset("deep/x", data=array, chunks=chunks, compression="gzip")
        file.create_dataset("other", data=array[:1])
    return f"{path}.h5:deep/x"


def save_zarr2(path: Path, array: Array) -> str:
    chunks = tuple(min(size, 5) for size in array.shape)
    zarr.create_array(path.with_suffix(".zarr"), data=array, chunks=chunks, zarr_format=2)
    return f"{path}.zarr"


def save_zarr3(path: Path, array: Array) -> str:
    group = zarr.open_group(path.with_suffix(".zarr"), mode="w", zarr_format=3)
    chunks = tuple(min(size, 5) for size in array.shape)
    shards = tuple(chunk * 2 for chunk in chunks)
    group.create_array("deep/x", data=array, chunks=chunks, shards=shards)
    return f"{path}.zarr:deep/x"


def arrow_column(array: Array, *, fixed: bool) -> Any:
    """Make nested lists of an array's rows."""
    import pyarrow as pa

    column = pa.array(array.reshape(-1))
    for size in reversed(array.shape[1:]):
        if fixed:
            column = pa.FixedSizeListArray.from_arrays(column, size)
        else:
            offsets = pa.array(np.arange(0, len(column) + 1, size), pa.int32())
            column = pa.ListArray.from_arrays(offsets, column)
    return column


def save_parquet(path: Path, array: Array) -> str:
    import pyarrow as pa
    from pyarrow import parquet

    table = pa.table({"a.b": arrow_column(array, fixed=False), "n": np.arange(len(array))})
    parquet.write_table(table, path.with_suffix(".parquet"), row_group_size=11)
    return f"{path}.parquet:a.b"


def save_parquet_fixed(path: Path, array: Array) -> str:
    import pyarrow as pa
    from pyarrow import parquet

    table = pa.table({"x": arrow_column(array, fixed=True)})
    parquet.write_table(table, path.with_suffix(".parquet"), row_group_size=11)
    return f"{path}.parquet"


def save_feather(path: Path, array: Array) -> str:
    import pyarrow as pa
    from pyarrow import feather

    table = pa.table({"n": np.arange(len(array)), "x": arrow_column(array, fixed=True)})
    feather.write_feather(table, str(path.with_suffix(".feather")), chunksize=9)
    return f"{path}.feather:x"


def save_arrow(path: Path, array: Array) -> str:
    """Write a stream of tensors that says so in its type."""
    import pyarrow as pa

    kind = pa.fixed_shape_tensor(pa.from_numpy_dtype(array.dtype), array.shape[1:])
    flat = pa.FixedSizeListArray.from_arrays(pa.array(array.reshape(-1)), array[0].size)
    column = pa.ExtensionArray.from_storage(kind, flat)
    table = pa.table({"x": column, "n": np.arange(len(array))})
    with (
        pa.OSFile(str(path.with_suffix(".arrow")), "wb") as file,
        pa.ipc.new_stream(file, table.schema) as writer,
    ):
        writer.write_table(table, max_chunksize=9)
    return f"{path}.arrow:x"


def save_dataset(path: Path, array: Array) -> str:
    """Save a data set in three files that has an order of its own in memory."""
    import datasets

    dtype = array.dtype.name
    kinds: dict[int, Callable[..., Any]] = {3: datasets.Array2D, 4: datasets.Array3D}
    feature = (
        kinds[array.ndim](array.shape[1:], dtype)
        if array.ndim in kinds
        else datasets.Value(dtype)
        if array.ndim == 1
        else datasets.Sequence(datasets.Value(dtype), length=array.shape[1])
    )
    order = np.random.default_rng(5).permutation(len(array))
    rows = np.empty_like(array)
    rows[order] = array  # so that selecting `order` gives back the rows
    made = datasets.Dataset.from_dict({"hook": rows}, features=datasets.Features(hook=feature))
    datasets.disable_progress_bars()
    made.select(order).save_to_disk(path, num_shards=min(3, len(array)))
    return f"{path}:hook"


def save_bin(path: Path, array: Array) -> str:
    """Big-ANN-benchmarks: N and D in 32 bits each, then the values."""
    ending = {"f": ".fbin", "i": ".ibin", "u": ".u8bin"}[array.dtype.kind]
    rows = array.reshape(len(array), -1)
    data = struct.pack("<2i", *rows.shape) + rows.tobytes()
    path.with_suffix(ending).write_bytes(data)
    return str(path.with_suffix(ending))


def save_vecs(path: Path, array: Array) -> str:
    """TEXMEX: D in 32 bits before the values of every row."""
    ending = {"f": ".fvecs", "i": ".ivecs", "u": ".bvecs"}[array.dtype.kind]
    rows = array.reshape(len(array), -1)
    data = b"".join(struct.pack("<i", rows.shape[1]) + row.tobytes() for row in rows)
    path.with_suffix(ending).write_bytes(data)
    return str(path.with_suffix(ending))


def to_torch(array: Array) -> Any:
    import torch

    if array.dtype == BFLOAT16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def make(shape: tuple[int, ...], dtype: str, seed: int = 0) -> Array:
    """Draw values of every sign and of many exponents."""
    rng = np.random.default_rng(seed)
    kind = BFLOAT16 if dtype == "bfloat16" else np.dtype(dtype)
    if kind.kind in "iu":
        info = np.iinfo(kind)
        return rng.integers(info.min, info.max, shape, kind, endpoint=True)
    return (rng.standard_normal(shape) * 2.0 ** rng.integers(-9, 9, shape)).astype(kind)


def two(path: Path) -> dict[str, str]:
    """Save files of two arrays ``a`` and ``b`` in every format that has names."""
    import h5py
    import pyarrow as pa
    import torch
    from pyarrow import feather, parquet
    from safetensors.numpy import save_file

    a, b = make((4, 3), "float32"), make((4, 3), "float32", 1)
    np.savez(path / "x.npz", a=a, b=b)
    save_file({"a": a, "b": b}, path / "x.safetensors")
    torch.save({"a": torch.from_numpy(a), "b": torch.from_numpy(b)}, path / "x.pt")
    with h5py.File(path / "x.h5", "w") as file:
        file["a"], file["b"] = a, b
    table = pa.table({"a": list(a), "b": list(b)})
    parquet.write_table(table, path / "x.parquet")
    feather.write_feather(table, str(path / "x.feather"))
    names = ("npz", "safetensors", "pt", "h5", "parquet", "feather")
    return {name: str(path / f"x.{name}") for name in names}
