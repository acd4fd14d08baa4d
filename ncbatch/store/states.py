"""States of splits: named arrays that sum samples up, kept in the place of the samples' rows.

The store does not know what the arrays mean. A state is complete or absent: it is written under a
staged name and takes its own when all is there.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.storage import LocalStore

from ncbatch.errors import CorruptionError, DataError
from ncbatch.store.chunks import checksums, chunk_fault, present_chunks, read_rows
from ncbatch.store.format import ATTRIBUTE, CLASSIFIER, STAGED, check_name
from ncbatch.store.nodes import create_array, found_group, open_array, subgroups

STATES = "states"
State = tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]

_CHUNK_BYTES = 4 * 2**20
_REPLACED = "replaced"
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
        _take_name(group, staged, kind)


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


def _take_name(group: zarr.Group, staged: str, name: str) -> None:
    """Let a state that is complete take its name, and the place of an earlier one."""
    assert isinstance(group.store, LocalStore)
    root = Path(group.store.root) / group.path
    replaced = root / f"{staged}{STAGED}{_REPLACED}"
    shutil.rmtree(replaced, ignore_errors=True)
    if (root / name).exists():
        (root / name).rename(replaced)
    (root / staged).rename(root / name)
    shutil.rmtree(replaced, ignore_errors=True)


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
