"""Prices and budgets: peak memory is known, and refused if need be, before anything is read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import psutil
from dask.utils import format_bytes, parse_bytes

from ncbatch.errors import BudgetError, UsageError

__all__ = ["Price", "check_budget", "format_bytes", "memory_budget", "resident_bytes"]


@dataclass(frozen=True)
class Price:
    """What a step needs at its peak, beside the interpreter.

    Attributes
    ----------
    step : str
        What needs it.
    peak_bytes : int
        Bytes held at once.
    """

    step: str
    peak_bytes: int


def resident_bytes() -> int:
    """Memory this process holds now, libraries included."""
    return int(psutil.Process().memory_info().rss)


def memory_budget(text: str | int | None) -> int:
    """Read a budget such as ``"8GiB"``; without one, what the machine has left.

    Returns
    -------
    int
        Total resident bytes that the process may reach.

    Raises
    ------
    UsageError
        When the text is no size.

    Examples
    --------
    >>> memory_budget("2GiB")
    2147483648
    """
    if text is None:
        return resident_bytes() + int(psutil.virtual_memory().available)
    try:
        budget = int(parse_bytes(text))
    except ValueError as error:
        raise UsageError(f"memory '{text}'", "a size such as 8GiB or 500MB") from error
    if budget <= 0:
        raise UsageError(f"memory '{text}'", "a size above zero")
    return budget


def _rounded_up(n_bytes: int) -> str:
    """Name a budget that holds when the interpreter's own share differs by a few MiB."""
    step = 16 * 2**20
    return f"{(n_bytes // step + 2) * step // 2**20}MiB"


def check_budget(prices: Iterable[Price], budget: int, base_bytes: int) -> int:
    """Refuse a run of which a step does not fit; steps run one after the other.

    Parameters
    ----------
    prices : iterable of Price
        The steps.
    budget : int
        Total resident bytes allowed.
    base_bytes : int
        What the process holds before the first step.

    Returns
    -------
    int
        Planned peak of resident bytes.

    Raises
    ------
    BudgetError
        Names the step and the smallest budget that would work.
    """
    dearest = max(prices, key=lambda price: price.peak_bytes)
    peak = base_bytes + dearest.peak_bytes
    if peak > budget:
        raise BudgetError(
            f"{dearest.step} needs {format_bytes(peak)} resident, the interpreter's "
            f"{format_bytes(base_bytes)} included",
            f"at most {format_bytes(budget)}",
            f"give at least --memory {_rounded_up(peak)}, or measure fewer metrics",
        )
    return peak
