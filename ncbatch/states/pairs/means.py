"""Class means compared in pairs: norms, directions, distances, in full float64 accuracy."""

from __future__ import annotations

import tempfile
import weakref
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from array_api_compat import device

from ncbatch.arrays.namespace import Array, as_float64, namespace
from ncbatch.arrays.rows import (
    StoredRows,
    float64_blocks,
    product_rows,
    row_blocks,
    take,
    take_rows,
)

# A squared distance at or below this share of |a|^2 + |b|^2 counts as zero: the means coincide.
COINCIDENT = 1e-24
# Below this share of |a|^2 + |b|^2 a squared distance from products is computed anew.
LOST_IN_FLOAT64 = 1e-7


@dataclass(frozen=True, eq=False)
class MeansBlock:
    """The means of some classes in memory, one side of a tile of pairs.

    Attributes
    ----------
    means : array (B, D) of float64
        m_c.
    center : array (D,)
        m_G.
    size, square, inverse : array (B,)
        |m_c|^2, |m_c - m_G|^2, and 1 / |m_c - m_G|, or 0 for a mean without a direction.
    """

    means: Array
    center: Array
    size: Array
    square: Array
    inverse: Array

    @cached_property
    def centred(self) -> Array:
        """m_c - m_G (B, D)."""
        return self.means - self.center

    @cached_property
    def directions(self) -> Array:
        """Unit vectors (B, D)."""
        return self.centred * self.inverse[:, None]


# Which classes a side of a tile has: a slice, an integer array, or a block that was read before.
Classes = slice | Array | MeansBlock


class PairMeans:
    """Class means, and what is known of each, for comparing them in pairs.

    Parameters
    ----------
    means : array (K, D) or StoredRows
        Class means; of stored ones only the blocks that are compared are read.
    center : array (D,) or 0, optional
        m_G, subtracted before directions are taken.
    within : array (D, D), optional
        S_W: then `within` has rows whose squared distances are (m_i - m_j)^T S_W (m_i - m_j).
    scratch : path, optional
        Folder for these rows where the means are stored; by default that of the means' file. The
        file goes when this object does.
    """

    def __init__(
        self,
        means: Array,
        center: Array | float = 0.0,
        within: Array | None = None,
        scratch: str | Path | None = None,
    ) -> None:
        xp = self._xp = namespace(means)
        place = {"dtype": xp.float64, "device": device(means)}
        self.means = means
        self.n_classes, self.n_features = means.shape
        self.center = xp.zeros((self.n_features,), **place) + center
        self._size, self._square, self._square_within = (
            xp.zeros((self.n_classes,), **place) for _ in range(3)
        )
        self.within: Array | None = None
        root = None
        if within is not None:
            values, vectors = xp.linalg.eigh(as_float64(within))
            # R (D, D) with R R^T = S_W; rounding may leave eigenvalues just below zero.
            root = vectors * xp.sqrt(xp.clip(values, 0.0, None))[None, :]
            self.within = (
                self._scratch_rows(scratch) if self.stored else xp.empty(means.shape, **place)
            )
        # All that is known of the classes, in one pass over the means.
        for part, block in float64_blocks(
            means, 1 if root is None else product_rows(self.n_features)
        ):
            centred = block - self.center
            self._size[part] = xp.sum(block * block, axis=1)
            self._square[part] = xp.sum(centred * centred, axis=1)
            if self.within is not None:
                along = xp.matmul(centred, root)
                self.within[part, :] = along
                self._square_within[part] = xp.sum(along * along, axis=1)
        directed = self._square > COINCIDENT * (self._size + xp.sum(self.center**2))
        # A mean at the center has no direction: 1 stands for its norm, 0 for the inverse.
        norms = xp.sqrt(xp.where(directed, self._square, 1.0))
        self._inverse = xp.where(directed, 1.0 / norms, 0.0)

    @property
    def stored(self) -> bool:
        """Whether the means lie in a file."""
        return isinstance(self.means, StoredRows)

    def _scratch_rows(self, folder: str | Path | None) -> StoredRows:
        folder = self.means.path.parent if folder is None else folder
        # Another process may sweep the same means.
        scratch = tempfile.TemporaryDirectory(prefix="within-", dir=folder)
        weakref.finalize(self, scratch.cleanup)
        return StoredRows.create(Path(scratch.name) / "within.rows", self.means.shape)

    def block(self, classes: Classes) -> MeansBlock:
        """Read the means of some classes, a slice or an integer array."""
        if isinstance(classes, MeansBlock):
            return classes
        return MeansBlock(
            as_float64(take_rows(self.means, classes)),
            self.center,
            take(self._size, classes),
            take(self._square, classes),
            take(self._inverse, classes),
        )

    def square_distances(
        self, rows: Classes, columns: Classes, *, directions: bool = False
    ) -> Array:
        """Compute |m_i - m_j|^2, or |u_i - u_j|^2, of a tile to full float64 accuracy.

        Distances that cancelled in the product are computed from differences.
        """
        x = self.block(rows)
        y = self.block(columns)
        xp = self._xp
        a, b = (x.directions, y.directions) if directions else (x.centred, y.centred)
        total = x.square[:, None] + y.square[None, :]
        if directions:
            total = xp.full_like(total, 2.0)
        # |a|^2 + |b|^2 - 2 a.b cancels where means are near each other; those are computed anew.
        squares = xp.clip(total - 2.0 * xp.matmul(a, xp.matrix_transpose(b)), 0.0, None)
        lost = squares < LOST_IN_FLOAT64 * total
        if bool(xp.any(lost)):
            if not directions:
                a = x.means
                b = y.means
            squares[lost] = square_differences(a, b, lost)
        return squares

    def apart(self, rows: Classes, columns: Classes, squares: Array) -> Array:
        """Mark the pairs of a tile whose means do not coincide."""
        sizes = [
            c.size if isinstance(c, MeansBlock) else take(self._size, c) for c in (rows, columns)
        ]
        return squares > COINCIDENT * (sizes[0][:, None] + sizes[1][None, :])

    def directed(self, rows: slice, columns: slice) -> Array:
        """Mark the pairs of a tile of which both means differ from the center."""
        return (self._inverse[rows] > 0.0)[:, None] & (self._inverse[columns] > 0.0)[None, :]

    def interference(self, rows: Classes, columns: Classes) -> Array:
        """Compute the products of centred means of a tile."""
        xp = self._xp
        return xp.matmul(self.block(rows).centred, xp.matrix_transpose(self.block(columns).centred))


def square_differences(a: Array, b: Array, where: Array) -> Array:
    """Compute |a_i - b_j|^2 of the pairs that `where` (B, C) marks, from differences."""
    xp = namespace(a)
    at_i, at_j = xp.nonzero(where)
    parts = []
    for part in row_blocks(at_i.shape[0], product_rows(a.shape[1])):
        apart = xp.take(a, at_i[part], axis=0) - xp.take(b, at_j[part], axis=0)
        parts.append(xp.sum(apart * apart, axis=1))
    return xp.concat(parts)
