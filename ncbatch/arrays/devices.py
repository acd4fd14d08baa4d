"""Where arrays are computed on: the host, or a GPU through CuPy, which is named in this room only."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from ncbatch.arrays.namespace import Array
from ncbatch.arrays.staging import HostArray, as_bits, staged_copies, widened
from ncbatch.errors import UsageError

Block = tuple[HostArray, ...]
Precision = Literal["exact", "fp32", "tf32"]

PRECISIONS = ("exact", "fp32", "tf32")

# cublasMath_t of NVIDIA's cublas_api.h; CuPy names the first only.
_DEFAULT_MATH, _TF32_MATH = 0, 3

# TF32 came with this compute capability.
_TF32_CAPABILITY = 80


class Device(Protocol):
    """Where arrays live and products are computed."""

    @property
    def name(self) -> str:
        """What results record: ``cpu``, or the device's number and model."""
        ...

    def put(self, values: HostArray) -> Array:
        """Bring an array to the device."""
        ...

    def stream(self, blocks: Iterable[Block]) -> Iterator[tuple[Array, ...]]:
        """Bring blocks to the device one after another, each ahead of its use."""
        ...

    def matmul_precision(self, precision: Precision) -> AbstractContextManager[None]:
        """Say how products of float32 are computed within a ``with``."""
        ...

    def free_bytes(self) -> int | None:
        """Count the bytes that new arrays can take; None where the plan of the host decides."""
        ...

    def synchronize(self) -> None:
        """Wait until all work is done."""
        ...


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
        """Give the array itself."""
        return values

    def stream(self, blocks: Iterable[Block]) -> Iterator[tuple[Array, ...]]:
        """Give the blocks themselves."""
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
        return staged_copies(blocks, _CudaLane(self.number))

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
                "8.0 or more", "use fp32",
            )  # fmt: skip
        return _float32_math(tf32=precision == "tf32")

    def free_bytes(self) -> int | None:
        """Count the bytes that new arrays can take: the device's free ones and those of the pool."""
        cupy = _cupy()
        with cupy.cuda.Device(self.number):
            free, _ = cupy.cuda.runtime.memGetInfo()
            return int(free) + _pool_free_bytes(cupy)

    def synchronize(self) -> None:
        """Wait until all work on the device is done."""
        _cupy().cuda.Device(self.number).synchronize()


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


class _CudaLane:
    """Copies on a stream of their own, for the stream that is current when they begin."""

    def __init__(self, number: int) -> None:
        self._cupy = _cupy()
        self._device = self._cupy.cuda.Device(number)
        with self._device:
            self._compute = self._cupy.cuda.get_current_stream()
            # The legacy default stream would otherwise wait for it, and it for that.
            self._copies = self._cupy.cuda.Stream(non_blocking=True)

    def pinned(self, size: int) -> npt.NDArray[np.uint8]:
        # Not from CuPy's pool, which rounds up to powers of two.
        memory = self._cupy.cuda.PinnedMemoryPointer(self._cupy.cuda.PinnedMemory(size), 0)
        return np.frombuffer(memory, np.uint8, size)

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        # Pools are kept per stream: memory returns to that of the stream it was allocated for.
        with self._device, self._compute:
            return self._cupy.empty(shape, dtype)

    def fork(self) -> None:
        with self._device:
            self._copies.wait_event(self._compute.record(self._event()))

    def copy(self, source: HostArray, target: Array) -> None:
        with self._device:
            target.data.copy_from_host_async(source.ctypes.data, source.nbytes, self._copies)

    def mark(self) -> Any:
        with self._device:
            return self._copies.record(self._event())

    def reached(self, event: Any) -> None:
        event.synchronize()

    def join(self, event: Any) -> None:
        with self._device:
            self._compute.wait_event(event)

    def drain(self) -> None:
        with self._device:
            self._copies.synchronize()

    def _event(self) -> Any:
        return self._cupy.cuda.Event(disable_timing=True)


def _cupy() -> Any:
    return import_module("cupy")


def _cuda_device() -> CudaDevice:
    """Give the current device, once CuPy has computed something on it."""
    try:
        cupy = _cupy()
    except ImportError as error:
        raise UsageError(
            f"CuPy is not installed ({_first_line(error)})",
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
            f"CuPy sees no CUDA device that works ({_first_line(error)})",
            "an NVIDIA GPU, and a driver for CuPy's version of CUDA",
            "see what 'nvidia-smi' and 'python -c \"import cupy; cupy.show_config()\"' say;"
            " or compute with --device cpu",
        ) from error
    return CudaDevice(number, model)


@contextmanager
def _float32_math(tf32: bool) -> Iterator[None]:
    cupy, float32 = _cupy(), np.dtype(np.float32)
    linalg = import_module("cupy._core._routines_linalg")
    cublas = import_module("cupy_backends.cuda.libs.cublas")
    handle = cupy.cuda.device.get_cublas_handle()
    compute_type, mode = linalg.get_compute_type(float32), cublas.getMathMode(handle)
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
    size, given_out = 0, None
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


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
