"""Rows of a store as passes read them: which classes are used, and their samples block by block."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from ncbatch.arrays import first_nonfinite_row, read_ahead
from ncbatch.engine import Item, cut
from ncbatch.errors import DataError
from ncbatch.store import Split

# Bytes of a block of rows in float64, the unit of arithmetic within a chunk.
BLOCK_BYTES = 64 * 2**20
# Items of a sweep over rows, and the most chunks of one: enough for resume and balance.
ITEMS, ITEM_CHUNKS = 16, 64


@dataclass(frozen=True)
class Selection:
    """The classes a measurement uses, found from the labels alone.

    Attributes
    ----------
    counts : array (K,) of int64
        Samples per class of the split.
    classes : array (C,) of int64
        Class ids used, ascending.
    filtered : bool
        Whether a filter was asked for, beyond the class being seen.
    """

    counts: npt.NDArray[np.int64]
    classes: npt.NDArray[np.int64]
    filtered: bool

    @cached_property
    def index(self) -> npt.NDArray[np.int64]:
        """For each class id its place among the classes used, or -1 (K,)."""
        index = np.full(self.counts.shape[0], -1, np.int64)
        index[self.classes] = np.arange(self.classes.shape[0])
        return index

    @property
    def n_samples(self) -> int:
        """Samples of the classes used."""
        return int(self.counts[self.classes].sum())

    @property
    def digest(self) -> str:
        """A hash of the classes used."""
        return hashlib.sha256(self.classes.tobytes()).hexdigest()[:32]


def count_labels(split: Split) -> npt.NDArray[np.int64]:
    """Count the samples of each class (K,), reading labels only.

    Raises
    ------
    DataError
        For a label that is not below K; names the row.
    """
    counts = np.zeros(split.n_classes, np.int64)
    for start, labels in split.label_blocks():
        if labels.size and labels.max() >= split.n_classes:
            row = int(labels.argmax())
            raise DataError(
                f"label {int(labels[row])} in row {start + row} of split '{split.name}' of {split.where}",
                f"labels below {split.n_classes}, the classes of the store",
            )
        counts += np.bincount(labels[labels >= 0], minlength=split.n_classes)
    return counts


def select_classes(
    counts: npt.NDArray[np.int64],
    *,
    min_count: int = 1,
    max_count: int | None = None,
    classes: Iterable[int] | None = None,
) -> Selection:
    """Choose the classes to use: seen, and within the filters.

    Parameters
    ----------
    counts : array (K,)
        Samples per class.
    min_count, max_count : int, optional
        Least and greatest number of samples.
    classes : iterable of int, optional
        Class ids to choose among.

    Raises
    ------
    DataError
        When a class id is not below K.
    """
    used = counts >= max(min_count, 1)
    if max_count is not None:
        used &= counts <= max_count
    if classes is not None:
        ids = np.asarray(list(classes), np.int64)
        bad = ids[(ids < 0) | (ids >= counts.shape[0])]
        if bad.size:
            raise DataError(f"class {int(bad[0])} in the list of classes", f"0..{len(counts) - 1}")
        listed = np.zeros(counts.shape[0], np.bool_)
        listed[ids] = True
        used &= listed
    filtered = min_count > 1 or max_count is not None or classes is not None
    return Selection(counts, np.flatnonzero(used).astype(np.int64), filtered)


@dataclass(frozen=True)
class Block:
    """Labelled samples in memory.

    Attributes
    ----------
    features : array (B, D)
        In the stored dtype.
    labels : array (B,) of int64
        Classes, as `RowSource.index` gives them out.
    numbers : array (B,) of int64
        Their rows in the split.
    n_skipped : int
        Rows left out because they are not finite.
    """

    features: npt.NDArray[Any]
    labels: npt.NDArray[np.int64]
    numbers: npt.NDArray[np.int64]
    n_skipped: int = 0


@dataclass(frozen=True)
class RowSource:
    """The rows of one layer of one split as labelled blocks of samples.

    Attributes
    ----------
    split : Split
        Where they are.
    layer : str
        Which layer.
    index : array (K,) of int, optional
        Maps stored labels to those given out; rows mapped below 0 are left out.
    skip_nonfinite : bool
        Leave out rows with NaN or infinities, and count them, instead of refusing them.
    widened : bool
        Give bfloat16 as float32, as the host's arithmetic takes it; a GPU takes the half.
    """

    split: Split
    layer: str
    index: npt.NDArray[np.int64] | None = None
    skip_nonfinite: bool = False
    widened: bool = True

    @property
    def chunk_rows(self) -> int:
        """Rows of a chunk, the grain of items."""
        return int(self.split.feature(self.layer).chunks[0])

    @property
    def items(self) -> list[Item]:
        """Ranges of whole chunks: about a sixteenth of the rows each, and at most 64 chunks."""
        width = self.split.spec(self.layer).row_bytes
        ranges = cut(0, self.split.n_rows, self.chunk_rows, ITEM_CHUNKS, ITEMS)
        return [Item(start, stop, (stop - start) * width) for start, stop in ranges]

    @property
    def n_features(self) -> int:
        """D."""
        return self.split.spec(self.layer).n_features

    @property
    def block_rows(self) -> int:
        """Rows of a block: a chunk's, or fewer where a chunk in float64 would be large."""
        return min(self.chunk_rows, max(256, BLOCK_BYTES // (8 * self.n_features)))

    @property
    def read_bytes(self) -> int:
        """Bytes held by reading: one chunk in use and those ahead, each its file, bytes and array."""
        spec = self.split.spec(self.layer)
        chunk = self.chunk_rows * spec.row_bytes
        wide = 2 if spec.dtype == "bfloat16" and self.widened else 0
        ahead = self.split.chunks_at_once
        return chunk * (1 + wide + ahead * (3 + wide)) + int(self.split.base_block) * 48

    def empty(self) -> npt.NDArray[Any]:
        """Give no rows, of the dtype that blocks have."""
        spec = self.split.spec(self.layer)
        wide = spec.dtype == "bfloat16" and self.widened
        return np.empty((0, spec.n_features), np.float32 if wide else spec.numpy_dtype)

    def blocks(self, item: Item) -> Iterator[Block]:
        """Give the samples of an item block by block; a thread reads one chunk ahead.

        Raises
        ------
        DataError
            For a NaN or infinite feature, unless those are skipped; names split, layer and row.
        CorruptionError
            For a chunk that cannot be read.
        """
        return read_ahead(self._blocks(item))

    def _blocks(self, item: Item) -> Iterator[Block]:
        for (first, y), rows in self.split.read_each(
            self.layer, self._chunks(item), widened=self.widened
        ):
            for start in range(0, len(rows), self.block_rows):
                part = slice(start, start + self.block_rows)
                kept = np.flatnonzero(y[part] >= 0)
                whole = kept.size == y[part].size
                block = rows[part] if whole else rows[part][kept]
                yield self._finite(block, y[part][kept], kept + (first + start))

    def _chunks(self, item: Item) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
        """Give (first row, labels given out) of every chunk of an item that holds samples.

        A chunk of labels, which may cover many of features, is read once.
        """
        base = self.split.base_block
        for block in range(item.start // base * base, item.stop, base):
            start, stop = max(block, item.start), min(block + base, item.stop)
            labels = self.split.labels(start, stop)
            for first in range(start, stop, self.chunk_rows):
                y = self._given_out(labels[first - start : first - start + self.chunk_rows])
                if (y >= 0).any():
                    yield first, y

    def _given_out(self, labels: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
        y = np.full(labels.shape, -1, np.int64)
        exists = labels >= 0
        y[exists] = labels[exists] if self.index is None else self.index[labels[exists]]
        return y

    def _finite(
        self,
        block: npt.NDArray[Any],
        labels: npt.NDArray[np.int64],
        numbers: npt.NDArray[np.int64],
    ) -> Block:
        row = first_nonfinite_row(block) if len(block) else None
        if row is None:
            return Block(block, labels, numbers)
        if not self.skip_nonfinite:
            raise DataError(
                f"a feature that is not finite: split '{self.split.name}', layer '{self.layer}', "
                f"row {int(numbers[row])} of {self.split.where}",
                "finite features",
                "--skip-nonfinite (skip_nonfinite=True) leaves such rows out and counts them",
            )
        good = np.isfinite(block).all(axis=1)
        return Block(block[good], labels[good], numbers[good], int(np.count_nonzero(~good)))
