"""A rule: the class of greatest score for each row, decided as exact arithmetic would."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from array_api_compat import device, is_numpy_array

from ncbatch.arrays import (
    Array,
    as_float64,
    block_rows,
    float64_blocks,
    namespace,
    row_blocks,
    scalar,
    to_numpy,
)
from ncbatch.stats.leading_scores import (
    COMPILER_BYTES,
    Leaders,
    Tiling,
    sweep_arrays,
    sweep_compiled,
)
from ncbatch.stats.near_ties import (
    LISTED_SCORES,
    Contest,
    ExactScores,
    candidates,
    distinct_rows,
    pair_rows,
)

# With fewer classes the scan takes less time than loading compiled code.
COMPILED_CLASSES = 2048
FLOAT64_ROUNDOFF = float(np.finfo(np.float64).eps) / 2


@dataclass(frozen=True)
class Rule:
    """Chooses the class of greatest score ``w_k . (x - origin) + b_k``, as exact arithmetic would.

    Attributes
    ----------
    weight : array (C, D) or view of rows
        Score vectors; tiles of them are converted to `dtype` where they have another.
    bias : array (C,) of float64
        Score offsets; -inf for a class that is never chosen.
    origin : array (D,) of float64
        Subtracted from every row, so that a common offset costs no digits.
    classes : array (C,) of int64
        The class id of each score, ascending: equal scores go to the lowest.
    exact : callable
        ``exact(rows, k) -> (R,)`` scores row r for candidate k[r] in float64 on the host.
    dtype : dtype
        What products run in: float32 or float64.
    bias_error : float
        Rounding error that computing `bias` left in it, beyond its own relative one.
    compiled : bool, optional
        Whether tiles of NumPy arrays are scanned by compiled code; by default where there are
        enough classes for it to pay.
    tile_rows, tile_classes : int, optional
        Rows and classes of a tile of scores; by default what suits the processors.
    sweep_rows : int, optional
        Rows that share one sweep over the classes when it is compiled: 8192 by default, and all
        the rows at hand where `weight` is read or converted tile by tile.
    operand_roundoff : float
        Unit of rounding of the products' operands where it is coarser than that of `dtype`:
        2**-11 for TF32.
    """

    weight: Array
    bias: Array
    origin: Array
    classes: Array
    exact: ExactScores
    dtype: Any
    bias_error: float = 0.0
    compiled: bool | None = None
    tile_rows: int | None = None
    tile_classes: int | None = None
    sweep_rows: int | None = None
    operand_roundoff: float = 0.0

    @staticmethod
    def peak_bytes(
        n_classes: int,
        n_features: int,
        block_rows: int,
        itemsize: int = 4,
        *,
        stored: bool = False,
        tile_rows: int | None = None,
        tile_classes: int | None = None,
        sweep_rows: int | None = None,
    ) -> int:
        """Price the rule and its decisions of a block: bytes at their peak, on the CPU.

        Parameters
        ----------
        n_classes, n_features : int
            C and D.
        block_rows : int
            Rows that are decided at a time.
        itemsize : int, optional
            Bytes of a number in the products.
        stored : bool, optional
            Whether score vectors are read, or converted, tile by tile and never held.
        tile_rows, tile_classes, sweep_rows : int, optional
            As for the rule.
        """
        compiled = n_classes > COMPILED_CLASSES
        tiles = Tiling.of(block_rows, n_features, itemsize, compiled=compiled, converted=stored)
        tiles = _override(tiles, sweep_rows if compiled else tile_rows, tile_rows, tile_classes)
        rows = min(block_rows, tiles.sweep_rows)
        held = n_classes * (24 + (0 if stored else n_features * itemsize))
        block = rows * (n_features * itemsize + 64) + block_rows * 32
        centred = 3 * 8 * min(max(rows, n_classes), _rows_at_a_time(n_features)) * n_features
        # Candidates are listed once the sweep's tiles are gone, but their memory may stay.
        listed = LISTED_SCORES * (itemsize + 33) + 4 * 8 * pair_rows(n_features) * n_features
        if compiled:
            sweep = tiles.bytes_of(rows, n_features, itemsize, read=stored) + COMPILER_BYTES
        else:
            classes = min(n_classes, tiles.classes)
            sweep = min(rows, tiles.rows) * classes * itemsize * 3
            sweep += classes * n_features * (itemsize + 16) if stored else 0
        return held + block + centred + listed + sweep

    def decide(self, features: Array) -> Array:
        """Choose a class for each row of `features` (B, D); returns ids (B,) of int64.

        Notes
        -----
        Scores are computed tile by tile with the running leaders of every row, in float32 as a
        rule. With unit of rounding u, a dot product of D terms errs by at most
        ``gamma_D |w| |x|``, ``gamma_n = n u / (1 - n u)``, in whatever order it is summed [1]_;
        rounding w and x adds 2 u |w| |x|, and b_k with its addition 2 u (|b_k| + |w| |x|). Rows
        whose runner-up lies within twice that of the best, for the longest w and the largest b,
        are decided again from float64 scores of every class that does.

        References
        ----------
        .. [1] N. J. Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., SIAM 2002,
           section 3.1.
        """
        if features.shape[0] == 0:
            return self.classes[:0]
        size = self._tiles(features).sweep_rows
        blocks = [self._decide_sweep(features[p, :]) for p in row_blocks(features.shape[0], size)]
        return namespace(features).concat(blocks) if len(blocks) > 1 else blocks[0]

    def _decide_sweep(self, features: Array) -> Array:
        xp = namespace(features)
        rows, norms, wide = self._centred(features)
        leaders = self._leaders(rows)
        best = as_float64(leaders.values[:, 0])
        floor = xp.where(wide, -xp.inf, best - 2.0 * self._error(norms))
        chosen = xp.take(self.classes, leaders.at[:, 0], axis=0)
        if leaders.values.shape[1] == 1:
            return chosen
        doubt = as_float64(leaders.values[:, 1]) >= floor
        # The one time per sweep that a GPU is waited for.
        if not bool(xp.any(doubt)):
            return chosen
        if leaders.listed:
            short = doubt
            if leaders.at.shape[1] < self.weight.shape[0]:
                short = doubt & (as_float64(leaders.values[:, -1]) < floor)
            if bool(xp.any(short)):
                chosen[short] = self._decide_listed(features[short], leaders, short, floor)
            doubt = doubt & ~short
        if bool(xp.any(doubt)):
            chosen[doubt] = self._decide_unlisted(features[doubt], rows[doubt], floor[doubt])
        return chosen

    def _decide_listed(self, features: Array, leaders: Leaders, some: Array, floor: Array) -> Array:
        """Decide rows whose candidates are all among their leading scores."""
        values, at = to_numpy(leaders.values[some]), to_numpy(leaders.at[some])
        row, column = np.nonzero(values >= to_numpy(floor[some])[:, None])
        contest = Contest(features, self.exact)
        contest.offer(row, at[row, column])
        return self._ids_at(contest.at, features)

    def _decide_unlisted(self, features: Array, rows: Array, floor: Array) -> Array:
        """Decide rows from every class whose score reaches `floor`, which a sweep finds."""
        xp, host = namespace(features), to_numpy(features)
        first, back = distinct_rows(host)
        some = xp.asarray(first, device=device(features))
        rows, floor = xp.take(rows, some, axis=0), xp.take(floor, some, axis=0)
        contest = Contest(host[first], self.exact)
        most = self._tiles(rows).classes if self._converted else self.weight.shape[0]
        found = candidates(rows, self.weight, self.bias, floor, most)
        for row, k in found:
            contest.offer(row, k)
        return self._ids_at(contest.at[back], features)

    def _ids_at(self, at: npt.NDArray[np.int64], like: Array) -> Array:
        xp = namespace(like)
        return xp.take(self.classes, xp.asarray(at, device=device(like)), axis=0)

    def _leaders(self, rows: Array) -> Leaders:
        tiles = self._tiles(rows)
        if self._runs_compiled(rows):
            return sweep_compiled(rows, self.weight, self.bias, tiles.rows, tiles.classes)
        return sweep_arrays(rows, self.weight, self.bias, tiles.classes)

    def _runs_compiled(self, rows: Array) -> bool:
        enough = self.weight.shape[0] > COMPILED_CLASSES
        return is_numpy_array(rows) and (enough if self.compiled is None else self.compiled)

    @property
    def _converted(self) -> bool:
        return bool(self.weight.dtype != self.dtype) or not in_memory(self.weight)

    def _tiles(self, rows: Array) -> Tiling:
        compiled = self._runs_compiled(rows)
        itemsize = namespace(rows).finfo(self.dtype).bits // 8
        tiles = Tiling.of(
            rows.shape[0], rows.shape[1], itemsize, compiled=compiled, converted=self._converted
        )
        sweep = self.sweep_rows if compiled else self.tile_rows
        return _override(tiles, sweep, self.tile_rows, self.tile_classes)

    def _centred(self, features: Array) -> tuple[Array, Array, Array]:
        """Give the rows for the products, their lengths, and which are too long for `dtype`.

        Those are zeros; the float64 scores of every class decide them.
        """
        xp = namespace(features)
        shape, place = tuple(features.shape), {"device": device(features)}
        rows = xp.empty(shape, dtype=self.dtype, **place)
        norms = xp.empty(shape[:1], dtype=xp.float64, **place)
        limit = float(xp.finfo(self.dtype).max) / 16.0
        # On a GPU few large steps are better, and a sweep has few rows.
        at_a_time = _rows_at_a_time(shape[1]) if is_numpy_array(features) else max(shape[0], 1)
        for part in row_blocks(shape[0], at_a_time):
            centred = as_float64(features[part, :]) - self.origin
            norms[part] = xp.sqrt(xp.sum(centred * centred, axis=1))
            fits = norms[part] * max(self._reach, 1.0) <= limit
            rows[part, :] = xp.astype(xp.where(fits[:, None], centred, 0.0), self.dtype)
        wide = xp.isfinite(norms) & (norms * max(self._reach, 1.0) > limit)
        return rows, norms, wide

    def _error(self, norms: Array) -> Array:
        """Bound how far scores of rows of lengths `norms` are from those of exact arithmetic."""
        info = namespace(self.bias).finfo(self.dtype)
        n, u, r = self.weight.shape[1] + 8, float(info.eps) / 2, self.operand_roundoff
        # Tensor cores cut sums off instead of rounding them.
        n_units = (2 * n if r else n) * u
        relative = n_units / (1.0 - n_units) + 2.0 * r + r * r
        offsets = (4.0 * u + n * FLOAT64_ROUNDOFF) * self._largest_bias + self.bias_error
        underflow = n * float(info.smallest_normal)
        return (relative * self._reach + underflow) * norms + (
            offsets + underflow * (1.0 + self._reach)
        )

    @cached_property
    def _reach(self) -> float:
        """Length of the longest score vector."""
        return longest_row(self.weight)

    @cached_property
    def _largest_bias(self) -> float:
        xp = namespace(self.bias)
        finite = xp.where(xp.isfinite(self.bias), self.bias, 0.0)
        return scalar(xp.max(xp.abs(finite)))


def _override(
    tiles: Tiling, sweep_rows: int | None, tile_rows: int | None, tile_classes: int | None
) -> Tiling:
    return Tiling(
        sweep_rows or tiles.sweep_rows, tile_rows or tiles.rows, tile_classes or tiles.classes
    )


def _rows_at_a_time(n_features: int) -> int:
    return max(block_rows(n_features), 16)


def in_memory(rows: Array) -> bool:
    """Whether rows are an array, not a view or in a file."""
    return hasattr(rows, "__dlpack__")


def longest_row(rows: Array) -> float:
    """Give the length of the longest row."""
    xp = namespace(rows)
    longest = xp.zeros((), dtype=xp.float64, device=device(rows))
    for _, block in float64_blocks(rows):
        longest = xp.maximum(longest, xp.max(xp.sum(block * block, axis=1)))
    return math.sqrt(scalar(longest))
