"""Copies to a device that overlap with computing on it, through two staging buffers."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ncbatch.arrays.namespace import Array, namespace
from ncbatch.arrays.threads import cpu_count

HostArray = npt.NDArray[Any]

# Arrays within a staging buffer begin at multiples of this.
_ALIGNMENT = 256

# One thread copies within the host at a fraction of what the bus takes; beyond this size, several.
_FILL_BYTES, _FILL_THREADS = 8 * 2**20, 4


class Lane(Protocol):
    """What a device must do for staged copies: two queues of work, and events in them."""

    def pinned(self, size: int) -> npt.NDArray[np.uint8]:
        """Allocate host memory that the device can read by itself."""
        ...

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """Allocate an array on the device, for the queue that computes."""
        ...

    def fork(self) -> None:
        """Let copies to come wait for all that the computing queue was given so far."""
        ...

    def copy(self, source: HostArray, target: Array) -> None:
        """Queue a copy."""
        ...

    def mark(self) -> Any:
        """Make an event that is reached when the copies queued so far are done."""
        ...

    def reached(self, event: Any) -> None:
        """Wait, on the host, for an event."""
        ...

    def join(self, event: Any) -> None:
        """Let the computing queue wait for an event."""
        ...

    def drain(self) -> None:
        """Wait, on the host, for all copies."""
        ...


def staged_copies(
    blocks: Iterable[tuple[HostArray, ...]], lane: Lane
) -> Iterator[tuple[Array, ...]]:
    """Copy blocks to a device, each while the device computes on the one before.

    Parameters
    ----------
    blocks : iterable of tuples of numpy.ndarray
        What to copy. It is iterated here, one block ahead.
    lane : Lane
        The device's part.

    Yields
    ------
    tuple of array
        The block on the device; bfloat16 and float16 as float32. The arrays are the caller's: they
        are never written again.

    Notes
    -----
    Block i + 1 is queued before block i is given out. Its memory comes from the computing queue's
    pool and may have been freed a moment ago by work that has yet to run there; so the copy waits
    for what that queue holds: the work on block i - 1, but not that on block i. A staging buffer
    is filled again only when its last copy is done. At most three blocks are on the device: the
    caller's, the one that waits, and the one being copied.
    """
    slots = [_Slot(lane), _Slot(lane)]
    flights: deque[_Flight] = deque()
    with ThreadPoolExecutor(min(_FILL_THREADS, cpu_count())) as pool:
        try:
            for number, block in enumerate(blocks):
                flights.append(slots[number % 2].send(block, pool))
                if len(flights) == 2:
                    yield _land(flights.popleft(), lane)
            while flights:
                yield _land(flights.popleft(), lane)
        finally:
            # Neither buffers nor arrays may be freed under a copy that still runs.
            lane.drain()


@dataclass(frozen=True)
class _Flight:
    """A block on its way: its arrays on the device, what they hold, and the end of the copy."""

    arrays: tuple[Array, ...]
    dtypes: tuple[np.dtype[Any], ...]
    event: Any


class _Slot:
    """A staging buffer, and the event after which it may be filled again."""

    def __init__(self, lane: Lane) -> None:
        self._lane = lane
        self._buffer: npt.NDArray[np.uint8] | None = None
        self._event: Any = None

    def send(self, block: tuple[HostArray, ...], pool: Executor) -> _Flight:
        if self._event is not None:
            self._lane.reached(self._event)
        sources = [as_bits(np.asarray(array)) for array in block]
        staging = self._views(sources)
        for view, source in zip(staging, sources, strict=True):
            _fill(view, source, pool)
        arrays = tuple(self._lane.empty(source.shape, source.dtype) for source in sources)
        self._lane.fork()
        for view, array in zip(staging, arrays, strict=True):
            self._lane.copy(view, array)
        self._event = self._lane.mark()
        return _Flight(arrays, tuple(np.asarray(a).dtype for a in block), self._event)

    def _views(self, sources: list[HostArray]) -> list[HostArray]:
        """Lay the arrays out in the buffer, which grows to the largest block."""
        starts = [0]
        for source in sources:
            starts.append(-(-(starts[-1] + source.nbytes) // _ALIGNMENT) * _ALIGNMENT)
        if self._buffer is None or self._buffer.size < starts[-1]:
            self._buffer = None  # the old one goes before the new one comes
            self._buffer = self._lane.pinned(max(starts[-1], _ALIGNMENT))
        return [
            self._buffer[start : start + source.nbytes].view(source.dtype).reshape(source.shape)
            for start, source in zip(starts, sources, strict=False)
        ]


def _land(flight: _Flight, lane: Lane) -> tuple[Array, ...]:
    lane.join(flight.event)
    return tuple(
        widened(array, dtype) for array, dtype in zip(flight.arrays, flight.dtypes, strict=True)
    )


def _fill(target: HostArray, source: HostArray, pool: Executor) -> None:
    """Copy within the host; NumPy releases the GIL meanwhile."""
    if source.nbytes < _FILL_BYTES or source.shape[0] < _FILL_THREADS:
        np.copyto(target, source)
        return
    edges = np.linspace(0, source.shape[0], _FILL_THREADS + 1).astype(int)
    parts = [slice(a, b) for a, b in pairwise(edges)]
    list(pool.map(lambda part: np.copyto(target[part], source[part]), parts))


def as_bits(values: HostArray) -> HostArray:
    """Give bfloat16 as the uint16 of its bits, which every library can copy; others as they are."""
    return values.view(np.uint16) if values.dtype.name == "bfloat16" else values


def widened(values: Array, dtype: np.dtype[Any]) -> Array:
    """Turn bits of bfloat16, and float16, into float32, where the array is.

    Parameters
    ----------
    values : array
        What `as_bits` gave, in any library.
    dtype : numpy.dtype
        What it was before.

    Returns
    -------
    array
        The same numbers: a bfloat16 is the upper half of a float32.
    """
    xp = namespace(values)
    if dtype.name == "bfloat16":
        bits = xp.astype(values, xp.uint32)
        bits <<= 16
        return bits.view(xp.float32)
    return xp.astype(values, xp.float32) if dtype == np.float16 else values
