"""Devices: which one is found, what it says when there is none, and copies that overlap with work."""

from __future__ import annotations

import sys
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from ncbatch.arrays import devices
from ncbatch.arrays import devices as staging
from ncbatch.arrays import segments as cuda_kernels
from ncbatch.arrays.devices import CudaDevice, HostDevice, find_device, staged_copies, widened
from ncbatch.arrays.namespace import to_numpy
from ncbatch.arrays.segments import cuda_segment_sum, piece_table
from ncbatch.errors import UsageError
from tests.arrays.fake_cupy import FakeArray, FakeStream, HostKernel, install_fake_cupy

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@pytest.fixture
def cupy(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, types.ModuleType]]:
    """Let CuPy be a stand-in."""
    monkeypatch.setattr(HostKernel, "folder", tmp_path_factory.getbasetemp(), raising=False)
    cuda_kernels._kernel.cache_clear()
    yield install_fake_cupy(monkeypatch)
    cuda_kernels._kernel.cache_clear()


# ------------------------------------------------------------------------------------ finding one


def test_the_cpu_passes_everything_through():
    device = find_device("cpu")
    assert device.name == "cpu"
    assert device.free_bytes() is None
    device.synchronize()
    values = np.ones(3, BFLOAT16)
    assert device.put(values) is values
    blocks = [(values, np.arange(3)), (values, np.arange(2))]
    assert all(a is b for a, b in zip(device.stream(iter(blocks)), blocks, strict=True))


def test_cuda_without_cupy_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(UsageError, match=r"CuPy is not installed(.|\n)*ncbatch\[gpu\]"):
        find_device("cuda")
    assert find_device("auto").name == "cpu"


def test_cuda_without_a_driver_says_what_the_driver_said(
    cupy: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    def count() -> int:
        raise RuntimeError("cudaErrorInsufficientDriver: too old\n(more)")

    monkeypatch.setattr(cupy["cupy"].cuda.runtime, "getDeviceCount", count)
    with pytest.raises(UsageError, match=r"no CUDA device .*InsufficientDriver: too old") as raised:
        find_device("cuda")
    assert "(more)" not in str(raised.value)
    assert "not installed" not in str(raised.value)
    assert find_device("auto").name == "cpu"
    monkeypatch.setattr(cupy["cupy"].cuda.runtime, "getDeviceCount", lambda: 0)
    with pytest.raises(UsageError, match="it counts none"):
        find_device("cuda")


def test_a_device_that_cannot_compute_is_none(
    cupy: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    def fail(n: int) -> Any:
        raise ImportError("libnvrtc.so.12: cannot open shared object file")

    monkeypatch.setattr(cupy["cupy"], "ones", fail)
    with pytest.raises(UsageError, match="libnvrtc"):
        find_device("cuda")


def test_a_device_that_works_is_taken(cupy: dict[str, Any]):
    for asked in ("auto", "cuda"):
        assert find_device(asked).name == "cuda:0 Fake GPU"
    assert find_device("cpu").name == "cpu"
    with pytest.raises(UsageError, match="device 'gpu'; expected auto, cpu or cuda"):
        find_device("gpu")


# ------------------------------------------------------------------------------- bringing data in


def test_widened_numbers_are_the_same_numbers():
    patterns = np.arange(2**16, dtype=np.uint16)
    for dtype in (BFLOAT16, np.dtype(np.float16)):
        values = patterns.view(dtype)
        wide = widened(staging.as_bits(values), dtype)
        assert wide.dtype == np.float32
        np.testing.assert_array_equal(wide, values.astype(np.float32))
    kept = np.arange(3.0)
    assert widened(kept, kept.dtype) is kept


def test_put_widens_on_the_device(cupy: dict[str, Any]):
    device = find_device("cuda")
    for dtype, expected in ((BFLOAT16, "float32"), ("float16", "float32"), ("float64", "float64")):
        values = np.array([[1.5, -2], [3, 0.25]]).astype(dtype)
        there = device.put(values)
        assert isinstance(there, FakeArray)
        assert there.dtype == expected
        np.testing.assert_array_equal(there, values.astype(np.float64))
    assert device.put(there) is there
    device.synchronize()


def test_stream_brings_blocks_of_any_size_and_dtype(
    cupy: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(staging, "_FILL_BYTES", 100)  # several threads fill the larger ones
    rng = np.random.default_rng(0)
    blocks = [
        (
            rng.normal(size=(rows, 5)).astype(dtype)[:, ::step],
            rng.integers(0, 9, rows),
            np.empty((0, 3), np.float32),
        )
        for rows, dtype, step in [(3, BFLOAT16, 1), (40, "float16", 2), (1, "float32", 1), (7, "float64", 1)]
    ]  # fmt: skip
    found = list(find_device("cuda").stream(iter(blocks)))
    assert len(found) == len(blocks)
    for block, arrays in zip(blocks, found, strict=True):
        assert all(isinstance(array, FakeArray) for array in arrays)
        for there, here in zip(arrays, block, strict=True):
            np.testing.assert_array_equal(there, here.astype(there.dtype))
        assert arrays[0].dtype == ("float64" if block[0].dtype == np.float64 else "float32")
        assert arrays[1].dtype == np.int64
    assert list(find_device("cuda").stream([])) == []


def test_copies_go_on_a_stream_of_their_own_that_the_default_stream_does_not_wait_for(
    cupy: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    made = []

    class Stream(FakeStream):
        def __init__(self, non_blocking: bool = False) -> None:
            super().__init__(non_blocking)
            made.append(self)

    monkeypatch.setattr(cupy["cupy"].cuda, "Stream", Stream)
    list(find_device("cuda").stream([(np.ones(2),)]))
    assert [stream.non_blocking for stream in made] == [True]


# ------------------------------------------------------------- overlapping copies, by a simulation


class Simulation:
    """A device with two queues that lag behind the host as far as they may.

    Nothing queued runs before it must, except on the queue named `eager`, which runs as soon as it
    may. Memory that is freed is handed out again at once, as by a pool that trusts the order of the
    computing queue. So a missing event shows as wrong numbers.
    """

    def __init__(self, eager: str, without: str = "") -> None:
        self.queues: dict[str, deque[tuple[str, Any]]] = {"compute": deque(), "copies": deque()}
        self.eager, self.without = eager, without
        self.events: dict[int, str] = {}
        self.passed: set[int] = set()
        self.pool: dict[int, list[np.ndarray]] = {}
        self.live = self.most_live = self.n_pinned = self.copied = 0

    # what `Lane` asks for

    def pinned(self, size: int) -> np.ndarray:
        self.n_pinned += 1
        return np.zeros(size, np.uint8)

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        free = self.pool.setdefault(size, [])
        memory = free.pop() if free else np.zeros(size, np.uint8)
        array = np.ndarray.__new__(Held, shape, dtype, buffer=memory)
        self.live += 1
        self.most_live = max(self.most_live, self.live)
        weakref.finalize(array, self._free, size, memory)
        return array

    def fork(self) -> None:
        if self.without != "fork":
            self._wait("copies", self._record("compute"))

    def copy(self, source: np.ndarray, target: Any) -> None:
        memory = raw(target)

        def run() -> None:
            np.copyto(memory, source)
            self.copied += 1

        self._queue("copies", ("run", run))

    def mark(self) -> int:
        return self._record("copies")

    def reached(self, event: int) -> None:
        if self.without != "reached":
            self._run_until(event)

    def join(self, event: int) -> None:
        if self.without != "join":
            self._wait("compute", event)

    def drain(self) -> None:
        if self.without != "drain":
            self._run_until(self._record("copies"))

    # what the user of the arrays does

    def compute(self, work: Callable[[], None]) -> None:
        self._queue("compute", ("run", work))

    def synchronize(self) -> None:
        self._run_until(self._record("compute"))

    # how queues run

    def _free(self, size: int, memory: np.ndarray) -> None:
        self.live -= 1
        self.pool[size].append(memory)

    def _record(self, queue: str) -> int:
        event = len(self.events)
        self.events[event] = queue
        self._queue(queue, ("record", event))
        return event

    def _wait(self, queue: str, event: int) -> None:
        self._queue(queue, ("wait", event))

    def _queue(self, queue: str, work: tuple[str, Any]) -> None:
        self.queues[queue].append(work)
        self._hurry()

    def _hurry(self) -> None:
        while self.eager in self.queues and self._step(self.eager):
            pass

    def _step(self, queue: str) -> bool:
        if not self.queues[queue]:
            return False
        kind, what = self.queues[queue][0]
        if kind == "wait" and what not in self.passed:
            return False
        self.queues[queue].popleft()
        if kind == "run":
            what()
        elif kind == "record":
            self.passed.add(what)
        return True

    def _run_until(self, event: int) -> None:
        while event not in self.passed:
            queue = self.events[event]
            if not self._step(queue):
                self._run_until(self.queues[queue][0][1])
        self._hurry()


class Held(np.ndarray):
    """An array of the simulation, whose memory goes back to the pool with it."""


def raw(array: Any) -> np.ndarray:
    """Give the memory of an array as a kernel sees it: it does not keep it alive."""
    memory = array.base
    while isinstance(memory, np.ndarray) and memory.base is not None:
        memory = memory.base
    return np.frombuffer(memory, array.dtype).reshape(array.shape)


def sums_by_simulation(
    simulation: Simulation, n_blocks: int = 9
) -> tuple[list[float], list[float]]:
    """Sum blocks on the simulated device; gives what came out and what should have."""
    rng = np.random.default_rng(0)
    blocks = [
        (rng.integers(1, 1000, (4, 3)).astype(float), np.arange(4) + i) for i in range(n_blocks)
    ]
    found = [0.0] * n_blocks

    def add(i: int, memory: np.ndarray, numbers: np.ndarray) -> Callable[[], None]:
        def run() -> None:
            found[i] = float(memory.sum() + numbers.sum())

        return run

    for i, (values, numbers) in enumerate(staged_copies(iter(blocks), simulation)):
        simulation.compute(add(i, raw(values), raw(numbers)))
    del values, numbers
    simulation.synchronize()
    return found, [float(a.sum() + b.sum()) for a, b in blocks]


@pytest.mark.parametrize("eager", ["copies", "compute", "neither"])
def test_blocks_arrive_whole_however_far_the_queues_lag(eager: str):
    simulation = Simulation(eager)
    found, expected = sums_by_simulation(simulation)
    assert found == expected
    assert simulation.n_pinned == 2
    assert simulation.most_live <= 3 * 2  # three blocks of two arrays
    assert simulation.live == 0


@pytest.mark.parametrize(
    ("without", "eager"), [("fork", "copies"), ("reached", "neither"), ("join", "compute")]
)
def test_the_simulation_notices_a_missing_event(without: str, eager: str):
    found, expected = sums_by_simulation(Simulation(eager, without))
    assert found != expected


def test_a_copy_is_done_while_the_block_before_is_computed_on():
    simulation = Simulation("copies")
    blocks = [(np.full(4, float(i)),) for i in range(5)]
    for i, _ in enumerate(staged_copies(iter(blocks), simulation)):
        # Whatever was queued up to the block before is done, but not a thing of this block.
        simulation.synchronize()
        assert simulation.copied == min(i + 2, len(blocks))
        simulation.compute(lambda: None)


def test_leaving_early_waits_for_copies_that_still_run():
    simulation = Simulation("neither")
    blocks = [(np.full(4, float(i)),) for i in range(5)]
    stream = staged_copies(iter(blocks), simulation)
    next(stream)
    stream.close()
    assert simulation.copied == 2
    assert not any(kind == "run" for kind, _ in simulation.queues["copies"])


def test_what_reading_raises_arrives_after_the_blocks_before():
    def blocks() -> Iterator[tuple[np.ndarray]]:
        yield (np.ones(2),)
        yield (np.ones(2),)
        raise OSError("gone")

    simulation, seen = Simulation("neither"), 0
    with pytest.raises(OSError, match="gone"):  # noqa: PT012
        for _ in staged_copies(blocks(), simulation):
            seen += 1
    assert seen == 1
    assert simulation.copied == 2


# -------------------------------------------------------------------------------------- precision


def test_tf32_on_the_cpu_is_refused():
    device = HostDevice()
    for precision in ("exact", "fp32"):
        with device.matmul_precision(precision):
            pass
    with pytest.raises(UsageError, match="'tf32' on the cpu; expected exact or fp32"):
        device.matmul_precision("tf32")
    with pytest.raises(UsageError, match="precision 'half'"):
        device.matmul_precision("half")


def test_precision_is_set_for_both_ways_into_cublas_and_restored(cupy: dict[str, Any]):
    linalg = cupy["cupy._core._routines_linalg"]
    cublas = cupy["cupy_backends.cuda.libs.cublas"]
    device = find_device("cuda")
    for precision, expected in {"tf32": (7, 3), "fp32": (1, 0), "exact": (1, 0)}.items():
        with pytest.raises(KeyError), device.matmul_precision(precision):  # noqa: PT012
            assert (linalg.now["float32"], cublas.now[11]) == expected
            raise KeyError
        assert (linalg.now["float32"], cublas.now[11]) == (7, 1)


def test_tf32_on_an_old_gpu_is_refused(cupy: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cupy["cupy"].cuda.Device, "compute_capability", "75")
    with pytest.raises(UsageError, match=r"compute capability 7.5; expected 8.0 or more"):
        CudaDevice(0, "Fake GPU").matmul_precision("tf32")


# ----------------------------------------------------------------------------------------- memory


def test_free_memory_counts_what_the_pool_has_left(
    cupy: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    device = find_device("cuda")
    assert device.free_bytes() == 1000 + 500

    def allocator() -> None: ...

    allocator.__module__ = "rmm.allocators.cupy"
    pool = types.SimpleNamespace(pool_size=lambda: 700, get_upstream=object)
    tracked = types.SimpleNamespace(get_allocated_bytes=lambda: 300, get_upstream=lambda: pool)
    current = [tracked]
    rmm = types.SimpleNamespace(
        mr=types.SimpleNamespace(get_current_device_resource=lambda: current[0])
    )
    monkeypatch.setitem(sys.modules, "rmm", rmm)
    assert device.free_bytes() == 1000 + 500  # there is RMM, but CuPy does not use it
    monkeypatch.setattr(cupy["cupy"].cuda, "get_allocator", lambda: allocator)
    assert device.free_bytes() == 1000 + 700 - 300
    current[0] = pool  # nobody counts what it gave out
    assert device.free_bytes() == 1000


# ---------------------------------------------------------------------------------- sums by class


def loop_sums(values: np.ndarray, index: np.ndarray, n_segments: int) -> np.ndarray:
    sums = np.zeros((n_segments, *values.shape[1:]))
    for row, segment in zip(values.astype(np.float64), index, strict=True):
        sums[segment] += row
    return sums


def drawn_rows(dtype: str, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of which a class has half, as in Zipf's law, and others one."""
    rng = np.random.default_rng(1)
    drawn = np.minimum(rng.geometric(0.5, shape[0]), 40) - 1
    _, index, counts = np.unique(drawn, return_inverse=True, return_counts=True)
    return rng.normal(size=shape).astype(dtype), index, counts


def test_pieces_follow_each_other_without_gaps(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cuda_kernels, "PIECE_ROWS", 4)
    starts, firsts = piece_table(np.array([1, 4, 5, 13]))
    assert starts.tolist() == [0, 1, 5, 10, 23]
    assert firsts.tolist() == [0, 1, 2, 4, 8]


@pytest.mark.parametrize("piece_rows", [1, 4, 256])
@pytest.mark.parametrize("shape", [(1, 1), (300, 3), (300,), (90, 130), (0, 3)])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_kernels_equal_a_loop(
    cupy: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    dtype: str,
    shape: tuple[int, ...],
    piece_rows: int,
):
    monkeypatch.setattr(cuda_kernels, "PIECE_ROWS", piece_rows)
    values, index, counts = drawn_rows(dtype, shape)
    sums = cuda_segment_sum(*(a.view(FakeArray) for a in (values, index, counts)))
    assert sums.dtype == dtype
    assert sums.shape == (len(counts), *shape[1:])
    expected = loop_sums(values, index, len(counts))
    np.testing.assert_allclose(
        sums, expected, rtol=1e-6 if dtype == "float32" else 1e-13, atol=1e-13
    )


def test_the_kernels_take_rows_that_are_not_contiguous(cupy: dict[str, Any]):
    values, index, counts = drawn_rows("float64", (200, 6))
    turned = np.asfortranarray(values).view(FakeArray)
    sums = cuda_segment_sum(turned[:, ::2], index.view(FakeArray), counts.view(FakeArray))
    np.testing.assert_allclose(sums, loop_sums(values[:, ::2], index, len(counts)), rtol=1e-12)


# ----------------------------------------------------------------------------------- on a real GPU


@pytest.fixture
def gpu() -> CudaDevice:
    pytest.importorskip("cupy")
    try:
        device = find_device("cuda")
    except UsageError as error:
        pytest.skip(str(error))
    assert isinstance(device, CudaDevice)
    return device


@pytest.mark.gpu
def test_gpu_streams_blocks_while_it_computes(gpu: CudaDevice):
    rng = np.random.default_rng(0)
    blocks = [
        (rng.normal(size=(2000 + i, 512)).astype(BFLOAT16), rng.integers(0, 9, 2000 + i))
        for i in range(12)
    ]
    found = []
    for values, labels in gpu.stream(blocks):
        wide = values.astype("float64")
        found.append(((wide.T @ wide).trace(), labels.sum()))
    for (trace, total), (values, labels) in zip(found, blocks, strict=True):
        expected = np.sum(values.astype(np.float64) ** 2)
        assert float(trace) == pytest.approx(float(expected), rel=1e-12)
        assert int(total) == labels.sum()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_gpu_segment_sums_equal_a_loop_and_repeat_to_the_bit(gpu: CudaDevice, dtype: str):
    values, index, counts = drawn_rows(dtype, (5000, 300))
    there = [gpu.put(a) for a in (values, index, counts)]
    sums = [to_numpy(cuda_segment_sum(*there)) for _ in range(5)]
    expected = loop_sums(values, index, len(counts))
    np.testing.assert_allclose(
        sums[0], expected, rtol=1e-6 if dtype == "float32" else 1e-12, atol=1e-12
    )
    assert all(np.array_equal(sums[0], again) for again in sums)


@pytest.mark.gpu
def test_gpu_precision_is_what_was_asked_for(gpu: CudaDevice):
    rng = np.random.default_rng(0)
    host = rng.normal(size=(512, 512)).astype(np.float32)
    there, exact = gpu.put(host), host.astype(np.float64) @ host.astype(np.float64)
    scale = np.abs(exact).max()

    def error(precision: Any) -> float:
        with gpu.matmul_precision(precision):
            return float(np.abs(to_numpy(there @ there) - exact).max() / scale)

    assert error("fp32") < 1e-6
    assert error("exact") < 1e-6
    capability = int(sys.modules["cupy"].cuda.Device(gpu.number).compute_capability)
    if capability >= 80:
        assert 1e-5 < error("tf32") < 1e-2
        assert error("fp32") < 1e-6  # restored


@pytest.mark.gpu
def test_gpu_widens_every_bfloat16(gpu: CudaDevice):
    values = np.arange(2**16, dtype=np.uint16).view(BFLOAT16)
    np.testing.assert_array_equal(to_numpy(gpu.put(values)), values.astype(np.float32))
    free = gpu.free_bytes()
    assert free is not None
    assert free > 0


def test_cupy_is_named_in_one_room_only():
    from pathlib import Path

    package = Path(devices.__file__).parents[1]
    naming = {
        path.parent.name
        for path in package.rglob("*.py")
        if any(text in path.read_text() for text in ("import cupy", 'import_module("cupy'))
    }
    assert naming == {"arrays"}
