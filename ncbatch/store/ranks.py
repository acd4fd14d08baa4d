"""What several writers of one split agree on without talking: they derive it from their arguments."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import zarr
from zarr.core.sync import sync

from ncbatch.errors import StoreError, UsageError
from ncbatch.store.chunks import (
    chunk_fault,
    create_feature,
    create_label,
    create_prediction,
    find_node,
    find_nodes,
    found_group,
    open_array,
    present_chunks,
    stored_chunks,
    subgroups,
    trim,
)
from ncbatch.store.format import ATTRIBUTE, STAGED, LayerSpec, chunk_rows
from ncbatch.store.place import RemoteStore, rename

# What each writer of a split owns, and the record it keeps of what it has committed.


_CLAIM = "claim"


@dataclass(frozen=True)
class Share:
    """The base blocks of writer `rank` of `world_size`: rank, rank + world_size, and so on.

    Raises
    ------
    UsageError
        When `rank` is not in 0..world_size-1.
    """

    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if self.world_size < 1:
            raise UsageError(f"a split of {self.world_size} writers", "world_size of at least 1")
        if not 0 <= self.rank < self.world_size:
            raise UsageError(
                f"writer {self.rank} of {self.world_size}",
                f"a rank in 0..{self.world_size - 1}",
                "give world_size, the number of writers, with rank",
            )

    @property
    def several(self) -> bool:
        """Whether there are other writers."""
        return self.world_size > 1

    def row(self, own: int, block: int) -> int:
        """Give the row of the split that is this writer's own row number `own`.

        Examples
        --------
        >>> [Share(1, 3).row(own, block=2) for own in range(5)]
        [2, 3, 8, 9, 14]
        """
        full, rest = divmod(own, block)
        return self.block(full) * block + rest

    def block(self, own: int) -> int:
        """Give the base block that is this writer's own block number `own`."""
        return own * self.world_size + self.rank


@dataclass(frozen=True)
class CommitRecord:
    """What a writer has committed.

    Attributes
    ----------
    share : Share
        Which writer it is.
    blocks : int
        Base blocks whose labels it has stored.
    rows : int
        Samples in them (label >= 0).
    position : int
        Rows appended that are committed, holes included: where to go on in the input.
    final : bool
        Whether the writer has ended.
    """

    share: Share
    blocks: int = 0
    rows: int = 0
    position: int = 0
    final: bool = False

    def stop(self, block: int) -> int:
        """Give the row of the split after the last one committed; 0 without any."""
        return self.share.row(self.position - 1, block) + 1 if self.position else 0

    def save(self, group: zarr.Group) -> None:
        """Store the record in the split's `group`, in the place of this writer's last one."""
        home = find_node(group, f"writers/{self.share.rank}")
        if not isinstance(home, zarr.Group):
            home = found_group(found_group(group, "writers"), str(self.share.rank))
        home.update_attributes({ATTRIBUTE: self._attributes()})

    def _attributes(self) -> dict[str, Any]:
        return {
            "rank": self.share.rank,
            "world_size": self.share.world_size,
            "blocks": self.blocks,
            "rows": self.rows,
            "position": self.position,
            "final": self.final,
        }


def read_record(group: zarr.Group, share: Share) -> CommitRecord | None:
    """Read the record of a writer; None when it has not begun."""
    home = find_node(group, f"writers/{share.rank}")
    found = {} if home is None else home.attrs.get(ATTRIBUTE)
    if not isinstance(found, dict) or "blocks" not in found:
        return None
    return CommitRecord(
        share,
        int(found["blocks"]),
        int(found["rows"]),
        int(found["position"]),
        bool(found["final"]),
    )


def read_records(group: zarr.Group, world_size: int) -> list[CommitRecord]:
    """Read the records of the writers that have begun, by rank."""
    found = (read_record(group, Share(rank, world_size)) for rank in range(world_size))
    return [record for record in found if record is not None]


def claim(group: zarr.Group, share: Share, named: str, *, resume: bool) -> CommitRecord:
    """Become a writer of a split: no other process may write its blocks.

    Parameters
    ----------
    group : zarr.Group
        The split's group.
    share : Share
        Which writer.
    named : str
        The split and the store, for messages.
    resume : bool
        Go on after an earlier writer of this rank, if there was one.

    Returns
    -------
    CommitRecord
        What that one committed.

    Raises
    ------
    StoreError
        When a writer of this rank has begun and `resume` was not asked for.
    """
    token = str(uuid.uuid4())
    fresh = CommitRecord(share)
    attributes = {ATTRIBUTE: fresh._attributes() | {_CLAIM: token}}
    home = found_group(found_group(group, "writers"), str(share.rank), attributes)
    found = home.attrs.get(ATTRIBUTE)
    mine = isinstance(found, dict) and found.get(_CLAIM) == token
    if not mine and not resume:
        raise StoreError(
            f"writer {share.rank} of {share.world_size} of {named} has begun already",
            "a rank of its own for every process that writes",
            "give rank= and world_size= to each of several writers; resume=True goes on after one that stopped",
        )
    return fresh if mine else read_record(group, share) or fresh


def claimed_blocks(records: Iterable[CommitRecord], n_blocks: int = 0) -> npt.NDArray[np.bool_]:
    """Mark the base blocks whose labels must be there, for a writer recorded that it stored them.

    Parameters
    ----------
    records : iterable of CommitRecord
        The records of a split's writers.
    n_blocks : int, optional
        Blocks to mark at least; more where records claim more.
    """
    known = [record for record in records if record.blocks]
    n = max([n_blocks, *(record.share.block(record.blocks - 1) + 1 for record in known)])
    claimed = np.zeros(n, np.bool_)
    for record in known:
        claimed[record.share.rank :: record.share.world_size][: record.blocks] = True
    return claimed


def to_resume(record: CommitRecord, label: zarr.Array[Any]) -> CommitRecord:
    """Find where a writer that stopped goes on: after its committed blocks that are surely full.

    Parameters
    ----------
    record : CommitRecord
        Its last record, which may lag behind the labels by a block.
    label : zarr.Array
        The split's labels.

    Raises
    ------
    CorruptionError
        When labels that the record claims are missing.
    """
    block, share = int(label.chunks[0]), record.share
    stored, blocks = set(stored_chunks(label)), 0
    while share.block(blocks) in stored:
        blocks += 1
    if blocks < record.blocks:
        raise chunk_fault(label, share.block(blocks), "chunk is missing").error()
    if blocks and record.position < blocks * block:
        stop = (share.block(blocks - 1) + 1) * block
        if label.shape[0] < stop or np.asarray(label[stop - 1 : stop])[0] < 0:
            blocks -= 1  # killed while it ended: the last block is written again
    rows = sum(n_samples(label, [share.block(own)]) for own in range(blocks))
    return replace(record, blocks=blocks, rows=rows, position=blocks * block, final=False)


def n_samples(label: zarr.Array[Any], blocks: Sequence[int]) -> int:
    """Count the samples (label >= 0) in some base blocks."""
    rows = int(label.chunks[0])
    return sum(
        int(np.count_nonzero(np.asarray(label[b * rows : (b + 1) * rows]) >= 0)) for b in blocks
    )


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
            create_feature(group, name, spec, self.capacity, self.chunk_rows[name], order)
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


# The end of writing: every writer has ended, arrays end at the last row, samples are counted.


ARRAYS = "arrays"


def finalize_split(group: zarr.Group, named: str) -> None:
    """Complete a split: trim its arrays, fill gaps between its writers and record its samples.

    Every step can be repeated, so that a split whose completion was interrupted is completed by
    another call.

    Parameters
    ----------
    group : zarr.Group
        The split.
    named : str
        What messages call it.

    Raises
    ------
    StoreError
        When a writer has not ended.
    CorruptionError
        When labels that were committed are missing.
    """
    layout = Layout.read(group)
    world_size = 1 if layout is None else layout.world_size
    records = read_records(group, world_size)
    _check_ended(records, world_size, named)
    if layout is not None and "label" not in group:
        layout.create_arrays(group)  # no writer had a row
    label = open_array(group, "label")
    stop = max(record.stop(label.chunks[0]) for record in records)
    _check_labels(group, stop, records)
    names = _arrays(group)
    for name in names:
        trim(open_array(group, name if "/" not in name else f"{name}/feature"), stop)
    group.update_attributes(
        {ATTRIBUTE: {"n_samples": sum(record.rows for record in records), ARRAYS: names}}
    )


def record_arrays(group: zarr.Group) -> None:
    """Record which arrays a complete split has, so that the loss of a whole one is noticed."""
    attributes: dict[str, Any] = dict(group.attrs[ATTRIBUTE])  # type: ignore[arg-type]
    known = attributes.get(ARRAYS, [])
    names = list(dict.fromkeys([*known, *_arrays(group)]))
    group.update_attributes({ATTRIBUTE: attributes | {ARRAYS: names}})


def _arrays(group: zarr.Group) -> list[str]:
    """Name the arrays as `Split.arrays` does."""
    found = [name for name in ("label", "prediction") if name in group]
    layers = group.get("layers")
    if isinstance(layers, zarr.Group):
        found += [
            f"layers/{name}"
            for name, layer in subgroups(layers)
            if not name.startswith(STAGED) and layer.attrs.get("complete")
        ]
    return found


def _check_ended(records: list[CommitRecord], world_size: int, named: str) -> None:
    begun = {record.share.rank: record for record in records}
    missing = [str(rank) for rank in range(world_size) if rank not in begun]
    writing = [str(rank) for rank, record in begun.items() if not record.final]
    found = []
    if missing:
        found.append(f"no record of writer {', '.join(missing)}")
    if writing:
        found.append(f"no end of writer {', '.join(writing)}")
    if found:
        raise StoreError(
            f"{named} has {' and '.join(found)}",
            f"all of 0..{world_size - 1} closed" if world_size > 1 else "it to be closed",
            "let them end; resume those that stopped, and begin those that never did",
        )


def _check_labels(group: zarr.Group, stop: int, records: list[CommitRecord]) -> None:
    """Refuse lost labels; store holes where a writer had no row, so that all labels are there."""
    label = open_array(group, "label", stop)
    present = present_chunks(label)
    claimed = claimed_blocks(records, present.size)
    lost = np.flatnonzero(claimed[: present.size] & ~present)
    if lost.size:
        raise chunk_fault(label, int(lost[0]), "chunk is missing").error()
    rows = int(label.chunks[0])
    for block in np.flatnonzero(~present).tolist():
        label[block * rows : min((block + 1) * rows, stop)] = -1


def finish_renaming(split: zarr.Group) -> None:
    """Let layers and predictions take their names whose replacing was interrupted.

    Staged predictions are complete when a staged layer is, or when those that the split had are
    gone: both come after the last of them was stored.
    """
    if not isinstance(split.store, RemoteStore):
        return
    layers = find_node(split, "layers")
    groups = subgroups(layers) if isinstance(layers, zarr.Group) else ()
    complete = [
        name for name, group in groups if name.startswith(STAGED) and group.attrs.get("complete")
    ]
    known: Any = split.attrs.get(ATTRIBUTE, {})
    current, staged = find_nodes(split, ["prediction", f"{STAGED}prediction"])
    lost = "prediction" in known.get(ARRAYS, ()) and current is None
    if staged is not None and (complete or lost):
        rename(split, f"{STAGED}prediction", "prediction")
    for name in complete:
        rename(split, f"layers/{name}", f"layers/{name.removeprefix(STAGED)}")
    if complete or lost:
        record_arrays(split)


def delete_node(group: zarr.Group, name: str) -> None:
    """Delete a node of `group` with all below, even where its own metadata is gone already."""
    sync(group.store.delete_dir(f"{group.path}/{name}"))
