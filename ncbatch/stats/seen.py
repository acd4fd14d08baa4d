"""SeenMoments: moments of the classes that have samples only, small enough to be sent."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from array_api_compat import device

from ncbatch.arrays import Array, namespace, row_blocks, symmetric_product
from ncbatch.errors import DataError
from ncbatch.stats.folding import merge_rows
from ncbatch.stats.moments import Moments

# Results of fewer numbers than these, classes times features, are not worth compiled code.
_COMPILED_VALUES = 2**22


@dataclass(frozen=True)
class SeenMoments:
    """Moments of P classes with samples, whatever K is.

    Attributes
    ----------
    classes : array (P,) of int64
        Their ids, ascending.
    moments : Moments
        Of those classes, in that order.

    Examples
    --------
    >>> import numpy as np
    >>> a = SeenMoments.of(Moments.from_block(np.ones((1, 2)), np.array([4]), 100))
    >>> b = SeenMoments.of(Moments.from_block(np.zeros((2, 2)), np.array([1, 4]), 100))
    >>> a.merge(b).classes
    array([1, 4])
    >>> a.merge(b).moments.means
    array([[0. , 0. ],
           [0.5, 0.5]])
    """

    classes: Array
    moments: Moments

    @classmethod
    def zero(
        cls, n_features: int, scatter: bool = True, *, xp: Any = np, device: Any = None
    ) -> SeenMoments:
        """Make the state of no samples, neutral under `merge`.

        Parameters
        ----------
        n_features : int
            D.
        scatter : bool, optional
            Whether the pooled scatter is kept.
        xp : module, optional
            Array namespace of the state.
        device : optional
            Device of that namespace.
        """
        return cls(
            xp.zeros((0,), dtype=xp.int64, device=device),
            Moments.zero(0, n_features, scatter=scatter, xp=xp, device=device),
        )

    @classmethod
    def of(cls, moments: Moments) -> SeenMoments:
        """Leave out the classes (K,) of `moments` that have no samples.

        Where there are none to leave out, the arrays are those of `moments`, not copies.
        """
        xp = namespace(moments.counts)
        classes = xp.astype(xp.nonzero(moments.counts > 0)[0], xp.int64, copy=False)
        if classes.shape[0] == moments.counts.shape[0]:
            return cls(classes, moments)
        return cls(classes, moments.select(classes))

    @property
    def n_samples(self) -> int:
        """Samples in all classes together."""
        return self.moments.n_samples

    def merge(self, other: SeenMoments) -> SeenMoments:
        """Combine with the state of other samples; neither operand changes.

        Beside the operands and the result, blocks of a few thousand classes are held.

        Raises
        ------
        DataError
            When D or the presence of scatter differ.
        """
        mine = (self.moments.means.shape[1], self.moments.scatter is not None)
        theirs = (other.moments.means.shape[1], other.moments.scatter is not None)
        if mine != theirs:
            raise DataError(
                f"moments of (D, scatter) = {theirs} cannot be merged into {mine}",
                "equal D, and scatter on both sides or on neither",
            )
        xp = namespace(self.classes, other.classes)
        classes = xp.unique_values(xp.concat([self.classes, other.classes]))
        if _compiled(self, other, classes.shape[0]):
            from ncbatch.stats.seen_kernel import merge_seen

            sides = ((state.classes, state.moments) for state in (self, other))
            return SeenMoments(classes, merge_seen(classes, *sides))
        whole = Moments.zero(
            classes.shape[0], mine[0], scatter=False, xp=xp, device=device(classes)
        )
        scatter = None
        if self.moments.scatter is not None:
            scatter = self.moments.scatter + other.moments.scatter
        for part in row_blocks(classes.shape[0]):
            a, b = self._laid_over(classes[part]), other._laid_over(classes[part])
            whole.counts[part] = a[0] + b[0]
            whole.means[part, :], whole.traces[part], apart = merge_rows(a, b)
            if scatter is not None:
                scatter += symmetric_product(apart)
        return SeenMoments(classes, replace(whole, scatter=scatter))

    def expand(self, n_classes: int) -> Moments:
        """Give the moments of all classes 0..K-1, zeros where there are no samples.

        Where all have samples, the arrays are those of `moments`, not copies.

        Parameters
        ----------
        n_classes : int
            K.

        Raises
        ------
        DataError
            When a class is not below `n_classes`.
        """
        xp = namespace(self.classes)
        if self.classes.shape[0] and int(self.classes[-1]) >= n_classes:
            raise DataError(
                f"class {int(self.classes[-1])} among the classes seen",
                f"classes below {n_classes}",
            )
        state, place = self.moments, device(self.classes)
        if self.classes.shape[0] == n_classes:
            return state
        whole = Moments.zero(n_classes, state.means.shape[1], scatter=False, xp=xp, device=place)
        for part in row_blocks(n_classes):
            ids = xp.arange(part.start, part.stop, dtype=self.classes.dtype, device=place)
            whole.counts[part], whole.means[part, :], whole.traces[part] = self._laid_over(ids)
        return replace(whole, scatter=state.scatter)

    def _laid_over(self, ids: Array) -> tuple[Array, Array, Array]:
        """Give counts, means and traces of classes `ids`, ascending; zeros for those not seen.

        `ids` holds every class seen between its first and its last.
        """
        xp, state = namespace(self.classes), self.moments
        first = int(xp.searchsorted(self.classes, ids[:1])[0])
        stop = int(xp.searchsorted(self.classes, ids[-1:], side="right")[0])
        rows = (state.counts[first:stop], state.means[first:stop, :], state.traces[first:stop])
        if stop - first == ids.shape[0]:
            return rows
        seen = xp.zeros(ids.shape, dtype=xp.bool, device=device(ids))
        if stop > first:
            there = self.classes[first:stop]
            place = xp.clip(xp.searchsorted(there, ids), 0, stop - first - 1)
            seen = xp.take(there, place, axis=0) == ids
        return tuple(_spread(row, seen) for row in rows)


def _compiled(a: SeenMoments, b: SeenMoments, n_classes: int) -> bool:
    """Whether compiled code, which checks no bounds, merges two states into one of `n_classes`."""
    return n_classes * a.moments.means.shape[1] >= _COMPILED_VALUES and all(
        isinstance(state.moments.means, np.ndarray)
        and state.moments.means.dtype == np.float64
        and state.moments.means.shape[0] == state.classes.shape[0]
        for state in (a, b)
    )


def _spread(rows: Array, seen: Array) -> Array:
    """Lay `rows` (P, ...) over the P places of `seen` (C,) that are true."""
    xp = namespace(rows)
    whole = xp.zeros((seen.shape[0], *rows.shape[1:]), dtype=rows.dtype, device=device(rows))
    whole[seen] = rows
    return whole
