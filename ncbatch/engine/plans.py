"""Plans: what a run reads, computes and holds, in integers, known before anything is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import psutil
from dask.utils import format_bytes, parse_bytes

from ncbatch.engine.jobs import Price
from ncbatch.errors import BudgetError, UsageError

__all__ = ["Plan", "Price", "check_budget", "format_bytes", "memory_budget", "resident_bytes"]


@dataclass(frozen=True)
class Plan:
    """All steps of a run; prints itself as a table.

    Attributes
    ----------
    prices : sequence of Price
        The steps, in order.
    base_bytes : int
        What a worker's interpreter holds before the first.
    budget : int
        Bytes that a worker may hold.
    at_once : int
        Steps that a worker runs at once, each at its own peak.
    notes : sequence of str
        What the plan decided, for a person.
    """

    prices: Sequence[Price]
    base_bytes: int
    budget: int
    at_once: int = 1
    notes: Sequence[str] = ()

    @property
    def peak_bytes(self) -> int:
        """Resident bytes of a worker at its peak."""
        dearest = max((price.peak_bytes for price in self.prices), default=0)
        return self.base_bytes + self.at_once * dearest

    @property
    def device_bytes(self) -> int:
        """GPU memory of a worker at its peak."""
        return max((price.device_bytes for price in self.prices), default=0)

    @property
    def items(self) -> int:
        """Items of all steps."""
        return sum(price.n_items for price in self.prices)

    @property
    def bytes_read(self) -> int:
        """Bytes read from stores."""
        return sum(price.bytes_read for price in self.prices)

    @property
    def flops(self) -> int:
        """Floating-point operations of all products."""
        return sum(price.flops for price in self.prices)

    @property
    def disk_bytes(self) -> int:
        """Bytes of files that are needed beside memory."""
        return sum(price.disk_bytes for price in self.prices)

    def __str__(self) -> str:
        head = ("step", "reads", "items", "block rows", "tile", "read", "FLOP", "peak", "GPU peak")
        # Tasks that run at once add up.
        peak = self.peak_bytes - self.base_bytes
        total = Price("all", peak, self.device_bytes, self.bytes_read, self.flops, self.items)
        rows = [head, *(_cells(price, self.base_bytes) for price in [*self.prices, total])]
        used = [column for column in zip(*rows, strict=True) if any(column[1:])]
        columns = [_aligned(column, left=column is used[0]) for column in used]
        lines = ["  ".join(cells).rstrip() for cells in zip(*columns, strict=True)]
        lines.append(
            f"peak memory of a worker: {format_bytes(self.peak_bytes)}, "
            f"the interpreter's {format_bytes(self.base_bytes)} included, "
            f"of {format_bytes(self.budget)} allowed"
        )
        return "\n".join([*lines, *self.notes])


def _cells(price: Price, base: int) -> tuple[str, ...]:
    return (
        price.step,
        _number(price.n_reads),
        _number(price.n_items),
        _number(price.block_rows),
        _number(price.tile_classes),
        _size(price.bytes_read),
        f"{price.flops:.2e}" if price.flops else "",
        format_bytes(base + price.peak_bytes),
        _size(price.device_bytes),
    )


def _aligned(column: tuple[str, ...], *, left: bool) -> list[str]:
    width = max(map(len, column))
    return [cell.ljust(width) if left else cell.rjust(width) for cell in column]


def _number(number: int) -> str:
    return f"{number:,}" if number else ""


def _size(n_bytes: int) -> str:
    return format_bytes(n_bytes) if n_bytes else ""


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


def check_budget(plan: Plan, otherwise: str = ", or measure fewer metrics") -> None:
    """Refuse a plan of which a step does not fit; steps run one after the other.

    Parameters
    ----------
    plan : Plan
        What shall run.
    otherwise : str, optional
        What else than more memory would help.

    Raises
    ------
    BudgetError
        Names the step and the smallest budget that would work.
    """
    if plan.peak_bytes <= plan.budget:
        return
    dearest = max(plan.prices, key=lambda price: price.peak_bytes)
    at_once = f", {plan.at_once} at once," if plan.at_once > 1 else ""
    # Rounded up: the interpreter's own share differs by a few MiB from run to run.
    enough = (plan.peak_bytes // 2**24 + 2) * 16
    raise BudgetError(
        f"{dearest.step}{at_once} needs {format_bytes(plan.peak_bytes)} resident, "
        f"the interpreter's {format_bytes(plan.base_bytes)} included",
        f"at most {format_bytes(plan.budget)}",
        f"give at least --memory {enough}MiB{otherwise}",
    )
