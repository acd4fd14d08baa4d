"""Moments: counts, class means, within-class traces and pooled scatter, from one read."""

from __future__ import annotations

import os
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from array_api_compat import device

from ncbatch.arrays import (
    Array,
    Segments,
    add_at,
    as_float64,
    namespace,
    row_blocks,
    segment_sum,
    symmetric_product,
    to_numpy,
)
from ncbatch.errors import DataError
from ncbatch.stats.blocks import check_block

Precision: TypeAlias = Literal["exact", "fp32"]


@dataclass(frozen=True)
class Moments:
    """Sufficient statistics of labelled samples for class-mean geometry.

    Attributes
    ----------
    counts : array (K,) of int64
        Samples per class.
    means : array (K, D) of float64
        Class means; a class without samples has zeros.
    traces : array (K,) of float64
        Sum of squared distances to the class mean, per class.
    scatter : array (D, D) of float64, or None
        Pooled within-class scatter, the sum of outer products of residuals.

    Notes
    -----
    States merge by Chan, Golub and LeVeque (1979): nothing is ever computed as
    ``E[x x^T] - E[x] E[x]^T``, which loses the within-class part of collapsed features.
    """

    counts: Array
    means: Array
    traces: Array
    scatter: Array | None = None

    @classmethod
    def zero(
        cls,
        n_classes: int,
        n_features: int,
        *,
        scatter: bool = True,
        xp: Any = np,
        device: Any = None,
    ) -> Moments:
        """Make the state of no samples, neutral under `merge`.

        Parameters
        ----------
        n_classes, n_features : int
            K and D.
        scatter : bool, optional
            Whether the pooled scatter is kept; both sides of a merge must agree.
        xp : module, optional
            Array namespace of the state.
        device : optional
            Device of that namespace.
        """

        def zeros(*shape: int) -> Array:
            return xp.zeros(shape, dtype=xp.float64, device=device)

        return cls(
            counts=xp.zeros((n_classes,), dtype=xp.int64, device=device),
            means=zeros(n_classes, n_features),
            traces=zeros(n_classes),
            scatter=zeros(n_features, n_features) if scatter else None,
        )

    @classmethod
    def from_block(
        cls,
        features: Array,
        labels: Array,
        n_classes: int,
        *,
        scatter: bool = True,
        precision: Precision = "exact",
    ) -> Moments:
        """Summarise one block of samples held in memory.

        Parameters
        ----------
        features : array (N, D)
            Floating-point features, on any device.
        labels : array (N,)
            Class ids below `n_classes`; rows with a negative label are not samples.
        n_classes : int
            K.
        scatter : bool, optional
            Whether to keep the pooled within-class scatter (D, D).
        precision : {"exact", "fp32"}, optional
            Float64 throughout, or residual products in float32 folded in float64.

        Raises
        ------
        DataError
            When shapes do not fit or a label is not below `n_classes`.

        Examples
        --------
        >>> import numpy as np
        >>> X = np.array([[0.0, 0.0], [2.0, 0.0], [5.0, 1.0]])
        >>> m = Moments.from_block(X, np.array([0, 0, 1]), 2)
        >>> m.means
        array([[1., 0.],
               [5., 1.]])
        >>> m.traces
        array([2., 0.])
        """
        features, labels = check_block(features, labels, n_classes)
        accumulator = MomentsAccumulator(
            n_classes, features.shape[1], like=features, scatter=scatter, precision=precision
        )
        accumulator.add(features, labels)
        return accumulator.finish()

    @property
    def n_samples(self) -> int:
        """Samples in all classes together."""
        return int(namespace(self.counts).sum(self.counts))

    @property
    def variances(self) -> Array:
        """V_c, the mean squared distance to the class mean (K,); 0 for a class without samples."""
        xp = namespace(self.traces)
        return self.traces / as_float64(xp.clip(self.counts, 1, None))

    @property
    def within_covariance(self) -> Array:
        """S_W = pooled within-class scatter / N, an array (D, D) of float64.

        Raises
        ------
        DataError
            When the state was made without scatter.
        """
        if self.scatter is None:
            raise DataError("these moments hold no scatter", remedy="make them with scatter=True")
        return self.scatter / max(self.n_samples, 1)

    def merge(self, other: Moments) -> Moments:
        """Combine with the state of other samples; neither operand changes.

        Raises
        ------
        DataError
            When K, D or the presence of scatter differ.
        """
        self._check_mergeable(other)
        xp = namespace(self.means)
        means, traces = xp.empty_like(self.means), xp.empty_like(self.traces)
        scatter = None if self.scatter is None else self.scatter + other.scatter
        for part in row_blocks(self.means.shape[0]):
            n_a, n_b = as_float64(self.counts[part]), as_float64(other.counts[part])
            n = xp.clip(n_a + n_b, 1.0, None)
            apart = other.means[part, :] - self.means[part, :]
            # A class that only one side holds takes that side's mean, to the bit.
            toward = apart * (n_b / n)[:, None] + self.means[part, :]
            means[part, :] = xp.where((n_a == 0.0)[:, None], other.means[part, :], toward)
            weight = n_a * n_b / n
            traces[part] = (
                self.traces[part] + other.traces[part] + weight * xp.sum(apart * apart, axis=1)
            )
            if scatter is not None:
                both = weight > 0.0
                scatter = scatter + symmetric_product(apart[both] * xp.sqrt(weight[both])[:, None])
        return Moments(self.counts + other.counts, means, traces, scatter)

    def select(self, classes: Array) -> Moments:
        """Keep only `classes`, an integer array (C,) of class ids.

        Raises
        ------
        DataError
            When the state holds scatter and a class with samples would be dropped: the pooled
            scatter of a subset is not in it.
        """
        xp = namespace(self.counts)
        counts = xp.take(self.counts, classes, axis=0)
        if self.scatter is not None and int(xp.sum(counts)) != self.n_samples:
            raise DataError(
                "the pooled scatter of some classes cannot be had from finished moments",
                remedy="filter the classes when the features are read",
            )
        return Moments(
            counts,
            xp.take(self.means, classes, axis=0),
            xp.take(self.traces, classes, axis=0),
            self.scatter,
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state to one ``.npz`` file, complete or not at all."""
        target = Path(path)
        arrays = {
            name: to_numpy(value)
            for name in ("counts", "means", "traces", "scatter")
            if (value := getattr(self, name)) is not None
        }
        partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
        try:
            with partial.open("wb") as file:
                np.savez(file, allow_pickle=False, ncbatch_moments=np.int64(1), **arrays)
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Moments:
        """Read a state that `save` wrote, as NumPy arrays.

        Raises
        ------
        DataError
            When the file holds no moments.
        """
        try:
            opened = np.load(path, allow_pickle=False)
        except (ValueError, EOFError, zipfile.BadZipFile):
            opened = None
        if not isinstance(opened, np.lib.npyio.NpzFile) or "ncbatch_moments" not in opened.files:
            raise DataError(
                f"'{os.fspath(path)}' holds no moments", "a file written by Moments.save"
            )
        with opened as file:
            scatter = file["scatter"] if "scatter" in file.files else None
            return cls(file["counts"], file["means"], file["traces"], scatter)

    def _check_mergeable(self, other: Moments) -> None:
        mine = (*self.means.shape, self.scatter is not None)
        theirs = (*other.means.shape, other.scatter is not None)
        if mine != theirs:
            raise DataError(
                f"moments of (K, D, scatter) = {theirs} cannot be merged into {mine}",
                "equal K and D, and scatter on both sides or on neither",
            )


class MomentsAccumulator:
    """Streams blocks of samples into `Moments` in one read.

    Every class gets a pilot, its mean in the first block that holds it. Residuals to the pilot
    are summed; what the pilot misses of the mean is corrected once, at the end.

    Parameters
    ----------
    n_classes, n_features : int
        K and D.
    like : array
        An array whose library, device and dtype the blocks share.
    scatter : bool
        Whether to keep the pooled within-class scatter (D, D).
    precision : {"exact", "fp32"}
        Dtype of residuals and their products; sums are folded in float64 either way.

    Notes
    -----
    The pilot's own samples belong to the class, so the correction is at most n times the class's
    scatter: float64 keeps at least 16 - log10(n) digits, however far out the pilot lies.
    """

    def __init__(
        self,
        n_classes: int,
        n_features: int,
        *,
        like: Array,
        scatter: bool = True,
        precision: Precision = "exact",
    ) -> None:
        xp = self._xp = namespace(like)
        place = {"device": device(like)}
        self._work = xp.float64 if precision == "exact" else xp.float32
        # Any number near the mean serves as pilot; float32 halves the memory where it fits.
        pilot = xp.float64 if like.dtype == xp.float64 else xp.float32
        self._counts = xp.zeros((n_classes,), dtype=xp.int64, **place)
        self._pilots = xp.zeros((n_classes, n_features), dtype=pilot, **place)
        self._sums = xp.zeros((n_classes, n_features), dtype=xp.float64, **place)
        self._traces = xp.zeros((n_classes,), dtype=xp.float64, **place)
        self._scatter = (
            xp.zeros((n_features, n_features), dtype=xp.float64, **place) if scatter else None
        )

    @staticmethod
    def peak_bytes(n_classes: int, n_features: int, block_rows: int, *, scatter: bool) -> int:
        """Price the accumulator: bytes at its peak, blocks of `block_rows` rows included."""
        state = n_classes * (n_features * 16 + 16) + (n_features**2 * 8 if scatter else 0)
        # Converted rows, gathered pilots, residuals and the rows' class sums, all float64.
        block = block_rows * n_features * 8 * 4 + block_rows * 64
        products = n_features**2 * 8 * 2 if scatter else 0
        finish = n_classes * n_features * 8 + 4096 * n_features * 8 * 3
        return state + products + max(block, finish)

    def add(self, features: Array, labels: Array) -> None:
        """Fold a block: `features` (B, D) floats and `labels` (B,) ids in 0..K-1."""
        xp = self._xp
        if features.shape[0] == 0:
            return
        segments = Segments.of(labels)
        present = segments.mask(self._counts.shape[0])
        self._set_pilots(features, segments, present)
        residuals = self._residuals(features, labels)
        add_at(self._sums, present, as_float64(segment_sum(residuals, segments)))
        squares = as_float64(xp.sum(residuals * residuals, axis=1))
        add_at(self._traces, present, segment_sum(squares, segments))
        add_at(self._counts, present, segments.counts)
        if self._scatter is not None:
            self._scatter += as_float64(symmetric_product(residuals))

    def finish(self) -> Moments:
        """Correct for the pilots and give the state; the accumulator is spent."""
        xp = self._xp
        counts, means = self._counts, self._sums
        for part in row_blocks(means.shape[0]):
            n = as_float64(xp.clip(counts[part], 1, None))
            missed = means[part, :] / n[:, None]
            weighted = missed * xp.sqrt(n)[:, None]
            traces = self._traces[part] - xp.sum(weighted * weighted, axis=1)
            self._traces[part] = xp.clip(traces, 0.0, None)
            if self._scatter is not None:
                self._scatter -= symmetric_product(weighted)
            means[part, :] = as_float64(self._pilots[part, :]) + missed
        return Moments(counts, means, self._traces, self._scatter)

    def _set_pilots(self, features: Array, segments: Segments, present: Array) -> None:
        xp = self._xp
        known = xp.take(self._counts, segments.present, axis=0) > 0
        if bool(xp.all(known)):
            return
        rows = ~xp.take(known, segments.index, axis=0)
        firsts = Segments.of(segments.index[rows])
        sums = segment_sum(as_float64(features[rows]), firsts)
        pilots = sums / as_float64(firsts.counts)[:, None]
        self._pilots[present & (self._counts == 0)] = xp.astype(pilots, self._pilots.dtype)

    def _residuals(self, features: Array, labels: Array) -> Array:
        xp = self._xp
        wide = xp.float64 if self._pilots.dtype == xp.float64 else self._work
        pilots = xp.take(self._pilots, labels, axis=0)
        residuals = xp.astype(features, wide) - xp.astype(pilots, wide, copy=False)
        return xp.astype(residuals, self._work, copy=False)
