"""Passes over stores: what an item loads, how it folds, and the states that come of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from ncbatch.arrays.devices import Device, find_device
from ncbatch.arrays.named_arrays import Arrays, pack, unpack
from ncbatch.arrays.namespace import Array
from ncbatch.engine.jobs import Item
from ncbatch.measurement.samples import Block, MomentsRead, RowSource, to_file
from ncbatch.states.decisions import Decisions
from ncbatch.states.directional import DirectionalVariance
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

    def merge(self, a: MomentsRead, b: MomentsRead) -> MomentsRead:
        """Combine the states of different items."""
        return a.merge(b)

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

    def _part(self, arrays: Arrays, name: str) -> dict[str, Array]:
        prefix = f"value.{name}."
        return {
            key.removeprefix(prefix): self._device.put(value)
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
    """What passes share whose accumulator is a mergeable state on the host."""

    kind: ClassVar[Any]

    def seal(self, accumulator: Any) -> Any:
        """Give the state."""
        return accumulator

    def merge(self, a: Any, b: Any) -> Any:
        """Combine the states of different items."""
        return a.merge(b)

    def finish(self, partial: Any) -> Any:
        """Give the state."""
        return partial

    def save(self, accumulator: Any) -> Arrays:
        """Give all that the state is."""
        return pack(accumulator)

    def restore(self, arrays: Arrays) -> Any:
        """Give the state back."""
        return unpack(self.kind, arrays)


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

    def start(self) -> Decisions:
        """Give the state of no samples."""
        return Decisions.zero(self.source.split.n_classes)

    def fold(self, accumulator: Decisions, item: Item) -> Decisions:
        """Decide the samples of an item."""
        skipped = [accumulator.skipped]
        staged, device = self._staged(item, skipped), find_device(self.device)
        # The bound within which near-ties are decided again is that of float32, not of TF32.
        with device.matmul_precision("fp32"):
            for features, labels, *predictions in device.stream(staged):
                block = Decisions.from_block(
                    features, labels, self.source.split.n_classes, self.nearest_mean,
                    predictions[0] if self.classifier is None else self.classifier,
                )  # fmt: skip
                accumulator = accumulator.merge(on_host(block))
        return replace(accumulator, skipped=sum(skipped))

    def _staged(self, item: Item, skipped: list[int]) -> Iterator[tuple[Any, ...]]:
        predictions = None
        if self.classifier is None:
            predictions = self.source.split.predictions(item.start, item.stop).astype(np.int64)
        for block in self.source.blocks(item):
            skipped.append(block.n_skipped)
            if predictions is None:
                yield block.features, block.labels
            else:
                yield block.features, block.labels, predictions[block.numbers - item.start]


def on_host(state: Any) -> Any:
    """Bring a flat state of arrays to the host."""
    return type(state).from_arrays(state.to_arrays())


@dataclass(frozen=True)
class DirectionalPass(_StatePass):
    """Reads the rows of a layer a second time, into `DirectionalVariance`."""

    source: RowSource
    pairs: PairTiles
    device: str = "cpu"
    kind: ClassVar[Any] = DirectionalVariance

    def start(self) -> DirectionalVariance:
        """Give the state of no samples."""
        return DirectionalVariance.zero(self.pairs.n_classes)

    def fold(self, accumulator: DirectionalVariance, item: Item) -> DirectionalVariance:
        """Add the samples of an item."""
        blocks: Iterator[Block] = self.source.blocks(item)
        staged = ((block.features, block.labels) for block in blocks)
        for features, labels in find_device(self.device).stream(staged):
            block = DirectionalVariance.from_block(features, labels, self.pairs)
            accumulator = accumulator.merge(on_host(block))
        return accumulator


@dataclass(frozen=True)
class PairPass(_StatePass):
    """Sweeps all pairs of class means, into `PairStats`; without means it gives no pairs.

    Items number the tiles of all classes used. Where rows that are not finite left a class without
    samples there are fewer tiles, and the last items are shorter or empty.
    """

    pairs: PairTiles | None
    kind: ClassVar[Any] = PairStats

    def start(self) -> PairStats:
        """Give the state of no pairs."""
        return PairStats.zero()

    def fold(self, accumulator: PairStats, item: Item) -> PairStats:
        """Add some tiles."""
        if self.pairs is None:
            return accumulator
        return accumulator.merge(self.pairs.fold(self._tiles[item.start : item.stop]))

    @cached_property
    def _tiles(self) -> list[tuple[slice, slice]]:
        return [] if self.pairs is None else list(self.pairs.tiles())
