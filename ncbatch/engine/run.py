"""Running passes: fold their items, in order, into one state; and jobs, in a plain loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeAlias, TypeVar

import numpy as np

from ncbatch.engine.checkpoint import About, Kept, find_finished
from ncbatch.engine.packing import Arrays, pack, unpack

Accumulator = TypeVar("Accumulator")
Partial = TypeVar("Partial")

# A running state is kept when the work since the last time took so many times as long as keeping.
_KEEP_EVERY = 20.0


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


class Pass(Protocol[Accumulator, Partial]):
    """One sweep over data that produces a state.

    Items are folded into an accumulator on the device; sealed, it is a state that is compact, can
    be merged and can be packed (`ncbatch.engine.packing.pack`), of type `kind`.
    """

    kind: ClassVar[Any]  # the type of the sealed state

    def start(self) -> Accumulator:
        """Make what items are folded into."""
        ...

    def fold(self, accumulator: Accumulator, item: Item) -> Accumulator:
        """Load an item and fold it in; the accumulator may be changed and given back."""
        ...

    def seal(self, accumulator: Accumulator) -> Partial:
        """Turn the accumulator, which is spent then, into a state."""
        ...

    def merge(self, a: Partial, b: Partial) -> Partial:
        """Combine the states of two disjoint sets of items; neither operand changes."""
        ...

    def finish(self, partial: Partial) -> Partial:
        """Do what is to be done once, when all items are in."""
        ...

    def save(self, accumulator: Accumulator) -> Arrays:
        """Give all that an accumulator is, as named arrays."""
        ...

    def restore(self, arrays: Arrays) -> Accumulator:
        """Make an accumulator that goes on, to the bit, where `save` was called."""
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

    def note(self, text: str) -> None:
        """Tell the user something."""
        ...


@dataclass(frozen=True)
class Sweep:
    """A step of a job that reads data: a pass, made from the results of earlier steps.

    Attributes
    ----------
    name : str
        Names the result within its job.
    label : str
        What it does, for a person.
    make : callable
        ``make(*results of needs) -> Pass``; picklable.
    items : sequence of Item
        Its parts, which depend on the data and the options only.
    grain : int
        Rows or tiles that an item cannot be cut below.
    needs : tuple of str
        Names of the steps whose results `make` takes.
    unit : str
        What `Item.size` counts: ``B`` for bytes, otherwise a noun.
    about : mapping
        What the result depends on, for kept states.
    """

    name: str
    label: str
    make: Callable[..., Pass[Any, Any]]
    items: Sequence[Item]
    grain: int = 1
    needs: tuple[str, ...] = ()
    unit: str = "B"
    about: About = field(default_factory=dict)

    def kept(self, root: Path | None) -> Kept | None:
        """Give the place of its kept work."""
        return None if root is None else Kept(root, self.about)

    def finished(self, root: Path | None) -> Kept | None:
        """Find kept work that holds the result."""
        return None if root is None else find_finished(root, self.about)


@dataclass(frozen=True)
class Call:
    """A step of a job that computes from earlier results only.

    Attributes
    ----------
    name : str
        Names the result within its job.
    compute : callable
        ``compute(*results of needs)``; picklable.
    needs : tuple of str
        Names of the steps whose results it takes.
    """

    name: str
    compute: Callable[..., Any]
    needs: tuple[str, ...] = ()


Step: TypeAlias = Sweep | Call


@dataclass(frozen=True)
class Job:
    """Steps in order of their needs; the last one's result is the job's."""

    name: str
    steps: tuple[Step, ...]


def run(work: Pass[Accumulator, Partial], items: Sequence[Item]) -> Partial:
    """Fold the items of a pass in a plain loop and give the finished state."""
    accumulator = work.start()
    for item in items:
        accumulator = work.fold(accumulator, item)
    return work.finish(work.seal(accumulator))


def run_jobs(
    jobs: Sequence[Job], progress: Progress | None = None, state: Path | None = None
) -> list[Any]:
    """Run jobs one after the other in this process.

    Parameters
    ----------
    jobs : sequence of Job
        What to run.
    progress : Progress, optional
        Told of every item that is done.
    state : Path, optional
        Where work is kept, so that a run that was killed goes on to the same bits.

    Returns
    -------
    list
        A result per job.
    """
    found = []
    for job in jobs:
        results: dict[str, Any] = {}
        for i, step in enumerate(job.steps):
            given = [results[name] for name in step.needs]
            if isinstance(step, Call):
                results[step.name] = step.compute(*given)
            else:
                results[step.name] = _run_sweep(step, given, progress, state)
            _forget(results, job.steps[i + 1 :])
            del given
        found.append(results[job.steps[-1].name])
    return found


def load_state(work: Pass[Any, Any], kept: Kept) -> Any:
    """Give a finished state that is kept; None when it cannot be read."""
    arrays = kept.load("state")
    try:
        return None if arrays is None else unpack(work.kind, arrays)
    except KeyError:
        return None


def say_changes(step: Sweep, state: Path | None, progress: Progress | None) -> None:
    """Tell the user why work that is kept on the same subject does not serve."""
    kept = step.kept(state)
    if kept is not None and progress is not None and not kept.folder.exists():
        changes = kept.changes()
        if changes:
            progress.note(f"{step.label} starts anew: {changes}")


def _run_sweep(step: Sweep, given: list[Any], progress: Progress | None, state: Path | None) -> Any:
    work = step.make(*given)
    finished = step.finished(state)
    if finished is not None:
        result = load_state(work, finished)
        if result is not None:
            return result
    say_changes(step, state, progress)
    if progress:
        progress.begin(step.label, sum(item.size for item in step.items), step.unit)
    try:
        return _Loop(work, step, progress, step.kept(state)).run()
    finally:
        if progress:
            progress.end()


class _Loop:
    """Folds the items of a sweep into one running state, which is kept from time to time."""

    def __init__(
        self, work: Pass[Any, Any], step: Sweep, progress: Progress | None, kept: Kept | None
    ) -> None:
        self._work, self._step, self._progress, self._kept = work, step, progress, kept
        self._since, self._cost = time.monotonic(), 0.0

    def run(self) -> Any:
        first, accumulator = self._resumed()
        for number, item in enumerate(self._step.items):
            if number >= first:
                accumulator = self._work.fold(accumulator, item)
                self._keep(accumulator, number + 1)
            if self._progress:
                self._progress.advance(item.size)
        result = self._work.finish(self._work.seal(accumulator))
        if self._kept is not None:
            self._kept.conclude(pack(result))
        return result

    def _resumed(self) -> tuple[int, Any]:
        arrays = self._kept.load("running") if self._kept is not None else None
        if arrays is None:
            return 0, self._work.start()
        first = int(arrays.pop("items_done"))
        return first, self._work.restore(arrays)

    def _keep(self, accumulator: Any, done: int) -> None:
        now = time.monotonic()
        if self._kept is None or now - self._since < _KEEP_EVERY * self._cost:
            return
        if done == len(self._step.items):
            return
        self._kept.save("running", {**self._work.save(accumulator), "items_done": np.array(done)})
        self._since = time.monotonic()
        self._cost = self._since - now


def _forget(results: dict[str, Any], steps: Sequence[Step]) -> None:
    """Let go of results that no later step needs, but the last."""
    needed = {name for step in steps for name in step.needs}
    for name in [n for n in results if n not in needed]:
        if steps:
            del results[name]
