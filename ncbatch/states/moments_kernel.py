"""Moments of rows in memory on the CPU: conversion, residuals and sums in one compiled pass.

A block's rows are grouped by class; every class is one thread's work, so that neither its sums nor
the residual rows depend on how many threads there are.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import numpy.typing as npt
from llvmlite import binding, ir
from numba import njit, types
from numba.extending import intrinsic, overload

from ncbatch.arrays.rows import row_blocks, symmetric_product
from ncbatch.arrays.threads import cpu_count, map_threads
from ncbatch.errors import DataError
from ncbatch.states.moments import Moments
from ncbatch.states.moments_fold import Running, Scratch


@intrinsic  # type: ignore[untyped-decorator, unused-ignore]
def _half_to_float(typing_context, bits):
    """Read 16 bits as a float16; LLVM converts vectors of them at once."""

    def generate(context, builder, signature, arguments):
        half = builder.bitcast(arguments[0], ir.HalfType())
        return builder.fpext(half, ir.FloatType())

    return types.float32(types.uint16), generate


def _converts_halves() -> bool:
    """Whether this processor has instructions for float16, without which nothing links."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return platform.machine().lower() in ("aarch64", "arm64")
    return bool(binding.get_host_cpu_features().get("f16c", False))


_HALVES = _converts_halves()


def _wide(value):
    """Convert a feature to float64; a uint16 holds the bits of a float16."""


@overload(_wide, inline="always")
def _wide_compiled(value):
    def of_bits(value):
        return np.float64(_half_to_float(value))

    def of_number(value):
        return np.float64(value)

    return of_bits if value is types.uint16 else of_number


class Groups(NamedTuple):
    """The rows of a block by class: numbers of rows, where each class's begin, and the classes.

    Arrays (B,), (B + 1,) and (B,) of int64, of which `group_rows` writes as much as there is.
    """

    order: npt.NDArray[np.int64]
    starts: npt.NDArray[np.int64]
    present: npt.NDArray[np.int64]


# Only this sum may be reordered, so that it can be vectorised: reordered, a residual x - p that is
# added to a sum could become (sum - p) + x, which loses what residuals are taken for.
@njit(cache=True, fastmath={"reassoc", "contract"})
def _add_square(total, value):
    return total + value * value


@njit(cache=True, nogil=True)
def group_rows(labels, counts, slots, groups):
    """Group the rows of a block by class, in the order in which classes first occur.

    Parameters
    ----------
    labels : array (B,) of int64
        Class ids in 0..K-1.
    counts : array (K,) of int64
        Samples per class so far.
    slots : array (K,) of int32
        Scratch, full of -1, and left so.
    groups : Groups
        Written.

    Returns
    -------
    tuple of int
        Classes in the block, and how many of them come before those whose first and only sample
        so far this is: they stand last.
    """
    order, starts, present = groups
    # Classes in the order of their first row, and how many rows each has.
    n = 0
    sizes = np.zeros(labels.shape[0], np.int64)
    classes = np.empty(labels.shape[0], np.int64)
    for i in range(labels.shape[0]):
        c = labels[i]
        if slots[c] < 0:
            slots[c] = n
            classes[n] = c
            n += 1
        sizes[slots[c]] += 1
    place = row = several = 0
    # New classes of one row stand last: their residuals are zero, so that products skip them.
    for alone in (False, True):
        for p in range(n):
            c = classes[p]
            if (counts[c] == 0 and sizes[p] == 1) == alone:
                present[place] = c
                starts[place] = row
                slots[c] = place
                row += sizes[p]
                place += 1
        if not alone:
            several = place
    starts[n] = row
    # A counting sort: rows of a class keep their order, and so sums their bits.
    ends = starts[:n].copy()
    for i in range(labels.shape[0]):
        p = slots[labels[i]]
        order[ends[p]] = i
        ends[p] += 1
    for p in range(n):
        slots[present[p]] = -1
    return n, several


@njit(cache=True, nogil=True, error_model="numpy")
def fold_classes(rows, groups, first, stop, running, residuals):
    """Fold the rows of classes ``present[first:stop]`` of a block.

    Parameters
    ----------
    rows : array (B, D)
        Features: float32, float64, or the bits of float16 as uint16.
    groups : Groups
    first, stop : int
        Which of the present classes.
    running : Running
        Changed in place.
    residuals : array (B, D) or (0, D)
        Written where it has rows: each sample minus its class's pilot, in the order of `order`.
    """
    order, starts, present = groups
    counts, pilots, sums, traces = running
    n_features = rows.shape[1]
    keep = residuals.shape[0] > 0
    mean = np.empty(n_features)
    for p in range(first, stop):
        c = present[p]
        begin = starts[p]
        end = starts[p + 1]
        pilot = pilots[c]
        total = sums[c]
        # A new class: its pilot is its mean in this block.
        if counts[c] == 0:
            mean[:] = 0.0
            for t in range(begin, end):
                x = rows[order[t]]
                for j in range(n_features):
                    mean[j] += _wide(x[j])
            for j in range(n_features):
                pilot[j] = mean[j] / (end - begin)
        square = 0.0
        for t in range(begin, end):
            x = rows[order[t]]
            # Two loops: the one that writes no residuals is vectorised by itself.
            if keep:
                row = residuals[t]
                for j in range(n_features):
                    r = _wide(x[j]) - np.float64(pilot[j])
                    total[j] += r
                    square = _add_square(square, r)
                    row[j] = r
            else:
                for j in range(n_features):
                    r = _wide(x[j]) - np.float64(pilot[j])
                    total[j] += r
                    square = _add_square(square, r)
        traces[c] += square
        counts[c] += end - begin


@njit(cache=True, nogil=True)
def begin_classes(rows, groups, first, stop, counts, pilots):
    """Make the only sample of each of some classes its pilot: its residual is zero, to the bit."""
    order, starts, present = groups
    for p in range(first, stop):
        x = rows[order[starts[p]]]
        pilot = pilots[present[p]]
        for j in range(x.shape[0]):
            pilot[j] = _wide(x[j])
        counts[present[p]] = 1


@njit(cache=True, nogil=True, error_model="numpy")
def settle_classes(classes, running, means, missed):
    """Turn sums of residuals into means, and correct the traces, of `classes` (P,) with samples.

    Means are written to `means` (P, D), which may be rows of the sums. What the pilot missed of the
    mean, times the root of the count, is written to the rows of `missed`, if it has any, for each
    class with at least two samples; a single one is its pilot.
    """
    counts, pilots, sums, traces = running
    n_features = sums.shape[1]
    shift = np.empty(n_features)
    next_row = 0
    for p in range(classes.shape[0]):
        c = classes[p]
        n = counts[c]
        total = sums[c]
        pilot = pilots[c]
        mean = means[p]
        # Its only sample is its pilot and its mean, to the bit.
        if n == 1:
            for j in range(n_features):
                mean[j] = pilot[j]
            continue
        for j in range(n_features):
            shift[j] = total[j] / n
        square = 0.0
        for j in range(n_features):
            square = _add_square(square, shift[j])
            mean[j] = np.float64(pilot[j]) + shift[j]
        traces[c] = max(traces[c] - n * square, 0.0)
        if missed.shape[0] > 0:
            row = missed[next_row]
            root = np.sqrt(np.float64(n))
            next_row += 1
            for j in range(n_features):
                row[j] = shift[j] * root


@dataclass(frozen=True, eq=False)
class CompiledFolding:
    """Does what `Folding` does for NumPy arrays.

    Parameters
    ----------
    running : Running
        The state.
    scatter : array (D, D) or None
        The pooled scatter about the pilots.
    work : dtype
        Of residuals in products; sums are taken in float64.
    block_rows : int
        The most rows of a block, and of a product.
    scratch : Scratch
        Where residuals and products are; several that do not run at once may share it.
    """

    running: Running
    scatter: npt.NDArray[np.float64] | None
    work: Any
    block_rows: int
    scratch: Scratch

    @property
    def _residuals(self) -> npt.NDArray[Any]:
        kept = 0 if self.scatter is None else self.block_rows
        return self.scratch.take("residuals", (kept, self.running.sums.shape[1]), self.work)

    def add(self, features: npt.NDArray[Any], labels: npt.NDArray[Any]) -> None:
        """Fold a block: `features` (B, D) and `labels` (B,) in 0..K-1, B at most `block_rows`.

        Raises
        ------
        DataError
            For other shapes or a label out of range, before anything changed.
        """
        rows = as_rows(features)
        labels = np.ascontiguousarray(labels, np.int64)
        self._check(rows, labels)
        counts = self.running.counts
        pilots = self.running.pilots
        size = self.block_rows
        take = self.scratch.take
        groups = Groups(
            take("order", (size,), np.int64),
            take("starts", (size + 1,), np.int64),
            take("present", (size,), np.int64),
        )
        slots = take("slots", counts.shape, np.int32, fill=-1)
        n, several = group_rows(labels, counts, slots, groups)
        residuals = self._residuals

        def fold(part: slice) -> None:
            end = min(part.stop, several)
            if part.start < end:
                fold_classes(rows, groups, part.start, end, self.running, residuals)
            if several < part.stop:
                first = max(part.start, several)
                begin_classes(rows, groups, first, part.stop, counts, pilots)

        in_threads(fold, shares(groups.starts[: n + 1]))
        self._add_product(int(groups.starts[several]), 1)

    def finish(
        self, classes: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Do what `Folding.finish` does.

        Rows of other classes are not touched: they may never have been given memory.
        """
        sums = self.running.sums
        n_classes = sums.shape[0]
        n_seen = classes.shape[0]
        # In memory of their own, or moved up where that saves little and has no room.
        fresh = 2 * n_seen <= n_classes
        means = np.empty((n_seen, sums.shape[1])) if fresh else sums[:n_seen]
        # Rows that are moved up must be read before others take their place.
        ordered = not fresh and n_seen < n_classes
        residuals = self._residuals
        for block in row_blocks(n_seen, self.block_rows):
            ids = classes[block]
            ends = np.concatenate([[0], np.cumsum(self.running.counts[ids] > 1)])

            def settle(
                part: slice, ids: Any = ids, means: Any = means[block], ends: Any = ends
            ) -> None:
                missed = residuals[ends[part.start] : ends[part.stop]]
                settle_classes(ids[part], self.running, means[part], missed)

            parts = [slice(0, ids.shape[0])] if ordered else shares(np.arange(ids.shape[0] + 1))
            in_threads(settle, parts)
            self._add_product(int(ends[-1]), -1)
        return means, self.running.traces[classes]

    def _check(self, rows: npt.NDArray[Any], labels: npt.NDArray[np.int64]) -> None:
        """Compiled code would write out of bounds where NumPy raises."""
        n_classes, n_features = self.running.sums.shape
        if rows.shape != (labels.shape[0], n_features):
            raise DataError(
                f"features {rows.shape} with labels {labels.shape}",
                f"features (B, {n_features}) with labels (B,)",
            )
        if labels.min() < 0 or labels.max() >= n_classes:
            raise DataError("a label out of range", f"labels in 0..{n_classes - 1}, the classes")

    def _add_product(self, n_rows: int, sign: int) -> None:
        if self.scatter is None or n_rows == 0:
            return
        product = symmetric_product(
            self._residuals[:n_rows],
            out=self.scratch.take("product", self.scatter.shape, self.work),
        )
        add = np.add if sign > 0 else np.subtract
        add(self.scatter, product, out=self.scatter)


def as_rows(features: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Lay features out for the kernels: rows contiguous, float16 as bits, in native order."""
    # As bits, or NumPy would convert them in a pass of its own.
    if features.dtype == np.float16 and _HALVES:
        return np.ascontiguousarray(features, np.float16).view(np.uint16)
    if features.dtype in (np.float16, np.float32, ml_dtypes.bfloat16):
        return np.ascontiguousarray(features, np.float32)
    return np.ascontiguousarray(features, np.float64)


def shares(starts: npt.NDArray[np.int64]) -> list[slice]:
    """Cut segments, with rows from `starts`, into runs of about equal size, one per thread."""
    n_threads = cpu_count()
    targets = starts[-1] * np.arange(n_threads + 1) // n_threads
    # Cuts fall between classes only: a class is one thread's work.
    cuts = np.searchsorted(starts, targets)
    cuts[0] = 0
    cuts[-1] = len(starts) - 1
    pairs = zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True)
    return [slice(a, b) for a, b in pairs if a < b]


def in_threads(work: Any, parts: list[slice]) -> None:
    """Do `work`, which releases the GIL, on each of `parts`, one per thread."""
    if len(parts) == 1:
        work(parts[0])
        return
    for _ in map_threads(work, parts):
        pass


# Merging of `Moments` of some classes in memory on the CPU: one compiled pass over their union.
#
# Every class is one thread's work, and products take the same rows whatever the threads, so that
# the result does not depend on how many there are.

# Differences of means are multiplied so many rows, or bytes of them, at a time.
_PRODUCT_ROWS = 2048
_PRODUCT_BYTES = 32 * 2**20


class Sides(NamedTuple):
    """Two states over a union of U classes.

    `rows` (2, U) tell where each class stands in the means of either side, any number where it does
    not; `counts` (2, U) are its samples on both sides.
    """

    rows: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]
    means_a: npt.NDArray[np.float64]
    means_b: npt.NDArray[np.float64]


@njit(cache=True, nogil=True, error_model="numpy")
def merge_classes(first, stop, sides, traces, means, apart):
    """Merge classes ``first..stop-1`` of a union of U classes.

    Parameters
    ----------
    first, stop : int
        Which of the union.
    sides : Sides
    traces : array (U,)
        The sum of both sides' traces; what lies between their means is added.
    means : array (U, D)
        Written.
    apart : array (B, D) or (0, D)
        Written where it has rows, one for each of the classes that both sides hold: the
        difference of its means times the root of n_a n_b / (n_a + n_b).
    """
    rows, counts, means_a, means_b = sides
    n_features = means.shape[1]
    difference = np.empty(n_features)
    next_row = 0
    for p in range(first, stop):
        n_a = np.float64(counts[0, p])
        n_b = np.float64(counts[1, p])
        mean = means[p]
        if n_a == 0.0 or n_b == 0.0:  # one side's mean, to the bit
            known = means_b[rows[1, p]] if n_a == 0.0 else means_a[rows[0, p]]
            for j in range(n_features):
                mean[j] = known[j]
            continue
        mean_a = means_a[rows[0, p]]
        mean_b = means_b[rows[1, p]]
        share = n_b / (n_a + n_b)
        square = 0.0
        for j in range(n_features):
            difference[j] = mean_b[j] - mean_a[j]
            square = _add_square(square, difference[j])
        for j in range(n_features):
            mean[j] = difference[j] * share + mean_a[j]
        traces[p] += n_a * share * square
        if apart.shape[0] > 0:
            row = apart[next_row]
            root = np.sqrt(n_a * share)
            next_row += 1
            for j in range(n_features):
                row[j] = difference[j] * root


def merge_seen(classes: npt.NDArray[np.int64], a: Moments, b: Moments) -> Moments:
    """Merge the moments of two sets of classes over their union `classes`.

    Beside the operands and the result, `_PRODUCT_BYTES` and two arrays (D, D) are held.
    """
    n = classes.shape[0]
    n_features = a.means.shape[1]
    rows, counts = np.zeros((2, 2, n), np.int64)
    traces = np.zeros(n)
    for side, moments in enumerate((a, b)):
        ids = np.arange(len(moments.counts)) if moments.classes is None else moments.classes
        place = np.searchsorted(classes, ids)
        rows[side, place] = np.arange(ids.shape[0])
        counts[side, place] = moments.counts
        traces[place] += moments.traces
    means = np.empty((n, n_features))
    scatter = product = None
    apart = np.empty((0, n_features))
    size = n
    if a.scatter is not None and b.scatter is not None:
        scatter = a.scatter + b.scatter
        product = np.empty_like(scatter)
        size = min(_PRODUCT_ROWS, max(256, _PRODUCT_BYTES // (8 * n_features)))
        apart = np.empty((min(n, size), n_features))
    # Neither is written; a state that was sent cannot be.
    sides = Sides(rows, counts, _frozen(a.means), _frozen(b.means))
    for piece in row_blocks(n, size):
        # Where each class that both sides hold has its row of differences.
        ends = np.concatenate([[0], np.cumsum((counts[:, piece] > 0).all(axis=0))])

        def merge(part: slice, first: int = piece.start, ends: Any = ends) -> None:
            both = apart[ends[part.start] : ends[part.stop]]
            merge_classes(first + part.start, first + part.stop, sides, traces, means, both)

        in_threads(merge, shares(np.arange(piece.stop - piece.start + 1)))
        if scatter is not None:
            scatter += symmetric_product(apart[: ends[-1]], out=product)
    return Moments(counts[0] + counts[1], means, traces, scatter, classes, a.skipped + b.skipped)


def _frozen(means: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Make a view that cannot be written, as what was sent may be: one type to compile for."""
    view = np.ascontiguousarray(means).view()
    view.flags.writeable = False
    return view
