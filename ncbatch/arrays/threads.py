"""Threads of the CPU: work dealt out to all of them, with the BLAS held to one in each."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import TypeVar

from threadpoolctl import ThreadpoolController

Task = TypeVar("Task")
Result = TypeVar("Result")


def cpu_count() -> int:
    """Count the processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def map_threads(function: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[Result]:
    """Apply a function that releases the GIL to tasks, one thread per processor.

    Results come in the order of the tasks. A BLAS with threads of its own would idle while the
    rest of a task runs, and then compete with it; so it gets one thread per task.
    """
    pending: deque[Future[Result]] = deque()
    with _controller().limit(limits=1, user_api="blas"), ThreadPoolExecutor(cpu_count()) as pool:
        for task in tasks:
            pending.append(pool.submit(function, task))
            if len(pending) == max_pending():
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def max_pending() -> int:
    """Count the results that may wait to be taken."""
    return 2 * cpu_count()


@cache
def _controller() -> ThreadpoolController:
    return ThreadpoolController()
