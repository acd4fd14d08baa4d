"""The scan of a tile of scores on the CPU: the leading scores of every row, in one pass."""

from __future__ import annotations

from typing import Any

from numba import njit

from ncbatch.states.rules import RUN

# Scores are finite or -inf, never NaN; the maximum of a run may be taken in any order.
_FAST = {"nnan", "nsz", "reassoc"}


@njit(cache=True, nogil=True, fastmath=_FAST, error_model="numpy")
def scan_tile(scores: Any, bias: Any, first: int, values: Any, at: Any) -> None:
    """Fold a tile of products into the leading scores of its rows.

    Parameters
    ----------
    scores : array (R, C)
        Products of R rows with C classes.
    bias : array (C,)
        Added to the products, in their dtype.
    first : int
        Position of the tile's first class.
    values, at : array (R, T)
        The greatest scores so far and the positions of their classes: descending, equal scores
        by ascending position. So they do not depend on the order of the tiles.
    """
    n_columns = scores.shape[1]
    in_runs = n_columns - n_columns % RUN
    for r in range(scores.shape[0]):
        last = values.shape[1] - 1
        least = values[r, last]
        for start in range(0, in_runs, RUN):
            top = scores[r, start] + bias[start]
            for c in range(start, start + RUN):
                top = max(top, scores[r, c] + bias[c])
            if top >= least:
                _offer(scores[r], bias, start, start + RUN, first, values[r], at[r])
                least = values[r, last]
        _offer(scores[r], bias, in_runs, n_columns, first, values[r], at[r])


@njit(cache=True, nogil=True, error_model="numpy")
def _offer(scores: Any, bias: Any, start: int, stop: int, first: int, values: Any, at: Any) -> None:
    """Insert the scores of a run that belong among the leading ones of a row."""
    last = values.shape[0] - 1
    for c in range(start, stop):
        score = scores[c] + bias[c]
        k = first + c
        if score < values[last] or (score == values[last] and k > at[last]):
            continue
        t = last
        while t > 0 and (values[t - 1] < score or (values[t - 1] == score and at[t - 1] > k)):
            values[t] = values[t - 1]
            at[t] = at[t - 1]
            t -= 1
        values[t] = score
        at[t] = k
