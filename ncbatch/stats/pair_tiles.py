"""The pair sweep: tiles of class pairs, one product each, all reductions fused on the tile."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from array_api_compat import device, is_numpy_array

from ncbatch.arrays import (
    Array,
    as_float64,
    block_rows,
    cpu_count,
    map_threads,
    max_pending,
    product_rows,
    row_blocks,
    scalar,
    take_rows,
    to_numpy,
)
from ncbatch.errors import DataError, UsageError
from ncbatch.stats.pair_means import (
    COINCIDENT,
    LOST_IN_FLOAT64,
    PairMeans,
    square_differences,
)
from ncbatch.stats.pairs import (
    COSINE_BINS,
    PAIR_QUANTITIES,
    TOP_PAIRS,
    Nearest,
    PairStats,
    TopPairs,
)
from ncbatch.stats.tally import Tally

# Classes of a tile's side: few fit the cache; many are products at full speed; and of stored means
# each row is read once per tile, so that wider tiles leave reading small beside the work.
_FEW_SIDE, _MANY_SIDE, _STORED_SIDE = 512, 1024, 2048
# With fewer classes the sweep takes less time than loading compiled code.
_COMPILED_CLASSES = 2048
# What the compiler holds when it has just compiled the kernel.
_COMPILER_BYTES = 288 * 2**20
# Below this share of |a|^2 + |b|^2 a squared distance from products is computed anew.
_LOST_IN_FLOAT32 = 0.05
_SAMPLE_CLASSES = 128
# Below this share of its terms a corrected squared distance is rounding error.
_NO_DIGITS = 1e-9


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
        V_c; needed by the quantities ``cdnv`` and ``cdnv_corrected``.
    counts : array (K,), optional
        n_c; needed by ``cdnv_corrected``.
    within : array (D, D), optional
        S_W; needed by ``cdnv_directional``.
    quantities : iterable of str, optional
        Which of `PAIR_QUANTITIES`; by default all that the arguments allow.
    dist_exp : float, optional
        p of the CDNV.
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
        self._variances = None if variances is None else as_float64(variances)
        self._counts = None if counts is None else as_float64(counts)
        self._dist_exp = float(dist_exp)
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
        """Give the tiles of so many classes, in the order of `tiles`."""
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
        operands = copies or operand * (cpu_count() + _rows_in_flight())
        return fixed + operands + tile * cpu_count() + states + _COMPILER_BYTES

    def tiles(self, tile_classes: int | None = None) -> Iterator[tuple[slice, slice]]:
        """Give the tiles of the upper triangle as pairs of class slices, in a fixed order."""
        tile_classes = tile_classes or self.side(self.n_classes, stored=self.stored)
        return _upper_tiles(self.n_classes, tile_classes)

    def fold(self, tiles: Iterable[tuple[slice, slice]]) -> PairStats:
        """Tally the pairs i < j of some tiles, on all processors; merged in their order."""
        if self._compiled:
            self.prepare()
            folded = map_threads(lambda sides: self._fold_compiled(*sides), self._read_rows(tiles))
        else:
            folded = (self._fold_arrays(*tile) for tile in tiles)
        return functools.reduce(PairStats.merge, folded, PairStats.zero())

    # ------------------------------------------------------------ any array library, in float64

    def _fold_arrays(self, rows: slice, columns: slice) -> PairStats:
        xp = self._xp
        place = {"device": device(self.means)}
        i = xp.arange(rows.start, rows.stop, **place)
        j = xp.arange(columns.start, columns.stop, **place)
        pairs = i[:, None] < j[None, :]
        a = self.block(rows)
        b = a if rows == columns else self.block(columns)
        found: dict[str, Any] = {}
        if "interference" in self.quantities:
            found["interference"] = Tally.of(self.interference(a, b)[pairs])
        if self.quantities & {"cdnv", "cdnv_corrected", "cdnv_directional", "nearest"}:
            squares = self.square_distances(a, b)
            found |= self._fold_distances(rows, columns, pairs, squares)
        if self.quantities & {"distance", "log", "riesz", "cosine", "nearest"}:
            angles = self.square_distances(a, b, directions=True)
            found |= self._fold_directions(rows, columns, pairs, angles)
        if "nearest" in self.quantities:
            found["nearest"] = self._nearest(rows, columns, pairs, squares, angles)
        return PairStats(**found)

    def _fold_distances(
        self, rows: slice, columns: slice, pairs: Array, squares: Array
    ) -> dict[str, Any]:
        xp = self._xp
        apart = pairs & self.apart(rows, columns, squares)
        lengths = squares[apart]
        found: dict[str, Any] = {}
        if "cdnv" in self.quantities:
            values = self._mean_of_pair(self._variances, rows, columns)[apart]
            values = values / lengths**self._dist_exp
            found["cdnv"] = Tally.of(values)
            found["coincident_means"] = int(xp.count_nonzero(pairs)) - values.shape[0]
            found["top_cdnv"] = self._top(values, apart, rows, columns)
        if "cdnv_corrected" in self.quantities:
            corrected, error = self._corrected
            errors = 2.0 * self._mean_of_pair(error, rows, columns)
            left = squares - errors
            both = (corrected[rows] >= 0.0)[:, None] & (corrected[columns] >= 0.0)[None, :]
            good = pairs & both & self.apart(rows, columns, left)
            good = good & (left > _NO_DIGITS * (squares + errors))
            values = self._mean_of_pair(corrected, rows, columns)[good]
            found["cdnv_corrected"] = Tally.of(values / left[good] ** self._dist_exp)
        if "cdnv_directional" in self.quantities:
            along = self._square_along(rows, columns)
            found["cdnv_directional"] = Tally.of(along[apart] / lengths / lengths)
        return found

    def _square_along(self, rows: slice, columns: slice) -> Array:
        """Give (m_i - m_j)^T S_W (m_i - m_j) of a tile."""
        xp = self._xp
        a, b = take_rows(self.within, rows), take_rows(self.within, columns)
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
        found: dict[str, Any] = {}
        if self.quantities & {"log", "riesz"}:
            found["coincident_directions"] = squares.shape[0] - logs.shape[0]
        if "distance" in self.quantities:
            found["distance"] = Tally.of(xp.sqrt(squares))
        if "log" in self.quantities:
            found["log"] = Tally.of(logs)
        if "riesz" in self.quantities:
            found["riesz"] = self._riesz(logs)
        if "cosine" in self.quantities:
            cosines = 1.0 - 0.5 * squares
            found["cosine"] = Tally.of(cosines)
            found["deviation"] = Tally.of(xp.abs(cosines + 1.0 / (self.n_classes - 1)))
            found["uniformity"] = Tally.of(xp.exp(-2.0 * squares))
            found["top_cosine"] = self._top(cosines, directed, rows, columns)
            bins = np.clip((to_numpy(cosines) + 1.0) * (0.5 * COSINE_BINS), 0, COSINE_BINS - 1)
            found["histogram"] = np.bincount(bins.astype(np.int64), minlength=COSINE_BINS)
        return found

    def _mean_of_pair(self, values: Array, rows: slice, columns: slice) -> Array:
        return 0.5 * (values[rows][:, None] + values[columns][None, :])

    def _riesz(self, logs: Array) -> Tally:
        """Tally sign(s) exp(s log(1/|u_i - u_j|)), scaled by its largest value."""
        xp, s = self._xp, self._riesz_exponent
        if logs.shape[0] == 0:
            return Tally()
        largest = scalar(xp.max(s * logs))
        sign = math.copysign(1.0, s) if s else 0.0
        return Tally.of(sign * xp.exp(s * logs - largest), largest)

    def _top(self, values: Array, mask: Array, rows: slice, columns: slice) -> TopPairs:
        i, j = (to_numpy(at) for at in self._xp.nonzero(mask))
        host = to_numpy(values)
        kept = np.argsort(-host, kind="stable")[:TOP_PAIRS]
        classes = np.stack([i[kept] + rows.start, j[kept] + columns.start], axis=1)
        return TopPairs(host[kept], classes.astype(np.int64))

    def _nearest(
        self, rows: slice, columns: slice, pairs: Array, squares: Array, angles: Array
    ) -> Nearest:
        xp, k = self._xp, self.n_classes
        squares = xp.where(pairs, squares, xp.inf)
        angles = xp.where(pairs & self.directed(rows, columns), angles, xp.inf)
        state = Nearest.none(k)
        for axis, mine, others in ((1, rows, columns), (0, columns, rows)):
            side = Nearest.none(k)
            side.square[mine] = to_numpy(xp.min(squares, axis=axis))
            side.index[mine] = to_numpy(xp.argmin(squares, axis=axis)) + others.start
            side.direction_square[mine] = to_numpy(xp.min(angles, axis=axis))
            side.index[~np.isfinite(side.square)] = -1
            state = state.merge(side)
        return state

    @cached_property
    def _corrected(self) -> tuple[Array, Array]:
        """V n/(n-1), or -1 for fewer than two samples, and V/(n-1), the error of a mean."""
        xp = self._xp
        assert self._variances is not None
        assert self._counts is not None
        several = self._counts > 1.5
        n = xp.where(several, self._counts, xp.full_like(self._counts, 2.0))
        corrected = xp.where(several, self._variances * n / (n - 1.0), xp.full_like(n, -1.0))
        return corrected, xp.where(several, self._variances / (n - 1.0), xp.zeros_like(n))

    # ------------------------------------------------------------------- the CPU, one fused pass

    def prepare(self) -> None:
        """Compute what the tiles share, before threads do."""
        _ = self._copies, self._vectors, self._references

    def _read_rows(
        self, tiles: Iterable[tuple[slice, slice]]
    ) -> Iterator[tuple[slice, _Operand, slice]]:
        """Read the rows of tiles once for all tiles in a row."""
        last: slice | None = None
        for rows, columns in tiles:
            if rows != last:
                last, operand = rows, self._operand(rows)
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
    def _vectors(self) -> tuple[Array, ...]:
        """The arrays over classes that the kernel reads."""
        nothing = np.zeros(self.n_classes)
        variances = nothing if self._variances is None else self._variances
        corrected = (nothing, nothing)
        if "cdnv_corrected" in self.quantities:
            corrected = self._corrected
        return (
            self._square, COINCIDENT * self._size, self._inverse,
            variances, *corrected, self._square_within,
        )  # fmt: skip

    @cached_property
    def _references(self) -> Array:
        """Numbers near the means, from a sample of the pairs."""
        from ncbatch.stats import pair_kernel as kernel

        some = slice(0, min(self.n_classes, _SAMPLE_CLASSES))
        operand = self._operand(some)
        out = self._run_kernel(some, operand, some, operand, np.zeros(kernel.N_SUMS))
        sums, counts = out[0].sum(axis=0), out[1].sum(axis=0)
        references = np.zeros(kernel.N_SUMS)
        for column, counted in kernel.REFERENCED.items():
            if counts[counted]:
                references[column] = sums[column] / counts[counted]
        return references

    def _run_kernel(
        self, rows: slice, a: _Operand, columns: slice, b: _Operand, references: Array
    ) -> tuple[Array, ...]:
        # Compiled code is loaded only where a sweep runs.
        from ncbatch.stats import pair_kernel as kernel

        wanted = self.quantities
        gram = a.centred @ b.centred.T
        gram_w = np.empty((0, 0), self._products)
        if self.within is not None:
            gram_w = a.within_product @ b.within_product.T
        n_rows, n_columns = gram.shape
        out = kernel.outputs(n_rows, n_columns, COSINE_BINS, TOP_PAIRS)
        lost = _LOST_IN_FLOAT32 if self._products == np.float32 else LOST_IN_FLOAT64
        coherence = 1.0 / max(self.n_classes - 1, 1)
        kernel.sweep_tile(
            gram, gram_w, rows.start, columns.start,
            (a.means, a.within), (b.means, b.within), self.center, *self._vectors,
            (self._dist_exp, self._riesz_exponent, coherence, lost, COINCIDENT),
            references,
            (
                "cdnv" in wanted,
                bool(wanted & {"distance", "log"}),
                "riesz" in wanted,
                "cosine" in wanted,
                "cdnv_corrected" in wanted,
                "cdnv_directional" in wanted,
                "nearest" in wanted,
            ),
            out,
        )  # fmt: skip
        return out

    def _fold_compiled(self, rows: slice, a: _Operand, columns: slice) -> PairStats:
        from ncbatch.stats import pair_kernel as kernel

        b = a if rows == columns else self._operand(columns)
        out = self._run_kernel(rows, a, columns, b, self._references)
        return kernel.summarise(
            out, self.quantities, self._references, self._riesz_exponent,
            rows.start, columns.start, self.n_classes,
        )  # fmt: skip


def _upper_tiles(n_classes: int, side: int) -> Iterator[tuple[slice, slice]]:
    for rows in row_blocks(n_classes, side):
        for columns in row_blocks(n_classes, side):
            if columns.start >= rows.start:
                yield rows, columns


def _rows_in_flight() -> int:
    """Count the rows of tiles that the tasks of all threads span, at the triangle's corner."""
    return math.isqrt(2 * max_pending()) + 2


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
