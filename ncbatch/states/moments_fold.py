"""How blocks of rows, and other states, are folded into moments, in any array library."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from array_api_compat import is_numpy_array

from ncbatch.arrays.namespace import Array, as_float64, namespace
from ncbatch.arrays.rows import row_blocks, symmetric_product, take
from ncbatch.arrays.segments import Segments, add_at, segment_sum


class Scratch:
    """Memory that folds use one after another, so that each need not have its own: arrays by name.

    What is written to one lasts until the next fold takes it: folds that share a scratch must not
    run at once.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, npt.NDArray[Any]] = {}

    def take(
        self, name: str, shape: tuple[int, ...], dtype: Any, *, fill: int | None = None
    ) -> npt.NDArray[Any]:
        """Return an array in memory that an earlier taker of the name may have written to.

        Parameters
        ----------
        name : str
            Which.
        shape : tuple of int
            Its shape.
        dtype : dtype
            Its dtype; another one than before takes new memory.
        fill : int, optional
            What new memory is filled with; by default it is not.
        """
        size = int(np.prod(shape, dtype=np.int64))
        buffer = self._buffers.get(name)
        if buffer is None or buffer.dtype != dtype or buffer.size < size:
            self._buffers.pop(name, None)
            del buffer  # before the larger one is made
            buffer = np.empty(size, dtype) if fill is None else np.full(size, fill, dtype)
            self._buffers[name] = buffer
        return buffer[:size].reshape(shape)


class Running(NamedTuple):
    """Counts (K,), pilots and sums about them (K, D), and traces (K,), changed in place."""

    counts: Array
    pilots: Array
    sums: Array
    traces: Array


@dataclass(eq=False)
class Folding:
    """Folds blocks of rows into the arrays of a `MomentsAccumulator`, in place.

    Parameters
    ----------
    running : Running
        The state.
    scatter : array (D, D) or None
        The pooled scatter about the pilots.
    work : dtype
        Of residuals and their products.
    """

    running: Running
    scatter: Array | None
    work: Any

    def add(self, features: Array, labels: Array) -> None:
        """Fold a block: `features` (B, D) and `labels` (B,) in 0..K-1."""
        xp = namespace(self.running.sums)
        counts, _, sums, traces = self.running
        segments = Segments.of(labels)
        present = segments.mask(counts.shape[0])
        self._set_pilots(features, segments, present)
        residuals = self._residuals(features, labels)
        add_at(sums, present, as_float64(segment_sum(residuals, segments)))
        squares = as_float64(xp.sum(residuals * residuals, axis=1))
        add_at(traces, present, segment_sum(squares, segments))
        add_at(counts, present, segments.counts)
        if self.scatter is not None:
            self.scatter += as_float64(symmetric_product(residuals))

    def finish(self, classes: Array) -> tuple[Array, Array]:
        """Turn sums into means, and take what the pilots missed off traces and scatter.

        Returns
        -------
        means, traces : array (P, D), (P,)
            Of `classes` (P,), all that have samples.
        """
        xp = namespace(self.running.sums)
        n_classes = self.running.sums.shape[0]
        n_seen = classes.shape[0]
        means = self.running.sums[:n_seen, :]
        traces = self.running.traces[:n_seen]
        if is_numpy_array(means) and 2 * n_seen <= n_classes:
            means = xp.empty_like(means)  # or a view would keep the memory of all classes
        # Elsewhere rows move up in place, whatever is read standing behind what is written: a
        # device has given memory to every row, and there is none beside them.
        for part in row_blocks(n_seen):
            ids = part if n_seen == n_classes else classes[part]
            rows = Running(*(take(values, ids) for values in self.running))
            means[part, :], traces[part] = self._settle(rows)
        return means, traces

    def _settle(self, rows: Running) -> tuple[Array, Array]:
        """Compute means and traces of some classes, and correct the scatter for them."""
        xp = namespace(self.running.sums)
        n = as_float64(xp.clip(rows.counts, 1, None))
        missed = rows.sums / n[:, None]
        weighted = missed * xp.sqrt(n)[:, None]
        # Rounding may leave a class of equal samples a trace just below zero.
        traces = xp.clip(rows.traces - xp.sum(weighted * weighted, axis=1), 0.0, None)
        if self.scatter is not None:
            # A single sample is its own pilot: it misses nothing.
            self.scatter -= symmetric_product(weighted[rows.counts > 1])
        return as_float64(rows.pilots) + missed, traces

    def _set_pilots(self, features: Array, segments: Segments, present: Array) -> None:
        xp = namespace(self.running.sums)
        known = xp.take(self.running.counts, segments.present, axis=0) > 0
        if bool(xp.all(known)):
            return
        # For classes not seen before: were a pilot moved, sums about it would be wrong.
        rows = ~xp.take(known, segments.index, axis=0)
        firsts = Segments.of(segments.index[rows])
        sums = segment_sum(as_float64(features[rows]), firsts)
        pilots = sums / as_float64(firsts.counts)[:, None]
        self.running.pilots[present & (self.running.counts == 0)] = xp.astype(
            pilots, self.running.pilots.dtype
        )

    def _residuals(self, features: Array, labels: Array) -> Array:
        xp = namespace(self.running.sums)
        wide = xp.float64 if self.running.pilots.dtype == xp.float64 else self.work
        pilots = xp.take(self.running.pilots, labels, axis=0)
        # Rounded to `work` once subtracted: differences are small, features may lie far out.
        residuals = xp.astype(features, wide) - xp.astype(pilots, wide, copy=False)
        return xp.astype(residuals, self.work, copy=False)


def merge_rows(
    mine: tuple[Array, Array, Array], theirs: tuple[Array, Array, Array]
) -> tuple[Array, Array, Array]:
    """Merge counts (C,), means (C, D) and traces (C,) of the same classes.

    Returns
    -------
    means, traces : array (C, D), (C,)
        Of the samples of both sides; counts simply add.
    apart : array (B, D)
        Differences of the means of the B classes that both sides hold, times the root of
        n_a n_b / (n_a + n_b): its symmetric product is what the pooled scatter gains.
    """
    xp = namespace(mine[1])
    n_a, mean_a, trace_a = mine
    n_b, mean_b, trace_b = theirs
    n_a = as_float64(n_a)
    n_b = as_float64(n_b)
    # A class without samples on both sides stays a row of zeros.
    n = xp.clip(n_a + n_b, 1.0, None)
    apart = mean_b - mean_a
    # A class that only one side holds takes that side's mean, to the bit.
    means = xp.where((n_a == 0.0)[:, None], mean_b, apart * (n_b / n)[:, None] + mean_a)
    weight = n_a * n_b / n
    traces = trace_a + trace_b + weight * xp.sum(apart * apart, axis=1)
    both = weight > 0.0
    return means, traces, apart[both] * xp.sqrt(weight[both])[:, None]
