"""What each writer of a split owns, and the record it keeps of what it has committed."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr

from ncbatch.errors import StoreError, UsageError
from ncbatch.store.chunks import chunk_fault, stored_chunks
from ncbatch.store.format import ATTRIBUTE
from ncbatch.store.nodes import find_node, found_group

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
