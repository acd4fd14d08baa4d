"""The linear classifiers of layers: checked, stored, and read whole or slice by slice."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import array_api_compat.numpy
import numpy as np
import numpy.typing as npt
import zarr

from ncbatch.arrays.namespace import Array, to_numpy
from ncbatch.errors import DataError
from ncbatch.store import chunks
from ncbatch.store.format import CLASSIFIER, DTYPES

_CHUNK_BYTES = 16 * 2**20


def check_classifier(
    weight: Array, bias: Array | None, n_classes: int
) -> dict[str, npt.NDArray[Any]]:
    """Check shapes and values of a classifier.

    Parameters
    ----------
    weight : array (K, D)
        Numbers; integers become float64.
    bias : array (K,), optional
        The same.
    n_classes : int
        K of the store.

    Returns
    -------
    dict of str to array
        ``weight`` and, where there is one, ``bias``, as floats in memory.

    Raises
    ------
    DataError
        When shapes do not fit or a value is not finite.
    """
    parts = {"weight": _as_floats(weight, "classifier weight")}
    if bias is not None:
        parts["bias"] = _as_floats(bias, "classifier bias")
    shape = parts["weight"].shape
    if len(shape) != 2 or shape[0] != n_classes:
        padded = len(shape) == 2 and shape[0] > n_classes
        raise DataError(
            f"classifier weight of shape {shape}",
            f"({n_classes}, D): one row per class",
            f"a padded vocabulary? keep its first rows with --rows {n_classes}" if padded else "",
        )
    if bias is not None and parts["bias"].shape != (n_classes,):
        raise DataError(
            f"classifier bias of shape {parts['bias'].shape}",
            f"({n_classes},): one value per class",
        )
    for name, values in parts.items():
        if not np.isfinite(values).all():
            row = int(np.argwhere(~np.isfinite(values))[0][0])
            raise DataError(f"classifier {name} is not finite in row {row}", "finite values")
    return parts


def store_classifier(root: zarr.Group, layer: str, parts: Mapping[str, npt.NDArray[Any]]) -> None:
    """Store the classifier of a layer, in the place of an earlier one; visible once complete."""
    classifiers = chunks.require_group(root, CLASSIFIER)
    # Absent until the new one is complete: a mixture of both would be worse.
    del classifiers[layer]
    group = chunks.require_group(classifiers, layer)
    for name, values in parts.items():
        dimensions = ("class", "unit")[: values.ndim]
        chunks.store_array(group, name, values, dimensions, _CHUNK_BYTES)
    group.update_attributes({"complete": True})


class ClassifierRows:
    """The rows (K, D) of a stored classifier, read slice by slice; bfloat16 as float32."""

    device = "cpu"

    def __init__(self, array: zarr.Array[Any]) -> None:
        self._array = array
        self.shape = (int(array.shape[0]), int(array.shape[1]))
        self.dtype = np.dtype("float32" if array.dtype.name == "bfloat16" else array.dtype)
        self._last: tuple[int, npt.NDArray[Any]] = (-1, np.empty(0))

    def __array_namespace__(self, api_version: str | None = None) -> Any:
        return array_api_compat.numpy

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> npt.NDArray[Any]:
        """Read a slice of rows, or an array of row numbers by the slices between them."""
        part = rows[0] if isinstance(rows, tuple) else rows
        # By number, whatever was asked for: each chunk that holds some of them is read once.
        numbers = np.arange(self.shape[0])[part]
        values = np.empty((len(numbers), self.shape[1]), self.dtype)
        height = int(self._array.chunks[0])
        for chunk in np.unique(numbers // height).tolist():
            inside = numbers // height == chunk
            values[inside] = self._chunk(chunk)[numbers[inside] - chunk * height]
        return values

    def _chunk(self, chunk: int) -> npt.NDArray[Any]:
        # The last one is kept, since blocks are smaller than chunks.
        if self._last[0] != chunk:
            rows = chunks.chunk_range(self._array, chunk)
            self._last = (chunk, chunks.read_rows(self._array, *rows, widened=True))
        return self._last[1]


def read_classifier(
    arrays: Iterable[zarr.Array[Any]], *, lazily: bool = False
) -> tuple[npt.NDArray[Any] | ClassifierRows, npt.NDArray[Any] | None]:
    """Read the stored arrays of a classifier: weight (K, D) and bias (K,) or None.

    Parameters
    ----------
    arrays : iterable of zarr.Array
        Named ``weight`` and, if there is one, ``bias``.
    lazily : bool, optional
        Leave the weight where it is, to be read slice by slice.

    Raises
    ------
    CorruptionError
        Names the first chunk that is missing or cannot be read.
    """
    parts: dict[str, Any] = {}
    for array in arrays:
        chunks.check_present(array)
        if lazily and array.basename == "weight":
            parts["weight"] = ClassifierRows(array)
        else:
            parts[array.basename] = chunks.read_rows(array, 0, array.shape[0], widened=True)
    return parts["weight"], parts.get("bias")


def _as_floats(values: Array, what: str) -> npt.NDArray[Any]:
    array = to_numpy(values)
    if array.dtype.kind in "iu":
        return array.astype(np.float64)
    if str(array.dtype) not in DTYPES:
        raise DataError(f"{what} of dtype {array.dtype}", "one of: " + ", ".join(DTYPES))
    return array
