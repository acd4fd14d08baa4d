"""Running jobs as one Dask graph of pure tasks: items, a fixed tree of merges, and the rest."""

from __future__ import annotations

import hashlib
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ncbatch.arrays.named_arrays import pack, unpack
from ncbatch.arrays.threads import thread_limit
from ncbatch.engine.cluster import task_slots, task_threads
from ncbatch.engine.jobs import Call, Item, Job, Progress, Step, Sweep
from ncbatch.engine.loop import load_state, say_changes
from ncbatch.errors import DataError, WorkerError

# The tasks of a graph: pure functions of a job that carry paths and states, not data.


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
        with suppress(DataError):  # kept by an earlier version, in another form
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


# Seconds between looks at what is done, and those without a scheduler until a run is given up.
_POLL_SECONDS, _LOST_SECONDS = 0.02, 20.0
# Rounds in which workers died of a task that is no item, before that task is held guilty.
_UNEXPLAINED = 1


def run_graph(
    client: Any, jobs: Sequence[Job], progress: Progress | None = None, state: Path | None = None
) -> list[Any]:
    """Run jobs on the workers of a client, all in one graph.

    Parameters
    ----------
    client : distributed.Client
        Of any cluster.
    jobs : sequence of Job
        What to run.
    progress : Progress, optional
        Told of every item that is done.
    state : Path, optional
        Where work is kept; every worker must reach it under this path.

    Returns
    -------
    list
        A result per job.

    Raises
    ------
    WorkerError
        When an item kills every worker that takes it, however small it is cut.
    """
    graph = _Graph(client, jobs, state)
    if progress:
        for job in jobs:
            for step in job.steps:
                if isinstance(step, Sweep):
                    say_changes(step, state, progress)
        progress.begin(f"{len(jobs)} layers on {graph.n_workers} workers", graph.n_items, "items")
    try:
        return graph.run(progress)
    finally:
        if progress:
            progress.end()


@dataclass(frozen=True)
class _Leaf:
    """An item of a sweep of a job, as a task."""

    job: int
    step: Sweep
    item: Item

    def __hash__(self) -> int:
        return hash((self.job, self.step.name, self.item))

    @property
    def grains(self) -> int:
        """Whole grains that it can be cut into."""
        return -(-(self.item.stop - self.item.start) // self.step.grain)


class _Graph:
    """The tasks of all jobs. Items that killed workers are cut in two, and all is built anew."""

    def __init__(self, client: Any, jobs: Sequence[Job], state: Path | None) -> None:
        self._client, self._jobs, self._state = client, jobs, state
        self._slots = task_slots(client)
        self._round = ""
        self._items = {
            (j, step.name): list(step.items)
            for j, job in enumerate(jobs)
            for step in job.steps
            if isinstance(step, Sweep)
        }
        self._kept = {
            (j, name): kept
            for (j, name) in self._items
            if (kept := sweep_of(jobs[j], name).finished(state)) is not None
        }
        self._leaves: dict[str, _Leaf] = {}
        self._leaf_futures: list[Any] = []
        self._unexplained = 0

    @property
    def n_workers(self) -> int:
        """Workers of the cluster now."""
        return len(self._client.scheduler_info(n_workers=-1)["workers"])

    @property
    def n_items(self) -> int:
        """Items of all sweeps that are not kept."""
        return sum(len(items) for at, items in self._items.items() if at not in self._kept)

    def run(self, progress: Progress | None) -> list[Any]:
        """Run until every job has its result."""
        results: dict[int, Any] = {}
        told: set[_Leaf] = set()
        while len(results) < len(self._jobs):
            self._round = uuid.uuid4().hex[:8]
            left = [j for j in range(len(self._jobs)) if j not in results]
            ends = {j: self._submit_job(j, self._jobs[j]) for j in left}
            try:
                killers = self._wait(list(ends.values()), progress, told)
                results |= {j: end.result() for j, end in ends.items() if end.status == "finished"}
            finally:
                self._client.cancel(list(ends.values()))
            for leaf in killers:
                if leaf.grains > 1:
                    self._halve(leaf)
            guilty = [leaf for leaf in killers if leaf.grains == 1 and self._kills_alone(leaf)]
            if guilty:
                raise _deadly(guilty[0])
        return [results[j] for j in range(len(self._jobs))]

    def _submit_job(self, j: int, job: Job) -> Any:
        """Submit all tasks of a job; gives the future of its result."""
        return self._submit_steps(j, job.steps)[job.steps[-1].name]

    def _submit_steps(self, j: int, steps: Sequence[Step]) -> dict[str, Any]:
        """Submit the tasks of a job's first steps; gives the futures of their results."""
        whole = self._whole(j)
        results: dict[str, Any] = {}
        for step in steps:
            given = [results[name] for name in step.needs]
            if isinstance(step, Call):
                found = self._submit(call, step.name, whole, step.name, self._slots, *given)
            elif (j, step.name) in self._kept:
                found = self._submit(load, step.name, whole, j, step.name, self._state, *given)
            else:
                found = self._submit_sweep(j, step, whole, given)
            results[step.name] = found
        return results

    def _whole(self, j: int) -> Any:
        return self._submit(same, f"job-{self._jobs[j].name}", self._jobs[j])

    def _submit_item(self, step: Sweep, whole: Any, item: Item, given: list[Any]) -> Any:
        return self._submit(
            fold, step.name, whole, step.name, item, self._state, self._slots, *given
        )

    def _submit_sweep(self, j: int, step: Sweep, whole: Any, given: list[Any]) -> Any:
        parts = []
        for item in self._items[j, step.name]:
            future = self._submit_item(step, whole, item, given)
            self._leaves[future.key] = _Leaf(j, step, item)
            self._leaf_futures.append(future)
            parts.append(future)
        if not parts:
            parts = [self._submit(empty, step.name, whole, step.name, *given)]
        while len(parts) > 1:
            parts = [
                self._submit(merge, step.name, whole, step.name, self._slots, a, *b, *given)
                if b
                else a
                for a, *b in _in_pairs(parts)
            ]
        return self._submit(
            finish, step.name, whole, step.name, self._state, self._slots, parts[0], *given
        )

    def _submit(self, function: Any, name: str, *arguments: Any) -> Any:
        """Submit a task under a key made of what it is given, so that equal tasks run once."""
        text = repr([getattr(a, "key", a) for a in arguments if not isinstance(a, Job)])
        key = hashlib.sha256(f"{function.__name__}{name}{text}".encode()).hexdigest()[:16]
        kind = function.__name__
        return self._client.submit(
            function, *arguments, key=f"ncbatch-{kind}-{self._round}-{key}", pure=False
        )

    def _wait(self, ends: list[Any], progress: Progress | None, told: set[_Leaf]) -> list[_Leaf]:
        """Wait for all tasks; give the items that killed workers."""
        from distributed import KilledWorker

        futures, self._leaf_futures = [*ends, *self._leaf_futures], []
        killers: dict[str, _Leaf] = {}
        others: list[str] = []
        for future in _completed(self._client, futures):
            if future.status == "error":
                error = future.exception()
                if isinstance(error, UnreadableStateError):
                    self._kept.pop(error.at).forget()
                    return []  # and build anew
                if not isinstance(error, KilledWorker):
                    raise error
                # What depends on the task that killed ends with the same error.
                task = str(error.task)
                if task in self._leaves:
                    killers[task] = self._leaves[task]
                else:
                    others.append(task)
            elif progress and (leaf := self._leaves.get(future.key)) and leaf not in told:
                told.add(leaf)
                progress.advance(1)
        if others and not killers:
            # A merge may have waited on a worker that an item killed; twice is no accident.
            self._unexplained += 1
            if self._unexplained > _UNEXPLAINED:
                raise WorkerError(
                    f"workers died of task '{others[0]}'",
                    "workers with memory for it",
                    "see the memory that 'ncbatch plan' names, and the workers' own logs",
                )
        return list(killers.values())

    def _halve(self, leaf: _Leaf) -> None:
        """Cut an item in two, at a grain."""
        item = leaf.item
        middle = item.start + leaf.grains // 2 * leaf.step.grain
        size = item.size * (middle - item.start) // (item.stop - item.start)
        items = self._items[leaf.job, leaf.step.name]
        at = items.index(item)
        items[at : at + 1] = [
            Item(item.start, middle, size),
            Item(middle, item.stop, item.size - size),
        ]

    def _kills_alone(self, leaf: _Leaf) -> bool:
        """Try an item while nothing else runs: Dask blames all that waits on a worker that dies."""
        from distributed import KilledWorker

        self._round = uuid.uuid4().hex[:8]
        before = self._submit_steps(leaf.job, _needed(self._jobs[leaf.job], leaf.step))
        given = [before[name] for name in leaf.step.needs]
        self._leaf_futures = []
        for _ in _completed(self._client, list(given)):
            pass
        future = self._submit_item(leaf.step, self._whole(leaf.job), leaf.item, given)
        for _ in _completed(self._client, [future]):
            pass
        error = future.exception() if future.status == "error" else None
        if error is not None and not isinstance(error, KilledWorker):
            raise error
        return error is not None and str(error.task) == future.key


def _needed(job: Job, step: Sweep) -> list[Step]:
    """Give the steps of a job that one depends on, in their order."""
    names, found = set(step.needs), list[Step]()
    for earlier in reversed(job.steps[: job.steps.index(step)]):
        if earlier.name in names:
            names |= set(earlier.needs)
            found.insert(0, earlier)
    return found


def _deadly(leaf: _Leaf) -> WorkerError:
    item = leaf.item
    what = "rows" if leaf.step.unit == "B" else "tiles"
    return WorkerError(
        f"{leaf.step.label}: {what} {item.start}..{item.stop - 1} kill every worker that takes them",
        "workers that live through them",
        "see the workers' own logs; give them more memory, or check the data with 'ncbatch validate'",
    )


def _completed(client: Any, futures: list[Any]) -> Iterator[Any]:
    """Give futures as they complete; `futures` is emptied, so that none is held longer.

    Raises
    ------
    WorkerError
        When the scheduler is gone.
    """
    from distributed import as_completed

    waiting = as_completed(futures, loop=client.loop)
    futures.clear()
    last = time.monotonic()
    while not waiting.is_empty():
        batch = waiting.next_batch(block=False)
        yield from batch
        if client.status == "running":
            last = time.monotonic()
        elif time.monotonic() - last > _LOST_SECONDS:
            raise WorkerError(
                "the scheduler has gone", "one that answers",
                "start it again, and the same command: with --state it goes on",
            )  # fmt: skip
        if not batch:
            time.sleep(_POLL_SECONDS)


def _in_pairs(parts: list[Any]) -> Iterator[tuple[Any, ...]]:
    for i in range(0, len(parts), 2):
        yield tuple(parts[i : i + 2])
