"""Running jobs in this process, one after the other: a plain loop over items."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from ncbatch.arrays.named_arrays import pack, unpack
from ncbatch.engine.jobs import Call, Job, Pass, Progress, Sweep, counted
from ncbatch.engine.kept import Kept
from ncbatch.errors import DataError

# A running state is kept when the work since the last time took so many times as long as keeping.
_KEEP_EVERY = 20.0


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
    return [_run_job(job, progress, state) for job in jobs]


def load_state(work: Pass[Any], kept: Kept | None, name: str = "state") -> Any:
    """Read a state that is kept, finished or of an item; None where it cannot be read."""
    arrays = None if kept is None else kept.load(name)
    # What an earlier version kept in another form counts as absent.
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


def _run_job(job: Job, progress: Progress | None, state: Path | None) -> Any:
    results: dict[str, Any] = {}
    for i, step in enumerate(job.steps):
        inputs = [results[name] for name in step.needs]
        if isinstance(step, Call):
            results[step.name] = step.compute(*inputs)
        else:
            results[step.name] = _run_sweep(step, inputs, progress, state)
        # Before the next step, or its peak would come on top of what no step needs any more.
        del inputs
        needed = {name for later in job.steps[i + 1 :] for name in later.needs}
        for name in results.keys() - needed - {job.steps[-1].name}:
            del results[name]
    return results[job.steps[-1].name]


def _run_sweep(
    step: Sweep, inputs: list[Any], progress: Progress | None, state: Path | None
) -> Any:
    work = step.make(*inputs)
    result = load_state(work, step.finished(state))
    if result is not None:
        return result
    say_changes(step, state, progress)
    with counted(progress, step.label, sum(item.size for item in step.items), step.unit) as advance:
        return _fold_items(work, step, advance, step.kept(state))


def _fold_items(
    work: Pass[Any], step: Sweep, advance: Callable[[int], None], kept: Kept | None
) -> Any:
    """Fold the items into one running state, which is kept from time to time."""
    arrays = kept.load("running") if kept is not None else None
    n_done = 0
    fold = work.start()
    if arrays is not None:
        items_done = int(arrays.pop("items_done"))
        # What an earlier version kept in another form counts as absent.
        with suppress(DataError):
            fold.restore(arrays)
            n_done = items_done
    last_kept = time.monotonic()
    keeping = 0.0
    for number, item in enumerate(step.items, start=1):
        if number > n_done:
            work.fold(fold, item)
            now = time.monotonic()
            is_due = number < len(step.items) and now - last_kept >= _KEEP_EVERY * keeping
            if kept is not None and is_due:
                kept.save("running", {**fold.arrays(), "items_done": np.array(number)})
                last_kept = time.monotonic()
                keeping = last_kept - now
        advance(item.size)
    result = work.finish(fold.seal())
    if kept is not None:
        kept.conclude(pack(result))
    return result
