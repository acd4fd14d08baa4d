"""Where arrays are computed: the host, or a GPU through CuPy, which this room alone names."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from itertools import pairwise
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from ncbatch.arrays.namespace import Array, namespace
from ncbatch.arrays.threads import cpu_count
from ncbatch.errors import UsageError, first_line

# Copies to a device that overlap with computing on it, through two staging buffers.


HostArray = npt.NDArray[Any]

# Arrays within a staging buffer begin at multiples of this.
_ALIGNMENT = 256

# One thread copies within the host at a fraction of what the bus takes; beyond this size, several.
_FILL_BYTES = 8 * 2**20
_FILL_THREADS = 4


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
    flights: deque[Callable[[], tuple[Array, ...]]] = deque()
    with ThreadPoolExecutor(min(_FILL_THREADS, cpu_count())) as pool:
        try:
            for number, block in enumerate(blocks):
                flights.append(slots[number % 2].send(block, pool))
                if len(flights) == 2:
                    yield flights.popleft()()
            while flights:
                yield flights.popleft()()
        finally:
            # Neither buffers nor arrays may be freed under a copy that still runs.
            lane.drain()


class _Slot:
    """A staging buffer, and the event after which it may be filled again."""

    def __init__(self, lane: Lane) -> None:
        self._lane = lane
        self._buffer: npt.NDArray[np.uint8] | None = None
        self._event: Any = None

    def send(self, block: tuple[HostArray, ...], pool: Executor) -> Callable[[], tuple[Array, ...]]:
        """Queue the copy of a block; what is returned waits for its end, on the device only."""
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
        event = self._event = self._lane.mark()
        dtypes = [np.asarray(array).dtype for array in block]

        def land() -> tuple[Array, ...]:
            self._lane.join(event)
            return tuple(map(widened, arrays, dtypes))

        return land

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


def _fill(target: HostArray, source: HostArray, pool: Executor) -> None:
    """Copy within the host; NumPy releases the GIL meanwhile."""
    if source.nbytes < _FILL_BYTES or source.shape[0] < _FILL_THREADS:
        np.copyto(target, source)
        return
    edges = np.linspace(0, source.shape[0], _FILL_THREADS + 1).astype(int)
    parts = [slice(a, b) for a, b in pairwise(edges)]
    list(pool.map(lambda part: np.copyto(target[part], source[part]), parts))


def as_bits(values: HostArray) -> HostArray:
    """View bfloat16 as the uint16 of its bits, which every library can copy; others stay."""
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


Block = tuple[HostArray, ...]
Precision = Literal["exact", "fp32", "tf32"]

PRECISIONS = ("exact", "fp32", "tf32")

# cublasMath_t of NVIDIA's cublas_api.h; CuPy names the first only.
_DEFAULT_MATH = 0
_TF32_MATH = 3

# TF32 came with this compute capability.
_TF32_CAPABILITY = 80


def find_device(asked: str = "auto") -> Device:
    """Find the device that a user asked for.

    Parameters
    ----------
    asked : {"auto", "cpu", "cuda"}
        ``auto`` takes the GPU when CuPy and one work, otherwise the CPU.

    Raises
    ------
    UsageError
        When ``cuda`` is asked for and CuPy or a device is missing; says which. There is no
        falling back.
    """
    if asked not in ("auto", "cpu", "cuda"):
        raise UsageError(f"device '{asked}'", "auto, cpu or cuda")
    if asked != "cpu":
        try:
            return _cuda_device()
        except UsageError:
            if asked == "cuda":
                raise
    return HostDevice()


@dataclass(frozen=True)
class HostDevice:
    """The CPU: arrays stay NumPy arrays, in the dtype that they have."""

    name: str = "cpu"

    def put(self, values: HostArray) -> Array:
        """Return the array itself."""
        return values

    def stream(self, blocks: Iterable[Block]) -> Iterator[tuple[Array, ...]]:
        """Yield the blocks themselves."""
        yield from blocks

    def matmul_precision(self, precision: Precision) -> AbstractContextManager[None]:
        """Refuse TF32, which CPUs do not have.

        Raises
        ------
        UsageError
            For ``tf32``, and for what is no precision.
        """
        _check_precision(precision)
        if precision == "tf32":
            raise UsageError(
                "precision 'tf32' on the cpu", "exact or fp32", "tf32 needs a GPU: --device cuda"
            )
        return nullcontext()

    def free_bytes(self) -> int | None:
        """Leave the host's memory to the plan."""
        return None

    def synchronize(self) -> None:
        """Do nothing: the host waits for itself."""


@dataclass(frozen=True)
class CudaDevice:
    """An NVIDIA GPU through CuPy.

    Attributes
    ----------
    number : int
        CUDA's number of the device, among those this process sees.
    model : str
        What the driver calls it.
    """

    number: int
    model: str

    @property
    def name(self) -> str:
        """The device's number and model, such as ``cuda:0 NVIDIA H100``."""
        return f"cuda:{self.number} {self.model}"

    def put(self, values: HostArray) -> Array:
        """Copy an array to the device; bfloat16 and float16 arrive as float32."""
        cupy = _cupy()
        with cupy.cuda.Device(self.number):
            if not isinstance(values, np.ndarray):  # an array of the device stays there
                return cupy.asarray(values)
            return widened(cupy.asarray(as_bits(values)), values.dtype)

    def stream(self, blocks: Iterable[Block]) -> Iterator[tuple[Array, ...]]:
        """Copy blocks to the device, each while it computes on the one before.

        Parameters
        ----------
        blocks : iterable of tuples of numpy.ndarray
            What to copy; reading them is the iterable's matter. Iterate over the result in the
            thread that computes: CuPy's current stream belongs to a thread.

        Yields
        ------
        tuple of cupy.ndarray
            bfloat16 and float16 as float32. At most three blocks are on the device.
        """
        return staged_copies(blocks, Lane(self.number))

    def matmul_precision(self, precision: Precision) -> AbstractContextManager[None]:
        """Say how products of float32 are computed within a ``with``, whatever CUPY_TF32 says.

        Parameters
        ----------
        precision : {"exact", "fp32", "tf32"}
            Only ``tf32`` lets the tensor cores round operands to 10 bits.

        Raises
        ------
        UsageError
            For ``tf32`` on a device that has none, and for what is no precision.

        Notes
        -----
        CuPy's own products go by a setting of the process (``cupy._core.set_compute_type``, since
        CuPy hands cuBLAS a compute type with every call); routines of cuBLAS that take none, such
        as syrk, go by the math mode of the thread's handle. Both are set, and restored.
        """
        _check_precision(precision)
        capability = int(_cupy().cuda.Device(self.number).compute_capability)
        if precision == "tf32" and capability < _TF32_CAPABILITY:
            raise UsageError(
                f"precision 'tf32' on {self.name}, of compute capability {capability / 10}",
                "8.0 or more",
                "use fp32",
            )
        return _float32_math(tf32=precision == "tf32")

    def free_bytes(self) -> int | None:
        """Count the bytes that new arrays can take: free ones of the device and of the pool."""
        cupy = _cupy()
        with cupy.cuda.Device(self.number):
            free, _ = cupy.cuda.runtime.memGetInfo()
            return int(free) + _pool_free_bytes(cupy)

    def synchronize(self) -> None:
        """Wait until all work on the device is done."""
        _cupy().cuda.Device(self.number).synchronize()


# Where arrays live and products are computed.
Device: TypeAlias = HostDevice | CudaDevice


def cuda_chunk(values: HostArray) -> Array:
    """Copy a chunk of a Dask array to the GPU of the worker it is on; bfloat16 arrives as float32.

    It is widened there, so that half the bytes travel.
    """
    chunk = _cupy().asarray(as_bits(values))
    return widened(chunk, values.dtype) if values.dtype.name == "bfloat16" else chunk


def cuda_meta(dtype: npt.DTypeLike) -> Array:
    """Make the empty CuPy array (0, 0) that tells Dask what the chunks of a Dask array are.

    Raises
    ------
    UsageError
        As `find_device` for ``cuda``.
    """
    _cuda_device()
    return _cupy().empty((0, 0), dtype)


# ------------------------------------------------------------------------------------ CuPy's side


class Lane:
    """What a device must do for staged copies: two queues of work, and events in them.

    Copies go on a stream of their own, for the stream that is current when they begin.
    """

    def __init__(self, number: int) -> None:
        self._cupy = _cupy()
        self._device = self._cupy.cuda.Device(number)
        with self._device:
            self._compute = self._cupy.cuda.get_current_stream()
            # The legacy default stream would otherwise wait for it, and it for that.
            self._copies = self._cupy.cuda.Stream(non_blocking=True)

    def pinned(self, size: int) -> npt.NDArray[np.uint8]:
        """Allocate host memory that the device can read by itself."""
        # Not from CuPy's pool, which rounds up to powers of two.
        memory = self._cupy.cuda.PinnedMemoryPointer(self._cupy.cuda.PinnedMemory(size), 0)
        return np.frombuffer(memory, np.uint8, size)

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """Allocate an array on the device, for the queue that computes."""
        # Pools are kept per stream: memory returns to that of the stream it was allocated for.
        with self._device, self._compute:
            return self._cupy.empty(shape, dtype)

    def fork(self) -> None:
        """Let copies to come wait for all that the computing queue was given so far."""
        with self._device:
            self._copies.wait_event(self._compute.record(self._event()))

    def copy(self, source: HostArray, target: Array) -> None:
        """Queue a copy."""
        with self._device:
            target.data.copy_from_host_async(source.ctypes.data, source.nbytes, self._copies)

    def mark(self) -> Any:
        """Make an event that is reached when the copies queued so far are done."""
        with self._device:
            return self._copies.record(self._event())

    def reached(self, event: Any) -> None:
        """Wait, on the host, for an event."""
        event.synchronize()

    def join(self, event: Any) -> None:
        """Let the computing queue wait for an event."""
        with self._device:
            self._compute.wait_event(event)

    def drain(self) -> None:
        """Wait, on the host, for all copies."""
        with self._device:
            self._copies.synchronize()

    def _event(self) -> Any:
        return self._cupy.cuda.Event(disable_timing=True)


def _cupy() -> Any:
    return import_module("cupy")


def _cuda_device() -> CudaDevice:
    """Return the current device, once CuPy has computed something on it."""
    try:
        cupy = _cupy()
    except ImportError as error:
        raise UsageError(
            f"CuPy is not installed ({first_line(error)})",
            "CuPy, an NVIDIA GPU and its driver",
            "install it with: pip install 'ncbatch[gpu]'; or compute with --device cpu",
        ) from error
    try:
        if cupy.cuda.runtime.getDeviceCount() == 0:
            raise RuntimeError("it counts none")
        number = int(cupy.cuda.runtime.getDevice())
        model = cupy.cuda.runtime.getDeviceProperties(number)["name"].decode()
        float(cupy.ones(2).sum())
    except Exception as error:  # CUDA's errors, missing libraries and failed compilations
        raise UsageError(
            f"CuPy sees no CUDA device that works ({first_line(error)})",
            "an NVIDIA GPU, and a driver for CuPy's version of CUDA",
            "see what 'nvidia-smi' and 'python -c \"import cupy; cupy.show_config()\"' say;"
            " or compute with --device cpu",
        ) from error
    return CudaDevice(number, model)


@contextmanager
def _float32_math(tf32: bool) -> Iterator[None]:
    cupy = _cupy()
    float32 = np.dtype(np.float32)
    linalg = import_module("cupy._core._routines_linalg")
    cublas = import_module("cupy_backends.cuda.libs.cublas")
    handle = cupy.cuda.device.get_cublas_handle()
    compute_type = linalg.get_compute_type(float32)
    mode = cublas.getMathMode(handle)
    chosen = linalg.COMPUTE_TYPE_TF32 if tf32 else linalg.COMPUTE_TYPE_DEFAULT
    linalg.set_compute_type(float32, chosen)
    cublas.setMathMode(handle, _TF32_MATH if tf32 else _DEFAULT_MATH)
    try:
        yield
    finally:
        linalg.set_compute_type(float32, compute_type)
        cublas.setMathMode(handle, mode)


def _pool_free_bytes(cupy: Any) -> int:
    """Count what the pool behind CuPy holds and has not given out.

    RMM's pool tells its size only; what is given out is known where allocations are tracked, as
    on the clusters of GPUs that ncbatch starts. Elsewhere all of it counts as given out.
    """
    rmm = sys.modules.get("rmm")
    allocator = getattr(cupy.cuda.get_allocator(), "__module__", None) or ""
    if rmm is None or not allocator.startswith("rmm"):
        return int(cupy.get_default_memory_pool().free_bytes())
    size = 0
    given_out = None
    resource = rmm.mr.get_current_device_resource()
    while resource is not None:
        if hasattr(resource, "get_allocated_bytes"):
            given_out = resource.get_allocated_bytes()
        if hasattr(resource, "pool_size"):
            size = resource.pool_size()
        resource = resource.get_upstream() if hasattr(resource, "get_upstream") else None
    return 0 if given_out is None else max(0, int(size - given_out))


def _check_precision(precision: str) -> None:
    if precision not in PRECISIONS:
        raise UsageError(f"precision '{precision}'", ", ".join(PRECISIONS[:-1]) + " or tf32")
