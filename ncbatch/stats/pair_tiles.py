"""The pair sweep: tiles of class pairs, one product each, all reductions fused on the tile."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Any

import numpy as np
from array_api_compat import device, is_numpy_array

from ncbatch.arrays import (
    Array,
    as_float64,
    cpu_count,
    map_threads,
    max_pending,
    namespace,
    row_blocks,
    scalar,
    to_numpy,
)
from ncbatch.errors import DataError, UsageError
from ncbatch.stats.pairs import (
    COSINE_BINS,
    PAIR_QUANTITIES,
    TOP_PAIRS,
    Nearest,
    PairStats,
    TopPairs,
)
from ncbatch.stats.tally import Tally

# Classes of a tile's side: compiled, its product runs at full speed; in arrays, it fits the cache.
_COMPILED_TILE, _ARRAYS_TILE = 1024, 512
# With fewer classes the sweep takes less time than loading compiled code.
_COMPILED_CLASSES = 2048
# What the compiler holds when it has just compiled the kernel.
_COMPILER_BYTES = 288 * 2**20
# A squared distance at or below this share of |a|^2 + |b|^2 counts as zero: the means coincide.
COINCIDENT = 1e-24
# Below this share of |a|^2 + |b|^2 a squared distance from products is computed anew.
_LOST_IN_FLOAT64 = 1e-7
_LOST_IN_FLOAT32 = 0.05
_SAMPLE_CLASSES = 128
# Below this share of its terms a corrected squared distance is rounding error.
_NO_DIGITS = 1e-9


class PairTiles:
    """The means of a pair sweep, prepared once, and the statistics of its tiles.

    Parameters
    ----------
    means : array (K, D)
        Class means.
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
        xp = self._xp = namespace(means)
        place = {"device": device(means)}
        self.means = as_float64(means)
        self.n_classes, self.n_features = means.shape
        self.center = xp.zeros((self.n_features,), dtype=xp.float64, **place) + center
        self._variances = None if variances is None else as_float64(variances)
        self._counts = None if counts is None else as_float64(counts)
        self._set_norms()
        self._within = self._rooted(within) if "cdnv_directional" in self.quantities else None
        self._dist_exp = float(dist_exp)
        self._riesz_exponent = float(self.n_features - 2)
        if compiled is None:
            compiled = is_numpy_array(means) and self.n_classes > _COMPILED_CLASSES
        self._compiled = compiled
        # With more classes than an ETF can have no variance is so small that float32 shows in it.
        many = self.n_classes > max(_COMPILED_CLASSES, self.n_features + 1)
        self._products = np.dtype(products or (np.float32 if many else np.float64))

    def _set_norms(self) -> None:
        xp = self._xp
        self._size = xp.sum(self.means**2, axis=1)
        self._square = xp.empty_like(self._size)
        for part in row_blocks(self.n_classes):
            self._square[part] = xp.sum((self.means[part, :] - self.center) ** 2, axis=1)
        directed = self._square > COINCIDENT * (self._size + xp.sum(self.center**2))
        norms = xp.sqrt(xp.where(directed, self._square, xp.ones_like(self._square)))
        self._inverse = xp.where(directed, 1.0 / norms, xp.zeros_like(norms))

    def _rooted(self, within: Array) -> Array:
        """Give rows whose squared distances are (m_i - m_j)^T S_W (m_i - m_j)."""
        xp = self._xp
        values, vectors = xp.linalg.eigh(as_float64(within))
        root = vectors * xp.sqrt(xp.clip(values, 0.0, None))[None, :]
        rows = xp.empty_like(self.means)
        for part in row_blocks(self.n_classes):
            rows[part, :] = xp.matmul(self.means[part, :] - self.center, root)
        return rows

    @staticmethod
    def peak_bytes(
        n_classes: int,
        n_features: int,
        quantities: Iterable[str],
    ) -> int:
        """Price a sweep on the CPU beside its means: bytes at its peak."""
        directional = 2 if "cdnv_directional" in quantities else 1
        operands = n_classes * n_features * 8 * (2 * directional - 1)
        operands += n_classes * 256 + n_features**2 * 8 * 3 * (directional - 1)
        if n_classes > _COMPILED_CLASSES:
            itemsize = 4 if n_classes > n_features + 1 else 8
            tile = _COMPILED_TILE * (_COMPILED_TILE * itemsize * directional + 1024)
            states = 3 * max_pending() * n_classes * 24 if "nearest" in quantities else 0
            return operands + tile * cpu_count() + states + _COMPILER_BYTES
        return operands + min(_ARRAYS_TILE, n_classes) ** 2 * 8 * 16

    def tiles(self, tile_classes: int | None = None) -> Iterator[tuple[slice, slice]]:
        """Give the tiles of the upper triangle as pairs of class slices, in a fixed order."""
        tile_classes = tile_classes or (_COMPILED_TILE if self._compiled else _ARRAYS_TILE)
        for rows in row_blocks(self.n_classes, tile_classes):
            for columns in row_blocks(self.n_classes, tile_classes):
                if columns.start >= rows.start:
                    yield rows, columns

    def fold(self, tiles: Iterable[tuple[slice, slice]]) -> PairStats:
        """Tally the pairs i < j of some tiles, on all processors; merged in their order."""
        if self._compiled:
            self.prepare()
            folded = map_threads(lambda tile: self._fold_compiled(*tile), tiles)
        else:
            folded = (self._fold_arrays(*tile) for tile in tiles)
        return functools.reduce(PairStats.merge, folded, PairStats.zero())

    # ------------------------------------------------------------ any array library, in float64

    def square_distances(
        self, rows: slice | Array, columns: slice, *, directions: bool = False
    ) -> Array:
        """Give |m_i - m_j|^2, or |u_i - u_j|^2, of a tile to full float64 accuracy.

        The rows may be an integer array of classes. Distances that cancelled in the product are computed from differences.
        """
        xp = self._xp
        means_a, means_b = _at(self.means, rows), self.means[columns, :]
        a, b = means_a - self.center, means_b - self.center
        total = _at(self._square, rows)[:, None] + self._square[columns][None, :]
        if directions:
            a, b = a * _at(self._inverse, rows)[:, None], b * self._inverse[columns][:, None]
            total = xp.full_like(total, 2.0)
        squares = xp.clip(total - 2.0 * xp.matmul(a, xp.matrix_transpose(b)), 0.0, None)
        lost = squares < _LOST_IN_FLOAT64 * total
        if bool(xp.any(lost)):
            if not directions:
                a, b = means_a, means_b
            squares[lost] = self._from_differences(a, b, lost)
        return squares

    def _from_differences(self, a: Array, b: Array, lost: Array) -> Array:
        xp = self._xp
        at_i, at_j = xp.nonzero(lost)
        parts = []
        for part in row_blocks(at_i.shape[0]):
            apart = xp.take(a, at_i[part], axis=0) - xp.take(b, at_j[part], axis=0)
            parts.append(xp.sum(apart * apart, axis=1))
        return xp.concat(parts)

    def apart(self, rows: slice | Array, columns: slice, squares: Array) -> Array:
        """Mark the pairs of a tile whose means do not coincide."""
        size = _at(self._size, rows)[:, None] + self._size[columns][None, :]
        return squares > COINCIDENT * size

    def directed(self, rows: slice, columns: slice) -> Array:
        """Mark the pairs of a tile of which both means differ from the center."""
        return (self._inverse[rows] > 0.0)[:, None] & (self._inverse[columns] > 0.0)[None, :]

    def interference(self, rows: slice, columns: slice) -> Array:
        """Give the products of centred means of a tile."""
        xp = self._xp
        a, b = self.means[rows, :] - self.center, self.means[columns, :] - self.center
        return xp.matmul(a, xp.matrix_transpose(b))

    def _fold_arrays(self, rows: slice, columns: slice) -> PairStats:
        xp = self._xp
        place = {"device": device(self.means)}
        i = xp.arange(rows.start, rows.stop, **place)
        j = xp.arange(columns.start, columns.stop, **place)
        pairs = i[:, None] < j[None, :]
        found: dict[str, Any] = {}
        if "interference" in self.quantities:
            found["interference"] = Tally.of(self.interference(rows, columns)[pairs])
        if self.quantities & {"cdnv", "cdnv_corrected", "cdnv_directional", "nearest"}:
            found |= self._fold_distances(rows, columns, pairs)
        if self.quantities & {"distance", "log", "riesz", "cosine", "nearest"}:
            found |= self._fold_directions(rows, columns, pairs)
        if "nearest" in self.quantities:
            found["nearest"] = self._nearest(rows, columns, pairs)
        return PairStats(**found)

    def _fold_distances(self, rows: slice, columns: slice, pairs: Array) -> dict[str, Any]:
        xp = self._xp
        squares = self.square_distances(rows, columns)
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
        if self._within is not None:
            a, b = self._within[rows, :], self._within[columns, :]
            along = xp.sum(a * a, axis=1)[:, None] + xp.sum(b * b, axis=1)[None, :]
            total = along + 0.0
            along = along - 2.0 * xp.matmul(a, xp.matrix_transpose(b))
            lost = along < _LOST_IN_FLOAT64 * total
            if bool(xp.any(lost)):
                along[lost] = self._from_differences(a, b, lost)
            found["cdnv_directional"] = Tally.of(along[apart] / lengths / lengths)
        return found

    def _fold_directions(self, rows: slice, columns: slice, pairs: Array) -> dict[str, Any]:
        xp = self._xp
        directed = pairs & self.directed(rows, columns)
        squares = self.square_distances(rows, columns, directions=True)[directed]
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

    def _nearest(self, rows: slice, columns: slice, pairs: Array) -> Nearest:
        xp, k = self._xp, self.n_classes
        squares = xp.where(pairs, self.square_distances(rows, columns), xp.inf)
        angles = self.square_distances(rows, columns, directions=True)
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
        _ = self._rows, self._rows_within, self._vectors, self._references

    @cached_property
    def _rows(self) -> Array:
        """Centred means in the dtype of the products (K, D)."""
        rows = np.empty(self.means.shape, self._products)
        for part in row_blocks(self.n_classes):
            rows[part] = self.means[part] - self.center
        return rows

    @cached_property
    def _rows_within(self) -> Array:
        return None if self._within is None else self._within.astype(self._products, copy=False)

    @cached_property
    def _vectors(self) -> tuple[Array, ...]:
        """The arrays over classes that the kernel reads."""
        nothing = np.zeros(self.n_classes)
        variances = nothing if self._variances is None else self._variances
        corrected = (nothing, nothing)
        if "cdnv_corrected" in self.quantities:
            corrected = self._corrected
        within = np.empty((0, self.n_features)) if self._within is None else self._within
        square_w = nothing if self._within is None else np.sum(within**2, axis=1)
        return (
            self.means, self.center, within, self._square, COINCIDENT * self._size, self._inverse,
            variances, *corrected, square_w,
        )  # fmt: skip

    @cached_property
    def _references(self) -> Array:
        """Numbers near the means, from a sample of the pairs."""
        from ncbatch.stats import pair_kernel as kernel

        some = slice(0, min(self.n_classes, _SAMPLE_CLASSES))
        out = self._run_kernel(some, some, np.zeros(kernel.N_SUMS))
        sums, counts = out[0].sum(axis=0), out[1].sum(axis=0)
        references = np.zeros(kernel.N_SUMS)
        for column, counted in kernel.REFERENCED.items():
            if counts[counted]:
                references[column] = sums[column] / counts[counted]
        return references

    def _run_kernel(self, rows: slice, columns: slice, references: Array) -> tuple[Array, ...]:
        # Compiled code is loaded only where a sweep runs.
        from ncbatch.stats import pair_kernel as kernel

        wanted = self.quantities
        gram = self._rows[rows] @ self._rows[columns].T
        gram_w = np.empty((0, 0), self._products)
        if self._within is not None:
            gram_w = self._rows_within[rows] @ self._rows_within[columns].T
        n_rows, n_columns = gram.shape
        out = kernel.outputs(n_rows, n_columns, COSINE_BINS, TOP_PAIRS)
        lost = _LOST_IN_FLOAT32 if self._products == np.float32 else _LOST_IN_FLOAT64
        coherence = 1.0 / max(self.n_classes - 1, 1)
        kernel.sweep_tile(
            gram, gram_w, rows.start, columns.start, *self._vectors,
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

    def _fold_compiled(self, rows: slice, columns: slice) -> PairStats:
        from ncbatch.stats import pair_kernel as kernel

        out = self._run_kernel(rows, columns, self._references)
        return kernel.summarise(
            out, self.quantities, self._references, self._riesz_exponent,
            rows.start, columns.start, self.n_classes,
        )  # fmt: skip


def _at(values: Array, rows: slice | Array) -> Array:
    if not isinstance(rows, slice):
        return namespace(values).take(values, rows, axis=0)
    return values[rows] if len(values.shape) == 1 else values[rows, :]


def sweep_pairs(
    means: Array,
    center: Array | float = 0.0,
    variances: Array | None = None,
    *,
    tile_classes: int | None = None,
    **options: Any,
) -> PairStats:
    """Sweep all pairs of class means held in memory.

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
