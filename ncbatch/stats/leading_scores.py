"""Leading scores: the greatest scores of each row over tiles of classes, never rows x classes."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from array_api_compat import device

from ncbatch.arrays import Array, cpu_count, map_threads, max_pending, namespace, row_blocks
from ncbatch.arrays.rows import take_rows

# Rows and classes of a tile of scores: products of this size run at nearly full speed.
TILE_ROWS, TILE_CLASSES = 2048, 2048
_COMPILED_ROWS, _COMPILED_TILE = 1024, 2048
# Leading scores that the compiled scan keeps: near-ties have seldom more.
KEPT_SCORES = 8
# Rows that one compiled sweep over classes in memory takes at a time.
_SWEEP_ROWS = 8192
# A converted tile of classes that are not in memory as they are multiplied.
_CONVERTED_BYTES = 32 * 2**20
# Scores whose maximum is taken at once, so that a tile is gone over once.
_RUN = 64
# What the compiler holds when it has just compiled the scan.
COMPILER_BYTES = 160 * 2**20


class Tiling(NamedTuple):
    """How a sweep cuts rows and classes: rows of a sweep, and a tile's rows and classes."""

    sweep_rows: int
    rows: int
    classes: int

    @classmethod
    def of(
        cls, n_rows: int, n_features: int, itemsize: int, *, compiled: bool, converted: bool
    ) -> Tiling:
        """Choose tiles for `n_rows` rows.

        Parameters
        ----------
        n_rows, n_features, itemsize : int
            Rows to decide, D, and bytes of a number in the products.
        compiled : bool
            Whether the compiled scan works on the tiles.
        converted : bool
            Whether classes are read or converted tile by tile; then all rows share one sweep.
        """
        classes = _COMPILED_TILE if compiled else TILE_CLASSES
        if converted:
            classes = min(classes, max(64, _CONVERTED_BYTES // (n_features * itemsize)))
        if not compiled:
            return cls(TILE_ROWS, TILE_ROWS, classes)
        return cls(n_rows if converted else _SWEEP_ROWS, _COMPILED_ROWS, classes)

    def bytes_of(self, n_rows: int, n_features: int, itemsize: int, *, read: bool) -> int:
        """Price a compiled sweep: its tiles of scores and of classes, and the leading scores."""
        rows = min(n_rows, self.sweep_rows)
        scores = cpu_count() * min(rows, self.rows) * self.classes * itemsize
        leading = rows * KEPT_SCORES * (itemsize + 8)
        if not read:
            return scores + leading
        alive = max_pending() // -(-max(rows, 1) // self.rows) + 2
        return scores + leading + self.classes * n_features * (alive * itemsize + 16)


@dataclass(frozen=True)
class Leaders:
    """The greatest scores of each row.

    Attributes
    ----------
    values : array (B, T)
        Scores, descending, in the dtype of the products; -inf where there are fewer classes.
    at : array (B, L) of int64
        Positions of their classes: of all T, or of the first alone.
    """

    values: Array
    at: Array

    @property
    def listed(self) -> bool:
        """Whether the class of every score is known."""
        return bool(self.at.shape[1] == self.values.shape[1])


def class_tiles(
    weight: Array, bias: Array, like: Array, tile_classes: int
) -> Iterator[tuple[int, Array, Array]]:
    """Give the classes tile by tile: the first's position, weights and biases.

    Parameters
    ----------
    weight : array (C, D) or view
        Score vectors of any floating-point dtype.
    bias : array (C,)
        Score offsets.
    like : array
        An array in the dtype of the products.
    tile_classes : int
        Classes of a tile.
    """
    xp = namespace(like)
    for part in row_blocks(weight.shape[0], tile_classes):
        block = xp.astype(take_rows(weight, part), like.dtype, copy=False)
        yield part.start, block, xp.astype(bias[part], like.dtype)


def sweep_arrays(rows: Array, weight: Array, bias: Array, tile_classes: int) -> Leaders:
    """Find best score, its class and the runner-up of rows (B, D), in any array library.

    Nothing is brought to the host, so that a GPU never waits between tiles.
    """
    xp = namespace(rows)
    place = {"device": device(rows)}
    best = xp.full((rows.shape[0],), -xp.inf, dtype=rows.dtype, **place)
    second, at = best, xp.zeros((rows.shape[0],), dtype=xp.int64, **place)
    for first, block, offsets in class_tiles(weight, bias, rows, tile_classes):
        scores = xp.matmul(rows, xp.matrix_transpose(block)) + offsets[None, :]
        top, runner_up, top_at = _top_two(scores)
        second = xp.maximum(xp.minimum(best, top), xp.maximum(second, runner_up))
        better = top > best
        at = xp.where(better, top_at + first, at)
        best = xp.where(better, top, best)
    return Leaders(xp.stack([best, second], axis=1), at[:, None])


def _top_two(scores: Array) -> tuple[Array, Array, Array]:
    """Give the greatest score of each row, the next one, and where the first is."""
    xp = namespace(scores)
    n_rows, n_columns = scores.shape
    place = {"device": device(scores)}
    if missing := -n_columns % _RUN:
        filler = xp.full((n_rows, missing), -xp.inf, dtype=scores.dtype, **place)
        scores = xp.concat([scores, filler], axis=1)
    runs = xp.reshape(scores, (n_rows, -1, _RUN))
    tops = xp.max(runs, axis=2)
    run_at = xp.argmax(tops, axis=1)
    # The run that holds the maximum: the only one looked at again.
    index = xp.broadcast_to(run_at[:, None, None], (n_rows, 1, _RUN))
    run = xp.take_along_axis(runs, index, axis=1)[:, 0, :]
    within = xp.argmax(run, axis=1)
    second = xp.maximum(_others(tops, run_at), _others(run, within))
    at = xp.astype(run_at, xp.int64) * _RUN + xp.astype(within, xp.int64)
    return xp.max(tops, axis=1), second, at


def _others(values: Array, left_out: Array) -> Array:
    """Give the maximum of each row without one of its columns."""
    xp = namespace(values)
    columns = xp.arange(values.shape[1], dtype=left_out.dtype, device=device(values))
    rest = xp.where(columns[None, :] == left_out[:, None], -xp.inf, values)
    return xp.max(rest, axis=1)


def sweep_compiled(
    rows: npt.NDArray[Any],
    weight: Array,
    bias: npt.NDArray[Any],
    tile_rows: int,
    tile_classes: int,
) -> Leaders:
    """Find the `KEPT_SCORES` leading scores of rows (B, D) in memory, on all processors.

    The tiles of scores are dealt out to threads; tiles of classes are read or converted while
    others are worked on. What is found does not depend on threads: tiles do not, and neither do
    the leading scores on the order in which tiles are folded in.
    """
    # Compiled code is loaded only where a sweep runs.
    from ncbatch.stats.decision_kernel import scan_tile

    kept = min(KEPT_SCORES, weight.shape[0])
    values = np.full((len(rows), kept), -np.inf, rows.dtype)
    at = np.zeros((len(rows), kept), np.int64)
    parts = [(part, threading.Lock()) for part in row_blocks(len(rows), tile_rows)]

    def fold(task: tuple[Any, ...]) -> None:
        (part, lock), (first, block, offsets) = task
        scores = rows[part] @ block.T
        with lock:
            scan_tile(scores, offsets, first, values[part], at[part])

    tiles = class_tiles(weight, bias, rows, tile_classes)
    deque(map_threads(fold, ((part, tile) for tile in tiles for part in parts)), maxlen=0)
    return Leaders(values, at)
