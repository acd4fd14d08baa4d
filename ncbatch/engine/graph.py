"""Running jobs as one Dask graph of pure tasks: items, a fixed tree of merges, and the rest."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from ncbatch.arrays.named_arrays import pack
from ncbatch.arrays.threads import thread_limit
from ncbatch.engine.cluster import task_slots, task_threads
from ncbatch.engine.jobs import Call, Item, Job, Progress, Step, Sweep, counted
from ncbatch.engine.loop import load_state, say_changes
from ncbatch.errors import WorkerError

# Seconds between looks at what is done, and those without a scheduler until a run is given up.
_POLL_SECONDS = 0.02
_LOST_SECONDS = 20.0
# Rounds in which workers died and no item was to blame: of a task that is none, and all of them.
_UNEXPLAINED = 1
_ROUNDS = 5


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
        When an item kills every worker that takes it; it names the item's rows.
    """
    sweeps = [step for job in jobs for step in job.steps if isinstance(step, Sweep)]
    for step in sweeps:
        say_changes(step, state, progress)
    n_items = sum(len(step.items) for step in sweeps if step.finished(state) is None)
    n_workers = len(client.scheduler_info(n_workers=-1)["workers"])
    label = f"{len(jobs)} layers on {n_workers} workers"
    with counted(progress, label, n_items, "items") as advance:
        return _Graph(client, state, advance).run(jobs)


# ------------------------------------------------------------------------------------- the tasks
# Pure functions of a step: what they are sent are paths and states, not data.


class UnreadableStateError(Exception):
    """A finished state that was kept, and could not be read: it is deleted, to be made anew."""


def limited(function: Callable[..., Any], slots: Mapping[str, int], *arguments: Any) -> Any:
    """Call a function with the threads that a task may use."""
    with thread_limit(task_threads(slots)):
        return function(*arguments)


def send(step: Step) -> Step:
    """Return a step, which then is in the graph once."""
    return step


def fold(step: Sweep, item: Item, state: Path | None, *inputs: Any) -> Any:
    """Fold one item, unless it is kept."""
    work = step.make(*inputs)
    kept = step.kept(state)
    name = f"item-{item.start}-{item.stop}"
    partial = load_state(work, kept, name)
    if partial is not None:
        return partial
    into = work.start()
    work.fold(into, item)
    partial = into.seal()
    if kept is not None:
        kept.save(name, pack(partial))
    return partial


def merge(a: Any, b: Any) -> Any:
    """Combine the states of two sets of items."""
    return a.merge(b)


def finish(step: Sweep, state: Path | None, partial: Any, *inputs: Any) -> Any:
    """Do what is to be done once with the state of all items, None for no items; and keep it."""
    work = step.make(*inputs)
    kept = step.kept(state)
    # Done before, maybe, by a worker that was lost since: others use its files.
    result = load_state(work, kept)
    if result is not None:
        return result
    result = work.finish(work.start().seal() if partial is None else partial)
    if kept is not None:
        kept.conclude(pack(result))
    return result


def load(step: Sweep, state: Path, *inputs: Any) -> Any:
    """Read a finished state that is kept; `UnreadableStateError` when that cannot be done."""
    kept = step.finished(state)
    result = load_state(step.make(*inputs), kept)
    if result is None:
        if kept is not None:
            kept.forget()
        raise UnreadableStateError(step.label)
    return result


def call(step: Call, *inputs: Any) -> Any:
    """Compute a step from earlier results."""
    return step.compute(*inputs)


# ------------------------------------------------------------------------------------- the graph


def _key_of(function: Callable[..., Any]) -> str:
    """How the keys of a function's tasks begin."""
    return f"ncbatch-{function.__name__}-"


class _Leaf(NamedTuple):
    """An item of a sweep, and the arguments of its task."""

    step: Sweep
    item: Item
    arguments: tuple[Any, ...]


class _Graph:
    """The tasks of all jobs that have no result yet."""

    def __init__(self, client: Any, state: Path | None, advance: Callable[[int], None]) -> None:
        self._client = client
        self._state = state
        self._advance = advance
        self._slots = task_slots(client)
        self._futures: list[Any] = []  # of items that are not done
        self._leaves: dict[str, _Leaf] = {}  # by key
        self._told: set[tuple[int, Item]] = set()

    def run(self, jobs: Sequence[Job]) -> list[Any]:
        """Run until every job has its result; anew, where workers died of nothing that lasts."""
        results: dict[int, Any] = {}
        n_rounds = 0
        unexplained: list[str] = []
        while len(results) < len(jobs):
            ends = {j: self._submit_job(job) for j, job in enumerate(jobs) if j not in results}
            try:
                deaths = self._wait(list(ends.values()))
                results |= {j: end.result() for j, end in ends.items() if end.status == "finished"}
            finally:
                self._client.cancel(list(ends.values()))
            # Dask blames all tasks that wait on a worker that dies, so each is tried alone.
            suspects = [self._leaves[key] for key in deaths if key in self._leaves]
            # An item that was done, and is done again because its worker died, has lived once.
            others = [key for key in deaths if not key.startswith(_key_of(fold))]
            self._leaves = {}
            for leaf in suspects:
                alone = self._submit(fold, *leaf.arguments)
                if alone.key in self._wait([alone]):
                    raise _deadly(leaf)
            # A merge may have waited on a worker that an item killed; twice is no accident. Items
            # that live alone may have waited on a merge that kills: they are not counted so soon.
            n_rounds += bool(deaths)
            unexplained += others[:1]
            if len(unexplained) > _UNEXPLAINED or n_rounds > _ROUNDS:
                raise WorkerError(
                    f"workers died of task '{[*unexplained, *deaths][0]}'",
                    "workers with memory for it",
                    "see the memory that 'ncbatch plan' names, and the workers' own logs",
                )
        return [results[j] for j in range(len(jobs))]

    def _submit_job(self, job: Job) -> Any:
        """Submit all tasks of a job; returns the future of its result."""
        results: dict[str, Any] = {}
        for step in job.steps:
            sent = self._submit(send, step)
            inputs = [results[name] for name in step.needs]
            if isinstance(step, Call):
                result = self._submit(call, sent, *inputs)
            elif step.finished(self._state) is not None:
                result = self._submit(load, sent, self._state, *inputs)
            else:
                parts = [self._submit_item(step, item, sent, inputs) for item in step.items]
                result = self._submit(finish, sent, self._state, self._merged(parts), *inputs)
            results[step.name] = result
        return result

    def _submit_item(self, sweep: Sweep, item: Item, sent: Any, inputs: list[Any]) -> Any:
        leaf = _Leaf(sweep, item, (sent, item, self._state, *inputs))
        future = self._submit(fold, *leaf.arguments)
        self._leaves[future.key] = leaf
        self._futures.append(future)
        return future

    def _merged(self, parts: list[Any]) -> Any:
        """Merge neighbours until one is left: the same tree, whatever ends first."""
        while len(parts) > 1:
            pairs = [parts[i : i + 2] for i in range(0, len(parts), 2)]
            parts = [self._submit(merge, *pair) if len(pair) == 2 else pair[0] for pair in pairs]
        return parts[0] if parts else None

    def _submit(self, function: Callable[..., Any], *arguments: Any) -> Any:
        key = f"{_key_of(function)}{uuid.uuid4().hex}"
        return self._client.submit(limited, function, self._slots, *arguments, key=key, pure=False)

    def _wait(self, ends: list[Any]) -> list[str]:
        """Wait for all tasks; returns the keys of those that workers died of."""
        futures = [*ends, *self._futures]
        self._futures = []
        with closing(_completed(self._client, futures)) as completed:
            return self._deaths(completed)

    def _deaths(self, completed: Iterable[Any]) -> list[str]:
        from distributed import KilledWorker

        deaths: dict[str, None] = {}  # a set in order
        for future in completed:
            if future.status != "error":
                leaf = self._leaves.pop(future.key, None)
                # An item counts once, though a later round may do it again.
                if leaf is not None and (id(leaf.step), leaf.item) not in self._told:
                    self._told.add((id(leaf.step), leaf.item))
                    self._advance(1)
                continue
            error = future.exception()
            if isinstance(error, UnreadableStateError):
                return []
            if not isinstance(error, KilledWorker):
                raise error
            # What depends on the task that killed ends with the same error.
            deaths[str(error.task)] = None
        return list(deaths)


def _deadly(leaf: _Leaf) -> WorkerError:
    what = "rows" if leaf.step.unit == "B" else "tiles"
    return WorkerError(
        f"{leaf.step.label}: {what} {leaf.item.start}..{leaf.item.stop - 1} kill every worker "
        "that takes them",
        "workers that live through them",
        "see the workers' own logs; give them more memory, "
        "or check the data with 'ncbatch validate'",
    )


def _completed(client: Any, futures: list[Any]) -> Generator[Any]:
    """Iterate over futures as they complete; `futures` is emptied, so that none is held longer.

    Raises
    ------
    WorkerError
        When the scheduler is gone.
    """
    from distributed import as_completed

    waiting = as_completed(futures, loop=client.loop)
    futures.clear()
    last_seen = time.monotonic()
    try:
        while not waiting.is_empty():
            batch = waiting.next_batch(block=False)
            yield from batch
            if client.status == "running":
                last_seen = time.monotonic()
            elif time.monotonic() - last_seen > _LOST_SECONDS:
                raise WorkerError(
                    "the scheduler has gone",
                    "one that answers",
                    "start it again, and the same command: with --state it goes on",
                )
            if not batch:
                time.sleep(_POLL_SECONDS)
    finally:
        # Whoever holds an error's traceback holds the futures too, and workers would go on with
        # what nobody waits for. They cannot be cancelled: a scheduler fails over their merges.
        for future in list(waiting.futures):
            future.release()
