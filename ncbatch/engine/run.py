"""Running a pass: fold its items, in order, into one state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

Accumulator = TypeVar("Accumulator")
State = TypeVar("State", covariant=True)


@dataclass(frozen=True)
class Item:
    """A part of a pass: a range of rows, or of tiles, and the size of its work.

    Attributes
    ----------
    start, stop : int
        The range.
    size : int
        What progress counts, such as bytes to read.
    """

    start: int
    stop: int
    size: int


class Pass(Protocol[Accumulator, State]):
    """One sweep over data that produces a state."""

    @property
    def label(self) -> str:
        """What the pass does, for a person."""
        ...

    @property
    def unit(self) -> str:
        """What `Item.size` counts: ``B`` for bytes, otherwise a noun."""
        ...

    @property
    def items(self) -> Sequence[Item]:
        """The parts, which depend on the data and the options only."""
        ...

    def start(self) -> Accumulator:
        """Make what the items are folded into."""
        ...

    def fold(self, accumulator: Accumulator, item: Item) -> Accumulator:
        """Load an item and fold it in; the accumulator may be changed and given back."""
        ...

    def finish(self, accumulator: Accumulator) -> State:
        """Turn the accumulator into the state."""
        ...


class Progress(Protocol):
    """Something that shows how far a run is."""

    def begin(self, label: str, total: int, unit: str) -> None:
        """Start a pass of `total` units."""
        ...

    def advance(self, size: int) -> None:
        """Count `size` units as done."""
        ...

    def end(self) -> None:
        """End the pass, done or given up."""
        ...


def run(work: Pass[Accumulator, State], progress: Progress | None = None) -> State:
    """Run a pass in a plain loop and give its state.

    Parameters
    ----------
    work : Pass
        What to run.
    progress : Progress, optional
        Told of every item that is done.
    """
    if progress:
        progress.begin(work.label, sum(item.size for item in work.items), work.unit)
    try:
        accumulator = work.start()
        for item in work.items:
            accumulator = work.fold(accumulator, item)
            if progress:
                progress.advance(item.size)
        return work.finish(accumulator)
    finally:
        if progress:
            progress.end()
