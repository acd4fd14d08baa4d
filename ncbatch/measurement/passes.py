"""Passes over stores: what an item loads, how it folds, and the states that come of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from ncbatch.arrays.devices import Device, find_device
from ncbatch.arrays.named_arrays import Arrays, pack
from ncbatch.arrays.namespace import Array
from ncbatch.engine.jobs import Item
from ncbatch.measurement.samples import Block, MomentsRead, RowSource, to_file
from ncbatch.states.decisions import Decisions
from ncbatch.states.directional import DirectionalVariance
from ncbatch.states.fold import StateFold
from ncbatch.states.moments import Moments, MomentsAccumulator, Precision
from ncbatch.states.null import null_labels
from ncbatch.states.pairs.stats import PairStats
from ncbatch.states.pairs.sweep import PairTiles
from ncbatch.states.rules import Rule


@dataclass(frozen=True)
class MomentsPass:
    """Reads the rows of a layer once, into `MomentsRead` over the classes used.

    Attributes
    ----------
    source : RowSource
        The rows.
    n_classes : int
        How many classes are used.
    scatter : bool
        Whether the pooled scatter is kept.
    precision : {"exact", "fp32", "tf32"}
        Of the products.
    device : str
        Where it computes.
    null_counts : array (n_classes,), optional
        Samples per class; given, the same read also makes the moments under null labels.
    null_seed : int
        Which draw of those.
    block : (int, int), optional
        Only these of the classes used, first and last + 1: a class block.
    rows_at : Path, optional
        A folder for the class means, which then are not held in memory.
    """

    source: RowSource
    n_classes: int
    scatter: bool
    precision: Precision
    device: str = "cpu"
    null_counts: npt.NDArray[np.int64] | None = None
    null_seed: int = 0
    block: tuple[int, int] | None = None
    rows_at: Path | None = None
    kind: ClassVar[Any] = MomentsRead

    def start(self) -> _Moments:
        """Make empty accumulators."""
        return _Moments(
            self._accumulator(self.scatter),
            None if self.null_counts is None else self._accumulator(False),
        )

    def fold(self, accumulator: _Moments, item: Item) -> _Moments:
        """Add the samples of an item."""
        with self._device.matmul_precision(self.precision):
            for features, labels, *null in self._device.stream(self._staged(accumulator, item)):
                self._add(accumulator.real, features, labels)
                if accumulator.null is not None:
                    self._add(accumulator.null, features, null[0])
        return accumulator

    def seal(self, accumulator: _Moments) -> MomentsRead:
        """Correct for the pilots; the state is on the host, over classes with samples."""
        first = 0 if self.block is None else self.block[0]
        null = accumulator.null
        return MomentsRead(
            _sealed(accumulator.real, first, accumulator.skipped),
            None if null is None else _sealed(null, first),
        )

    def finish(self, partial: MomentsRead) -> MomentsRead:
        """Let the class means go to their file, where that is asked for."""
        if self.rows_at is None:
            return partial
        null = partial.null
        return replace(
            partial,
            moments=to_file(partial.moments, self.rows_at, "means"),
            null=None if null is None else to_file(null, self.rows_at, "null"),
        )

    def save(self, accumulator: _Moments) -> Arrays:
        """Give all that the accumulators are."""
        parts = {"real": accumulator.real.arrays()}
        if accumulator.null is not None:
            parts["null"] = accumulator.null.arrays()
        return pack({**parts, "skipped": accumulator.skipped})

    def restore(self, arrays: Arrays) -> _Moments:
        """Make accumulators that go on where `save` was called."""
        found = self.start()
        found.real.restore(self._part(arrays, "real"))
        if found.null is not None:
            found.null.restore(self._part(arrays, "null"))
        found.skipped = int(arrays["value.skipped"])
        return found

    @cached_property
    def _device(self) -> Device:
        return find_device(self.device)

    def _part(self, arrays: Arrays, name: str) -> Arrays:
        prefix = f"value.{name}."
        return {
            key.removeprefix(prefix): value
            for key, value in arrays.items()
            if key.startswith(prefix)
        }

    def _staged(self, accumulator: _Moments, item: Item) -> Iterator[tuple[Any, ...]]:
        for block in self.source.blocks(item):
            accumulator.skipped += block.n_skipped
            if self.null_counts is None:
                yield block.features, block.labels
            else:
                drawn = null_labels(block.numbers, self.null_counts, self.null_seed)
                yield block.features, block.labels, drawn

    def _add(self, accumulator: MomentsAccumulator, features: Array, labels: Array) -> None:
        if self.block is not None:
            first, stop = self.block
            inside = (labels >= first) & (labels < stop)
            features, labels = features[inside], labels[inside] - first
        accumulator.add(features, labels)

    def _accumulator(self, scatter: bool) -> MomentsAccumulator:
        first, stop = self.block or (0, self.n_classes)
        return MomentsAccumulator(
            stop - first,
            self.source.n_features,
            like=self._device.put(self.source.empty()),
            scatter=scatter,
            precision=self.precision,
        )


@dataclass
class _Moments:
    real: MomentsAccumulator
    null: MomentsAccumulator | None
    skipped: int = 0


def _sealed(accumulator: MomentsAccumulator, first: int, skipped: int = 0) -> Moments:
    state = Moments.from_arrays(accumulator.seal().to_arrays())
    assert state.classes is not None
    return replace(state, classes=state.classes + first, skipped=skipped)


class _StatePass:
    """What passes share whose accumulator merges the states of blocks on the host."""

    kind: ClassVar[Any]

    def start(self) -> StateFold[Any]:
        """Start from no samples."""
        raise NotImplementedError

    def seal(self, accumulator: StateFold[Any]) -> Any:
        """Return the state."""
        return accumulator.seal()

    def finish(self, partial: Any) -> Any:
        """Give the state."""
        return partial

    def save(self, accumulator: StateFold[Any]) -> Arrays:
        """Return all that the state is."""
        return accumulator.arrays()

    def restore(self, arrays: Arrays) -> StateFold[Any]:
        """Go on from what `save` returned."""
        accumulator = self.start()
        accumulator.restore(arrays)
        return accumulator


@dataclass(frozen=True)
class DecisionsPass(_StatePass):
    """Reads the rows of a layer once, into `Decisions` over all classes.

    Attributes
    ----------
    source : RowSource
        The rows.
    nearest_mean : Rule
        Chooses the nearest class mean, on the device.
    classifier : Rule or None
        The classifier; None where the stored predictions are its decisions.
    device : str
        Where it computes.
    """

    source: RowSource
    nearest_mean: Rule
    classifier: Rule | None
    device: str = "cpu"
    kind: ClassVar[Any] = Decisions

    def start(self) -> StateFold[Decisions]:
        """Start from no samples."""
        return StateFold(Decisions.zero(self.source.split.n_classes), self._decide)

    def _decide(
        self, features: Array, labels: Array, predictions: Array | None = None
    ) -> Decisions:
        return Decisions.from_block(
            features,
            labels,
            self.source.split.n_classes,
            self.nearest_mean,
            predictions if self.classifier is None else self.classifier,
        )

    def fold(self, accumulator: StateFold[Decisions], item: Item) -> StateFold[Decisions]:
        """Add an item."""
        device = find_device(self.device)
        # The bound within which near-ties are decided again is that of float32, not of TF32.
        with device.matmul_precision("fp32"):
            for block in device.stream(self._staged(item, accumulator)):
                accumulator.add(*block)
        return accumulator

    def _staged(self, item: Item, accumulator: StateFold[Decisions]) -> Iterator[tuple[Any, ...]]:
        predictions = None
        if self.classifier is None:
            predictions = self.source.split.predictions(item.start, item.stop).astype(np.int64)
        for block in self.source.blocks(item):
            accumulator.skip(block.n_skipped)
            if predictions is None:
                yield block.features, block.labels
            else:
                yield block.features, block.labels, predictions[block.numbers - item.start]


@dataclass(frozen=True)
class DirectionalPass(_StatePass):
    """Reads the rows of a layer a second time, into `DirectionalVariance`."""

    source: RowSource
    pairs: PairTiles
    device: str = "cpu"
    kind: ClassVar[Any] = DirectionalVariance

    def start(self) -> StateFold[DirectionalVariance]:
        """Start from no samples."""
        return StateFold(
            DirectionalVariance.zero(self.pairs.n_classes),
            partial(DirectionalVariance.from_block, pairs=self.pairs),
        )

    def fold(
        self, accumulator: StateFold[DirectionalVariance], item: Item
    ) -> StateFold[DirectionalVariance]:
        """Add an item."""
        blocks: Iterator[Block] = self.source.blocks(item)
        staged = ((block.features, block.labels) for block in blocks)
        for block in find_device(self.device).stream(staged):
            accumulator.add(*block)
        return accumulator


@dataclass(frozen=True)
class PairPass(_StatePass):
    """Sweeps all pairs of class means, into `PairStats`; without means it gives no pairs.

    Items number the tiles of all classes used. Where rows that are not finite left a class without
    samples there are fewer tiles, and the last items are shorter or empty.
    """

    pairs: PairTiles | None
    kind: ClassVar[Any] = PairStats

    def start(self) -> StateFold[PairStats]:
        """Start from no samples."""
        return StateFold(PairStats.zero(), None if self.pairs is None else self.pairs.fold)

    def fold(self, accumulator: StateFold[PairStats], item: Item) -> StateFold[PairStats]:
        """Add an item."""
        if self.pairs is not None:
            accumulator.add(self._tiles[item.start : item.stop])
        return accumulator

    @cached_property
    def _tiles(self) -> list[tuple[slice, slice]]:
        return [] if self.pairs is None else list(self.pairs.tiles())
