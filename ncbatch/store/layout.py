"""What several writers of one split agree on without talking: they derive it from their arguments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import zarr

from ncbatch.errors import StoreError, UsageError
from ncbatch.store.format import ATTRIBUTE, LayerSpec, chunk_rows
from ncbatch.store.nodes import create_label, create_prediction, found_group
from ncbatch.store.row_buffer import RowBuffer

_LAYOUT = "layout"


@dataclass(frozen=True)
class Layout:
    """The layout of a split of several writers, an attribute of the split until it is finalized.

    Attributes
    ----------
    world_size : int
        How many writers.
    n_samples : int
        Rows at most, of all writers together; so each has room for as many.
    layers : mapping of str to LayerSpec
        Width and dtype of every layer.
    chunk_rows : mapping of str to int
        Rows per chunk of every layer; the largest is the base block.
    head : str or None
        The layer whose classifier made the predictions; None without predictions.
    """

    world_size: int
    n_samples: int
    layers: Mapping[str, LayerSpec]
    chunk_rows: Mapping[str, int]
    head: str | None

    @classmethod
    def plan(
        cls, layers: Mapping[str, LayerSpec], world_size: int, n_samples: int, head: str | None
    ) -> Self:
        """Derive the layout: no chunk is longer than an even share of the rows needs."""
        share = -(-n_samples // world_size)
        rows = {name: chunk_rows(spec, share) for name, spec in layers.items()}
        return cls(world_size, n_samples, dict(layers), rows, head)

    @classmethod
    def read(cls, group: zarr.Group) -> Self | None:
        """Read the layout of a split; None for one of a single writer, and once it is finalized."""
        attributes = group.attrs.get(ATTRIBUTE)
        found = attributes.get(_LAYOUT) if isinstance(attributes, dict) else None
        if not isinstance(found, dict):
            return None
        layers = found["layers"]
        return cls(
            int(found["world_size"]),
            int(found["n_samples"]),
            {name: LayerSpec(int(x["n_features"]), x["dtype"]) for name, x in layers.items()},
            {name: int(x["chunk_rows"]) for name, x in layers.items()},
            found["head"],
        )

    @property
    def attributes(self) -> dict[str, Any]:
        """The attributes of the split's group that record the layout."""
        layers = {
            name: {
                "n_features": spec.n_features,
                "dtype": spec.dtype,
                "chunk_rows": self.chunk_rows[name],
            }
            for name, spec in self.layers.items()
        }
        record = {"world_size": self.world_size, "n_samples": self.n_samples, "head": self.head}
        return {ATTRIBUTE: {_LAYOUT: record | {"layers": layers}}}

    @property
    def base_block(self) -> int:
        """Rows that one label chunk commits."""
        return max(self.chunk_rows.values())

    @property
    def capacity(self) -> int:
        """Rows of the arrays until they are trimmed: any one writer may have all samples.

        Chunks that are never written cost nothing.
        """
        return self.world_size * -(-self.n_samples // self.base_block) * self.base_block

    def check(self, asked: Layout, named: str) -> None:
        """Refuse a writer that asks for another layout than this one, which its split has.

        Raises
        ------
        StoreError
            Names the first difference.
        """
        for what, here, there in self._compared(asked):
            if here != there:
                raise StoreError(
                    f"{named} was begun with {what} {here}",
                    f"{there}, as this writer was asked for",
                    "give all its writers the same arguments, or delete the split first",
                )

    def _compared(self, asked: Layout) -> list[tuple[str, object, object]]:
        layers = sorted(self.layers.keys() | asked.layers.keys())
        return [
            ("world_size", self.world_size, asked.world_size),
            ("layers", ", ".join(sorted(self.layers)), ", ".join(sorted(asked.layers))),
            *((f"layer '{x}'", self.layers.get(x), asked.layers.get(x)) for x in layers),
            ("head", self.head, asked.head),
            ("n_samples", self.n_samples, asked.n_samples),
        ]

    def create_arrays(self, group: zarr.Group) -> None:
        """Make every array of the split that is not there, features first."""
        for order, (name, spec) in enumerate(self.layers.items()):
            RowBuffer(name, spec, self.chunk_rows[name], order).create(group, self.capacity)
        if self.head is not None:
            create_prediction(group, self.capacity, self.base_block, self.head)
        create_label(group, self.capacity, self.base_block)


def join_split(
    root: zarr.Group,
    split: str,
    named: str,
    layers: Mapping[str, LayerSpec],
    *,
    world_size: int,
    n_samples: int | None,
    head: str | None,
) -> tuple[zarr.Group, Layout]:
    """Begin a split of several writers, or join those that have begun it.

    Parameters
    ----------
    root : zarr.Group
        The store.
    split, named : str
        The split's name, and what messages call it.
    layers : mapping of str to LayerSpec
        The layers to write.
    world_size, n_samples, head
        As `Layout` has them; `n_samples` may be left out when the split has begun.

    Returns
    -------
    tuple of zarr.Group and Layout
        The split, and the layout it has.

    Raises
    ------
    StoreError
        When the split was begun by a single writer, or with another layout.
    UsageError
        When `n_samples` is needed and missing, or not positive.
    """
    begun = Layout.read(root[split]) if split in root else None  # type: ignore[arg-type]
    if n_samples is None and begun is not None:
        n_samples = begun.n_samples
    if n_samples is None or n_samples < 1:
        raise UsageError(
            f"n_samples {n_samples} for several writers",
            "the rows that all writers together will append at most",
            "too large a number costs nothing",
        )
    asked = Layout.plan(layers, world_size, n_samples, head)
    group = found_group(root, split, asked.attributes)
    stored = Layout.read(group)
    if stored is None:
        raise StoreError(
            f"{named} was begun by a single writer",
            f"a split of {world_size} writers",
            "go on with it as it was begun, or delete it first",
        )
    stored.check(asked, named)
    return group, stored
