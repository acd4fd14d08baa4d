"""The pair sweep: tiles of class pairs, one product each, all reductions fused on the tile."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations_with_replacement
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from array_api_compat import device, is_numpy_array

from ncbatch.arrays.namespace import Array, as_float64, scalar, to_numpy
from ncbatch.arrays.rows import block_rows, product_rows, row_blocks, take_rows
from ncbatch.arrays.threads import cpu_count, map_threads, max_pending
from ncbatch.errors import DataError, UsageError
from ncbatch.states.pairs.means import COINCIDENT, LOST_IN_FLOAT64, PairMeans, square_differences
from ncbatch.states.pairs.stats import (
    COSINE_BINS,
    PAIR_QUANTITIES,
    TOP_PAIRS,
    Nearest,
    PairStats,
    Tally,
    TopPairs,
)

if TYPE_CHECKING:
    from ncbatch.states.pairs import kernel

# Below this share of its terms a corrected squared distance is rounding error; as in the kernel.
_NO_DIGITS = 1e-9
# Classes of a tile's side: few fit the cache; many are products at full speed; and of stored means
# each row is read once per tile, so that wider tiles leave reading small beside the work.
_FEW_SIDE = 512
_MANY_SIDE = 1024
_STORED_SIDE = 2048
# With fewer classes the sweep takes less time than loading compiled code.
_COMPILED_CLASSES = 2048
# What the compiler holds when it has just compiled the kernel.
_COMPILER_BYTES = 288 * 2**20
# Below this share of |a|^2 + |b|^2 a squared distance from products is computed anew.
_LOST_IN_FLOAT32 = 0.05
_SAMPLE_CLASSES = 128


@dataclass(frozen=True, eq=False)
class _Operand:
    """One side of a compiled tile: rows in float64, and in the dtype of products."""

    means: Array
    centred: Array
    within: Array
    within_product: Array


class PairTiles(PairMeans):
    """The means of a pair sweep, prepared once, and the statistics of its tiles.

    Parameters
    ----------
    means : array (K, D) or StoredRows
        Class means; of stored ones only the blocks of a tile are read.
    center : array (D,) or 0, optional
        m_G, subtracted before directions are taken.
    variances : array (K,), optional
        V_c; needed by the quantities ``cdnv`` and ``cdnv_corrected``. NaN for a class without:
        its pairs are left out of the CDNV.
    counts : array (K,), optional
        n_c; needed by ``cdnv_corrected``.
    within : array (D, D), optional
        S_W; needed by ``cdnv_directional``.
    quantities : iterable of str, optional
        Which of `PAIR_QUANTITIES`; by default all that the arguments allow.
    dist_exp : float, optional
        p of the CDNV.
    ddof : int, optional
        What `variances` are divided by is n_c - ddof; ``cdnv_corrected`` takes ddof 1 from either.
    compiled : bool, optional
        Whether tiles are worked on by compiled code, which takes NumPy arrays; by default where
        there are enough classes for it to pay.
    products : dtype, optional
        Dtype of the tiles' products on the CPU: by default float32 for many classes, where every
        distance that lost digits is computed anew in float64, and float64 otherwise.
    scratch : path, optional
        Folder for a file of ``cdnv_directional`` where the means are stored, K * D * 8 bytes; by
        default that of the means' file.

    Raises
    ------
    UsageError
        When a quantity is unknown.
    DataError
        When what a quantity needs is missing.
    """

    def __init__(
        self,
        means: Array,
        center: Array | float = 0.0,
        variances: Array | None = None,
        *,
        counts: Array | None = None,
        within: Array | None = None,
        quantities: Iterable[str] | None = None,
        dist_exp: float = 1.0,
        ddof: int = 0,
        compiled: bool | None = None,
        products: Any = None,
        scratch: str | Path | None = None,
    ) -> None:
        needed = {
            "cdnv": variances is None,
            "cdnv_corrected": variances is None or counts is None,
            "cdnv_directional": within is None,
        }
        if quantities is None:
            quantities = [q for q in PAIR_QUANTITIES if not needed.get(q)]
        self.quantities = frozenset(quantities)
        if unknown := self.quantities - set(PAIR_QUANTITIES):
            raise UsageError(f"no pair quantity '{min(unknown)}'", ", ".join(PAIR_QUANTITIES))
        for quantity, missing in needed.items():
            if missing and quantity in self.quantities:
                raise DataError(f"{quantity} without what it needs", "variances, counts or within")
        super().__init__(
            means, center, within if "cdnv_directional" in self.quantities else None, scratch
        )
        # Zeros for what is not given, which nothing reads then.
        nothing = self._xp.zeros_like(self._square)
        variances = nothing if variances is None else as_float64(variances)
        # -1 for NaN, which compiled code does not know.
        self._variances = self._xp.where(variances >= 0.0, variances, -1.0)
        self._counts = nothing if counts is None else as_float64(counts)
        self._dist_exp = float(dist_exp)
        self._ddof = ddof
        self._riesz_exponent = float(self.n_features - 2)
        if compiled is None:
            on_host = is_numpy_array(means) or self.stored
            compiled = on_host and self.n_classes > _COMPILED_CLASSES
        self._compiled = compiled
        # With more classes than an ETF can have no variance is so small that float32 shows in it.
        many = self.n_classes > max(_COMPILED_CLASSES, self.n_features + 1)
        self._products = np.dtype(products or (np.float32 if many else np.float64))

    @staticmethod
    def side(n_classes: int, *, stored: bool = False) -> int:
        """Count the classes of a tile's side, for so many classes in memory or in a file."""
        if n_classes <= _COMPILED_CLASSES:
            return _FEW_SIDE
        return _STORED_SIDE if stored else _MANY_SIDE

    @staticmethod
    def tile_list(n_classes: int, *, stored: bool = False) -> list[tuple[slice, slice]]:
        """List the tiles of so many classes, in the order of `tiles`."""
        side = PairTiles.side(n_classes, stored=stored)
        return list(combinations_with_replacement(row_blocks(n_classes, side), 2))

    @staticmethod
    def peak_bytes(
        n_classes: int,
        n_features: int,
        quantities: Iterable[str],
        *,
        stored: bool = False,
    ) -> int:
        """Price a sweep on the CPU beside its means: bytes at its peak.

        Parameters
        ----------
        n_classes, n_features : int
            K and D.
        quantities : iterable of str
            What is swept for.
        stored : bool, optional
            Whether the means lie in a file.
        """
        side = min(PairTiles.side(n_classes, stored=stored), n_classes)
        directional = "cdnv_directional" in quantities
        fixed = n_classes * 256
        if directional:  # a root of S_W, and the rows along it
            rows = min(product_rows(n_features), n_classes)
            fixed += n_features**2 * 8 * 4 + rows * n_features * 8 * 3
            fixed += 0 if stored else n_classes * n_features * 8
        else:
            fixed += block_rows(n_features) * n_features * 8 * 4
        if n_classes <= _COMPILED_CLASSES:
            # Two sides of means, centred means, directions and rows along S_W.
            blocks = 2 * side * n_features * 8 * (4 if stored else 3)
            return fixed + blocks + side**2 * 8 * 16
        itemsize = 4 if n_classes > n_features + 1 else 8
        sides = 2 if directional else 1
        operand = side * n_features * (itemsize + (8 if stored else 0)) * sides
        tile = side * (side * itemsize * sides + 1024)
        states = 3 * max_pending() * n_classes * 24 if "nearest" in quantities else 0
        copies = n_classes * n_features * 4 * sides if itemsize == 4 and not stored else 0
        # Rows of tiles that the tasks of all threads span, at the triangle's corner.
        rows = min(math.isqrt(2 * max_pending()) + 2, -(-n_classes // side))
        operands = copies or operand * (cpu_count() + rows)
        return fixed + operands + tile * cpu_count() + states + _COMPILER_BYTES

    def tiles(self, tile_classes: int | None = None) -> Iterator[tuple[slice, slice]]:
        """Cut the upper triangle into tiles, pairs of class slices, in a fixed order."""
        side = tile_classes or self.side(self.n_classes, stored=self.stored)
        return combinations_with_replacement(row_blocks(self.n_classes, side), 2)

    def fold(self, tiles: Iterable[tuple[slice, slice]]) -> PairStats:
        """Tally the pairs i < j of some tiles, on all processors; merged in their order."""
        if self._compiled:
            # Loaded where it runs: numba takes longer than the sweep of a small store.
            global kernel
            from ncbatch.states.pairs import kernel

            # Before threads do, what the tiles share.
            _ = self._copies, self._vectors, self._references
            # Merged in the order of the tiles, whichever thread is done first.
            folded = map_threads(lambda sides: self._fold_compiled(*sides), self._read_rows(tiles))
        else:
            folded = (self._fold_arrays(*tile) for tile in tiles)
        return functools.reduce(PairStats.merge, folded, PairStats.zero())

    def _fold_arrays(self, rows: slice, columns: slice) -> PairStats:
        """Tally the pairs i < j of one tile in any array library, in float64."""
        xp = self._xp
        place = {"device": device(self.means)}
        i = xp.arange(rows.start, rows.stop, **place)
        j = xp.arange(columns.start, columns.stop, **place)
        pairs = i[:, None] < j[None, :]
        a = self.block(rows)
        b = a if rows == columns else self.block(columns)
        squares = self.square_distances(a, b)
        tallies = self._fold_distances(rows, columns, pairs, squares)
        if "interference" in self.quantities:
            tallies["interference"] = Tally.of(self.interference(a, b)[pairs])
        if self.quantities & {"distance", "log", "riesz", "cosine", "nearest"}:
            angles = self.square_distances(a, b, directions=True)
            tallies |= self._fold_directions(rows, columns, pairs, angles)
        if "nearest" in self.quantities:
            tallies["nearest"] = self._nearest(rows, columns, pairs, squares, angles)
        return PairStats(**tallies)

    def _fold_distances(
        self, rows: slice, columns: slice, pairs: Array, squares: Array
    ) -> dict[str, Any]:
        xp = self._xp
        apart = pairs & self.apart(rows, columns, squares)
        n_pairs = int(xp.count_nonzero(pairs))
        tallies: dict[str, Any] = {
            "n_pairs": n_pairs,
            "coincident_means": n_pairs - int(xp.count_nonzero(apart)),
        }
        if "cdnv" in self.quantities:
            varied = apart & self._both_known(self._variances, rows, columns)
            values = self._mean_of_pair(self._variances, rows, columns)[varied]
            values = values / squares[varied] ** self._dist_exp
            tallies["cdnv"] = Tally.of(values)
            tallies["top_cdnv"] = self._top(values, varied, rows, columns)
        if "cdnv_corrected" in self.quantities:
            corrected, error = self._corrected
            errors = 2.0 * self._mean_of_pair(error, rows, columns)
            reduced = squares - errors
            both = self._both_known(corrected, rows, columns)
            good = pairs & both & self.apart(rows, columns, reduced)
            # Where the correction takes all but the last digits, nothing of the distance is known.
            good = good & (reduced > _NO_DIGITS * (squares + errors))
            values = self._mean_of_pair(corrected, rows, columns)[good]
            tallies["cdnv_corrected"] = Tally.of(values / reduced[good] ** self._dist_exp)
        if "cdnv_directional" in self.quantities:
            along = self._square_along(rows, columns)
            lengths = squares[apart]
            tallies["cdnv_directional"] = Tally.of(along[apart] / lengths / lengths)
        return tallies

    def _square_along(self, rows: slice, columns: slice) -> Array:
        """Compute (m_i - m_j)^T S_W (m_i - m_j) of a tile."""
        xp = self._xp
        a = take_rows(self.within, rows)
        b = take_rows(self.within, columns)
        total = self._square_within[rows][:, None] + self._square_within[columns][None, :]
        along = total - 2.0 * xp.matmul(a, xp.matrix_transpose(b))
        lost = along < LOST_IN_FLOAT64 * total
        if bool(xp.any(lost)):
            along[lost] = square_differences(a, b, lost)
        return along

    def _fold_directions(
        self, rows: slice, columns: slice, pairs: Array, angles: Array
    ) -> dict[str, Any]:
        xp = self._xp
        directed = pairs & self.directed(rows, columns)
        squares = angles[directed]
        logs = -0.5 * xp.log(squares[squares > 2.0 * COINCIDENT])
        tallies: dict[str, Any] = {}
        if self.quantities & {"log", "riesz"}:
            tallies["coincident_directions"] = squares.shape[0] - logs.shape[0]
        if "distance" in self.quantities:
            tallies["distance"] = Tally.of(xp.sqrt(squares))
        if "log" in self.quantities:
            tallies["log"] = Tally.of(logs)
        if "riesz" in self.quantities:
            tallies["riesz"] = self._riesz(logs)
        if "cosine" in self.quantities:
            cosines = 1.0 - 0.5 * squares
            tallies["cosine"] = Tally.of(cosines)
            tallies["deviation"] = Tally.of(xp.abs(cosines + 1.0 / (self.n_classes - 1)))
            tallies["uniformity"] = Tally.of(xp.exp(-2.0 * squares))
            tallies["top_cosine"] = self._top(cosines, directed, rows, columns)
            bins = np.clip((to_numpy(cosines) + 1.0) * (0.5 * COSINE_BINS), 0, COSINE_BINS - 1)
            tallies["histogram"] = np.bincount(bins.astype(np.int64), minlength=COSINE_BINS)
        return tallies

    def _both_known(self, values: Array, rows: slice, columns: slice) -> Array:
        """Mark the pairs of a tile of which both classes have a value; -1 stands for none."""
        return (values[rows] >= 0.0)[:, None] & (values[columns] >= 0.0)[None, :]

    def _mean_of_pair(self, values: Array, rows: slice, columns: slice) -> Array:
        return 0.5 * (values[rows][:, None] + values[columns][None, :])

    def _riesz(self, logs: Array) -> Tally:
        """Tally sign(s) exp(s log(1/|u_i - u_j|)), scaled by its largest value."""
        s = self._riesz_exponent
        if logs.shape[0] == 0:
            return Tally()
        largest = scalar(self._xp.max(s * logs))
        sign = math.copysign(1.0, s) if s else 0.0
        return Tally.of(sign * self._xp.exp(s * logs - largest), largest)

    def _top(self, values: Array, mask: Array, rows: slice, columns: slice) -> TopPairs:
        i, j = map(to_numpy, self._xp.nonzero(mask))
        host = to_numpy(values)
        large = np.arange(len(host))
        if len(host) > TOP_PAIRS:  # sorting all of a tile would take longer than its product
            large = np.flatnonzero(host >= np.partition(host, -TOP_PAIRS)[-TOP_PAIRS])
        kept = large[np.argsort(-host[large], kind="stable")[:TOP_PAIRS]]
        classes = np.stack([i[kept] + rows.start, j[kept] + columns.start], axis=1)
        return TopPairs(host[kept], classes.astype(np.int64))

    def _nearest(
        self, rows: slice, columns: slice, pairs: Array, squares: Array, angles: Array
    ) -> Nearest:
        xp = self._xp
        squares = xp.where(pairs, squares, xp.inf)
        angles = xp.where(pairs & self.directed(rows, columns), angles, xp.inf)
        state = Nearest.none(self.n_classes)
        for axis, mine, others in ((1, rows, columns), (0, columns, rows)):
            square = to_numpy(xp.min(squares, axis=axis))
            index = to_numpy(xp.argmin(squares, axis=axis)) + others.start
            index[~np.isfinite(square)] = -1
            side = self._nearest_to(mine, index, square, to_numpy(xp.min(angles, axis=axis)))
            state = state.merge(side)
        return state

    def _nearest_to(self, classes: slice, index: Array, square: Array, angle: Array) -> Nearest:
        nearest = Nearest.none(self.n_classes)
        nearest.index[classes] = index
        nearest.square[classes] = square
        nearest.direction_square[classes] = angle
        return nearest

    @cached_property
    def _corrected(self) -> tuple[Array, Array]:
        """V of ddof 1, or -1 for fewer than two samples, and V/n of it, the error of a mean."""
        xp = self._xp
        several = self._counts > 1.5
        n = xp.where(several, self._counts, 2.0)
        unbiased = self._variances * ((n - self._ddof) / (n - 1.0))
        return xp.where(several, unbiased, -1.0), xp.where(several, unbiased / n, 0.0)

    def _read_rows(
        self, tiles: Iterable[tuple[slice, slice]]
    ) -> Iterator[tuple[slice, _Operand, slice]]:
        """Read the rows of tiles once for all tiles in a row."""
        last: slice | None = None
        for rows, columns in tiles:
            if rows != last:
                last = rows
                operand = self._operand(rows)
            yield rows, operand, columns

    def _operand(self, classes: slice) -> _Operand:
        means = np.ascontiguousarray(take_rows(self.means, classes), np.float64)
        within = self._none if self.within is None else take_rows(self.within, classes)
        if self._copies is not None:
            return _Operand(means, self._copies[0][classes], within, self._copies[1][classes])
        centred = np.empty(means.shape, self._products)
        # Subtracted in float64, without an array of that.
        np.subtract(means, self.center, out=centred, casting="same_kind")
        return _Operand(means, centred, within, within.astype(self._products, copy=False))

    @cached_property
    def _copies(self) -> tuple[Array, Array] | None:
        """Operands of float32 of all classes, of means in memory: half their size."""
        if self.stored or self._products != np.float32:
            return None
        centred = np.empty(self.means.shape, np.float32)
        np.subtract(self.means, self.center, out=centred, casting="same_kind")
        return centred, (self._none if self.within is None else self.within).astype(np.float32)

    @cached_property
    def _none(self) -> Array:
        return np.empty((0, self.n_features))

    @cached_property
    def _vectors(self) -> kernel.ClassVectors:
        return kernel.ClassVectors(
            self._square,
            COINCIDENT * self._size,
            self._inverse,
            self._variances,
            *self._corrected,
            self._square_within,
        )

    @cached_property
    def _numbers(self) -> kernel.Numbers:
        lost = _LOST_IN_FLOAT32 if self._products == np.float32 else LOST_IN_FLOAT64
        coherence = 1.0 / max(self.n_classes - 1, 1)
        return kernel.Numbers(self._dist_exp, self._riesz_exponent, coherence, lost, COINCIDENT)

    @cached_property
    def _wanted(self) -> kernel.Wanted:
        alone = {q: q in self.quantities for q in kernel.Wanted._fields if q != "sphere"}
        return kernel.Wanted(sphere=bool(self.quantities & {"distance", "log"}), **alone)

    @cached_property
    def _references(self) -> Array:
        """Numbers near the means, from a sample of the pairs."""
        # Sums of squares about a number near the mean lose no digits; which number does not matter.
        sample = slice(0, min(self.n_classes, _SAMPLE_CLASSES))
        operand = self._operand(sample)
        out = self._run_kernel(sample, operand, sample, operand, np.zeros(kernel.N_SUMS))
        sums = out.sums.sum(axis=0)
        counts = out.counts.sum(axis=0)
        references = np.zeros(kernel.N_SUMS)
        for column, counted in kernel.TALLIES.values():
            if counts[counted]:
                references[column] = sums[column] / counts[counted]
        # All are positive: nothing cancels, and the kernel subtracts nothing.
        references[kernel.UNIFORM] = 0.0
        return references

    def _run_kernel(
        self, rows: slice, a: _Operand, columns: slice, b: _Operand, references: Array
    ) -> kernel.Outputs:
        gram = a.centred @ b.centred.T
        gram_within = np.empty((0, 0), self._products)
        if self.within is not None:
            gram_within = a.within_product @ b.within_product.T
        n_rows, n_columns = gram.shape
        out = kernel.Outputs.empty(n_rows, n_columns, COSINE_BINS, TOP_PAIRS)
        kernel.sweep_tile(
            gram,
            gram_within,
            rows.start,
            columns.start,
            kernel.Side(a.means, a.within),
            kernel.Side(b.means, b.within),
            self.center,
            self._vectors,
            self._numbers,
            references,
            self._wanted,
            out,
        )
        return out

    def _fold_compiled(self, rows: slice, a: _Operand, columns: slice) -> PairStats:
        b = a if rows == columns else self._operand(columns)
        out = self._run_kernel(rows, a, columns, b, self._references)
        tallies = self._tallies(out)
        if "nearest" in self.quantities:
            mine = self._nearest_to(rows, out.near_at, *out.near.T)
            theirs = self._nearest_to(columns, out.column_near_at, *out.column_near)
            tallies["nearest"] = theirs.merge(mine)
        return PairStats(
            **tallies,
            histogram=out.histogram,
            top_cdnv=_top_pairs(out.top[0], out.top_at[0]),
            top_cosine=_top_pairs(out.top[1], out.top_at[1]),
        )

    def _tallies(self, out: kernel.Outputs) -> dict[str, Any]:
        """Sum what the kernel wrote of a tile over its rows."""
        sums = out.sums.sum(axis=0)
        counts = out.counts.sum(axis=0).tolist()
        lows = out.extremes[:, ::2].min(axis=0).tolist()
        highs = out.extremes[:, 1::2].max(axis=0).tolist()
        limits = list(zip(lows, highs, strict=True))
        nearest, farthest = limits[kernel.SQUARE_RANGE // 2]
        cosines = limits[kernel.COSINE_RANGE // 2]
        ranges = {
            "cdnv": limits[kernel.CDNV_RANGE // 2],
            "interference": limits[kernel.INNER_RANGE // 2],
            "distance": (math.sqrt(nearest), math.sqrt(max(farthest, 0.0))),
            "log": limits[kernel.LOG_RANGE // 2],
            "cosine": cosines,
            "deviation": (-math.inf, max(abs(end + self._numbers.coherence) for end in cosines)),
            "uniformity": (math.exp(-2.0 * farthest), math.exp(-2.0 * nearest)),
        }
        # The kernel finds products always, distances and logarithms together.
        unasked = {"interference", "distance", "log"} - self.quantities
        tallies: dict[str, Any] = {
            name: Tally.of_sums(
                counts[counted],
                float(sums[column]),
                float(sums[column + 1]),
                float(self._references[column]),
                ranges.get(name, (-math.inf, math.inf)),
            )
            for name, (column, counted) in kernel.TALLIES.items()
            if name not in unasked
        }
        tallies["n_pairs"] = counts[kernel.PAIRS]
        tallies["coincident_means"] = counts[kernel.COINCIDENT]
        n_apart = counts[kernel.DIRECTIONS_APART]
        if self.quantities & {"log", "riesz"}:
            tallies["coincident_directions"] = counts[kernel.DIRECTIONS] - n_apart
        if "riesz" in self.quantities and n_apart:
            tallies["riesz"] = self._riesz_of(out, n_apart, ranges["log"])
        return tallies

    def _riesz_of(self, out: kernel.Outputs, n: int, logs: tuple[float, float]) -> Tally:
        """Bring the rows' sums to one scale; energies grow with the logarithms, whatever s is."""
        s = self._riesz_exponent
        scale = float(out.scales.max())
        factors = np.exp(np.maximum(out.scales - scale, -1000.0))
        sign = math.copysign(1.0, s) if s else 0.0
        total = float(out.sums[:, kernel.RIESZ] @ factors)
        squares = float(out.sums[:, kernel.RIESZ2] @ factors**2)
        extremes = (sign * math.exp(s * logs[0] - scale), sign * math.exp(s * logs[1] - scale))
        return Tally.of_sums(n, sign * total, sign * sign * squares, 0.0, extremes, scale)


def sweep_pairs(
    means: Array,
    center: Array | float = 0.0,
    variances: Array | None = None,
    *,
    tile_classes: int | None = None,
    **options: Any,
) -> PairStats:
    """Sweep all pairs of class means.

    Parameters
    ----------
    means, center, variances
        As for `PairTiles`.
    tile_classes : int, optional
        Classes of a tile's side.
    **options
        Further arguments of `PairTiles`.
    """
    pairs = PairTiles(means, center, variances, **options)
    return pairs.fold(pairs.tiles(tile_classes))


def _top_pairs(values: Any, classes: Any) -> TopPairs:
    real = values > -np.inf
    return TopPairs.none().merge(TopPairs(values[real], classes[real]))
