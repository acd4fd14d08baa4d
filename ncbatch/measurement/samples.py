"""Samples of a layer: which classes are used, labelled blocks of rows, and what a read gives.

`Samples` and `ncbatch.measurement.finished.Finished` answer the same questions, so that nobody asks
which of them a source is, but the steps that read it.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from ncbatch.arrays.atomic import replacing
from ncbatch.arrays.namespace import first_nonfinite_row
from ncbatch.arrays.rows import StackedRows, StoredRows, row_blocks
from ncbatch.arrays.threads import read_ahead
from ncbatch.engine.jobs import Item, cut
from ncbatch.engine.kept import About
from ncbatch.errors import DataError
from ncbatch.measurement.options import Options
from ncbatch.states.moments import Moments
from ncbatch.store.split import Split

Index = npt.NDArray[np.int64]
# Bytes of a block of rows in float64, the unit of arithmetic within a chunk.
BLOCK_BYTES = 64 * 2**20
# Items of a sweep over rows, and the most chunks of one: enough for resume and balance.
ITEMS = 16
ITEM_CHUNKS = 64


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

    counts: Index
    classes: Index
    filtered: bool

    @cached_property
    def index(self) -> Index:
        """For each class id its place among the classes used, or -1 (K,)."""
        index = np.full(self.counts.shape[0], -1, np.int64)
        index[self.classes] = np.arange(self.classes.shape[0])
        return index

    @property
    def digest(self) -> str:
        """A hash of the classes used."""
        return hashlib.sha256(self.classes.tobytes()).hexdigest()[:32]

    @property
    def drops_classes(self) -> bool:
        """Whether a class that has samples is not used."""
        return len(self.classes) < int(np.count_nonzero(self.counts))


def count_labels(split: Split) -> Index:
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
                f"label {int(labels[row])} in row {start + row} of split '{split.name}' "
                f"of {split.where}",
                f"labels below {split.n_classes}, the classes of the store",
            )
        # Rows below 0 are holes or no samples.
        counts += np.bincount(labels[labels >= 0], minlength=split.n_classes)
    return counts


def select_classes(counts: Index, options: Options) -> Selection:
    """Choose the classes to use: seen, and within the filters.

    Parameters
    ----------
    counts : array (K,)
        Samples per class.
    options : Options
        The filters are among them.

    Raises
    ------
    DataError
        When a class id is not below K.
    """
    # A class without samples has no mean, so that it is never used.
    used = counts >= options.min_count
    if options.max_count is not None:
        used &= counts <= options.max_count
    if options.classes is not None:
        ids = np.asarray(options.classes, np.int64)
        bad = ids[(ids < 0) | (ids >= len(counts))]
        if bad.size:
            raise DataError(f"class {int(bad[0])} in the list of classes", f"0..{len(counts) - 1}")
        used &= np.isin(np.arange(len(counts)), ids)
    filters = (options.min_count > 1, options.max_count is not None, options.classes is not None)
    return Selection(counts, np.flatnonzero(used).astype(np.int64), any(filters))


# What a read of moments gives, and how its class means get to files.


@dataclass(frozen=True)
class MomentsRead:
    """What a read of a layer gives.

    Attributes
    ----------
    moments : Moments
        Of the samples under their labels, over classes with samples; counts rows left out because
        they are not finite.
    null : Moments or None
        Of the same samples under labels at random, without scatter.
    """

    moments: Moments
    null: Moments | None = None

    def merge(self, other: MomentsRead) -> MomentsRead:
        """Combine with what other rows gave."""
        return self._combine(other, Moments.merge)

    def join(self, other: MomentsRead) -> MomentsRead:
        """Join with another class block of the same rows, both with their means in files."""
        return self._combine(other, _stack)

    def _combine(
        self, other: MomentsRead, combine: Callable[[Moments, Moments], Moments]
    ) -> MomentsRead:
        null = None
        # Both have it or neither: whether there is a null is an option of the whole read.
        if self.null is not None and other.null is not None:
            null = combine(self.null, other.null)
        return MomentsRead(combine(self.moments, other.moments), null)


def _stack(a: Moments, b: Moments) -> Moments:
    return Moments(
        np.concatenate([a.counts, b.counts]),
        StackedRows([a.means, b.means]),
        np.concatenate([a.traces, b.traces]),
        None if a.scatter is None or b.scatter is None else a.scatter + b.scatter,
        np.concatenate([a.classes, b.classes]),
        # Both reads met the same rows that are not finite.
        max(a.skipped, b.skipped),
    )


def to_file(moments: Moments, folder: Path, name: str) -> Moments:
    """Move class means to a file of `folder` whose own name begins with `name`.

    A task may run twice, and both runs' results may be in use: no file is ever written again.
    """
    means = moments.means
    blocks = (means[part] for part in row_blocks(len(means)))
    rows = rows_file(folder / f"{name}-{uuid.uuid4().hex[:12]}.rows", blocks, means.shape)
    return replace(moments, means=rows)


def rows_file(path: Path, blocks: Iterable[Any], shape: tuple[int, int]) -> StoredRows:
    """Write all rows, given as blocks (n, D) in order, to a file; its folder is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        fill_rows(StoredRows.create(temporary, shape), blocks)
    return StoredRows(path, shape)


def fill_rows(rows: Any, blocks: Iterable[Any]) -> None:
    """Write blocks (n, D) one below the other."""
    first = 0
    for block in blocks:
        rows[first : first + len(block)] = block
        first += len(block)


# Sources: both kinds have the facts that plans are made of, and the reasons of what they lack.


@dataclass(frozen=True)
class Mode:
    """How a layer is measured so that it fits.

    Attributes
    ----------
    class_blocks : int
        The data is read once per block of classes.
    stored : bool
        Whether class means are kept in a file instead of memory.
    merged : bool
        Whether items are merged on a cluster.
    """

    class_blocks: int = 1
    stored: bool = False
    merged: bool = False


@dataclass(frozen=True)
class Reading:
    """Which moments a step gives of a source.

    Attributes
    ----------
    name : str
        Of the step's result.
    label, planned : str
        What a person reads while it runs, and in a plan.
    about : mapping
        What its kept state depends on; empty in a plan.
    n_classes : int
        The classes used, or the most there can be.
    selection : Selection or None
        Which those are; None in a plan.
    scatter, null : bool
        Whether the pooled scatter, and the moments under labels at random, are wanted too.
    beside : int
        Bytes that are held meanwhile.
    """

    name: str
    label: str
    planned: str
    about: About
    n_classes: int
    selection: Selection | None
    scatter: bool = False
    null: bool = False
    beside: int = 0

    @property
    def index(self) -> Index | None:
        """For each class id its place among those used, or -1 (K,)."""
        return None if self.selection is None else self.selection.index


@dataclass(frozen=True)
class Block:
    """Labelled samples in memory.

    Attributes
    ----------
    features : array (B, D)
        In the stored dtype.
    labels : array (B,) of int64
        Classes, as `Samples.index` numbers them.
    numbers : array (B,) of int64
        Their rows in the split.
    n_skipped : int
        Rows left out because they are not finite.
    """

    features: npt.NDArray[Any]
    labels: Index
    numbers: Index
    n_skipped: int = 0


@dataclass(frozen=True)
class Samples:
    """The rows of one layer of one split as labelled blocks of samples.

    Attributes
    ----------
    split : Split
        Where they are.
    layer : str
        Which layer.
    index : array (K,) of int, optional
        Maps stored labels to those of blocks; rows mapped below 0 are left out.
    skip_nonfinite : bool
        Leave out rows with NaN or infinities, and count them, instead of refusing them.
    widened : bool
        Read bfloat16 as float32, as the host's arithmetic takes it; a GPU takes the half.
    """

    split: Split
    layer: str
    index: Index | None = None
    skip_nonfinite: bool = False
    widened: bool = True
    kind: ClassVar[str] = "features"
    no_samples: ClassVar[str | None] = None
    no_moments: ClassVar[str | None] = None
    moments_fingerprint: ClassVar[str | None] = None
    bytes_left: ClassVar[int] = 0

    @property
    def incomplete(self) -> str | None:
        """What there is of a split whose writing has not ended; None of a complete one."""
        split = self.split
        return None if split.finalized else f"{split.n_samples:,} samples of an interrupted writer"

    @property
    def name(self) -> str:
        """The split's name."""
        return self.split.name

    @property
    def where(self) -> str:
        """The store's path, for messages."""
        return self.split.where

    @property
    def n_features(self) -> int:
        """D."""
        return self.split.spec(self.layer).n_features

    @property
    def wide(self) -> bool:
        """Whether features are float64."""
        return self.split.spec(self.layer).dtype == "float64"

    @property
    def most_classes(self) -> int:
        """The most classes that can have samples, as far as metadata says."""
        return self.split.n_rows

    @property
    def bytes_read(self) -> int:
        """Bytes of features and labels."""
        return self.split.n_rows * (self.split.spec(self.layer).row_bytes + 4)

    @property
    def by_predictions(self) -> bool:
        """Whether stored predictions are the classifier's decisions."""
        return self.split.head == self.layer

    @property
    def decider(self) -> str:
        """Name what the classifier's decisions are: those of its weights, or the model's own."""
        return "predictions" if self.by_predictions else "weights"

    @cached_property
    def deciding_fingerprint(self) -> str | None:
        """Fingerprint of what decides, where it is not the layer's classifier."""
        return self.split.prediction_fingerprint() if self.by_predictions else None

    def fingerprint(self, classes: str = "") -> str:
        """Hash what values depend on: features, labels, and the classes used by their digest."""
        return self.split.fingerprint(self.layer, classes)

    def check_chunks(self) -> None:
        """Refuse missing chunks."""
        self.split.check_chunks(self.layer)

    def check_width(self) -> None:
        """Do nothing: the store checks features against classifiers as they are written."""

    def is_empty(self, *, scanned: bool) -> bool:
        """Whether there is no row or, where labels may be read, no sample."""
        return not (self.split.n_rows and (not scanned or self.split.n_samples))

    def counts(self) -> Index:
        """Read the samples of each class (K,)."""
        return count_labels(self.split)

    def no_scatter(self, *, drops_classes: bool) -> str | None:
        """Say why the pooled scatter cannot be had."""
        return None

    def undecided(self, train: object, *, classifier: bool, drops_classes: bool) -> str | None:
        """Say why there are no decisions; `classifier` is whether the layer has one."""
        decides = classifier or self.by_predictions
        return None if decides else "no classifier and no predictions"

    def labelled(self, index: Index | None, options: Options) -> Samples:
        """Let blocks have the labels of `index`, and be as `options` wants them."""
        widened = options.device == "cpu"
        return Samples(self.split, self.layer, index, options.skip_nonfinite, widened)

    # ------------------------------------------------------------------------------ reading blocks

    @property
    def chunk_rows(self) -> int:
        """Rows of a chunk, the grain of items."""
        return int(self.split.feature(self.layer).chunks[0])

    @property
    def items(self) -> list[Item]:
        """Ranges of whole chunks: about a sixteenth of the rows each, and at most 64 chunks."""
        width = self.split.spec(self.layer).row_bytes
        # Of the data alone, not of memory or workers: a run that goes on must find the same items.
        ranges = cut(0, self.split.n_rows, self.chunk_rows, ITEM_CHUNKS, ITEMS)
        return [Item(start, stop, (stop - start) * width) for start, stop in ranges]

    @property
    def block_rows(self) -> int:
        """Rows of a block: a chunk's, or fewer where a chunk in float64 would be large."""
        return min(self.chunk_rows, max(256, BLOCK_BYTES // (8 * self.n_features)))

    @property
    def read_bytes(self) -> int:
        """Bytes held by reading: a chunk in use and those ahead, each its file, bytes and array."""
        spec = self.split.spec(self.layer)
        chunk = self.chunk_rows * spec.row_bytes
        wide = 2 if spec.dtype == "bfloat16" and self.widened else 0
        ahead = self.split.chunks_at_once
        return chunk * (1 + wide + ahead * (3 + wide)) + int(self.split.base_block) * 48

    def empty(self) -> npt.NDArray[Any]:
        """Make an array of no rows, of the dtype that blocks have."""
        spec = self.split.spec(self.layer)
        wide = spec.dtype == "bfloat16" and self.widened
        return np.empty((0, spec.n_features), np.float32 if wide else spec.numpy_dtype)

    def blocks(self, item: Item) -> Iterator[Block]:
        """Read the samples of an item block by block; a thread reads one chunk ahead.

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
                # Choosing rows copies them; most chunks have none to leave out.
                all_kept = kept.size == y[part].size
                block = rows[part] if all_kept else rows[part][kept]
                yield self._finite(block, y[part][kept], kept + (first + start))

    def _chunks(self, item: Item) -> Iterator[tuple[int, Index]]:
        """Find (first row, labels of the rows) of every chunk of an item that holds samples.

        A chunk of labels, which may cover many of features, is read once.
        """
        base = self.split.base_block
        for block in range(item.start // base * base, item.stop, base):
            start = max(block, item.start)
            stop = min(block + base, item.stop)
            labels = self.split.labels(start, stop)
            for first in range(start, stop, self.chunk_rows):
                y = labels[first - start : first - start + self.chunk_rows].astype(np.int64)
                if self.index is not None:
                    # Rows that are no samples have no class to look up.
                    y = np.where(y >= 0, self.index[np.maximum(y, 0)], -1)
                if (y >= 0).any():
                    yield first, y

    def _finite(self, block: npt.NDArray[Any], labels: Index, numbers: Index) -> Block:
        # One pass over the block, where `isfinite` of all would write a mask as large.
        row = first_nonfinite_row(block) if len(block) else None
        if row is None:
            return Block(block, labels, numbers)
        if not self.skip_nonfinite:
            raise DataError(
                f"a feature that is not finite: split '{self.name}', layer '{self.layer}', "
                f"row {int(numbers[row])} of {self.where}",
                "finite features",
                "--skip-nonfinite (skip_nonfinite=True) leaves such rows out and counts them",
            )
        good = np.isfinite(block).all(axis=1)
        return Block(block[good], labels[good], numbers[good], int(np.count_nonzero(~good)))
