"""What a store says of itself: the attribute of its root group."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import zarr

from ncbatch.store.format import ATTRIBUTE, LayerSpec, read_header
from ncbatch.store.nodes import found_group

_DUMPED = "ncbatch_dump"  # of a split: beside ATTRIBUTE, which the end of writing replaces


class StoreHeader:
    """The header of a store: its identifier, classes, declared layers, and where its features come from.

    Parameters
    ----------
    root : zarr.Group
        The store.
    path : str
        Its path or URL, for messages.
    """

    def __init__(self, root: zarr.Group, path: str) -> None:
        self._root = root
        self.path = path
        self._header = read_header(root, path)

    @property
    def id(self) -> str:
        """The store's own identifier, a UUID."""
        return str(self._header["id"])

    @property
    def n_classes(self) -> int:
        """K, the number of classes."""
        return int(self._header["n_classes"])

    @property
    def class_names(self) -> list[str] | None:
        """A name per class, where recorded."""
        return self._header.get("class_names")

    @property
    def model(self) -> str | None:
        """Name of the model that made the features, where recorded."""
        return self._header.get("model")

    @property
    def step(self) -> int | None:
        """Training step of that model, where recorded."""
        return self._header.get("step")

    @property
    def layer_notes(self) -> dict[str, dict[str, Any]]:
        """What is recorded of layers by name.

        ``depth``: the share of the model's blocks that come before, 0 to 1; ``hidden_state``: its
        index among a Hugging Face model's ``hidden_states``.
        """
        return {name: dict(notes) for name, notes in self._header.get("layer_notes", {}).items()}

    @property
    def declared_layers(self) -> dict[str, LayerSpec]:
        """The layers that writers write by default."""
        return {
            name: LayerSpec(int(spec["n_features"]), str(spec["dtype"]))
            for name, spec in self._header.get("layers", {}).items()
        }

    def begun_with(self, split: str, kind: str) -> dict[str, Any]:
        """Give what a dump of rows or moments into a split was begun with, as it was recorded."""
        group = self._root.get(split)
        found = group.attrs.get(_DUMPED, {}) if isinstance(group, zarr.Group) else {}
        return dict(found.get(kind, {})) if isinstance(found, dict) else {}

    def set_begun_with(self, split: str, kind: str, values: Mapping[str, Any]) -> None:
        """Record what a dump of rows or moments into a split is begun with."""
        group = found_group(self._root, split)
        found: Any = group.attrs.get(_DUMPED, {})
        group.update_attributes({_DUMPED: {**found, kind: dict(values)}})

    def describe(
        self,
        *,
        model: str | None = None,
        step: int | None = None,
        layers: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """Record where the features come from; what is given replaces what was recorded.

        Parameters
        ----------
        model : str, optional
            Name of the model.
        step : int, optional
            Its training step.
        layers : mapping of str to mapping, optional
            Notes of layers, as in `layer_notes`.
        """
        header = dict(self._header)
        if model is not None:
            header["model"] = str(model)
        if step is not None:
            header["step"] = int(step)
        if layers:
            kept = self.layer_notes
            header["layer_notes"] = {
                **kept, **{name: {**kept.get(name, {}), **notes} for name, notes in layers.items()}
            }  # fmt: skip
        self._root.update_attributes({ATTRIBUTE: header})
        self._header = header
