"""Threads of the CPU: how many a task may use, work dealt out to them, and reading ahead."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeVar

from threadpoolctl import ThreadpoolController

Task = TypeVar("Task")
Result = TypeVar("Result")
Block = TypeVar("Block")


def cpu_count() -> int:
    """Count the processors that this process may use, or fewer within `thread_limit`."""
    return _limit.threads or len(processors())


def processors() -> set[int]:
    """Return the numbers of the processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))


@contextmanager
def thread_limit(threads: int) -> Iterator[None]:
    """Hold the BLAS and `map_threads` to so many threads, in the whole process.

    Tasks that share a process enter and leave in any order: the first sets the limit and the last
    to leave lifts it.
    """
    with _limit.lock:
        _limit.holders += 1
        if _limit.holders == 1:
            _limit.threads = max(threads, 1)
            _limit.blas = _controller().limit(limits=_limit.threads, user_api="blas")
    try:
        yield
    finally:
        with _limit.lock:
            _limit.holders -= 1
            if _limit.holders == 0:
                _limit.blas.restore_original_limits()
                _limit.threads = 0


def map_threads(function: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[Result]:
    """Apply a function that releases the GIL to tasks, one thread per processor.

    Results come in the order of the tasks. A BLAS with threads of its own would idle while the
    rest of a task runs, and then compete with it; so it gets one thread per task.
    """
    pending: deque[Future[Result]] = deque()
    with _controller().limit(limits=1, user_api="blas"), ThreadPoolExecutor(cpu_count()) as pool:
        for task in tasks:
            pending.append(pool.submit(function, task))
            # Enough that no thread waits for the consumer, and no more than memory is planned for.
            if len(pending) == max_pending():
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def max_pending() -> int:
    """Count the results that may wait to be taken."""
    return 2 * cpu_count()


def read_ahead(blocks: Iterable[Block]) -> Iterator[Block]:
    """Iterate in a thread of its own, one block ahead of the consumer.

    What the iteration raises is raised at its place. Leaving early stops the thread after the
    block that it is at.
    """
    source = iter(blocks)
    end: Any = object()
    with ThreadPoolExecutor(1, "ncbatch-reader") as reader:
        ahead = reader.submit(next, source, end)
        while (block := ahead.result()) is not end:
            # The next is loaded only once this one was taken: two are held at most.
            ahead = reader.submit(next, source, end)
            yield block


class _Limit:
    """The process's limit of threads, 0 for none, and how many tasks hold it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.holders = 0
        self.blas: Any = None
        self.threads = 0


_limit = _Limit()


@cache
def _controller() -> ThreadpoolController:
    return ThreadpoolController()
