"""Reads: what a read of a layer gives, and how class blocks of one are joined."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ncbatch.arrays import StackedRows, StoredRows, row_blocks
from ncbatch.stats import Decisions, Moments, SeenMoments


@dataclass(frozen=True)
class MomentsRead:
    """What a read of a layer gives.

    Attributes
    ----------
    seen : SeenMoments
        Of the samples under their labels.
    null : SeenMoments or None
        Of the same samples under labels at random, without scatter.
    skipped : int
        Rows left out because they are not finite.
    """

    seen: SeenMoments
    null: SeenMoments | None
    skipped: int

    def merge(self, other: MomentsRead) -> MomentsRead:
        """Combine with what other rows gave."""
        null = None
        if self.null is not None and other.null is not None:
            null = self.null.merge(other.null)
        return MomentsRead(self.seen.merge(other.seen), null, self.skipped + other.skipped)


@dataclass(frozen=True)
class DecisionsRead:
    """Decisions of the rows of a layer, and how many rows were left out as not finite."""

    decisions: Decisions
    skipped: int

    def merge(self, other: DecisionsRead) -> DecisionsRead:
        """Combine with what other rows gave."""
        return DecisionsRead(self.decisions.merge(other.decisions), self.skipped + other.skipped)


def to_file(seen: SeenMoments, folder: Path, name: str) -> SeenMoments:
    """Move class means to a file of a name of its own, complete when it takes that name.

    A task may run twice, and both runs' results may be in use: no file is ever written again.

    Parameters
    ----------
    seen : SeenMoments
        With its means (P, D) in memory.
    folder : Path
        Where the file goes; made if it is not there.
    name : str
        What the file's name begins with.
    """
    means = seen.moments.means
    blocks = (means[part] for part in row_blocks(len(means)))
    rows = rows_file(folder / f"{name}-{uuid.uuid4().hex[:12]}.rows", blocks, means.shape)
    return replace(seen, moments=replace(seen.moments, means=rows))


def rows_file(path: Path, blocks: Iterable[Any], shape: tuple[int, int]) -> StoredRows:
    """Write blocks of rows, one after another, to a file that is complete when it takes its name.

    Parameters
    ----------
    path : Path
        The file; its folder is made if it is not there.
    blocks : iterable of array (n, D)
        All rows in order.
    shape : (int, int)
        Rows in all, and D.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{uuid.uuid4().hex[:12]}.partial")
    try:
        rows, first = StoredRows.create(partial, shape), 0
        for block in blocks:
            rows[first : first + len(block)] = block
            first += len(block)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return StoredRows(path, shape)


def joined(a: MomentsRead, b: MomentsRead) -> MomentsRead:
    """Join the moments of two class blocks of the same rows, with their means in files."""
    null = None
    if a.null is not None and b.null is not None:
        null = _stacked(a.null, b.null)
    # Both reads met the same rows that are not finite.
    return MomentsRead(_stacked(a.seen, b.seen), null, max(a.skipped, b.skipped))


def _stacked(a: SeenMoments, b: SeenMoments) -> SeenMoments:
    x, y = a.moments, b.moments
    scatter = None if x.scatter is None or y.scatter is None else x.scatter + y.scatter
    return SeenMoments(
        np.concatenate([a.classes, b.classes]),
        Moments(
            np.concatenate([x.counts, y.counts]),
            StackedRows([x.means, y.means]),
            np.concatenate([x.traces, y.traces]),
            scatter,
        ),
    )
