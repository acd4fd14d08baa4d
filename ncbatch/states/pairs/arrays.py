"""Statistics of the tiles of a pair sweep in any array library, in float64."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from array_api_compat import device

from ncbatch.arrays.namespace import Array, as_float64, namespace, scalar, to_numpy
from ncbatch.arrays.rows import take_rows
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

# Below this share of its terms a corrected squared distance is rounding error.
_NO_DIGITS = 1e-9


class ArrayTiles(PairMeans):
    """Class means with what their pairs are measured by; folds one tile at a time.

    Parameters
    ----------
    means, center, variances, counts, within, quantities, dist_exp, ddof, scratch
        As for `PairTiles`, with the same errors.
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
        self._dist_exp, self._ddof = float(dist_exp), ddof
        self._riesz_exponent = float(self.n_features - 2)

    def fold_arrays(self, rows: slice, columns: slice) -> PairStats:
        """Tally the pairs i < j of one tile."""
        xp = self._xp
        place = {"device": device(self.means)}
        i = xp.arange(rows.start, rows.stop, **place)
        j = xp.arange(columns.start, columns.stop, **place)
        pairs = i[:, None] < j[None, :]
        a = self.block(rows)
        b = a if rows == columns else self.block(columns)
        squares = self.square_distances(a, b)
        found = self._fold_distances(rows, columns, pairs, squares)
        if "interference" in self.quantities:
            found["interference"] = Tally.of(self.interference(a, b)[pairs])
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
        n_pairs = int(xp.count_nonzero(pairs))
        found: dict[str, Any] = {
            "n_pairs": n_pairs,
            "coincident_means": n_pairs - int(xp.count_nonzero(apart)),
        }
        if "cdnv" in self.quantities:
            varied = apart & self._both_known(self._variances, rows, columns)
            values = self._mean_of_pair(self._variances, rows, columns)[varied]
            values = values / squares[varied] ** self._dist_exp
            found["cdnv"] = Tally.of(values)
            found["top_cdnv"] = self._top(values, varied, rows, columns)
        if "cdnv_corrected" in self.quantities:
            corrected, error = self._corrected
            errors = 2.0 * self._mean_of_pair(error, rows, columns)
            left = squares - errors
            both = self._both_known(corrected, rows, columns)
            good = pairs & both & self.apart(rows, columns, left)
            good = good & (left > _NO_DIGITS * (squares + errors))
            values = self._mean_of_pair(corrected, rows, columns)[good]
            found["cdnv_corrected"] = Tally.of(values / left[good] ** self._dist_exp)
        if "cdnv_directional" in self.quantities:
            along, lengths = self._square_along(rows, columns), squares[apart]
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

    def _both_known(self, values: Array, rows: slice, columns: slice) -> Array:
        """Mark the pairs of a tile of which both classes have a value; -1 stands for none."""
        return (values[rows] >= 0.0)[:, None] & (values[columns] >= 0.0)[None, :]

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
        large = np.arange(len(host))
        if len(host) > TOP_PAIRS:  # sorting all of a tile would take longer than its product
            large = np.flatnonzero(host >= np.partition(host, -TOP_PAIRS)[-TOP_PAIRS])
        kept = large[np.argsort(-host[large], kind="stable")[:TOP_PAIRS]]
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
        """V of ddof 1, or -1 for fewer than two samples, and V/n of it, the error of a mean."""
        xp = self._xp
        assert self._variances is not None
        assert self._counts is not None
        several = self._counts > 1.5
        n = xp.where(several, self._counts, xp.full_like(self._counts, 2.0))
        unbiased = self._variances * ((n - self._ddof) / (n - 1.0))
        corrected = xp.where(several, unbiased, xp.full_like(n, -1.0))
        return corrected, xp.where(several, unbiased / n, xp.zeros_like(n))


def _or_minus_one(values: Array) -> Array:
    """Write -1 for NaN: compiled code does not know it."""
    xp = namespace(values)
    return xp.where(values >= 0.0, values, xp.full_like(values, -1.0))
