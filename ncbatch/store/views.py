"""Dask and xarray views of a layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ncbatch.arrays import cuda_chunk, cuda_meta
from ncbatch.errors import UsageError
from ncbatch.store.format import DTYPES
from ncbatch.store.split import Split

if TYPE_CHECKING:
    import dask.array as da
    import xarray as xr


def dask_view(split: Split, layer: str, device: str) -> da.Array:
    """Give a layer's rows as a Dask array; see `FeatureStore.to_dask`."""
    import dask.array as da

    if device not in ("cpu", "cuda"):
        raise UsageError(f"device '{device}'", "cpu or cuda")
    array = da.from_zarr(split.feature(layer))
    dtype = np.dtype("float32") if array.dtype == DTYPES["bfloat16"] else array.dtype
    if device == "cuda":
        return array.map_blocks(cuda_chunk, dtype=dtype, meta=cuda_meta(dtype))
    return array.astype(dtype)


def xarray_view(split: Split, layer: str, store_id: str) -> xr.Dataset:
    """Give a layer as a Dataset of its samples; see `FeatureStore.to_xarray`."""
    import xarray as xr

    labels = split.labels()
    variables: dict[str, Any] = {
        "feature": (("sample", "unit"), dask_view(split, layer, "cpu")),
        "label": (("sample",), labels),
    }
    if split.head is not None:
        variables["prediction"] = (("sample",), split.predictions())
    about = {"store": split.where, "store_id": store_id, "split": split.name, "layer": layer}
    dataset = xr.Dataset(variables, attrs=about)
    rows = np.flatnonzero(labels >= 0)
    return dataset if rows.size == labels.size else dataset.isel(sample=rows)
