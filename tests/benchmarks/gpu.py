"""Cases on an NVIDIA GPU, held against copies and cuBLAS products measured in the same process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np
import numpy.typing as npt

import ncbatch as nc
from ncbatch.arrays.devices import Device, find_device
from ncbatch.states.decisions import Decisions
from ncbatch.states.moments import MomentsAccumulator
from ncbatch.states.pairs.sweep import PairTiles
from ncbatch.states.rules import linear_rule, nearest_mean_rule
from tests.benchmarks.case import Aim, Case, MissingError, Sample, Shape
from tests.benchmarks.measuring import measured, timed

# Blocks of features on the host, which are sent again and again: 64 MiB each at D = 4,096.
_BLOCK_ROWS, _POOL_BLOCKS = 8192, 8
# Products are timed on so many blocks, and scaled up.
_SAMPLE_BLOCKS = 8
# Of the pair sweep's tiles, what is timed.
_TILE_SHARE = 1 / 16
_BASE = ("cdnv", "distance", "log", "riesz", "interference")
# What TF32 rounds operands to.
_TF32_ROUNDOFF = 2.0**-11

Block = tuple[npt.NDArray[Any], npt.NDArray[np.int64]]


def _gpu() -> tuple[Any, Device]:
    """Give CuPy and the device."""
    try:
        device = find_device("cuda")
    except nc.NcbatchError as error:
        raise MissingError("no GPU") from error
    import cupy

    return cupy, device


def _synchronized(device: Device, work: Callable[[], Any]) -> float:
    """Give the seconds that work takes, to the end of what it gave the device."""
    device.synchronize()

    def whole() -> None:
        work()
        device.synchronize()

    return timed(whole)


def _noted(cupy: Any, device: Device, sample: Sample) -> Sample:
    """Add the device, and its memory at the peak: CuPy's pool keeps what it once had."""
    held = cupy.get_default_memory_pool().total_bytes() / 2**30
    return replace(sample, notes=[*sample.notes, f"{device.name}; {held:.1f} GiB of its memory"])


# ------------------------------------------------------------------------------------- moments


def moments(shape: Shape, precision: Any) -> Sample:
    """Moments with scatter of bfloat16 blocks that come from the host, against copy and product."""
    cupy, device = _gpu()
    pool = _host_blocks(cupy, shape)

    def fold(n_blocks: int) -> None:
        empty = device.put(pool[0][0][:0])
        accumulator = MomentsAccumulator(
            shape.k, shape.d, like=empty, scatter=True, precision=precision
        )
        with device.matmul_precision(precision):
            for features, labels in device.stream(_repeated(pool, n_blocks)):
                accumulator.add(features, labels)
        accumulator.finish()
        device.synchronize()

    n_blocks = shape.n // _BLOCK_ROWS
    fold(2)

    def limit() -> dict[str, float]:
        copies = _copies(cupy, device, pool, n_blocks)
        products = _products(cupy, device, shape.d, precision) * n_blocks
        # They can overlap, so the larger one is the limit; what is left of the other is nothing.
        return {
            "copies": copies if copies > products else 0.0,
            "products": products if products >= copies else 0.0,
        }

    return _noted(cupy, device, measured(lambda: fold(n_blocks), limit))


def _host_blocks(cupy: Any, shape: Shape) -> list[Block]:
    """Draw blocks on the device and bring them to the host as bfloat16 and labels."""
    import ml_dtypes

    rng, found = np.random.default_rng(0), []
    cupy.random.seed(0)
    for _ in range(_POOL_BLOCKS):
        rows = cupy.random.standard_normal((_BLOCK_ROWS, shape.d), dtype=cupy.float32)
        bits = (rows.view(cupy.uint32) >> 16).astype(cupy.uint16)
        labels = rng.integers(0, shape.k, _BLOCK_ROWS)
        found.append((cupy.asnumpy(bits).view(ml_dtypes.bfloat16), labels))
    return found


def _repeated(pool: list[Block], n_blocks: int) -> Iterator[Block]:
    for i in range(n_blocks):
        features, labels = pool[i % len(pool)]
        # Other classes each time round, so that all are met.
        yield features, np.roll(labels, i // len(pool))


def _copies(cupy: Any, device: Device, pool: list[Block], n_blocks: int) -> float:
    """Time copies of so many blocks from pinned memory, one after the other."""
    bits = pool[0][0].view(np.uint16)
    memory = cupy.cuda.alloc_pinned_memory(bits.nbytes)
    pinned = np.frombuffer(memory, np.uint16, bits.size).reshape(bits.shape)
    pinned[...] = bits
    target = cupy.empty(bits.shape, cupy.uint16)
    stream = cupy.cuda.get_current_stream()

    def copy() -> None:
        for _ in range(n_blocks):
            target.data.copy_from_host_async(pinned.ctypes.data, pinned.nbytes, stream)

    return _synchronized(device, copy)


def _products(cupy: Any, device: Device, d: int, precision: Any) -> float:
    """Time the symmetric product of a block by cuBLAS: the faster of syrk and gemm."""
    dtype = cupy.float64 if precision == "exact" else cupy.float32
    rows = cupy.random.standard_normal((_BLOCK_ROWS, d), dtype=dtype)
    out = cupy.empty((d, d), dtype, order="F")
    cublas = import_module("cupy.cublas")
    ways = [
        lambda: cupy.matmul(rows.T, rows),
        # Of a C-ordered array, cuBLAS sees the transpose.
        lambda: cublas.syrk("N", rows.T, out=out),
    ]

    def repeated(way: Callable[[], Any]) -> None:
        for _ in range(_SAMPLE_BLOCKS):
            way()

    with device.matmul_precision(precision):
        for way in ways:
            way()
        found = [_synchronized(device, partial(repeated, way)) for way in ways]
    return min(found) / _SAMPLE_BLOCKS


# ----------------------------------------------------------------------------------- decisions


def decisions(shape: Shape, precision: Any) -> Sample:
    """Decide rows on the device by both rules, against the two products by cuBLAS."""
    cupy, device = _gpu()
    cupy.random.seed(0)
    means = cupy.random.standard_normal((shape.k, shape.d), dtype=cupy.float32)
    weight = means + 0.1 * cupy.random.standard_normal(means.shape, dtype=cupy.float32)
    labels = cupy.random.randint(0, shape.k, shape.n).astype(cupy.int64)
    features = means[labels]
    features += 0.5 * cupy.random.standard_normal(features.shape, dtype=cupy.float32)
    how = {"operand_roundoff": _TF32_ROUNDOFF} if precision == "tf32" else {}
    wide = means.astype(cupy.float64)
    rules = nearest_mean_rule(wide, **how), linear_rule(weight, **how)

    def decide(n: int) -> None:
        with device.matmul_precision(precision):
            Decisions.from_block(features[:n], labels[:n], shape.k, *rules)
        device.synchronize()

    decide(1024)

    def limit() -> dict[str, float]:
        with device.matmul_precision(precision):
            return {"two products": 2 * _tall_product(cupy, device, features, weight)}

    return _noted(cupy, device, measured(lambda: decide(shape.n), limit))


def _tall_product(cupy: Any, device: Device, rows: Any, weight: Any) -> float:
    """Time the product of rows with the transpose of a weight, into memory that is held."""
    step = min(4096, len(rows))
    out = cupy.empty((step, len(weight)), rows.dtype)

    def multiply(stop: int) -> None:
        for i in range(0, stop, step):
            part = rows[i : i + step]
            cupy.matmul(part, weight.T, out=out[: len(part)])

    multiply(step)
    return _synchronized(device, lambda: multiply(len(rows)))


# --------------------------------------------------------------------------------------- pairs


def pairs(shape: Shape) -> Sample:
    """Sweep a share of the tiles on the device, against cuBLAS products of as many pairs."""
    cupy, device = _gpu()
    cupy.random.seed(0)
    means = cupy.random.standard_normal((shape.k, shape.d), dtype=cupy.float64)
    variances = cupy.random.uniform(0.5, 1.0, shape.k)
    counts = cupy.random.randint(1, 99, shape.k)
    tiles = PairTiles(means, means.mean(axis=0), variances, counts=counts, quantities=_BASE)
    chosen = list(tiles.tiles())
    chosen = chosen[: max(1, round(len(chosen) * _TILE_SHARE))]
    n_pairs = sum((r.stop - r.start) * (c.stop - c.start) for r, c in chosen)

    def sweep(some: list[tuple[slice, slice]]) -> None:
        tiles.fold(some)
        device.synchronize()

    sweep(chosen[:2])
    # Tiles of other libraries than NumPy are computed in float64 throughout.
    rows = means[: min(16_384, shape.k)]

    def limit() -> dict[str, float]:
        seconds = _tall_product(cupy, device, rows, rows)
        return {"float64 product": seconds * n_pairs / len(rows) ** 2}

    notes = [f"on a share of {_TILE_SHARE:.3g} of the tiles"]
    return _noted(cupy, device, measured(lambda: sweep(chosen), limit, notes=notes))


# --------------------------------------------------------------------------------------- table

_VOCABULARY = Shape(n=2**20, k=131_072, d=4096)
_DECIDED, _MEANS = Shape(n=16_384, k=131_072, d=4096), Shape(k=131_072, d=4096)
# At least 60 % of the limit's rate.
_AIM = Aim(at_most=1 / 0.6)
_MOMENTS = "moments with covariance of bfloat16 blocks from the host, {}, on a GPU"
_LIMIT = "the larger of copies and cuBLAS products"

CASES = [
    *(
        Case(
            f"gpu-moments-{precision}", _MOMENTS.format(precision), _LIMIT,
            partial(moments, precision=precision), _VOCABULARY, None, _AIM,
        )
        for precision in ("exact", "fp32", "tf32")
    ),
    *(
        Case(
            f"gpu-decisions-{precision}", f"decisions by both rules, {precision}, on a GPU",
            f"two cuBLAS products, {precision}", partial(decisions, precision=precision),
            _DECIDED, None, _AIM,
        )
        for precision in ("fp32", "tf32")
    ),
    Case(
        "gpu-pairs", "pairs, base metrics together, on a GPU", "half the float64 cuBLAS product",
        pairs, _MEANS, None, _AIM,
    ),
]  # fmt: skip
