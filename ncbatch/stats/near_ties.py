"""Near-ties: the classes that rounding leaves in doubt, decided from float64 scores."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from array_api_compat import device

from ncbatch.arrays import Array, namespace, row_blocks, take_rows, to_numpy
from ncbatch.stats.leading_scores import class_tiles

# Bytes of the rows, and of the score vectors, of pairs that are scored at a time.
_PAIR_BYTES = 4 * 2**20
# Scores of a tile that is searched for candidates.
LISTED_SCORES = 2**19


class ExactScores(Protocol):
    """Scores pairs of rows and classes in float64, on the host."""

    def __call__(self, rows: npt.NDArray[Any], k: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Score row r of (R, D) for the class at position k[r]; gives (R,) of float64."""
        ...


def pair_rows(n_features: int) -> int:
    """Count the pairs that are scored at a time."""
    return max(1, min(2048, _PAIR_BYTES // (8 * n_features)))


class Contest:
    """Rows in doubt and the best of the classes that were offered for each so far.

    Parameters
    ----------
    features : array (R, D)
        The rows, of any library and floating-point dtype.
    exact : ExactScores
        Scores of float64.
    """

    def __init__(self, features: Array, exact: ExactScores) -> None:
        self._rows, self._exact = to_numpy(features), exact
        self._best = np.full(len(self._rows), -np.inf)
        self.at = np.zeros(len(self._rows), np.int64)

    def offer(self, row: npt.NDArray[Any], k: npt.NDArray[Any]) -> None:
        """Let classes compete: the class at position k[i] for row[i]; equal scores go to the first."""
        for some in row_blocks(len(row), pair_rows(self._rows.shape[1])):
            i, c = row[some], k[some]
            scores = self._exact(self._rows[i].astype(np.float64), c)
            # The first of each row: greatest score, then lowest position.
            order = np.lexsort((c, -scores, i))
            i, c, scores = i[order], c[order], scores[order]
            first = np.r_[True, i[1:] != i[:-1]]
            i, c, scores = i[first], c[first], scores[first]
            better = (scores > self._best[i]) | ((scores == self._best[i]) & (c < self.at[i]))
            self._best[i[better]], self.at[i[better]] = scores[better], c[better]


def candidates(
    rows: Array, weight: Array, bias: Array, floor: Array, most_classes: int
) -> Iterator[tuple[npt.NDArray[Any], npt.NDArray[Any]]]:
    """Find every class whose score reaches `floor`, tile by tile.

    Parameters
    ----------
    rows : array (R, D)
        Rows in the dtype of the products.
    weight, bias : array (C, D) and (C,)
        The scores' vectors and offsets.
    floor : array (R,) of float64
        The least score that counts; -inf where every class does.
    most_classes : int
        Classes of a tile at most, such as where they are read or converted.

    Yields
    ------
    tuple of two arrays (P,)
        Rows and positions of classes, on the host.
    """
    xp = namespace(rows)
    info = xp.finfo(rows.dtype)
    # Rounded down: a candidate may be one too many, never one too few.
    floor = floor - 2.0 * float(info.eps) * xp.abs(floor) - float(info.smallest_normal)
    floor = xp.astype(floor, rows.dtype)
    for part in row_blocks(rows.shape[0], 1024):
        n_rows = part.stop - part.start
        tile = min(max(LISTED_SCORES // n_rows, 1), most_classes)
        for first, block, offsets in class_tiles(weight, bias, rows, tile):
            scores = xp.matmul(rows[part, :], xp.matrix_transpose(block)) + offsets[None, :]
            row, k = xp.nonzero(scores >= floor[part, None])
            yield to_numpy(row) + part.start, to_numpy(k) + first


def distinct_rows(rows: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Find one of each of the rows (R, D) that are equal: their numbers, and which each row is.

    Rows of many candidates are often the same row: one of zeros ties with every class.
    """
    whole = np.ascontiguousarray(rows)
    keys = whole.view(np.dtype((np.void, whole.dtype.itemsize * whole.shape[1])))[:, 0]
    _, first, back = np.unique(keys, return_index=True, return_inverse=True)
    return first, back


def score_vectors(rows: Array, k: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Read rows (C, D) at positions k (P,), in any order, as float64 on the host."""
    numbers, back = np.unique(k, return_inverse=True)
    found = take_rows(rows, namespace(rows).asarray(numbers, device=device(rows)))
    return np.asarray(to_numpy(found), dtype=np.float64)[back]
