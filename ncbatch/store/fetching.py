"""Several requests at once, where a store is far away."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from zarr.abc.store import Store
from zarr.storage import LocalStore

Task = TypeVar("Task")
Result = TypeVar("Result")

SMALL_REQUESTS = 64
# One connection to an object store gives a part of what the line does, and each chunk costs memory.
_CHUNKS_AT_ONCE = 4


def chunks_at_once(store: Store) -> int:
    """Say how many chunks are read at once: one from a disk, which reads ahead by itself."""
    return 1 if isinstance(store, LocalStore) else _CHUNKS_AT_ONCE


def map_ahead(
    function: Callable[[Task], Result], tasks: Iterable[Task], at_once: int
) -> Iterator[Result]:
    """Apply a function that waits to tasks, several at once; results come in their order.

    Parameters
    ----------
    function : callable
        Called in threads, unless `at_once` is 1.
    tasks : iterable
        Iterated in the caller's thread, no further ahead than needed.
    at_once : int
        How many calls are made or waiting to be taken.
    """
    if at_once == 1:
        yield from map(function, tasks)
        return
    pending: deque[Future[Result]] = deque()
    pool = ThreadPoolExecutor(at_once)
    try:
        for task in tasks:
            pending.append(pool.submit(function, task))
            if len(pending) == at_once:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


async def gathered(requests: Iterable[Coroutine[Any, Any, Result]]) -> list[Result]:
    """Wait for many small requests, a bounded number at once; results come in their order."""
    gate = asyncio.Semaphore(SMALL_REQUESTS)

    async def gated(request: Coroutine[Any, Any, Result]) -> Result:
        async with gate:
            return await request

    return await asyncio.gather(*(gated(request) for request in requests))
