"""The scan of a tile of scores on the CPU: the two best scores of every row, in one pass."""

from __future__ import annotations

from typing import Any

from numba import njit

from ncbatch.states.rules import RUN

# Scores are finite or -inf, never NaN; the maximum of a run may be taken in any order.
_FAST = {"nnan", "nsz", "reassoc"}


@njit(cache=True, nogil=True, fastmath=_FAST, error_model="numpy")
def scan_tile(scores: Any, bias: Any, first: int, leaders: Any) -> None:
    """Fold a tile of products into the leaders of its rows.

    Parameters
    ----------
    scores : array (R, C)
        Products of R rows with C classes.
    bias : array (C,)
        Added to the products, in their dtype.
    first : int
        Position of the tile's first class.
    leaders : Leaders
        Of the R rows so far; changed in place. They do not depend on the order of the tiles.
    """
    best, at, second = leaders
    n_columns = scores.shape[1]
    for r in range(scores.shape[0]):
        for start in range(0, n_columns, RUN):
            stop = min(start + RUN, n_columns)
            top = scores[r, start] + bias[start]
            for c in range(start, stop):
                top = max(top, scores[r, c] + bias[c])
            # Few runs hold one of the two best: the others are not gone over again.
            if top < second[r]:
                continue
            for c in range(start, stop):
                score = scores[r, c] + bias[c]
                if score > best[r] or (score == best[r] and first + c < at[r]):
                    second[r] = best[r]
                    best[r] = score
                    at[r] = first + c
                elif score > second[r]:
                    second[r] = score
