"""Classifier rows beside class means, compared class by class in one pass over both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from array_api_compat import device

from ncbatch.arrays import Array, as_float64, float64_blocks, namespace, take_rows
from ncbatch.metrics.kernels import directions


@dataclass(frozen=True)
class Duality:
    """What classifier row w_c and centred mean Mc_c of each class have in common.

    Attributes
    ----------
    squares : array (K,)
        |w_c|^2.
    dots : array (K,)
        w_c . Mc_c.
    cosines : array (K,)
        Of the angle between both; 0 where one is zero.
    distances : array (K,)
        Between their directions; a zero vector stays zero.
    logits : array (K,)
        w_c . m_G.
    """

    squares: Array
    dots: Array
    cosines: Array
    distances: Array
    logits: Array

    @classmethod
    def of(cls, weight: Array, centred: Array, center: Array) -> Duality:
        """Compare classifier rows with centred means, block by block.

        Parameters
        ----------
        weight, centred : array (K, D) or view of rows
            The rows w_c and Mc_c.
        center : array (D,)
            m_G.
        """
        xp: Any = namespace(weight, center)
        n_classes = centred.shape[0]
        place = {"dtype": xp.float64, "device": device(center)}
        found = cls(*(xp.zeros((n_classes,), **place) for _ in range(5)))
        for part, mean in float64_blocks(centred):
            row = as_float64(take_rows(weight, part))
            found.squares[part] = xp.sum(row * row, axis=1)
            found.dots[part] = xp.sum(row * mean, axis=1)
            found.logits[part] = xp.sum(row * center, axis=1)
            row, mean = directions(row), directions(mean)
            found.cosines[part] = xp.sum(row * mean, axis=1)
            found.distances[part] = xp.sqrt(xp.sum((row - mean) ** 2, axis=1))
        return found
