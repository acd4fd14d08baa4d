"""A stand-in for CuPy on the host: arrays that are NumPy's, streams that do at once what they are told.

It shows that what ncbatch asks of CuPy fits together; what a GPU makes of it, tests marked ``gpu`` show.
"""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest


class FakeMemory:
    """Where an array's bytes are."""

    def __init__(self, address: int) -> None:
        self.address = address

    def copy_from_host_async(self, source: int, size: int, stream: Any) -> None:
        ctypes.memmove(self.address, source, size)


class FakeArray(np.ndarray):
    """An array of the fake device."""

    @property
    def data(self) -> FakeMemory:  # type: ignore[override]
        return FakeMemory(self.ctypes.data)


class FakeStream:
    """A stream that is never behind."""

    def __init__(self, non_blocking: bool = False) -> None:
        self.non_blocking = non_blocking

    def __enter__(self) -> FakeStream:
        return self

    def __exit__(self, *error: object) -> None: ...

    def record(self, event: Any) -> Any:
        return event

    def wait_event(self, event: Any) -> None: ...

    def synchronize(self) -> None: ...


class FakeEvent:
    def __init__(self, disable_timing: bool = False) -> None: ...

    def synchronize(self) -> None: ...


class FakeDevice:
    """A device of compute capability 9.0."""

    compute_capability = "90"

    def __init__(self, number: int) -> None:
        self.number = number

    def __enter__(self) -> FakeDevice:
        return self

    def __exit__(self, *error: object) -> None: ...

    def synchronize(self) -> None: ...


def _on_device(values: Any) -> FakeArray:
    if isinstance(values, FakeArray):
        return values
    assert np.asarray(values).dtype.kind in "fiub", "CuPy takes no dtypes of ml_dtypes for sure"
    return np.array(values).view(FakeArray)


def fake_cupy() -> dict[str, types.ModuleType]:
    """Make the modules, by their names."""
    cupy, cuda = types.ModuleType("cupy"), types.ModuleType("cupy.cuda")
    cupy.ndarray = type("ndarray", (), {})  # so that FakeArray's namespace is NumPy's
    cupy.asarray = _on_device
    cupy.ascontiguousarray = lambda a: np.ascontiguousarray(a).view(FakeArray)
    cupy.empty = lambda shape, dtype: np.full(shape, 77, dtype).view(FakeArray)
    cupy.ones = lambda n: np.ones(n).view(FakeArray)
    cupy.argsort = lambda a: np.argsort(a, kind="stable").view(FakeArray)
    cupy.int64, cupy.float64 = np.int64, np.float64
    cupy.RawKernel = HostKernel
    cupy.cuda = cuda
    cupy.get_default_memory_pool = lambda: types.SimpleNamespace(free_bytes=lambda: 500)
    cuda.Device, cuda.Stream, cuda.Event = FakeDevice, FakeStream, FakeEvent
    cuda.get_current_stream = FakeStream
    cuda.PinnedMemory = bytearray
    cuda.PinnedMemoryPointer = lambda memory, offset: memory
    cuda.get_allocator = lambda: cupy.empty
    cuda.device = types.SimpleNamespace(get_cublas_handle=lambda: 11)
    cuda.runtime = types.SimpleNamespace(
        getDeviceCount=lambda: 1,
        getDevice=lambda: 0,
        getDeviceProperties=lambda number: {"name": b"Fake GPU"},
        memGetInfo=lambda: (1000, 4000),
    )
    linalg, cublas = types.ModuleType("linalg"), types.ModuleType("cublas")
    linalg.COMPUTE_TYPE_DEFAULT, linalg.COMPUTE_TYPE_TF32 = 1, 7
    linalg.now, cublas.now = {"float32": 7}, {11: 1}
    linalg.get_compute_type = lambda dtype: linalg.now[dtype.name]
    linalg.set_compute_type = lambda dtype, kind: linalg.now.update({dtype.name: kind})
    cublas.getMathMode = lambda handle: cublas.now[handle]
    cublas.setMathMode = lambda handle, mode: cublas.now.update({handle: mode})
    return {
        "cupy": cupy,
        "cupy._core._routines_linalg": linalg,
        "cupy_backends.cuda.libs.cublas": cublas,
    }


def install_fake_cupy(monkeypatch: pytest.MonkeyPatch) -> dict[str, types.ModuleType]:
    """Let ``import cupy`` find the stand-in."""
    modules = fake_cupy()
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return modules


# ----------------------------------------------------------------- kernels, compiled for the host

_PRELUDE = """
#define __global__
struct Index { unsigned x, y, z; };
static Index blockIdx, threadIdx, blockDim;
"""

_LAUNCH = """
#include <tuple>
extern "C" void launch(unsigned gx, unsigned gy, unsigned threads, %s) {
    blockDim = {threads, 1, 1};
    for (unsigned x = gx; x-- > 0;)  // blocks may run in any order: here, backwards
        for (unsigned y = 0; y < gy; ++y)
            for (unsigned t = 0; t < threads; ++t) {
                blockIdx = {x, y, 0};
                threadIdx = {t, 0, 0};
                %s(%s);
            }
}
"""


class HostKernel:
    """A CUDA kernel without barriers, compiled as C++ and run thread by thread."""

    folder: Path  # set by the fixture that uses it

    def __init__(self, source: str, name: str) -> None:
        compiler = shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")
        if compiler is None:
            pytest.skip("no C++ compiler")
        parameters = source.split(f"void {name}(")[1].split(")")[0]
        names = [p.replace("*", " ").split()[-1] for p in parameters.split(",")]
        text = _PRELUDE + source + _LAUNCH % (parameters, name, ", ".join(names))
        stem = self.folder / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
        if not stem.with_suffix(".so").exists():
            stem.with_suffix(".cpp").write_text(text)
            command = [
                compiler,
                "-O1",
                "-ffp-contract=off",
                "-shared",
                "-fPIC",
                "-Wno-unknown-pragmas",
            ]
            files = ["-o", str(stem.with_suffix(".so")), str(stem.with_suffix(".cpp"))]
            subprocess.run([*command, *files], check=True)
        self._launch = ctypes.CDLL(str(stem.with_suffix(".so"))).launch

    def __call__(
        self, grid: tuple[int, int], block: tuple[int], arguments: tuple[Any, ...]
    ) -> None:
        assert all(isinstance(n, int) and n > 0 for n in itertools.chain(grid, block))
        passed = []
        for value in arguments:
            if isinstance(value, np.ndarray):
                assert value.flags.c_contiguous
                passed.append(ctypes.c_void_p(value.ctypes.data))
            else:
                assert isinstance(value, np.int64), "a Python int has no fixed size in a kernel"
                passed.append(ctypes.c_longlong(int(value)))
        self._launch(*grid, *block, *passed)
