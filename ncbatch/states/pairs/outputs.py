"""What the compiled pair sweep writes: columns of its arrays, and the state that is made of them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ncbatch.states.pairs.stats import Nearest, PairStats, Tally, TopPairs

# Sums per tile: columns of the result.
CDNV, CDNV2, DIST, DIST2, LOG, LOG2, RIESZ, RIESZ2, INNER, INNER2 = range(10)
COS, COS2, DEV, DEV2, UNIFORM, UNIFORM2 = range(10, 16)
CORRECTED, CORRECTED2, DIRECTED, DIRECTED2 = range(16, 20)
N_SUMS = 20
# Counts per tile.
PAIRS, VARIED, DIRECTIONS, DIRECTIONS_APART, CORRECTABLE, ALONG, COINCIDENT = range(7)
N_COUNTS = 7
# Extremes: columns of (minimum, maximum).
CDNV_RANGE, SQUARE_RANGE, COSINE_RANGE, INNER_RANGE, LOG_RANGE = 0, 2, 4, 6, 8
N_EXTREMES = 10
# Sums that are taken of differences from a reference, and the count each goes with.
REFERENCED = {
    CDNV: VARIED,
    DIST: DIRECTIONS,
    LOG: DIRECTIONS_APART,
    INNER: PAIRS,
    COS: DIRECTIONS,
    DEV: DIRECTIONS,
    CORRECTED: CORRECTABLE,
    DIRECTED: ALONG,
}


def outputs(n_rows: int, n_columns: int, bins: int, n_top: int) -> tuple[Any, ...]:
    """Make the arrays that `sweep_tile` writes to.

    Returns
    -------
    tuple of array
        Per row: sums (R, N_SUMS), counts (R, N_COUNTS), extremes (R, N_EXTREMES), scales of the Riesz sums
        (R,), nearest squares (R, 2) and class (R,). Per column: nearest squares (2, C) and class
        (C,). Then the histogram (bins,), and the top values (2, T) and their classes (2, T, 2).
    """
    extremes = np.empty((n_rows, N_EXTREMES))
    extremes[:, ::2], extremes[:, 1::2] = np.inf, -np.inf
    return (
        np.zeros((n_rows, N_SUMS)),
        np.zeros((n_rows, N_COUNTS), np.int64),
        extremes,
        np.full(n_rows, -np.inf),
        np.full((n_rows, 2), np.inf),
        np.full(n_rows, -1, np.int64),
        np.full((2, n_columns), np.inf),
        np.full(n_columns, -1, np.int64),
        np.zeros(bins, np.int64),
        np.full((2, n_top), -np.inf),
        np.zeros((2, n_top, 2), np.int64),
    )


def summarise(
    out: tuple[Any, ...],
    wanted: frozenset[str],
    references: Any,
    riesz_exponent: float,
    i0: int,
    j0: int,
    n_classes: int,
) -> PairStats:
    """Turn what `sweep_tile` wrote into the state of the tile's pairs."""
    sums, counts, extremes, scales, near, near_at, cnear, cnear_at, histogram, top, top_at = out
    total, n = sums.sum(axis=0), counts.sum(axis=0)
    low, high = extremes[:, ::2].min(axis=0), extremes[:, 1::2].max(axis=0)

    def tally(column: int, extremes: tuple[float, float] = (-math.inf, math.inf)) -> Tally:
        return Tally.of_sums(
            int(n[REFERENCED[column]]), float(total[column]), float(total[column + 1]),
            float(references[column]), extremes,
        )  # fmt: skip

    def limits(column: int) -> tuple[float, float]:
        return float(low[column // 2]), float(high[column // 2])

    found: dict[str, Any] = {"n_pairs": int(n[PAIRS]), "coincident_means": int(n[COINCIDENT])}
    squares = limits(SQUARE_RANGE)
    some_directed = bool(n[DIRECTIONS])
    if "cdnv" in wanted:
        found["cdnv"] = tally(CDNV, limits(CDNV_RANGE))
        found["top_cdnv"] = _top_pairs(top[0], top_at[0])
    if "cdnv_corrected" in wanted:
        found["cdnv_corrected"] = tally(CORRECTED)
    if "cdnv_directional" in wanted:
        found["cdnv_directional"] = tally(DIRECTED)
    if "interference" in wanted:
        found["interference"] = tally(INNER, limits(INNER_RANGE))
    if "distance" in wanted and some_directed:
        found["distance"] = tally(DIST, (math.sqrt(squares[0]), math.sqrt(squares[1])))
    if "log" in wanted and n[DIRECTIONS_APART]:
        found["log"] = tally(LOG, limits(LOG_RANGE))
    if wanted & {"log", "riesz"}:
        found["coincident_directions"] = int(n[DIRECTIONS] - n[DIRECTIONS_APART])
    if "riesz" in wanted:
        found["riesz"] = _riesz(
            sums, scales, int(n[DIRECTIONS_APART]), riesz_exponent, limits(LOG_RANGE)
        )
    if "cosine" in wanted:
        found |= _cosines(
            tally, total, int(n[DIRECTIONS]), limits(COSINE_RANGE), squares, 1.0 / (n_classes - 1)
        )
        found["histogram"] = histogram
        found["top_cosine"] = _top_pairs(top[1], top_at[1])
    if "nearest" in wanted:
        found["nearest"] = _nearest(near, near_at, cnear, cnear_at, i0, j0, n_classes)
    return PairStats(**found)


def _cosines(
    tally: Any,
    total: Any,
    n: int,
    limits: tuple[float, float],
    squares: tuple[float, float],
    coherence: float,
) -> dict[str, Tally]:
    if not n:
        return {}
    ends = [abs(end + coherence) for end in limits]
    energies = (math.exp(-2.0 * squares[1]), math.exp(-2.0 * squares[0]))
    return {
        "cosine": tally(COS, limits),
        "deviation": tally(DEV, (-math.inf, max(ends))),
        "uniformity": Tally.of_sums(
            n, float(total[UNIFORM]), float(total[UNIFORM2]), extremes=energies
        ),
    }


def _riesz(sums: Any, scales: Any, n: int, exponent: float, logs: tuple[float, float]) -> Tally:
    """Bring the rows' sums to one scale; energies grow with the logarithms, whatever their sign."""
    if not n:
        return Tally()
    scale = float(scales.max())
    factors = np.exp(np.maximum(scales - scale, -1000.0))
    sign = math.copysign(1.0, exponent) if exponent else 0.0
    total, squares = float(sums[:, RIESZ] @ factors), float(sums[:, RIESZ2] @ factors**2)
    least, most = (sign * math.exp(exponent * end - scale) for end in logs)
    return Tally.of_sums(
        n, sign * total, sign * sign * squares, extremes=(least, most), log_scale=scale
    )


def _top_pairs(values: Any, classes: Any) -> TopPairs:
    real = values > -np.inf
    return TopPairs.none().merge(TopPairs(values[real], classes[real]))


def _nearest(
    near: Any, near_at: Any, cnear: Any, cnear_at: Any, i0: int, j0: int, n_classes: int
) -> Nearest:
    rows, columns = Nearest.none(n_classes), Nearest.none(n_classes)
    mine = slice(i0, i0 + near.shape[0])
    rows.index[mine], rows.square[mine] = near_at, near[:, 0]
    rows.direction_square[mine] = near[:, 1]
    theirs = slice(j0, j0 + cnear.shape[1])
    columns.index[theirs], columns.square[theirs] = cnear_at, cnear[0]
    columns.direction_square[theirs] = cnear[1]
    return columns.merge(rows)
