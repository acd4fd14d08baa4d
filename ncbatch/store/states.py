"""States of splits: named arrays that sum samples up, kept in the place of the samples' rows.

The store does not know what the arrays mean. A state is complete or absent: it is written under a
staged name and takes its own when all is there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.storage import LocalStore

from ncbatch.arrays.namespace import Array, to_numpy
from ncbatch.errors import CorruptionError, DataError
from ncbatch.store import chunks
from ncbatch.store.format import ATTRIBUTE, CLASSIFIER, STAGED, check_name, read_attributes
from ncbatch.store.place import rename

STATES = "states"
# Kinds of states of one rank: what it has folded so far, and what it has folded in all.
RUNNING = "running-"
PART = "part-"

State = tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]

_CHUNK_BYTES = 4 * 2**20
# Names of dimensions of arrays that are not over classes alone.
_DIMENSIONS = {"mean": ("class", "unit"), "scatter": ("unit", "other_unit")}


class StoredStates:
    """The states of a store; `FeatureStore` inherits what it offers of them."""

    _root: zarr.Group

    def set_state(
        self,
        split: str,
        layer: str,
        kind: str,
        arrays: Mapping[str, Array],
        attributes: Mapping[str, Any] | None = None,
    ) -> None:
        """Store what sums the samples of a layer up, replacing an earlier state of that kind.

        Parameters
        ----------
        split, layer : str
            Of which samples; neither needs rows in the store.
        kind : str
            Such as ``moments`` or ``decisions``; ``docs/store.md`` lists their arrays.
        arrays : mapping of str to array
            Integers or floats, in memory.
        attributes : mapping, optional
            What JSON can hold.

        Raises
        ------
        UsageError
            For a name that cannot be part of a path.
        DataError
            For an array of another type or without a dimension.
        """
        for what, name in (("split", split), ("layer", layer), ("kind of state", kind)):
            check_name(what, name)
        values = {name: _check_array(name, to_numpy(array)) for name, array in arrays.items()}
        if not values:
            raise DataError(f"state '{kind}' of layer '{layer}' without arrays", "at least one")
        states = chunks.require_group(chunks.require_group(self._root, split), STATES)
        group = chunks.require_group(states, layer)
        # Elsewhere nothing can be renamed; there the attributes, written last, make it complete.
        staged = STAGED + kind if isinstance(group.store, LocalStore) else kind
        del group[staged]
        # A full disk, or a signal, leaves nothing behind.
        try:
            state = chunks.require_group(group, staged)
            for name, array in values.items():
                others = (f"{name}_{i}" for i in range(1, array.ndim))
                dimensions = _DIMENSIONS.get(name, ("class", *others))[: array.ndim]
                chunks.store_array(state, name, array, dimensions, _CHUNK_BYTES)
            record = {"arrays": list(values), "attributes": dict(attributes or {})}
            state.update_attributes({ATTRIBUTE: {"complete": True, **record}})
        except BaseException:
            del group[staged]
            raise
        if staged != kind:
            rename(group, staged, kind)

    def state(self, split: str, layer: str, kind: str) -> State | None:
        """Read a state: its arrays and attributes, as `set_state` took them; None without one.

        Raises
        ------
        CorruptionError
            Names a chunk that cannot be read.
        """
        arrays = self.state_arrays(split, layer, kind)
        if arrays is None:
            return None
        # A missing chunk would read as NaN or -1.
        for array in arrays.values():
            chunks.check_present(array)
        values = {
            name: chunks.read_rows(array, 0, array.shape[0]) for name, array in arrays.items()
        }
        return values, self.state_attributes(split, layer, kind)

    def state_arrays(self, split: str, layer: str, kind: str) -> dict[str, zarr.Array[Any]] | None:
        """Open the arrays of a state without reading them; None without one."""
        group = self._state_group(split, layer, kind)
        if group is None:
            return None
        names = read_attributes(group)["arrays"]
        for name in names:
            if name not in group:
                raise CorruptionError(
                    f"array '{group.path}/{name}' is missing",
                    remedy="restore it or make the state anew",
                )
        return {name: chunks.open_array(group, name) for name in names}

    def state_attributes(self, split: str, layer: str, kind: str) -> dict[str, Any]:
        """Return the attributes of a state; empty without one."""
        group = self._state_group(split, layer, kind)
        return {} if group is None else dict(read_attributes(group)["attributes"])

    def state_fingerprint(self, split: str, layer: str, kind: str) -> str:
        """Hash the shapes and stored checksums of a state; 32 hexadecimal digits."""
        digest = hashlib.sha256(repr((split, layer, kind)).encode())
        for name, array in sorted((self.state_arrays(split, layer, kind) or {}).items()):
            digest.update(name.encode() + chunks.checksums(array))
        return digest.hexdigest()[:32]

    def state_layers(self, split: str, kind: str = "moments") -> list[str]:
        """Name the layers of a split that have a state of that kind."""
        return [layer for layer, other in self._states(split) if other == kind]

    def state_kinds(self, split: str) -> list[tuple[str, str]]:
        """Name layer and kind of every state of a split."""
        return list(self._states(split))

    @property
    def state_splits(self) -> list[str]:
        """Names of the splits that hold states, with or without rows."""
        names = (name for name, _ in chunks.subgroups(self._root) if name != CLASSIFIER)
        return [name for name in names if next(self._states(name), None) is not None]

    def unmerged_layers(self, split: str) -> list[str]:
        """Name the layers of which only parts, or running states, are there yet."""
        kinds = self.state_kinds(split)
        unmerged: dict[str, None] = {}
        for layer, kind in kinds:
            if layer in unmerged or not kind.startswith((RUNNING, PART)):
                continue
            holds = self.state_attributes(split, layer, kind).get("holds", ())
            # Decisions that are being added to finished moments keep nobody from measuring those.
            wanted = holds if kind.startswith(PART) else {"moments"} & set(holds)
            if any((layer, each) not in kinds for each in wanted):
                unmerged[layer] = None
        return list(unmerged)

    def delete_state(self, split: str, layer: str, kind: str) -> None:
        """Delete a state, if it is there."""
        del self._root[f"{split}/{STATES}/{layer}/{kind}"]

    def _state_group(self, split: str, layer: str, kind: str) -> zarr.Group | None:
        group = self._root.get(f"{split}/{STATES}/{layer}/{kind}")
        return group if isinstance(group, zarr.Group) and _is_complete(group) else None

    def _states(self, split: str) -> Iterator[tuple[str, str]]:
        """Yield layer and kind of every complete state of a split, sorted."""
        for layer, kinds in chunks.subgroups(self._root, f"{split}/{STATES}"):
            for kind, group in chunks.subgroups(kinds):
                if not kind.startswith(STAGED) and _is_complete(group):
                    yield layer, kind


def _is_complete(group: zarr.Group) -> bool:
    return bool(read_attributes(group).get("complete"))


def _check_array(name: str, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    check_name("array", name)
    if values.dtype.kind == "i":
        values = values.astype(np.int64, copy=False)
    if values.ndim == 0 or values.dtype not in (np.int64, np.float32, np.float64):
        raise DataError(
            f"array '{name}' of shape {values.shape} and dtype {values.dtype} in a state",
            "signed integers, float32 or float64, of one dimension or more",
        )
    return values
