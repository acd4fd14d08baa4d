"""The linear classifiers of layers, as they are stored."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import array_api_compat.numpy
import numpy as np
import numpy.typing as npt
import zarr

from ncbatch.arrays import Array, to_numpy
from ncbatch.errors import DataError
from ncbatch.store.chunks import chunk_fault, present_chunks, read_rows
from ncbatch.store.format import CLASSIFIER, DTYPES
from ncbatch.store.nodes import create_array, found_group

_CHUNK_BYTES = 16 * 2**20


def checked_classifier(
    weight: Array, bias: Array | None, n_classes: int
) -> tuple[npt.NDArray[Any], npt.NDArray[Any] | None]:
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
    tuple of array and array or None
        Both as floats in memory.

    Raises
    ------
    DataError
        When shapes do not fit or a value is not finite.
    """
    w = _float_array(weight, "classifier weight")
    b = None if bias is None else _float_array(bias, "classifier bias")
    k = n_classes
    if w.ndim != 2 or w.shape[0] != k:
        padded = w.ndim == 2 and w.shape[0] > k
        raise DataError(
            f"classifier weight of shape {w.shape}",
            f"({k}, D): one row per class",
            f"a padded vocabulary? keep its first rows with --rows {k}" if padded else "",
        )
    if b is not None and b.shape != (k,):
        raise DataError(f"classifier bias of shape {b.shape}", f"({k},): one value per class")
    for name, values in (("weight", w), ("bias", b)):
        if values is not None and not np.isfinite(values).all():
            row = int(np.argwhere(~np.isfinite(values))[0][0])
            raise DataError(f"classifier {name} is not finite in row {row}", "finite values")
    return w, b


def store_classifier(
    root: zarr.Group, layer: str, w: npt.NDArray[Any], b: npt.NDArray[Any] | None
) -> None:
    """Store the classifier of a layer, in the place of an earlier one; visible once complete."""
    classifiers = found_group(root, CLASSIFIER)
    if layer in classifiers:
        del classifiers[layer]
    group = found_group(classifiers, layer)
    if b is not None:
        array = create_array(
            group, "bias", shape=b.shape, chunks=b.shape, dtype=str(b.dtype), dimensions=("class",)
        )
        array[:] = b
    rows = max(1, min(len(w), _CHUNK_BYTES // w[:1].nbytes))
    array = create_array(
        group, "weight", shape=w.shape, chunks=(rows, w.shape[1]), dtype=str(w.dtype),
        dimensions=("class", "unit"),
    )  # fmt: skip
    array[:] = w
    group.update_attributes({"complete": True})


class ClassifierRows:
    """The rows (K, D) of a stored classifier, read slice by slice; bfloat16 as float32."""

    device = "cpu"

    def __init__(self, array: zarr.Array[Any]) -> None:
        self._array = array
        self.shape = (int(array.shape[0]), int(array.shape[1]))
        stored: np.dtype[Any] = np.dtype(array.dtype)
        self.dtype = np.dtype(np.float32) if stored == DTYPES["bfloat16"] else stored
        self._last: tuple[int, npt.NDArray[Any]] = (-1, np.empty(0))

    def __array_namespace__(self, api_version: str | None = None) -> Any:
        return array_api_compat.numpy

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> npt.NDArray[Any]:
        """Read a slice of rows, or an array of row numbers by the slices between them."""
        part = rows[0] if isinstance(rows, tuple) else rows
        if isinstance(part, slice):
            part = np.arange(*part.indices(self.shape[0]))
        numbers = np.asarray(part)
        found = np.empty((len(numbers), self.shape[1]), self.dtype)
        height = int(self._array.chunks[0])
        for chunk in np.unique(numbers // height).tolist():
            here = numbers // height == chunk
            found[here] = self._chunk(chunk)[numbers[here] - chunk * height]
        return found

    def _chunk(self, chunk: int) -> npt.NDArray[Any]:
        """Read a chunk of rows; the last one is kept, since blocks are smaller than chunks."""
        number, rows = self._last
        if number != chunk:
            height = int(self._array.chunks[0])
            rows = _read(self._array, chunk * height, min((chunk + 1) * height, self.shape[0]))
            self._last = (chunk, rows)
        return rows


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
    found: dict[str, Any] = {}
    for array in arrays:
        missing = np.flatnonzero(~present_chunks(array))
        if missing.size:
            raise chunk_fault(array, int(missing[0]), "chunk is missing").error()
        if lazily and array.basename == "weight":
            found["weight"] = ClassifierRows(array)
        else:
            found[array.basename] = _read(array, 0, array.shape[0])
    return found["weight"], found.get("bias")


def _read(array: zarr.Array[Any], start: int, stop: int) -> npt.NDArray[Any]:
    values = read_rows(array, start, stop)
    return values.astype(np.float32) if values.dtype == DTYPES["bfloat16"] else values


def _float_array(values: Array, what: str) -> npt.NDArray[Any]:
    array = to_numpy(values)
    if array.dtype.kind in "iu":
        return array.astype(np.float64)
    if str(array.dtype) not in DTYPES:
        raise DataError(f"{what} of dtype {array.dtype}", "one of: " + ", ".join(DTYPES))
    return array
