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
from array_api_compat import is_numpy_array

from ncbatch.arrays.namespace import Array
from ncbatch.arrays.rows import block_rows, product_rows, row_blocks, take_rows
from ncbatch.arrays.threads import cpu_count, map_threads, max_pending
from ncbatch.states.pairs import outputs as pair_outputs
from ncbatch.states.pairs.arrays import ArrayTiles
from ncbatch.states.pairs.means import COINCIDENT, LOST_IN_FLOAT64
from ncbatch.states.pairs.stats import COSINE_BINS, TOP_PAIRS, PairStats

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


@dataclass(frozen=True, eq=False)
class _Operand:
    """One side of a compiled tile: rows in float64, and in the dtype of products."""

    means: Array
    centred: Array
    within: Array
    within_product: Array


class PairTiles(ArrayTiles):
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
        super().__init__(
            means, center, variances, counts=counts, within=within, quantities=quantities,
            dist_exp=dist_exp, ddof=ddof, scratch=scratch,
        )  # fmt: skip
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
        rows = min(_rows_in_flight(), -(-n_classes // side))
        operands = copies or operand * (cpu_count() + rows)
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
            folded = (self.fold_arrays(*tile) for tile in tiles)
        return functools.reduce(PairStats.merge, folded, PairStats.zero())

    # ------------------------------------------------------------ any array library, in float64

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
        some = slice(0, min(self.n_classes, _SAMPLE_CLASSES))
        operand = self._operand(some)
        out = self._run_kernel(some, operand, some, operand, np.zeros(pair_outputs.N_SUMS))
        sums, counts = out[0].sum(axis=0), out[1].sum(axis=0)
        references = np.zeros(pair_outputs.N_SUMS)
        for column, counted in pair_outputs.REFERENCED.items():
            if counts[counted]:
                references[column] = sums[column] / counts[counted]
        return references

    def _run_kernel(
        self, rows: slice, a: _Operand, columns: slice, b: _Operand, references: Array
    ) -> tuple[Array, ...]:
        # Compiled code is loaded only where a sweep runs.
        from ncbatch.states.pairs.kernel import sweep_tile

        wanted = self.quantities
        gram = a.centred @ b.centred.T
        gram_w = np.empty((0, 0), self._products)
        if self.within is not None:
            gram_w = a.within_product @ b.within_product.T
        n_rows, n_columns = gram.shape
        out = pair_outputs.outputs(n_rows, n_columns, COSINE_BINS, TOP_PAIRS)
        lost = _LOST_IN_FLOAT32 if self._products == np.float32 else LOST_IN_FLOAT64
        coherence = 1.0 / max(self.n_classes - 1, 1)
        sweep_tile(
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
        b = a if rows == columns else self._operand(columns)
        out = self._run_kernel(rows, a, columns, b, self._references)
        return pair_outputs.summarise(
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
