"""Writers of one split, one or several: whose rows are where, what each has committed, and the end.

Several writers do not talk: what they agree on they derive from their arguments.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import zarr

from ncbatch.errors import StoreError, UsageError
from ncbatch.store import chunks
from ncbatch.store.format import ARRAYS, ATTRIBUTE, LayerSpec, chunk_rows, read_attributes

_CLAIM = "claim"
_LAYOUT = "layout"


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

    def row(self, number: int, block: int) -> int:
        """Return the row of the split that is this writer's row number `number`.

        Examples
        --------
        >>> [Share(1, 3).row(number, block=2) for number in range(5)]
        [2, 3, 8, 9, 14]
        """
        full, rest = divmod(number, block)
        return self.block(full) * block + rest

    def block(self, number: int) -> int:
        """Return the base block that is this writer's block number `number`."""
        return number * self.world_size + self.rank


@dataclass(frozen=True)
class CommitRecord(Share):
    """The share of a writer, and what it has committed of it."""

    # Base blocks whose labels it has stored, and the samples in them (label >= 0).
    blocks: int = 0
    rows: int = 0
    # Rows that it was given, holes included: where to go on in the input.
    position: int = 0
    # Whether it has ended.
    final: bool = False

    def stop(self, block: int) -> int:
        """Return the row of the split after the last one committed; 0 without any."""
        return self.row(self.position - 1, block) + 1 if self.position else 0

    def save(self, group: zarr.Group) -> None:
        """Store the record in the split's `group`, in the place of this writer's last one."""
        # Made when the writer claimed its rank.
        home: Any = group[f"writers/{self.rank}"]
        home.update_attributes({ATTRIBUTE: asdict(self)})


def read_record(group: zarr.Group, rank: int) -> CommitRecord | None:
    """Read the record of a writer; None when it has not begun."""
    home = chunks.find_node(group, f"writers/{rank}")
    values = read_attributes(home) if isinstance(home, zarr.Group) else {}
    if not values:
        return None
    return CommitRecord(**{field.name: values[field.name] for field in fields(CommitRecord)})


def read_records(group: zarr.Group, world_size: int) -> list[CommitRecord]:
    """Read the records of the writers that have begun, by rank."""
    return list(filter(None, (read_record(group, rank) for rank in range(world_size))))


def claim(group: zarr.Group, share: Share, named: str, *, resume: bool) -> CommitRecord:
    """Become a writer of a split, and return what an earlier one of this rank has committed.

    Raises
    ------
    StoreError
        When one has begun and `resume` was not asked for: no two processes may write its blocks.
    """
    # Of several processes that make the record exactly one finds its own token in it.
    token = str(uuid.uuid4())
    fresh = CommitRecord(share.rank, share.world_size)
    attributes = {ATTRIBUTE: asdict(fresh) | {_CLAIM: token}}
    home = chunks.require_group(chunks.require_group(group, "writers"), str(share.rank), attributes)
    mine = read_attributes(home).get(_CLAIM) == token
    if not mine and not resume:
        raise StoreError(
            f"writer {share.rank} of {share.world_size} of {named} has begun already",
            "a rank of its own for every process that writes",
            "give rank= and world_size= to each of several writers; "
            "resume=True goes on after one that stopped",
        )
    return fresh if mine else read_record(group, share.rank) or fresh


def claimed_blocks(records: Iterable[CommitRecord], n_blocks: int = 0) -> npt.NDArray[np.bool_]:
    """Mark the base blocks whose labels must be there, for a writer recorded that it stored them.

    Of `n_blocks` blocks at least, and of more where records claim more.
    """
    known = [record for record in records if record.blocks]
    n = max([n_blocks, *(record.block(record.blocks - 1) + 1 for record in known)])
    claimed = np.zeros(n, np.bool_)
    for record in known:
        claimed[record.rank :: record.world_size][: record.blocks] = True
    return claimed


def to_resume(record: CommitRecord, label: zarr.Array[Any]) -> CommitRecord:
    """Find where a writer that stopped goes on: after its committed blocks that are surely full.

    Raises
    ------
    CorruptionError
        When labels that the record claims are missing.
    """
    block = int(label.chunks[0])
    stored = set(chunks.stored_chunks(label))
    # The record may lag behind the labels by a block, for it is written after them.
    blocks = 0
    while record.block(blocks) in stored:
        blocks += 1
    if blocks < record.blocks:
        raise chunks.chunk_fault(label, record.block(blocks), "chunk is missing").error()
    if blocks and record.position < blocks * block:
        stop = (record.block(blocks - 1) + 1) * block
        # Killed while it ended: the last block may be a part of one, and is written again.
        if label.shape[0] < stop or np.asarray(label[stop - 1 : stop])[0] < 0:
            blocks -= 1
    rows = count_samples(label, map(record.block, range(blocks)))
    return replace(record, blocks=blocks, rows=rows, position=blocks * block, final=False)


def count_samples(label: zarr.Array[Any], blocks: Iterable[int]) -> int:
    """Count the samples (label >= 0) in some base blocks."""
    parts = (np.asarray(label[slice(*chunks.chunk_range(label, block))]) for block in blocks)
    return sum(int(np.count_nonzero(labels >= 0)) for labels in parts)


@dataclass(frozen=True)
class Layout:
    """The layout of a split of several writers, an attribute of the split until it is finalized."""

    world_size: int
    # Rows at most, of all writers together; so each has room for as many.
    n_samples: int
    layers: Mapping[str, LayerSpec]
    # Rows per chunk of every layer; the largest is the base block.
    chunk_rows: Mapping[str, int]
    # The layer whose classifier made the predictions; None without predictions.
    head: str | None

    @classmethod
    def read(cls, group: zarr.Group) -> Self | None:
        """Read the layout of a split; None for one of a single writer, and once it is finalized."""
        record = read_attributes(group).get(_LAYOUT)
        if not isinstance(record, dict):
            return None
        layers = record["layers"]
        return cls(
            record["world_size"],
            record["n_samples"],
            {name: LayerSpec.read(layer) for name, layer in layers.items()},
            {name: layer["chunk_rows"] for name, layer in layers.items()},
            record["head"],
        )

    @property
    def attributes(self) -> dict[str, Any]:
        """The attributes of the split's group that record the layout."""
        layers = {
            name: asdict(spec) | {"chunk_rows": self.chunk_rows[name]}
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
        """Rows of the arrays until they are trimmed: any one writer may have all samples."""
        # Chunks that are never written cost nothing.
        return self.world_size * -(-self.n_samples // self.base_block) * self.base_block

    def check(self, asked: Layout, named: str) -> None:
        """Refuse a writer that asks for another layout than this one, which its split has.

        Raises
        ------
        StoreError
            Names the first difference.
        """
        begun = self._arguments()
        for what, value in asked._arguments().items():
            if begun[what] != value:
                raise StoreError(
                    f"{named} was begun with {what} {begun[what]}",
                    f"{value}, as this writer was asked for",
                    "give all its writers the same arguments, or delete the split first",
                )

    def _arguments(self) -> dict[str, object]:
        """Return what writers must agree on, in the order in which it is compared."""
        layers = sorted(self.layers)
        return {
            "world_size": self.world_size,
            "layers": ", ".join(layers),
            **{f"layer '{name}'": self.layers[name] for name in layers},
            "head": self.head,
            "n_samples": self.n_samples,
        }

    def create_arrays(self, group: zarr.Group) -> None:
        """Make every array of the split that is not there, features first."""
        for order, (name, spec) in enumerate(self.layers.items()):
            chunks.create_feature(group, name, spec, order, self.capacity, self.chunk_rows[name])
        if self.head is not None:
            chunks.create_ids(group, "prediction", self.capacity, self.base_block, head=self.head)
        chunks.create_ids(group, "label", self.capacity, self.base_block)


def join_split(
    root: zarr.Group,
    split: str,
    named: str,
    layers: Mapping[str, LayerSpec],
    world_size: int,
    n_samples: int | None,
    head: str | None,
) -> tuple[zarr.Group, Layout]:
    """Begin a split of several writers, or join those that have begun it.

    `n_samples` may be left out when the split has begun; `named` is what messages call it.

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
    # No chunk is longer than an even share of the rows needs.
    rows = {name: chunk_rows(spec, -(-n_samples // world_size)) for name, spec in layers.items()}
    asked = Layout(world_size, n_samples, layers, rows, head)
    # Whoever makes the group decides: the others read what it has.
    group = chunks.require_group(root, split, asked.attributes)
    stored = Layout.read(group)
    if stored is None:
        raise StoreError(
            f"{named} was begun by a single writer",
            f"a split of {world_size} writers",
            "go on with it as it was begun, or delete it first",
        )
    stored.check(asked, named)
    return group, stored


def finalize_split(group: zarr.Group, named: str) -> None:
    """Complete a split: trim its arrays, fill gaps between its writers and record its samples.

    Raises
    ------
    StoreError
        When a writer has not ended.
    CorruptionError
        When labels that were committed are missing.
    """
    # Every step can be repeated, so that what was interrupted is completed by another call.
    layout = Layout.read(group)
    world_size = 1 if layout is None else layout.world_size
    records = read_records(group, world_size)
    _check_ended(records, world_size, named)
    # Arrays are made with the first rows, and no writer may have had one.
    if layout is not None and "label" not in group:
        layout.create_arrays(group)
    label = chunks.open_array(group, "label")
    stop = max(record.stop(label.chunks[0]) for record in records)
    _check_labels(group, stop, records)
    names = chunks.array_names(group)
    for name in names:
        chunks.trim(chunks.open_array(group, name if "/" not in name else f"{name}/feature"), stop)
    # What makes the split complete comes last.
    group.update_attributes(
        {ATTRIBUTE: {"n_samples": sum(record.rows for record in records), ARRAYS: names}}
    )


def _check_ended(records: list[CommitRecord], world_size: int, named: str) -> None:
    begun = {record.rank: record for record in records}
    missing = [str(rank) for rank in range(world_size) if rank not in begun]
    writing = [str(rank) for rank, record in begun.items() if not record.final]
    lacking = {"no record": missing, "no end": writing}
    reasons = [f"{what} of writer {', '.join(each)}" for what, each in lacking.items() if each]
    if reasons:
        raise StoreError(
            f"{named} has {' and '.join(reasons)}",
            f"all of 0..{world_size - 1} closed" if world_size > 1 else "it to be closed",
            "let them end; resume those that stopped, and begin those that never did",
        )


def _check_labels(group: zarr.Group, stop: int, records: list[CommitRecord]) -> None:
    label = chunks.open_array(group, "label", stop)
    present = chunks.present_chunks(label)
    chunks.check_present(label, claimed_blocks(records, present.size)[: present.size])
    # Where a writer had no row there are holes: in a complete split every label chunk is there.
    for block in np.flatnonzero(~present).tolist():
        label[slice(*chunks.chunk_range(label, block))] = -1
