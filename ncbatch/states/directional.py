"""Variance of each class along the lines to all others, from a second read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from array_api_compat import device

from ncbatch.arrays.named_arrays import NamedArrays
from ncbatch.arrays.namespace import Array, as_float64, namespace
from ncbatch.arrays.rows import row_blocks
from ncbatch.arrays.segments import Segments, add_at, segment_sum
from ncbatch.errors import DataError
from ncbatch.states.pairs.means import PairMeans

_TILE_CLASSES = 1024


@dataclass(frozen=True)
class DirectionalVariance(NamedArrays):
    """Sums over the samples x of each class i, and other classes j, of ((x - m_i) . u)^2 / d_ij^2.

    Attributes
    ----------
    sums : array (K,)
        With u = (m_j - m_i) / d_ij; coincident means are left out.
    """

    sums: Array
    called = "directional variances"

    @classmethod
    def zero(cls, n_classes: int, *, xp: Any = np, device: Any = None) -> DirectionalVariance:
        """Make the state of no samples, neutral under `merge`."""
        return cls(xp.zeros((n_classes,), dtype=xp.float64, device=device))

    @classmethod
    def from_block(cls, features: Array, labels: Array, pairs: PairMeans) -> DirectionalVariance:
        """Sum one block of samples held in memory.

        Parameters
        ----------
        features : array (N, D)
            Floating-point features.
        labels : array (N,)
            Class ids 0..K-1.
        pairs : PairMeans
            The class means, such as a `PairTiles`; they may lie in a file.
        """
        xp = namespace(features, labels)
        state = cls.zero(pairs.n_classes, xp=xp, device=device(pairs.means))
        if features.shape[0] == 0:
            return state
        segments = Segments.of(labels)
        present = pairs.block(segments.present)
        class_means = xp.take(present.means, segments.index, axis=0)
        residuals = as_float64(features) - class_means
        offsets = xp.sum(residuals * (class_means - pairs.center), axis=1)
        del class_means
        total = xp.zeros_like(as_float64(segments.present))
        for part in row_blocks(pairs.n_classes, _TILE_CLASSES):
            others = pairs.block(part)
            squares = pairs.square_distances(present, others)
            apart = pairs.apart(present, others, squares)
            # 1/inf is 0: coincident means, and a class with itself, add nothing.
            weight = xp.where(apart, squares, xp.full_like(squares, xp.inf)) ** -2.0
            along = xp.matmul(residuals, xp.matrix_transpose(others.centred)) - offsets[:, None]
            total = total + xp.sum(segment_sum(along * along, segments) * weight, axis=1)
        add_at(state.sums, segments.mask(pairs.n_classes), total)
        return state

    def merge(self, other: DirectionalVariance) -> DirectionalVariance:
        """Combine with the state of other samples; neither operand changes."""
        if self.sums.shape != other.sums.shape:
            raise DataError(
                "directional variances of different classes", "equal numbers of classes"
            )
        return DirectionalVariance(self.sums + other.sums)

    @staticmethod
    def peak_bytes(n_classes: int, n_features: int, block_rows: int) -> int:
        """Price a block: bytes at its peak, beside the means."""
        tile = min(n_classes, _TILE_CLASSES)
        present = min(n_classes, block_rows)
        # Present means, themselves and centred, and a tile of others; then residuals and gathers.
        means = (present + 2 * tile) * n_features * 8 * 2
        return n_classes * 32 + means + block_rows * (n_features * 32 + tile * 48)
