"""Passes over stores: what an item loads, how it folds, and the states that come of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from ncbatch.arrays.devices import find_device
from ncbatch.arrays.named_arrays import Arrays, pack
from ncbatch.arrays.namespace import Array
from ncbatch.engine.jobs import Item, Pass
from ncbatch.measurement.samples import Block, MomentsRead, Samples, to_file
from ncbatch.states.decisions import Decisions
from ncbatch.states.directional import DirectionalVariance
from ncbatch.states.fold import StateFold
from ncbatch.states.moments import Moments, MomentsAccumulator, Precision
from ncbatch.states.null import null_labels
from ncbatch.states.pairs.stats import PairStats
from ncbatch.states.pairs.sweep import PairTiles
from ncbatch.states.rules import Rule


class _RowsPass(Pass[Any]):
    """What passes over rows share: their blocks go to the device, and into the fold."""

    source: Samples
    device: str
    # The bound within which near-ties are decided again is that of float32, not of TF32.
    precision: Precision = "fp32"

    def fold(self, fold: Any, item: Item) -> None:
        """Add the samples of an item."""
        device = find_device(self.device)
        with device.matmul_precision(self.precision):
            for block in device.stream(self._staged(fold, item)):
                fold.add(*block)

    def _staged(self, fold: Any, item: Item) -> Iterator[tuple[Any, ...]]:
        # Blocks are staged on the host, ahead of the device, which streams them.
        beside = self._beside(item)
        for block in self.source.blocks(item):
            fold.skip(block.n_skipped)
            yield block.features, block.labels, *beside(block)

    def _beside(self, item: Item) -> Any:
        """Find what gives the arrays that a block takes along, beside features and labels."""
        return lambda block: ()


class MomentsFold:
    """Folds blocks into moments under their labels and, maybe, under labels at random.

    Parameters
    ----------
    accumulators : dict of str to MomentsAccumulator
        ``real`` and, maybe, ``null``: for the labels of a block in their order.
    block : (int, int), optional
        Only these classes are taken, the first and the last + 1.
    """

    def __init__(
        self, accumulators: dict[str, MomentsAccumulator], block: tuple[int, int] | None
    ) -> None:
        self._accumulators = accumulators
        self._block = block
        self._skipped = 0

    def add(self, features: Array, *drawn: Array) -> None:
        """Fold a block: features (B, D), and labels (B,) for each accumulator."""
        # One read, one upload of the features, for as many labellings as there are.
        for accumulator, labels in zip(self._accumulators.values(), drawn, strict=True):
            if self._block is None:
                accumulator.add(features, labels)
                continue
            first, stop = self._block
            inside = (labels >= first) & (labels < stop)
            accumulator.add(features[inside], labels[inside] - first)

    def skip(self, n_rows: int) -> None:
        """Count rows that are left out."""
        self._skipped += n_rows

    def arrays(self) -> Arrays:
        """Return all that it is so far as arrays."""
        parts = {name: each.arrays() for name, each in self._accumulators.items()}
        return pack({**parts, "skipped": self._skipped})

    def restore(self, arrays: Mapping[str, Any]) -> None:
        """Go on from what `arrays` returned."""
        for name, accumulator in self._accumulators.items():
            prefix = f"value.{name}."
            names = [key for key in arrays if key.startswith(prefix)]
            accumulator.restore({key.removeprefix(prefix): arrays[key] for key in names})
        self._skipped = int(arrays["value.skipped"])

    def seal(self) -> MomentsRead:
        """Correct for the pilots; the state is on the host, over classes with samples."""
        first = 0 if self._block is None else self._block[0]
        states = []
        for accumulator in self._accumulators.values():
            state = Moments.from_arrays(accumulator.seal().to_arrays())
            assert state.classes is not None
            # A block counts its classes from 0; states are over the places of all that are used.
            states.append(replace(state, classes=state.classes + first))
        return MomentsRead(replace(states[0], skipped=self._skipped), *states[1:])


@dataclass(frozen=True)
class MomentsPass(_RowsPass):
    """Reads the rows of a layer once, into `MomentsRead` over the classes used.

    Attributes
    ----------
    source : Samples
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

    source: Samples
    n_classes: int
    scatter: bool
    precision: Precision
    device: str = "cpu"
    null_counts: npt.NDArray[np.int64] | None = None
    null_seed: int = 0
    block: tuple[int, int] | None = None
    rows_at: Path | None = None
    kind: ClassVar[Any] = MomentsRead

    def start(self) -> MomentsFold:
        """Make the fold of no samples."""
        first, stop = self.block or (0, self.n_classes)
        accumulator = partial(
            MomentsAccumulator,
            stop - first,
            self.source.n_features,
            like=find_device(self.device).put(self.source.empty()),
            precision=self.precision,
        )
        accumulators = {"real": accumulator(scatter=self.scatter)}
        if self.null_counts is not None:
            accumulators["null"] = accumulator(scatter=False)
        return MomentsFold(accumulators, self.block)

    def _beside(self, item: Item) -> Any:
        counts = self.null_counts
        if counts is None:
            return lambda block: ()
        return lambda block: (null_labels(block.numbers, counts, self.null_seed),)

    def finish(self, state: MomentsRead) -> MomentsRead:
        """Let the class means go to their file, where that is asked for."""
        if self.rows_at is None:
            return state
        null = None if state.null is None else to_file(state.null, self.rows_at, "null")
        return MomentsRead(to_file(state.moments, self.rows_at, "means"), null)


@dataclass(frozen=True)
class DecisionsPass(_RowsPass):
    """Reads the rows of a layer once, into `Decisions` over all classes.

    Attributes
    ----------
    source : Samples
        The rows.
    nearest_mean : Rule
        Chooses the nearest class mean, on the device.
    classifier : Rule or None
        The classifier; None where the stored predictions are its decisions.
    device : str
        Where it computes.
    """

    source: Samples
    nearest_mean: Rule
    classifier: Rule | None
    device: str = "cpu"
    kind: ClassVar[Any] = Decisions

    def start(self) -> StateFold[Decisions]:
        """Make the fold of no samples."""
        return StateFold(Decisions.zero(self.source.split.n_classes), self._decide)

    def _decide(
        self, features: Array, labels: Array, predictions: Array | None = None
    ) -> Decisions:
        chosen = predictions if self.classifier is None else self.classifier
        n_classes = self.source.split.n_classes
        return Decisions.from_block(features, labels, n_classes, self.nearest_mean, chosen)

    def _beside(self, item: Item) -> Any:
        if self.classifier is not None:
            return lambda block: ()
        # Predictions are small beside features: those of an item are read at once.
        predictions = self.source.split.predictions(item.start, item.stop).astype(np.int64)
        return lambda block: (predictions[block.numbers - item.start],)


@dataclass(frozen=True)
class DirectionalPass(_RowsPass):
    """Reads the rows of a layer a second time, into `DirectionalVariance`."""

    source: Samples
    pairs: PairTiles
    device: str = "cpu"
    kind: ClassVar[Any] = DirectionalVariance

    def start(self) -> StateFold[DirectionalVariance]:
        """Make the fold of no samples."""
        state_of = partial(DirectionalVariance.from_block, pairs=self.pairs)
        return StateFold(DirectionalVariance.zero(self.pairs.n_classes), state_of)

    def _staged(self, fold: Any, item: Item) -> Iterator[tuple[Any, ...]]:
        # The first read counted the rows left out.
        blocks: Iterator[Block] = self.source.blocks(item)
        return ((block.features, block.labels) for block in blocks)


@dataclass(frozen=True)
class PairPass(Pass[StateFold[PairStats]]):
    """Sweeps all pairs of class means, into `PairStats`; without means it gives no pairs.

    Items number the tiles of all classes used. Where rows that are not finite left a class without
    samples there are fewer tiles, and the last items are shorter or empty.
    """

    pairs: PairTiles | None
    kind: ClassVar[Any] = PairStats

    def start(self) -> StateFold[PairStats]:
        """Make the fold of no pairs."""
        return StateFold(PairStats.zero(), None if self.pairs is None else self.pairs.fold)

    def fold(self, fold: StateFold[PairStats], item: Item) -> None:
        """Add some tiles."""
        if self.pairs is not None:
            fold.add(self._tiles[item.start : item.stop])

    @cached_property
    def _tiles(self) -> list[tuple[slice, slice]]:
        return [] if self.pairs is None else list(self.pairs.tiles())
