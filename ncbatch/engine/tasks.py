"""The tasks of a graph: pure functions of a job that carry paths and states, not data."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ncbatch.arrays import thread_limit
from ncbatch.engine.packing import pack, unpack
from ncbatch.engine.run import Call, Item, Job, Sweep, load_state
from ncbatch.engine.slots import task_threads


class UnreadableStateError(Exception):
    """A finished state that is kept, and cannot be read: it counts as absent."""

    def __init__(self, job: int, step: str) -> None:
        super().__init__(job, step)
        self.at = (job, step)


def same(job: Job) -> Job:
    """Give a job, which then is in the graph once."""
    return job


def sweep_of(job: Job, name: str) -> Sweep:
    """Find a sweep of a job by its name."""
    step = next(step for step in job.steps if step.name == name)
    assert isinstance(step, Sweep)
    return step


def fold(
    job: Job, name: str, item: Item, state: Path | None, slots: Mapping[str, int], *given: Any
) -> Any:
    """Fold one item, unless it is kept."""
    step = sweep_of(job, name)
    work, kept = step.make(*given), step.kept(state)
    file = f"item-{item.start}-{item.stop}"
    arrays = None if kept is None else kept.load(file)
    if arrays is not None:
        return unpack(work.kind, arrays)
    with thread_limit(task_threads(slots)):
        found = work.seal(work.fold(work.start(), item))
    if kept is not None:
        kept.save(file, pack(found))
    return found


def empty(job: Job, name: str, *given: Any) -> Any:
    """Give the state of no items."""
    work = sweep_of(job, name).make(*given)
    return work.seal(work.start())


def merge(job: Job, name: str, slots: Mapping[str, int], a: Any, b: Any, *given: Any) -> Any:
    """Combine the states of two sets of items."""
    with thread_limit(task_threads(slots)):
        return sweep_of(job, name).make(*given).merge(a, b)


def finish(
    job: Job, name: str, state: Path | None, slots: Mapping[str, int], partial: Any, *given: Any
) -> Any:
    """Do what is to be done once with a state of all items, and keep it."""
    step = sweep_of(job, name)
    work, kept = step.make(*given), step.kept(state)
    if kept is not None:  # done before, by a worker that was lost since: others use its files
        found = load_state(work, kept)
        if found is not None:
            return found
    with thread_limit(task_threads(slots)):
        found = work.finish(partial)
    if kept is not None:
        kept.conclude(pack(found))
    return found


def load(job: Job, j: int, name: str, state: Path, *given: Any) -> Any:
    """Read a finished state that is kept; `UnreadableStateError` when that cannot be done."""
    step = sweep_of(job, name)
    kept = step.finished(state)
    found = None if kept is None else load_state(step.make(*given), kept)
    if found is None:
        raise UnreadableStateError(j, name)
    return found


def call(job: Job, name: str, slots: Mapping[str, int], *given: Any) -> Any:
    """Compute a step from earlier results."""
    step = next(step for step in job.steps if step.name == name)
    assert isinstance(step, Call)
    with thread_limit(task_threads(slots)):
        return step.compute(*given)
