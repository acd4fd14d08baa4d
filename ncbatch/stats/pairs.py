"""PairStats: statistics over all unordered pairs of class means, tile by tile."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields
from typing import Any

from array_api_compat import device

from ncbatch.arrays import Array, as_float64, namespace, row_blocks, scalar
from ncbatch.errors import DataError, UsageError

# Classes of a tile's side: its arrays stay near the cache, its product runs at full speed.
TILE_CLASSES = 512
# Below this share of |a|^2 + |b|^2 a squared distance from products is computed anew.
_LOST_DIGITS = 1e-7
# A squared distance at or below this share counts as zero: the means coincide.
COINCIDENT = 1e-24

PAIR_QUANTITIES = ("cdnv", "distance", "log", "riesz", "interference")


@dataclass(frozen=True)
class Tally:
    """Count, mean and sum of squared deviations of numbers that are all scaled by ``exp(-log_scale)``.

    The scale lets quantities beyond the range of float64 be tallied; it is 0 for all others.
    """

    n: int = 0
    mean: float = 0.0
    m2: float = 0.0
    log_scale: float = 0.0

    @classmethod
    def of(cls, values: Array, log_scale: float = 0.0) -> Tally:
        """Tally an array of any shape."""
        xp = namespace(values)
        n = math.prod(values.shape)
        if n == 0:
            return cls()
        mean = scalar(xp.mean(values))
        return cls(n, mean, scalar(xp.sum((values - mean) ** 2)), log_scale)

    def merge(self, other: Tally) -> Tally:
        """Combine with the tally of other numbers."""
        if not self.n or not other.n:
            return self if self.n else other
        scale = max(self.log_scale, other.log_scale)
        a, b = self._rescaled(scale), other._rescaled(scale)
        n, apart = a.n + b.n, b.mean - a.mean
        return Tally(
            n,
            a.mean + apart * (b.n / n),
            a.m2 + b.m2 + apart * apart * (a.n / n) * b.n,
            scale,
        )

    def _rescaled(self, log_scale: float) -> Tally:
        factor = math.exp(self.log_scale - log_scale)
        return Tally(self.n, self.mean * factor, self.m2 * factor * factor, log_scale)

    @property
    def variance(self) -> float:
        """Variance with ddof 0, of the scaled numbers."""
        return self.m2 / self.n if self.n else math.nan

    @property
    def log_abs_mean(self) -> float:
        """Logarithm of the absolute mean, free of overflow."""
        return math.log(abs(self.mean)) + self.log_scale if self.mean else -math.inf

    @property
    def log_variance(self) -> float:
        """Logarithm of the variance, free of overflow."""
        return math.log(self.variance) + 2.0 * self.log_scale if self.m2 > 0.0 else -math.inf


@dataclass(frozen=True)
class PairStats:
    """Tallies over unordered pairs of classes i < j; u is the direction of a centred mean.

    Attributes
    ----------
    cdnv : Tally
        (V_i + V_j) / (2 d_ij^(2p)), coincident means left out.
    distance, log, riesz : Tally
        |u_i - u_j|, log(1/|u_i - u_j|) and sign(s) |u_i - u_j|^(-s) with s = D - 2; the latter
        two without coincident directions.
    interference : Tally
        Inner products of the centred means.
    coincident_means, coincident_directions : int
        Pairs left out because d_ij, or |u_i - u_j|, is zero.
    """

    cdnv: Tally = field(default_factory=Tally)
    distance: Tally = field(default_factory=Tally)
    log: Tally = field(default_factory=Tally)
    riesz: Tally = field(default_factory=Tally)
    interference: Tally = field(default_factory=Tally)
    coincident_means: int = 0
    coincident_directions: int = 0

    @classmethod
    def zero(cls) -> PairStats:
        """Make the state of no pairs, neutral under `merge`."""
        return cls()

    def merge(self, other: PairStats) -> PairStats:
        """Combine with the state of other pairs; neither operand changes."""

        def both(name: str) -> Any:
            mine, theirs = getattr(self, name), getattr(other, name)
            return mine.merge(theirs) if isinstance(mine, Tally) else mine + theirs

        return PairStats(**{f.name: both(f.name) for f in fields(self)})

    @classmethod
    def from_means(
        cls,
        means: Array,
        center: Array | float = 0.0,
        variances: Array | None = None,
        *,
        quantities: Iterable[str] = PAIR_QUANTITIES,
        dist_exp: float = 1.0,
        tile_classes: int = TILE_CLASSES,
    ) -> PairStats:
        """Sweep all pairs of class means held in memory.

        Parameters
        ----------
        means : array (K, D)
            Class means.
        center : array (D,) or 0, optional
            m_G, subtracted before directions are taken.
        variances : array (K,), optional
            V_c; needed for ``cdnv`` only.
        quantities : iterable of str, optional
            Which of `PAIR_QUANTITIES` to tally.
        dist_exp : float, optional
            p of the CDNV.
        tile_classes : int, optional
            Classes of a tile's side.
        """
        pairs = PairTiles(means, center, variances, quantities=quantities, dist_exp=dist_exp)
        state = cls.zero()
        for rows, columns in pairs.tiles(tile_classes):
            state = state.merge(pairs.fold(rows, columns))
        return state


class PairTiles:
    """The means of a pair sweep, centred once, and the statistics of its tiles.

    Parameters
    ----------
    means, center, variances, quantities, dist_exp
        As for `PairStats.from_means`.

    Raises
    ------
    UsageError
        When a quantity is unknown.
    DataError
        When ``cdnv`` is asked for without variances.
    """

    def __init__(
        self,
        means: Array,
        center: Array | float = 0.0,
        variances: Array | None = None,
        *,
        quantities: Iterable[str] = PAIR_QUANTITIES,
        dist_exp: float = 1.0,
    ) -> None:
        self.quantities = frozenset(quantities)
        if unknown := self.quantities - set(PAIR_QUANTITIES):
            raise UsageError(f"no pair quantity '{min(unknown)}'", ", ".join(PAIR_QUANTITIES))
        if "cdnv" in self.quantities and variances is None:
            raise DataError("the CDNV without class variances", remedy="pass variances")
        xp = self._xp = namespace(means)
        self._means = as_float64(means)
        self._centred = self._means - center
        self._variances = None if variances is None else as_float64(variances)
        self._size = xp.sum(self._means**2, axis=1)
        self._square = xp.sum(self._centred**2, axis=1)
        limit = COINCIDENT * (self._size + scalar(xp.sum(as_float64(xp.asarray(center)) ** 2)))
        self._directed = self._square > limit
        norm = xp.sqrt(xp.where(self._directed, self._square, xp.ones_like(self._square)))
        self._inverse_norm = 1.0 / norm
        self._dist_exp = float(dist_exp)
        self._riesz_exponent = float(means.shape[1] - 2)

    @staticmethod
    def peak_bytes(n_classes: int, n_features: int, tile_classes: int = TILE_CLASSES) -> int:
        """Price a sweep, its means included: bytes at its peak."""
        tile = tile_classes**2 * 8 * 12 + tile_classes * n_features * 8 * 4
        return n_classes * (n_features * 8 + 48) + tile

    def tiles(self, tile_classes: int = TILE_CLASSES) -> Iterator[tuple[slice, slice]]:
        """Give the tiles of the upper triangle as pairs of class slices, in a fixed order."""
        n_classes = self._means.shape[0]
        for rows in row_blocks(n_classes, tile_classes):
            for columns in row_blocks(n_classes, tile_classes):
                if columns.start >= rows.start:
                    yield rows, columns

    def fold(self, rows: slice, columns: slice) -> PairStats:
        """Tally the pairs i < j of one tile."""
        xp = self._xp
        a, b = self._centred[rows, :], self._centred[columns, :]
        gram = xp.matmul(a, xp.matrix_transpose(b))
        place = {"device": device(gram)}
        i = xp.arange(rows.start, rows.stop, **place)
        j = xp.arange(columns.start, columns.stop, **place)
        pairs = i[:, None] < j[None, :]
        found: dict[str, Any] = {}
        if "interference" in self.quantities:
            found["interference"] = Tally.of(gram[pairs])
        if "cdnv" in self.quantities:
            found |= self._cdnv(rows, columns, gram, pairs)
        if self.quantities & {"distance", "log", "riesz"}:
            found |= self._kernels(rows, columns, gram, pairs)
        return PairStats(**found)

    def tile_square_distances(self, rows: slice, columns: slice, *, directions: bool) -> Array:
        """Give the squared distances of a tile, its Gram product included."""
        xp = self._xp
        gram = xp.matmul(self._centred[rows, :], xp.matrix_transpose(self._centred[columns, :]))
        return self._square_distances(rows, columns, gram, directions=directions)

    def _square_distances(
        self, rows: slice, columns: slice, gram: Array, *, directions: bool
    ) -> Array:
        """Give |m_i - m_j|^2, or |u_i - u_j|^2, of a tile to full float64 accuracy.

        Pairs whose squared distance cancelled in the product are computed from differences.
        """
        xp = self._xp
        if directions:
            scale = self._inverse_norm
            total = 2.0 + xp.zeros_like(gram)
            gram = gram * scale[rows][:, None] * scale[columns][None, :]
        else:
            scale = None
            total = self._square[rows][:, None] + self._square[columns][None, :]
        squares = xp.clip(total - 2.0 * gram, 0.0, None)
        lost = squares < _LOST_DIGITS * total
        if bool(xp.any(lost)):
            squares[lost] = self._from_differences(rows, columns, lost, scale)
        return squares

    def _from_differences(
        self, rows: slice, columns: slice, lost: Array, scale: Array | None
    ) -> Array:
        xp = self._xp
        at_i, at_j = xp.nonzero(lost)
        parts = []
        for part in row_blocks(at_i.shape[0]):
            i, j = at_i[part] + rows.start, at_j[part] + columns.start
            if scale is None:
                a, b = xp.take(self._means, i, axis=0), xp.take(self._means, j, axis=0)
            else:
                a = xp.take(self._centred, i, axis=0) * xp.take(scale, i, axis=0)[:, None]
                b = xp.take(self._centred, j, axis=0) * xp.take(scale, j, axis=0)[:, None]
            parts.append(xp.sum((a - b) ** 2, axis=1))
        return xp.concat(parts)

    def _cdnv(self, rows: slice, columns: slice, gram: Array, pairs: Array) -> dict[str, Any]:
        xp = self._xp
        squares = self._square_distances(rows, columns, gram, directions=False)
        limit = COINCIDENT * (self._size[rows][:, None] + self._size[columns][None, :])
        apart = pairs & (squares > limit)
        v = self._variances
        assert v is not None  # checked when the sweep was made
        spread = (0.5 * (v[rows][:, None] + v[columns][None, :]))[apart]
        values = spread / squares[apart] ** self._dist_exp
        coincident = int(xp.count_nonzero(pairs)) - values.shape[0]
        return {"cdnv": Tally.of(values), "coincident_means": coincident}

    def _kernels(self, rows: slice, columns: slice, gram: Array, pairs: Array) -> dict[str, Any]:
        xp = self._xp
        directed = self._directed[rows][:, None] & self._directed[columns][None, :] & pairs
        squares = self._square_distances(rows, columns, gram, directions=True)
        apart = directed & (squares > 2.0 * COINCIDENT)
        logs = -0.5 * xp.log(squares[apart])
        coincident = int(xp.count_nonzero(directed)) - logs.shape[0]
        found: dict[str, Any] = {"coincident_directions": coincident}
        if "distance" in self.quantities:
            found["distance"] = Tally.of(xp.sqrt(squares[directed]))
        if "log" in self.quantities:
            found["log"] = Tally.of(logs)
        if "riesz" in self.quantities:
            found["riesz"] = self._riesz(logs)
        return found

    def _riesz(self, logs: Array) -> Tally:
        """Tally sign(s) exp(s log(1/|u_i - u_j|)), scaled by its largest value."""
        xp, s = self._xp, self._riesz_exponent
        if logs.shape[0] == 0:
            return Tally()
        largest = scalar(xp.max(s * logs))
        sign = math.copysign(1.0, s) if s else 0.0
        return Tally.of(sign * xp.exp(s * logs - largest), largest)
