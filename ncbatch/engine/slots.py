"""How many threads a task may use: the processors of a host, dealt out to its workers' task slots."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any


def task_slots(client: Any) -> Mapping[str, int]:
    """Count the threads that each task may use, so that neither idle cores nor a crowd remain.

    Parameters
    ----------
    client : distributed.Client
        Of any cluster.

    Returns
    -------
    mapping of str to int
        For each host and set of processors that a worker there may use, the threads of a task;
        to be passed to the tasks, for `task_threads`.

    Notes
    -----
    A processor is shared by the task slots of all workers of its host that may use it. So workers
    that are bound to sockets (as dask-cuda's are), and jobs on parts of a node, get what is theirs.
    """
    found = client.run(_place, on_error="ignore")
    slots: dict[tuple[str, int], int] = {}
    for host, processors, threads, _ in found.values():
        for processor in processors:
            slots[host, processor] = slots.get((host, processor), 0) + threads
    share: dict[str, int] = {}
    for host, processors, _, quota in found.values():
        whole = sum(1 / slots[host, processor] for processor in processors)
        # A container may be given less time than the processors it sees.
        whole *= quota / len(processors)
        share[_key(host, processors)] = max(1, int(whole + 1e-9))
    return share


def task_threads(slots: Mapping[str, int]) -> int:
    """Count the threads that the running task may use.

    Parameters
    ----------
    slots : mapping of str to int
        What `task_slots` gave.

    Returns
    -------
    int
        At least 1. A worker that came later counts as alone on its host; outside of a worker, all
        processors.
    """
    from distributed import get_worker

    try:
        worker = get_worker()
    except ValueError:
        return len(processors_here())
    host, processors, threads, quota = _place(worker)
    return slots.get(_key(host, processors), max(1, quota // threads))


def _place(dask_worker: Any) -> tuple[str, tuple[int, ...], int, int]:
    """Give a worker's host, its processors, its threads, and how many processors it has time for.

    The argument's name makes `Client.run` pass the worker.
    """
    from dask.system import cpu_count
    from distributed.comm import get_address_host

    processors = tuple(sorted(processors_here()))
    quota = min(len(processors), cpu_count())
    return (
        get_address_host(dask_worker.address), processors, dask_worker.state.nthreads, quota
    )  # fmt: skip


def _key(host: str, processors: tuple[int, ...]) -> str:
    return f"{host} {','.join(map(str, processors))}"


def processors_here() -> set[int]:
    """Give the numbers of the processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))
