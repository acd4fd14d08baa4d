"""Running passes: fold their items, in order, into one state; and jobs, in a plain loop."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ncbatch.arrays.named_arrays import pack, unpack
from ncbatch.engine.jobs import Accumulator, Call, Item, Job, Partial, Pass, Progress, Step, Sweep
from ncbatch.engine.kept import Kept
from ncbatch.errors import DataError

# A running state is kept when the work since the last time took so many times as long as keeping.
_KEEP_EVERY = 20.0


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
    except DataError:
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
