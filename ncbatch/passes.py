"""Passes over stores: what an item loads, how it folds, what it costs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from ncbatch.arrays import first_nonfinite_row
from ncbatch.engine import Item
from ncbatch.errors import DataError
from ncbatch.stats import (
    Decisions,
    DirectionalVariance,
    Moments,
    MomentsAccumulator,
    PairStats,
    Rule,
    null_labels,
    null_scatter,
)
from ncbatch.stats.moments import Precision
from ncbatch.stats.pair_tiles import PairTiles
from ncbatch.store import Split

# Tiles of an item of the pair sweep: enough for any number of processors to share.
_ITEM_TILES = 64
# Bytes of a block of rows in float64, the unit of arithmetic within a chunk.
BLOCK_BYTES = 64 * 2**20


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
class RowSource:
    """The rows of one layer of one split, chunk by chunk, as labelled blocks of samples.

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
    skipped : list of int
        One number per block that had such rows; filled while reading.
    """

    split: Split
    layer: str
    index: npt.NDArray[np.int64] | None = None
    skip_nonfinite: bool = False
    skipped: list[int] = field(default_factory=list)

    @cached_property
    def items(self) -> list[Item]:
        """One item per chunk."""
        rows, n = self.split.feature(self.layer).chunks[0], self.split.n_rows
        width = self.split.spec(self.layer).row_bytes
        return [
            Item(start, min(start + rows, n), (min(start + rows, n) - start) * width)
            for start in range(0, n, rows)
        ]

    @property
    def n_features(self) -> int:
        """D."""
        return self.split.spec(self.layer).n_features

    @property
    def block_rows(self) -> int:
        """Rows of a block: a chunk's, or fewer where a chunk in float64 would be large."""
        rows = int(self.split.feature(self.layer).chunks[0])
        return min(rows, max(256, BLOCK_BYTES // (8 * self.n_features)))

    @property
    def read_bytes(self) -> int:
        """Bytes held while a chunk is read: its file, its decoded bytes and the array."""
        array = self.split.feature(self.layer)
        chunk = int(array.chunks[0]) * self.split.spec(self.layer).row_bytes
        wide = 2 if self.split.spec(self.layer).dtype == "bfloat16" else 0
        return chunk * (3 + wide) + int(self.split.base_block) * 24

    def empty(self) -> npt.NDArray[Any]:
        """Give no rows, of the dtype that blocks have."""
        spec = self.split.spec(self.layer)
        dtype = np.dtype(np.float32) if spec.dtype == "bfloat16" else spec.numpy_dtype
        return np.empty((0, spec.n_features), dtype)

    def blocks(
        self, item: Item
    ) -> Iterator[tuple[npt.NDArray[Any], npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
        """Give (features, labels, row numbers) of the samples of an item, block by block.

        Raises
        ------
        DataError
            For a NaN or infinite feature, unless those are skipped; names split, layer and row.
        CorruptionError
            For a chunk that cannot be read.
        """
        labels = self.split.labels(item.start, item.stop)
        y = np.full(labels.shape, -1, np.int64)
        exists = labels >= 0
        y[exists] = labels[exists] if self.index is None else self.index[labels[exists]]
        if not (y >= 0).any():
            return
        rows = self.split.read(self.layer, item.start, item.stop)
        for start in range(0, len(rows), self.block_rows):
            part = slice(start, start + self.block_rows)
            kept = np.flatnonzero(y[part] >= 0)
            whole = kept.size == y[part].size
            block = rows[part] if whole else rows[part][kept]
            yield self._finite(block, y[part][kept], kept + (item.start + start))

    def _finite(
        self,
        block: npt.NDArray[Any],
        labels: npt.NDArray[np.int64],
        numbers: npt.NDArray[np.int64],
    ) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        row = first_nonfinite_row(block) if len(block) else None
        if row is None:
            return block, labels, numbers
        if not self.skip_nonfinite:
            raise DataError(
                f"a feature that is not finite: split '{self.split.name}', layer '{self.layer}', "
                f"row {int(numbers[row])} of {self.split.where}",
                "finite features",
                "--skip-nonfinite (skip_nonfinite=True) leaves such rows out and counts them",
            )
        good = np.isfinite(block).all(axis=1)
        self.skipped.append(int(np.count_nonzero(~good)))
        return block[good], labels[good], numbers[good]


@dataclass(frozen=True)
class MomentsPass:
    """Reads the rows of a layer once, into `Moments` over the classes used.

    Attributes
    ----------
    source : RowSource
        The rows.
    n_classes : int
        How many classes are used.
    scatter : bool
        Whether the pooled scatter is kept.
    precision : {"exact", "fp32"}
        Of the products.
    null_counts : array (n_classes,), optional
        Samples per class; given, the same read also makes the moments under null labels.
    null_seed : int
        Which draw of those.
    """

    source: RowSource
    n_classes: int
    scatter: bool
    precision: Precision
    null_counts: npt.NDArray[np.int64] | None = None
    null_seed: int = 0
    unit: str = "B"

    @property
    def label(self) -> str:
        """What the pass does."""
        return f"moments of {self.source.split.name}/{self.source.layer}"

    @property
    def items(self) -> list[Item]:
        """The chunks."""
        return self.source.items

    @property
    def peak_bytes(self) -> int:
        """Bytes held at the peak."""
        d, rows = self.source.n_features, self.source.block_rows
        peak = MomentsAccumulator.peak_bytes(self.n_classes, d, rows, scatter=self.scatter)
        if self.null_counts is not None:
            peak += MomentsAccumulator.peak_bytes(self.n_classes, d, rows, scatter=False)
            peak += d * d * 8 * 3
        return self.source.read_bytes + peak

    def start(self) -> _MomentsPair:
        """Make empty accumulators."""
        return self._accumulator(self.scatter), (
            None if self.null_counts is None else self._accumulator(False)
        )

    def fold(self, accumulator: _MomentsPair, item: Item) -> _MomentsPair:
        """Add the samples of a chunk."""
        real, null = accumulator
        for features, labels, numbers in self.source.blocks(item):
            real.add(features, labels)
            if null is not None and self.null_counts is not None:
                null.add(features, null_labels(numbers, self.null_counts, self.null_seed))
        return accumulator

    def finish(self, accumulator: _MomentsPair) -> tuple[Moments, Moments | None]:
        """Give the state, and that under null labels."""
        real, null = accumulator
        moments = real.finish()
        if null is None:
            return moments, None
        chance = null.finish()
        return moments, null_scatter(moments, chance) if self.scatter else chance

    def _accumulator(self, scatter: bool) -> MomentsAccumulator:
        return MomentsAccumulator(
            self.n_classes,
            self.source.n_features,
            like=self.source.empty(),
            scatter=scatter,
            precision=self.precision,
        )


_MomentsPair: TypeAlias = tuple[MomentsAccumulator, MomentsAccumulator | None]


@dataclass(frozen=True)
class DecisionsPass:
    """Reads the rows of a layer once, into `Decisions` over all classes.

    `classifier` is None where the stored predictions are the classifier's decisions.
    """

    source: RowSource
    nearest_mean: Rule
    classifier: Rule | None
    unit: str = "B"

    @property
    def label(self) -> str:
        """What the pass does."""
        return f"decisions of {self.source.split.name}/{self.source.layer}"

    @property
    def items(self) -> list[Item]:
        """The chunks."""
        return self.source.items

    def start(self) -> Decisions:
        """Give the state of no samples."""
        return Decisions.zero(self.source.split.n_classes)

    def fold(self, accumulator: Decisions, item: Item) -> Decisions:
        """Decide the samples of a chunk."""
        split = self.source.split
        predictions = None
        if self.classifier is None:
            predictions = split.predictions(item.start, item.stop)
        for features, labels, numbers in self.source.blocks(item):
            chosen = self.classifier if predictions is None else predictions[numbers - item.start]
            block = Decisions.from_block(
                features, labels, split.n_classes, self.nearest_mean, chosen
            )
            accumulator = accumulator.merge(block)
        return accumulator

    def finish(self, accumulator: Decisions) -> Decisions:
        """Give the state."""
        return accumulator


@dataclass(frozen=True)
class DirectionalPass:
    """Reads the rows of a layer a second time, into `DirectionalVariance`."""

    source: RowSource
    pairs: PairTiles
    unit: str = "B"

    @property
    def label(self) -> str:
        """What the pass does."""
        return f"directional variance of {self.source.split.name}/{self.source.layer}"

    @property
    def items(self) -> list[Item]:
        """The chunks."""
        return self.source.items

    def start(self) -> DirectionalVariance:
        """Give the state of no samples."""
        return DirectionalVariance.zero(self.pairs.n_classes)

    def fold(self, accumulator: DirectionalVariance, item: Item) -> DirectionalVariance:
        """Add the samples of a chunk."""
        for features, labels, _ in self.source.blocks(item):
            block = DirectionalVariance.from_block(features, labels, self.pairs)
            accumulator = accumulator.merge(block)
        return accumulator

    def finish(self, accumulator: DirectionalVariance) -> DirectionalVariance:
        """Give the state."""
        return accumulator


@dataclass(frozen=True)
class PairPass:
    """Sweeps all pairs of class means, into `PairStats`."""

    pairs: PairTiles
    name: str
    unit: str = "pairs"

    @property
    def label(self) -> str:
        """What the pass does."""
        return f"pairs of {self.name}"

    @cached_property
    def _tiles(self) -> list[tuple[slice, slice]]:
        return list(self.pairs.tiles())

    @cached_property
    def items(self) -> list[Item]:
        """The tiles, numbered, some at a time."""
        sizes = [(r.stop - r.start) * (c.stop - c.start) for r, c in self._tiles]
        stops = [
            min(start + _ITEM_TILES, len(sizes)) for start in range(0, len(sizes), _ITEM_TILES)
        ]
        return [
            Item(start, stop, sum(sizes[start:stop]))
            for start, stop in zip(range(0, len(sizes), _ITEM_TILES), stops, strict=True)
        ]

    def start(self) -> PairStats:
        """Give the state of no pairs."""
        return PairStats.zero()

    def fold(self, accumulator: PairStats, item: Item) -> PairStats:
        """Add a tile."""
        return accumulator.merge(self.pairs.fold(self._tiles[item.start : item.stop]))

    def finish(self, accumulator: PairStats) -> PairStats:
        """Give the state."""
        return accumulator
