"""States of splits: named arrays that sum samples up, kept in the place of the samples' rows.

The store does not know what the arrays mean. A state is complete or absent: it is written under a
staged name and takes its own when all is there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import array_api_compat.numpy
import numpy as np
import numpy.typing as npt
import zarr
from zarr.storage import LocalStore

from ncbatch.arrays.namespace import Array, to_numpy
from ncbatch.errors import CorruptionError, DataError
from ncbatch.store.chunks import (
    checksums,
    chunk_fault,
    create_array,
    found_group,
    open_array,
    present_chunks,
    read_rows,
    subgroups,
)
from ncbatch.store.format import ATTRIBUTE, CLASSIFIER, DTYPES, STAGED, check_name
from ncbatch.store.place import rename

# The linear classifiers of layers, as they are stored.


_CLASSIFIER_CHUNK_BYTES = 16 * 2**20


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
    rows = max(1, min(len(w), _CLASSIFIER_CHUNK_BYTES // w[:1].nbytes))
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


# Kinds of states of one rank: what it has folded so far, and what it has folded in all.
RUNNING, PART = "running-", "part-"


def unmerged_layers(store: FeatureStore, split: str) -> list[str]:
    """Name the layers of which only parts, or running states, are there yet."""
    there = store.state_kinds(split)
    found: dict[str, None] = {}
    for layer, kind in there:
        if layer in found or not kind.startswith((RUNNING, PART)):
            continue
        holds = store.state_attributes(split, layer, kind).get("holds", ())
        # Decisions that are being added to finished moments keep nobody from measuring those.
        wanted = holds if kind.startswith(PART) else {"moments"} & set(holds)
        if any((layer, each) not in there for each in wanted):
            found[layer] = None
    return list(found)


STATES = "states"
if TYPE_CHECKING:
    from ncbatch.store.feature_store import FeatureStore

State = tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]

_CHUNK_BYTES = 4 * 2**20
# Names of dimensions of arrays that are not over classes alone.
_DIMENSIONS = {"mean": ("class", "unit"), "scatter": ("unit", "other_unit")}


def store_state(
    root: zarr.Group,
    split: str,
    layer: str,
    kind: str,
    arrays: Mapping[str, Any],
    attributes: Mapping[str, Any] | None = None,
) -> None:
    """Store a state in the place of an earlier one; see `FeatureStore.set_state`."""
    check_name("split", split)
    check_name("layer", layer)
    check_name("kind of state", kind)
    values = {name: _checked(name, array) for name, array in arrays.items()}
    if not values:
        raise DataError(f"state '{kind}' of layer '{layer}' without arrays", "at least one")
    layers = found_group(found_group(root, split), STATES)
    group = found_group(layers, layer)
    # Elsewhere nothing can be renamed; there the attributes, written last, make it complete.
    staged = STAGED + kind if isinstance(group.store, LocalStore) else kind
    if staged in group:
        del group[staged]
    try:
        state = found_group(group, staged)
        for name, array in values.items():
            _store_array(state, name, array)
        record = {"arrays": list(values), "attributes": dict(attributes or {})}
        state.update_attributes({ATTRIBUTE: {"complete": True, **record}})
    except BaseException:
        if staged in group:
            del group[staged]
        raise
    if staged != kind:
        rename(group, staged, kind)


def _checked(name: str, array: Any) -> npt.NDArray[Any]:
    check_name("array", name)
    found = np.asarray(array)
    if found.dtype.kind == "i":
        found = found.astype(np.int64, copy=False)
    if found.ndim == 0 or found.dtype not in (np.int64, np.float32, np.float64):
        raise DataError(
            f"array '{name}' of shape {found.shape} and dtype {found.dtype} in a state",
            "signed integers, float32 or float64, of one dimension or more",
        )
    return found


def _store_array(group: zarr.Group, name: str, values: npt.NDArray[Any]) -> None:
    width = int(np.prod(values.shape[1:], dtype=np.int64)) * values.dtype.itemsize
    rows = max(1, min(len(values), _CHUNK_BYTES // max(width, 1)))
    dimensions = _DIMENSIONS.get(name, ("class", *(f"{name}_{i}" for i in range(1, values.ndim))))
    array = create_array(
        group, name, shape=values.shape, chunks=(rows, *(max(n, 1) for n in values.shape[1:])),
        dtype=str(values.dtype), dimensions=dimensions[: values.ndim],
    )  # fmt: skip
    if values.size:
        array[...] = values


def state_arrays(
    root: zarr.Group, split: str, layer: str, kind: str
) -> dict[str, zarr.Array[Any]] | None:
    """Open the arrays of a state; None when there is no complete one."""
    group = _state_group(root, split, layer, kind)
    if group is None:
        return None
    lost = lost_arrays(root, split, layer, kind)
    if lost:
        raise CorruptionError(
            f"array '{group.path}/{lost[0]}' is missing", remedy="restore it or make the state anew"
        )
    return {name: open_array(group, name) for name in _record(group)["arrays"]}


def check_arrays(arrays: Iterable[zarr.Array[Any]]) -> None:
    """Refuse arrays of which a chunk is missing: it would read as NaN or -1.

    Raises
    ------
    CorruptionError
        Names the first such chunk.
    """
    for array in arrays:
        for index in np.flatnonzero(~present_chunks(array)).tolist():
            raise chunk_fault(array, index, "chunk is missing").error()


def lost_arrays(root: zarr.Group, split: str, layer: str, kind: str) -> list[str]:
    """Name the arrays of a complete state that are gone."""
    group = _state_group(root, split, layer, kind)
    names = [] if group is None else _record(group)["arrays"]
    return [name for name in names if group is not None and name not in group]


def state_attributes(root: zarr.Group, split: str, layer: str, kind: str) -> dict[str, Any]:
    """Give the attributes of a complete state, without its arrays."""
    group = _state_group(root, split, layer, kind)
    return {} if group is None else dict(_record(group)["attributes"])


def read_state(root: zarr.Group, split: str, layer: str, kind: str) -> State | None:
    """Read a state; see `FeatureStore.state`."""
    arrays = state_arrays(root, split, layer, kind)
    if arrays is None:
        return None
    check_arrays(arrays.values())
    values = {name: read_rows(array, 0, array.shape[0]) for name, array in arrays.items()}
    return values, state_attributes(root, split, layer, kind)


def state_fingerprint(root: zarr.Group, split: str, layer: str, kind: str) -> str:
    """Hash the shapes, the stored checksums and the attributes of a state; 32 hexadecimal digits."""
    digest = hashlib.sha256(repr((split, layer, kind)).encode())
    for name, array in sorted((state_arrays(root, split, layer, kind) or {}).items()):
        digest.update(name.encode() + checksums(array))
    return digest.hexdigest()[:32]


def states_of(root: zarr.Group, split: str) -> Iterator[tuple[str, str]]:
    """Give (layer, kind) of every complete state of a split, sorted."""
    layers = root.get(f"{split}/{STATES}")
    if not isinstance(layers, zarr.Group):
        return
    for layer, kinds in subgroups(layers):
        for kind, group in subgroups(kinds):
            if not kind.startswith(STAGED) and _is_complete(group):
                yield layer, kind


def splits_with_states(root: zarr.Group) -> list[str]:
    """Name the splits that hold a complete state, with or without rows."""
    return [
        name
        for name, _ in subgroups(root)
        if name != CLASSIFIER and next(states_of(root, name), None) is not None
    ]


def delete_state(root: zarr.Group, split: str, layer: str, kind: str) -> None:
    """Delete a state, if it is there."""
    path = f"{split}/{STATES}/{layer}/{kind}"
    if path in root:
        del root[path]


def _state_group(root: zarr.Group, split: str, layer: str, kind: str) -> zarr.Group | None:
    group = root.get(f"{split}/{STATES}/{layer}/{kind}")
    return group if isinstance(group, zarr.Group) and _is_complete(group) else None


def _record(group: zarr.Group) -> dict[str, Any]:
    found: Any = group.attrs.get(ATTRIBUTE)
    return found if isinstance(found, dict) else {}


def _is_complete(group: zarr.Group) -> bool:
    return bool(_record(group).get("complete"))
