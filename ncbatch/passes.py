"""Passes over stores: what an item loads, how it folds, what it costs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from ncbatch.engine import Item
from ncbatch.rows import RowSource
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

# Tiles of an item of the pair sweep: enough for any number of processors to share.
_ITEM_TILES = 64


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
