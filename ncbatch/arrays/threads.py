"""Threads of the CPU: how many a task may use, work dealt out to them, and reading ahead."""

from __future__ import annotations

import os
import queue
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
    _limit.enter(threads)
    try:
        yield
    finally:
        _limit.leave()


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
    ready: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
    # The reader loads a block only once the one before was taken: two are held at most.
    room = threading.Semaphore(1)
    abandoned = threading.Event()

    def read() -> None:
        source = iter(blocks)
        while room.acquire() and not abandoned.is_set():
            try:
                ready.put(("block", next(source)))
            except StopIteration:
                return ready.put(("end", None))
            except BaseException as error:
                return ready.put(("error", error))
        return None

    reader = threading.Thread(target=read, name="ncbatch-reader", daemon=True)
    reader.start()
    try:
        while True:
            kind, value = ready.get()
            if kind == "end":
                return
            if kind == "error":
                raise value
            room.release()
            yield value
    finally:
        abandoned.set()
        room.release()
        reader.join()


class _Limit:
    """The process's limit of threads, and how many tasks hold it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holders = 0
        self._blas: Any = None
        self.threads = 0

    def enter(self, threads: int) -> None:
        with self._lock:
            self._holders += 1
            if self._holders == 1:
                self.threads = max(threads, 1)
                self._blas = _controller().limit(limits=self.threads, user_api="blas")

    def leave(self) -> None:
        with self._lock:
            self._holders -= 1
            if self._holders == 0:
                self._blas.restore_original_limits()
                self.threads = 0
                self._blas = None


_limit = _Limit()


@cache
def _controller() -> ThreadpoolController:
    return ThreadpoolController()
