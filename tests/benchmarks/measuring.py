"""Measuring one piece of work: its limit before and after it, in the same process."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tests.benchmarks.case import Sample
from tests.benchmarks.memory import forget_peak, peak_bytes

# Gives the seconds of the limit's parts, by name; their sum is the limit.
Limit = Callable[[], Mapping[str, float]]

_LEAST_SECONDS = 1.0


def timed(work: Callable[[], Any]) -> float:
    """Give the seconds that work takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _mean_seconds(work: Callable[[], Any]) -> float:
    """Time work that is short several times over, since a limit takes longer."""
    found = [timed(work)]
    while sum(found) < _LEAST_SECONDS:
        found.append(timed(work))
    return sum(found) / len(found)


def measured(
    work: Callable[[], Any],
    limit: Limit,
    *,
    held: int = 0,
    parts: Mapping[str, float] | None = None,
    notes: Sequence[str] = (),
) -> Sample:
    """Time work, and its limit before and after; machines that are shared change their pace.

    Parameters
    ----------
    work : callable
        What is timed; compiled code should have been loaded before.
    limit : callable
        Gives the seconds of the limit's parts, by name; their sum is the limit.
    held : int, optional
        Bytes that the peak shall not count, such as the work's operands.
    parts, notes : optional
        Further figures, and what a reader must know.
    """
    forget_peak()
    before = limit()
    against_peak = peak_bytes() - held
    forget_peak()
    seconds = _mean_seconds(work)
    peak = peak_bytes() - held
    found = {name: (before[name] + after) / 2 for name, after in limit().items()}
    return Sample(
        seconds, sum(found.values()), peak, against_peak, {**found, **(parts or {})}, notes
    )  # fmt: skip
