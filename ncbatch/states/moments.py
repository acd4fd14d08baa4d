"""Moments: counts, class means, within-class traces and pooled scatter, from one read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import ml_dtypes
import numpy as np
import numpy.typing as npt
from array_api_compat import device, is_numpy_array

from ncbatch.arrays.named_arrays import Arrays, NamedArrays
from ncbatch.arrays.namespace import Array, as_float64, namespace, to_numpy, zeros
from ncbatch.arrays.rows import row_blocks, symmetric_product
from ncbatch.errors import DataError
from ncbatch.states.fold import check_block
from ncbatch.states.moments_fold import Folding, Running, Scratch, merge_rows

# Names of arrays of states in a store; docs/store.md has their shapes.
_MOMENTS = {
    "class": "classes",
    "count": "counts",
    "mean": "means",
    "trace": "traces",
    "scatter": "scatter",
}


def moments_arrays(moments: Moments) -> Arrays:
    """Take moments of classes with samples apart into the arrays of a state in a store."""
    values = {name: getattr(moments, attribute) for name, attribute in _MOMENTS.items()}
    return {name: to_numpy(value) for name, value in values.items() if value is not None}


def moments_of(arrays: Mapping[str, npt.NDArray[Any]]) -> Moments:
    """Put moments together from the arrays of a state in a store, as `moments_arrays` made them."""
    values: dict[str, Any] = {field: arrays.get(name) for name, field in _MOMENTS.items()}
    return Moments(**values)


Precision: TypeAlias = Literal["exact", "fp32", "tf32"]

# Fewer numbers than these, rows times features, take less time than loading compiled code.
_COMPILED_VALUES = 2**22
# What the compiler holds when it has just compiled the kernels.
_COMPILER_BYTES = 192 * 2**20
# Blocks of NumPy arrays are folded in pieces of at most so many rows and bytes of float64.
_PIECE_ROWS = 8192
_PIECE_BYTES = 64 * 2**20
# What the arrays of `Running` are called where a running state is saved.
_SAVED = ("count", "pilots", "sums", "traces")
# Dtypes that are exact in float64.
_FLOATS = (np.float16, np.float32, np.float64, ml_dtypes.bfloat16)


@dataclass(frozen=True)
class Moments(NamedArrays):
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
    classes : array (K,) of int64, or None
        Ids of the classes, ascending, where only some are held, such as those with samples; None
        for 0..K-1.
    skipped : int
        Rows that were left out, such as those that are not finite.

    Notes
    -----
    States merge by Chan, Golub and LeVeque (1979): nothing is ever computed as
    ``E[x x^T] - E[x] E[x]^T``, which loses the within-class part of collapsed features.
    """

    counts: Array
    means: Array
    traces: Array
    scatter: Array | None = None
    classes: Array | None = None
    skipped: int = 0
    called = "moments"
    later = frozenset({"skipped"})

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
        of = {"dtype": xp.float64, "device": device}
        return cls(
            counts=xp.zeros((n_classes,), dtype=xp.int64, device=device),
            means=xp.zeros((n_classes, n_features), **of),
            traces=xp.zeros((n_classes,), **of),
            scatter=xp.zeros((n_features, n_features), **of) if scatter else None,
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
        precision : {"exact", "fp32", "tf32"}, optional
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
        # A block alone is a stream of one: its pilots are the class means, up to rounding.
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

        Where either side has `classes` the result is over the classes of both. Beside the operands
        and the result, blocks of a few thousand classes are held.

        Raises
        ------
        DataError
            When D or the presence of scatter differ, or K where neither side has `classes`.

        Examples
        --------
        >>> import numpy as np
        >>> a = Moments.from_block(np.ones((1, 2)), np.array([4]), 100).seen()
        >>> b = Moments.from_block(np.zeros((2, 2)), np.array([1, 4]), 100).seen()
        >>> a.merge(b).classes
        array([1, 4])
        >>> a.merge(b).means
        array([[0. , 0. ],
               [0.5, 0.5]])
        """
        self._check_mergeable(other)
        xp = namespace(self.means)
        classes = None
        n_classes = self.means.shape[0]
        if self.classes is not None or other.classes is not None:
            # Ascending, as either side is: a slice of it lies in a slice of each side.
            classes = xp.unique_values(xp.concat([self._ids, other._ids]))
            n_classes = classes.shape[0]
            if _compiled(self, other, n_classes):
                from ncbatch.states.moments_kernel import merge_seen

                return merge_seen(classes, self, other)
        merged = Moments.zero(
            n_classes, self.means.shape[1], scatter=False, xp=xp, device=device(self.means)
        )
        # Both are about their own means; what lies between the means is added per class.
        scatter = None if self.scatter is None else self.scatter + other.scatter
        for part in row_blocks(n_classes):
            ids = None if classes is None else classes[part]
            a = self._rows(part, ids)
            b = other._rows(part, ids)
            merged.counts[part] = a[0] + b[0]
            merged.means[part, :], merged.traces[part], apart = merge_rows(a, b)
            if scatter is not None:
                scatter += symmetric_product(apart)
        skipped = self.skipped + other.skipped
        return replace(merged, scatter=scatter, classes=classes, skipped=skipped)

    def seen(self) -> Moments:
        """Leave out the classes that have no samples; `classes` tells which are left.

        Where there are none to leave out, the arrays are not copied.
        """
        xp = namespace(self.counts)
        rows = xp.astype(xp.nonzero(self.counts > 0)[0], xp.int64, copy=False)
        if rows.shape[0] == self.counts.shape[0]:
            return replace(self, classes=self._ids)
        return replace(self.select(rows), classes=xp.take(self._ids, rows, axis=0))

    def expand(self, n_classes: int) -> Moments:
        """Lay the moments out over all classes 0..K-1, zeros where there are no samples.

        Where all are held, the arrays are not copied.

        Parameters
        ----------
        n_classes : int
            K.

        Raises
        ------
        DataError
            When a class is not below `n_classes`.
        """
        xp = namespace(self.counts)
        held = self._ids
        if held.shape[0] and int(held[-1]) >= n_classes:
            raise DataError(
                f"class {int(held[-1])} among the classes seen", f"classes below {n_classes}"
            )
        if held.shape[0] == n_classes:
            return replace(self, classes=None)
        place = device(held)
        laid = Moments.zero(n_classes, self.means.shape[1], scatter=False, xp=xp, device=place)
        for part in row_blocks(n_classes):
            ids = xp.arange(part.start, part.stop, dtype=held.dtype, device=place)
            laid.counts[part], laid.means[part, :], laid.traces[part] = self._rows(part, ids)
        return replace(laid, scatter=self.scatter, skipped=self.skipped)

    def select(self, classes: Array) -> Moments:
        """Keep only `classes`, an integer array (C,) of rows of `means`: ids, if all are held.

        Raises
        ------
        DataError
            When the state holds scatter and a class with samples would be dropped: the pooled
            scatter of a subset is not in it.
        """
        xp = namespace(self.counts)
        counts = xp.take(self.counts, classes, axis=0)
        # The scatter is pooled: what one class has in it cannot be taken out again.
        if self.scatter is not None and int(xp.sum(counts)) != self.n_samples:
            raise DataError(
                "the pooled scatter of some classes cannot be had from finished moments",
                remedy="filter the classes when the features are read",
            )
        return replace(
            self,
            counts=counts,
            means=xp.take(self.means, classes, axis=0),
            traces=xp.take(self.traces, classes, axis=0),
            classes=None if self.classes is None else xp.take(self.classes, classes, axis=0),
        )

    @property
    def _ids(self) -> Array:
        """Ids of the classes, ascending."""
        if self.classes is not None:
            return self.classes
        xp = namespace(self.counts)
        return xp.arange(self.counts.shape[0], dtype=xp.int64, device=device(self.counts))

    def _rows(self, part: slice, ids: Array | None) -> tuple[Array, Array, Array]:
        """Take counts, means and traces of rows `part`, or of classes `ids`, ascending.

        `ids` holds every class held between its first and its last; others get zeros.
        """
        if ids is None:
            return self.counts[part], self.means[part, :], self.traces[part]
        xp = namespace(self.counts)
        held = self._ids
        first = int(xp.searchsorted(held, ids[:1])[0])
        stop = int(xp.searchsorted(held, ids[-1:], side="right")[0])
        rows = (self.counts[first:stop], self.means[first:stop, :], self.traces[first:stop])
        if stop - first == ids.shape[0]:
            return rows
        seen = xp.zeros(ids.shape, dtype=xp.bool, device=device(ids))
        if stop > first:
            between = held[first:stop]
            place = xp.clip(xp.searchsorted(between, ids), 0, stop - first - 1)
            seen = xp.take(between, place, axis=0) == ids
        return tuple(_spread(row, seen) for row in rows)

    def _check_mergeable(self, other: Moments) -> None:
        sizes = [(*state.means.shape, state.scatter is not None) for state in (self, other)]
        names = "(K, D, scatter)"
        equal = "equal K and D"
        if self.classes is not None or other.classes is not None:
            sizes = [size[1:] for size in sizes]
            names = "(D, scatter)"
            equal = "equal D"
        if sizes[0] != sizes[1]:
            raise DataError(
                f"moments of {names} = {sizes[1]} cannot be merged into {sizes[0]}",
                f"{equal}, and scatter on both sides or on neither",
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
    precision : {"exact", "fp32", "tf32"}
        Dtype of residuals and their products, float64 or float32; sums are folded in float64
        either way.
    scratch : Scratch, optional
        Shared with accumulators that fold at other times; `peak_bytes` counts it for each.

    Notes
    -----
    The pilot's own samples belong to the class, so the correction is at most n times the class's
    scatter: float64 keeps at least 16 - log10(n) digits, however far out the pilot lies.

    NumPy arrays beyond `_COMPILED_VALUES` numbers are folded by compiled code, `CompiledFolding`,
    with the same arithmetic; which code folds a block depends on the data before it only. There the
    first sample of a class, alone in its block, is left out of the product: it is its own pilot.
    """

    def __init__(
        self,
        n_classes: int,
        n_features: int,
        *,
        like: Array,
        scatter: bool = True,
        precision: Precision = "exact",
        scratch: Scratch | None = None,
    ) -> None:
        self._scratch = scratch if scratch is not None else Scratch()
        xp = self._xp = namespace(like)
        self._place = {"device": device(like)}
        self._work = xp.float64 if precision == "exact" else xp.float32
        # Any number near the mean serves as pilot; float32 halves the memory where it fits.
        kind = like.dtype.newbyteorder("=") if is_numpy_array(like) else like.dtype
        pilot = "float64" if kind == xp.float64 else "float32"
        self._running = Running(
            counts=zeros((n_classes,), like, "int64"),
            pilots=zeros((n_classes, n_features), like, pilot),
            sums=zeros((n_classes, n_features), like),
            traces=zeros((n_classes,), like),
        )
        self._scatter: Array | None = zeros((n_features, n_features), like) if scatter else None
        self._n_samples = 0
        self._compilable = is_numpy_array(like) and kind in _FLOATS
        self._compiled_folding: Any = None

    @staticmethod
    def state_bytes(
        n_classes: int, n_features: int, *, scatter: bool = True, itemsize: int = 8
    ) -> int:
        """Price what the accumulator holds between blocks; arguments as for `peak_bytes`.

        Of NumPy arrays, rows of classes without samples take no memory: `n_classes` may be those
        with samples.
        """
        pilot = 8 if itemsize == 8 else 4
        return n_classes * (n_features * (8 + pilot) + 16) + (n_features**2 * 8 if scatter else 0)

    @staticmethod
    def peak_bytes(
        n_classes: int,
        n_features: int,
        block_rows: int,
        *,
        scatter: bool,
        n_rows: int | None = None,
        itemsize: int = 8,
    ) -> int:
        """Price the accumulator: bytes at its peak, blocks of `block_rows` rows included.

        Parameters
        ----------
        n_classes, n_features, block_rows : int
            K, D, and the most rows of a block.
        scatter : bool
            Whether the pooled scatter is kept.
        n_rows : int, optional
            The most rows there can be in all: where they are few nothing is compiled. 0 stands for
            another library than NumPy, None for any number.
        itemsize : int, optional
            Bytes of a feature as it is given; 8 needs wider pilots than less.
        """
        state = MomentsAccumulator.state_bytes(
            n_classes, n_features, scatter=scatter, itemsize=itemsize
        )
        products = n_features**2 * 8 * 2 if scatter else 0
        rows = block_rows
        piece = _piece_rows(n_features)
        compiled = 0
        if n_rows is None or n_rows * n_features >= _COMPILED_VALUES:
            rows = min(block_rows, piece, -(-_COMPILED_VALUES // n_features))
            # Residuals, rows converted where they must be, and what the grouping needs.
            compiled = piece * (n_features * 8 * (2 if scatter else 1) + 48) + n_classes * 24
            compiled += _COMPILER_BYTES
        # Converted rows, gathered pilots, residuals and the rows' class sums, all float64.
        block = rows * n_features * 8 * 4 + rows * 64 + n_classes * 24 + 2**20
        finish = min(n_classes, 4096) * n_features * 8 * 5
        return state + products + max(block, finish, compiled)

    @staticmethod
    def scratch_bytes(n_features: int) -> int:
        """Price what compiled folds keep in their scratch between blocks, but for K numbers."""
        return _piece_rows(n_features) * (n_features * 8 + 24) + n_features**2 * 8

    @property
    def running_bytes(self) -> int:
        """Bytes of what `arrays` returns."""
        n_seen = int(self._xp.count_nonzero(self._running.counts))
        return self.state_bytes(
            n_seen,
            self._running.sums.shape[1],
            scatter=self._scatter is not None,
            itemsize=int(self._running.pilots.dtype.itemsize),
        )

    def arrays(self) -> Arrays:
        """Return all that the running state is, on the host and over the classes with samples.

        Returns
        -------
        dict of str to array
            Not copied where they are of NumPy and all classes have samples: the next `add` changes
            them.
        """
        xp = self._xp
        counts = to_numpy(self._running.counts)
        classes = np.flatnonzero(counts)
        arrays = {"class": classes}
        for name, rows in zip(_SAVED, self._running, strict=True):
            if len(classes) < len(counts):
                rows = xp.take(rows, xp.asarray(classes, **self._place), axis=0)
            arrays[name] = to_numpy(rows)
        return arrays if self._scatter is None else arrays | {"scatter": to_numpy(self._scatter)}

    def restore(self, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Go on from what `arrays` returned, to the same bits as without a break.

        Parameters
        ----------
        arrays : mapping of str to array
            Of an accumulator made with the same arguments. They are taken over, not copied, where
            all classes have samples and their library allows it.

        Raises
        ------
        DataError
            When they are not those of such an accumulator; nothing has changed then.
        """
        shapes = {name: tuple(value.shape) for name, value in arrays.items()}
        classes = arrays.get("class", np.empty(0, np.int64))
        expected = {"class": classes.shape}
        for name, rows in zip(_SAVED, self._running, strict=True):
            expected[name] = (len(classes), *rows.shape[1:])
        if self._scatter is not None:
            expected["scatter"] = tuple(self._scatter.shape)
        n_classes = self._running.counts.shape[0]
        if shapes != expected or (len(classes) and classes[-1] >= n_classes):
            raise DataError(
                f"a running state of {shapes}", f"{expected}, of classes below {n_classes}"
            )
        self._running = Running(
            *(
                self._restored(arrays[name], rows, classes)
                for name, rows in zip(_SAVED, self._running, strict=True)
            )
        )
        if self._scatter is not None:
            self._scatter = self._restored(arrays["scatter"], self._scatter)
        # It decides which code folds, which must not depend on a break.
        self._n_samples = int(self._xp.sum(self._running.counts))
        self._compiled_folding = None

    def _restored(
        self, saved: npt.NDArray[Any], old: Array, classes: npt.NDArray[np.int64] | None = None
    ) -> Array:
        """Bring a saved array to the shape, dtype and place of an old one."""
        if classes is not None and len(classes) < old.shape[0]:
            # Memory of the classes that have no samples is not touched.
            rows = np.zeros(old.shape, saved.dtype)
            rows[classes] = saved
            saved = rows
        value = self._xp.asarray(saved, dtype=old.dtype, **self._place)
        if is_numpy_array(value):
            value = np.require(value, requirements=["C", "W"])
        return value

    def add(self, features: Array, labels: Array) -> None:
        """Fold a block of rows.

        Parameters
        ----------
        features : array (B, D)
            Floats.
        labels : array (B,)
            Class ids below K; rows with negative ones are no samples.

        Raises
        ------
        DataError
            When shapes do not fit, or a label is K or more; nothing has changed then.
        """
        n_classes, n_features = self._running.sums.shape
        features, labels = check_block(features, labels, n_classes)
        if features.shape[1] != n_features:
            raise DataError(f"features {tuple(features.shape)}", f"(B, {n_features})")
        n_rows = features.shape[0]
        step = _piece_rows(features.shape[1]) if self._compilable else max(n_rows, 1)
        # Pieces whose residuals stay in the scratch that `peak_bytes` counts.
        for part in row_blocks(n_rows, step):
            self._n_samples += part.stop - part.start
            self._folding().add(features[part, :], labels[part])

    def finish(self) -> Moments:
        """Correct for the pilots and return the state of all K classes; this object is spent.

        Where a class has no samples, (K, D) is held once more than `peak_bytes` says.
        """
        return self.seal().expand(self._running.counts.shape[0])

    def seal(self) -> Moments:
        """Correct for the pilots and return the state of the classes with samples only.

        The accumulator is spent. Nothing beyond `peak_bytes` is held; of NumPy arrays, rows of
        classes without samples are not touched.
        """
        xp = self._xp
        classes = xp.astype(xp.nonzero(self._running.counts > 0)[0], xp.int64, copy=False)
        counts = xp.take(self._running.counts, classes, axis=0)
        means, traces = self._folding().finish(classes)
        return Moments(counts, means, traces, self._scatter, classes)

    def _folding(self) -> Any:
        """Return what folds the next block into the state."""
        n_features = self._running.sums.shape[1]
        if not self._compilable or self._n_samples * n_features < _COMPILED_VALUES:
            return Folding(self._running, self._scatter, self._work)
        if self._compiled_folding is None:
            from ncbatch.states.moments_kernel import CompiledFolding

            self._compiled_folding = CompiledFolding(
                self._running, self._scatter, self._work, _piece_rows(n_features), self._scratch
            )
        return self._compiled_folding


def _piece_rows(n_features: int) -> int:
    return min(_PIECE_ROWS, max(256, _PIECE_BYTES // (8 * n_features)))


def _compiled(a: Moments, b: Moments, n_classes: int) -> bool:
    """Whether compiled code, which checks no bounds, merges two states into one of `n_classes`."""
    return n_classes * a.means.shape[1] >= _COMPILED_VALUES and all(
        isinstance(state.means, np.ndarray)
        and state.means.dtype == np.float64
        and state.means.shape[0] == state._ids.shape[0]
        for state in (a, b)
    )


def _spread(rows: Array, seen: Array) -> Array:
    """Lay `rows` (P, ...) over the P places of `seen` (C,) that are true."""
    xp = namespace(rows)
    laid = xp.zeros((seen.shape[0], *rows.shape[1:]), dtype=rows.dtype, device=device(rows))
    laid[seen] = rows
    return laid
