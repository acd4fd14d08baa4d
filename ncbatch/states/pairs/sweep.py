"""The pair sweep: tiles of class pairs, one product each, all reductions fused on the tile."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from array_api_compat import device, is_numpy_array

from ncbatch.arrays.namespace import Array, as_float64, namespace, scalar, to_numpy
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
        self._variances = None if variances is None else _or_minus_one(as_float64(variances))
        self._counts = None if counts is None else as_float64(counts)
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
        return list(_upper_tiles(n_classes, PairTiles.side(n_classes, stored=stored)))

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
        rows = min(_rows_in_flight(), -(-n_classes // side))
        operands = copies or operand * (cpu_count() + rows)
        return fixed + operands + tile * cpu_count() + states + _COMPILER_BYTES

    def tiles(self, tile_classes: int | None = None) -> Iterator[tuple[slice, slice]]:
        """Cut the upper triangle into tiles, pairs of class slices, in a fixed order."""
        tile_classes = tile_classes or self.side(self.n_classes, stored=self.stored)
        return _upper_tiles(self.n_classes, tile_classes)

    def fold(self, tiles: Iterable[tuple[slice, slice]]) -> PairStats:
        """Tally the pairs i < j of some tiles, on all processors; merged in their order."""
        if self._compiled:
            _load_kernel()
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
            side = Nearest.none(self.n_classes)
            side.square[mine] = to_numpy(xp.min(squares, axis=axis))
            side.index[mine] = to_numpy(xp.argmin(squares, axis=axis)) + others.start
            side.direction_square[mine] = to_numpy(xp.min(angles, axis=axis))
            side.index[~np.isfinite(side.square)] = -1
            state = state.merge(side)
        return state

    @cached_property
    def _corrected(self) -> tuple[Array, Array]:
        """V of ddof 1, or -1 for fewer than two samples, and V/n of it, the error of a mean."""
        xp = self._xp
        assert self._variances is not None
        assert self._counts is not None
        several = self._counts > 1.5
        n = xp.where(several, self._counts, xp.full_like(self._counts, 2.0))
        unbiased = self._variances * ((n - self._ddof) / (n - 1.0))
        corrected = xp.where(several, unbiased, xp.full_like(n, -1.0))
        return corrected, xp.where(several, unbiased / n, xp.zeros_like(n))

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
        nothing = np.zeros(self.n_classes)
        variances = nothing if self._variances is None else self._variances
        corrected = (nothing, nothing)
        if "cdnv_corrected" in self.quantities:
            corrected = self._corrected
        return kernel.ClassVectors(
            self._square,
            COINCIDENT * self._size,
            self._inverse,
            variances,
            *corrected,
            self._square_within,
        )

    @cached_property
    def _numbers(self) -> kernel.Numbers:
        lost = _LOST_IN_FLOAT32 if self._products == np.float32 else LOST_IN_FLOAT64
        coherence = 1.0 / max(self.n_classes - 1, 1)
        return kernel.Numbers(self._dist_exp, self._riesz_exponent, coherence, lost, COINCIDENT)

    @cached_property
    def _wanted(self) -> kernel.Wanted:
        return kernel.Wanted(
            cdnv="cdnv" in self.quantities,
            sphere=bool(self.quantities & {"distance", "log"}),
            riesz="riesz" in self.quantities,
            cosine="cosine" in self.quantities,
            corrected="cdnv_corrected" in self.quantities,
            directed="cdnv_directional" in self.quantities,
            nearest="nearest" in self.quantities,
        )

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
        for column, counted in kernel.REFERENCED.items():
            if counts[counted]:
                references[column] = sums[column] / counts[counted]
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
        tallies = _TileSums(out, self._references, self._numbers).tallies(self.quantities)
        if "cosine" in self.quantities:
            tallies["histogram"] = out.histogram
            tallies["top_cosine"] = _top_pairs(out.top[1], out.top_at[1])
        if "cdnv" in self.quantities:
            tallies["top_cdnv"] = _top_pairs(out.top[0], out.top_at[0])
        if "nearest" in self.quantities:
            tallies["nearest"] = _nearest(out, rows, columns, self.n_classes)
        return PairStats(**tallies)


def _load_kernel() -> None:
    """Load compiled code where it runs: numba takes longer than the sweep of a small store."""
    global kernel
    from ncbatch.states.pairs import kernel


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


class _TileSums:
    """What the kernel wrote of a tile, summed over its rows, and the tallies that come of it."""

    def __init__(self, out: kernel.Outputs, references: Array, numbers: kernel.Numbers) -> None:
        self._out = out
        self._references = references
        self._numbers = numbers
        self._sums = out.sums.sum(axis=0)
        self._counts = out.counts.sum(axis=0)
        self._low = out.extremes[:, ::2].min(axis=0)
        self._high = out.extremes[:, 1::2].max(axis=0)

    def tallies(self, wanted: frozenset[str]) -> dict[str, Any]:
        n_directed = int(self._counts[kernel.DIRECTIONS])
        n_apart = int(self._counts[kernel.DIRECTIONS_APART])
        tallies: dict[str, Any] = {
            "n_pairs": int(self._counts[kernel.PAIRS]),
            "coincident_means": int(self._counts[kernel.COINCIDENT]),
        }
        if "cdnv" in wanted:
            tallies["cdnv"] = self._tally(kernel.CDNV, self._limits(kernel.CDNV_RANGE))
        if "cdnv_corrected" in wanted:
            tallies["cdnv_corrected"] = self._tally(kernel.CORRECTED)
        if "cdnv_directional" in wanted:
            tallies["cdnv_directional"] = self._tally(kernel.DIRECTED)
        if "interference" in wanted:
            tallies["interference"] = self._tally(kernel.INNER, self._limits(kernel.INNER_RANGE))
        if "distance" in wanted and n_directed:
            low, high = self._limits(kernel.SQUARE_RANGE)
            tallies["distance"] = self._tally(kernel.DIST, (math.sqrt(low), math.sqrt(high)))
        if "log" in wanted and n_apart:
            tallies["log"] = self._tally(kernel.LOG, self._limits(kernel.LOG_RANGE))
        if wanted & {"log", "riesz"}:
            tallies["coincident_directions"] = n_directed - n_apart
        if "riesz" in wanted and n_apart:
            tallies["riesz"] = self._riesz(n_apart)
        if "cosine" in wanted and n_directed:
            tallies |= self._cosines(n_directed)
        return tallies

    def _limits(self, column: int) -> tuple[float, float]:
        return float(self._low[column // 2]), float(self._high[column // 2])

    def _tally(self, column: int, extremes: tuple[float, float] = (-math.inf, math.inf)) -> Tally:
        return Tally.of_sums(
            int(self._counts[kernel.REFERENCED[column]]),
            float(self._sums[column]),
            float(self._sums[column + 1]),
            float(self._references[column]),
            extremes,
        )

    def _cosines(self, n: int) -> dict[str, Tally]:
        limits = self._limits(kernel.COSINE_RANGE)
        nearest, farthest = self._limits(kernel.SQUARE_RANGE)
        most = max(abs(end + self._numbers.coherence) for end in limits)
        return {
            "cosine": self._tally(kernel.COS, limits),
            "deviation": self._tally(kernel.DEV, (-math.inf, most)),
            "uniformity": Tally.of_sums(
                n,
                float(self._sums[kernel.UNIFORM]),
                float(self._sums[kernel.UNIFORM2]),
                extremes=(math.exp(-2.0 * farthest), math.exp(-2.0 * nearest)),
            ),
        }

    def _riesz(self, n: int) -> Tally:
        """Bring the rows' sums to one scale; energies grow with the logarithms, whatever s is."""
        s = self._numbers.riesz_exponent
        scale = float(self._out.scales.max())
        factors = np.exp(np.maximum(self._out.scales - scale, -1000.0))
        sign = math.copysign(1.0, s) if s else 0.0
        total = float(self._out.sums[:, kernel.RIESZ] @ factors)
        squares = float(self._out.sums[:, kernel.RIESZ2] @ factors**2)
        least, most = (sign * math.exp(s * end - scale) for end in self._limits(kernel.LOG_RANGE))
        return Tally.of_sums(
            n, sign * total, sign * sign * squares, extremes=(least, most), log_scale=scale
        )


def _top_pairs(values: Any, classes: Any) -> TopPairs:
    real = values > -np.inf
    return TopPairs.none().merge(TopPairs(values[real], classes[real]))


def _nearest(out: kernel.Outputs, rows: slice, columns: slice, n_classes: int) -> Nearest:
    mine = Nearest.none(n_classes)
    mine.index[rows] = out.near_at
    mine.square[rows] = out.near[:, 0]
    mine.direction_square[rows] = out.near[:, 1]
    theirs = Nearest.none(n_classes)
    theirs.index[columns] = out.column_near_at
    theirs.square[columns] = out.column_near[0]
    theirs.direction_square[columns] = out.column_near[1]
    return theirs.merge(mine)


def _upper_tiles(n_classes: int, side: int) -> Iterator[tuple[slice, slice]]:
    for rows in row_blocks(n_classes, side):
        for columns in row_blocks(n_classes, side):
            if columns.start >= rows.start:
                yield rows, columns


def _rows_in_flight() -> int:
    """Count the rows of tiles that the tasks of all threads span, at the triangle's corner."""
    return math.isqrt(2 * max_pending()) + 2


def _or_minus_one(values: Array) -> Array:
    """Write -1 for NaN: compiled code does not know it."""
    xp = namespace(values)
    return xp.where(values >= 0.0, values, xp.full_like(values, -1.0))
