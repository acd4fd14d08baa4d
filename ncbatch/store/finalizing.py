"""The end of writing: every writer has ended, arrays end at the last row, samples are counted."""

from __future__ import annotations

from typing import Any

import numpy as np
import zarr

from ncbatch.errors import StoreError
from ncbatch.store.chunks import chunk_fault, present_chunks, trim
from ncbatch.store.commit_records import CommitRecord, claimed_blocks, read_records
from ncbatch.store.format import ATTRIBUTE, STAGED
from ncbatch.store.layout import Layout
from ncbatch.store.nodes import open_array, subgroups

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
