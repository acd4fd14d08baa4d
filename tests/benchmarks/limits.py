"""Limits: what the parts of a piece of work take alone, with plain NumPy, files and Zarr."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr

_BLOCK_ROWS = 8192
# Rows of a tile of scores, and classes: their product is held once, so that no time goes into
# memory that is new.
_TILE_ROWS = 1024


def feature_files(store: Path) -> list[Path]:
    """List the files that hold the chunks of features of a store."""
    return sorted(p for p in store.glob("*/layers/*/feature/c/**/*") if p.is_file())


def raw_read(files: Sequence[Path]) -> float:
    """Time plain reads of files into one buffer, which is not looked at."""
    buffer = np.empty(max(file.stat().st_size for file in files), np.uint8)
    buffer[:] = 0
    start = time.perf_counter()
    for path in files:
        with path.open("rb", buffering=0) as file:
            # One call reads 2 GiB at most; chunks are far smaller.
            file.readinto(memoryview(buffer))
    return time.perf_counter() - start


def syrk(n: int, d: int, dtype: Any, share: float = 0.5) -> float:
    """Time the symmetric product of N rows over blocks of 8192, on a share of them, scaled up."""
    rng = np.random.default_rng(0)
    block = rng.standard_normal((_BLOCK_ROWS, d)).astype(dtype)
    out = np.zeros((d, d), dtype)
    np.matmul(block.T, block, out=out)
    n_blocks = max(1, round(n * share / _BLOCK_ROWS))
    start = time.perf_counter()
    for _ in range(n_blocks):
        np.matmul(block.T, block, out=out)
    return (time.perf_counter() - start) * n / (n_blocks * _BLOCK_ROWS)


def product(rows: npt.NDArray[Any], weight: npt.NDArray[Any]) -> float:
    """Time the plain product of rows (N, D) with the transpose of (K, D), tile by tile of rows."""
    out = np.zeros((min(_TILE_ROWS, len(rows)), len(weight)), rows.dtype)
    np.matmul(rows[: len(out)], weight[:2048].T, out=out[:, : min(2048, len(weight))])
    start = time.perf_counter()
    for i in range(0, len(rows), len(out)):
        part = rows[i : i + len(out)]
        np.matmul(part, weight.T, out=out[: len(part)])
    return time.perf_counter() - start


def read_and_sum(array: zarr.Array[Any]) -> dict[str, float]:
    """Time a read of all rows with its checksum, their conversion and one sum, chunk by chunk."""
    step = array.chunks[0]
    wide = np.zeros(array.chunks, np.float32)
    seconds = dict.fromkeys(("Zarr read", "to float32", "sum"), 0.0)
    for first in range(0, array.shape[0], step):
        start = time.perf_counter()
        rows = array[first : first + step]
        read = time.perf_counter()
        np.copyto(wide[: len(rows)], rows)
        converted = time.perf_counter()
        wide[: len(rows)].sum()
        seconds["Zarr read"] += read - start
        seconds["to float32"] += converted - read
        seconds["sum"] += time.perf_counter() - converted
    return seconds


def half_product(k: int, d: int) -> float:
    """Time half of the float32 product of two distinct (K, D) arrays, on a sample of its rows."""
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((min(k, 16_384), d), dtype=np.float32) for _ in range(2))
    a[:2048] @ b.T[:, :2048]
    start = time.perf_counter()
    for i in range(0, len(a), 2048):
        a[i : i + 2048] @ b.T
    return (time.perf_counter() - start) * (k / len(a)) ** 2 / 2
