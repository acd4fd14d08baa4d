"""Metric: one entry of the table, and the reductions that entries share."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ncbatch.arrays.namespace import Array, namespace, scalar
from ncbatch.metrics.statistics import Statistics, Undefined

if TYPE_CHECKING:
    from ncbatch.states.pairs.stats import Tally

PAPYAN = "Papyan, Han & Donoho 2020, doi:10.1073/pnas.2015509117"
HAN = "Han, Papyan & Donoho 2022, arXiv:2106.02073"
TIRER = "Tirer, Huang & Niles-Weed 2023, PMLR 202"
GALANTI = "Galanti, György & Hutter 2021, arXiv:2112.15121"
HUI = "Hui, Belkin & Nakkiran 2022, arXiv:2202.08384"
KOTHAPALLI = "Kothapalli 2023, arXiv:2206.04041"
LIU = "Liu et al. 2023, arXiv:2303.06484"
WU = "Wu & Papyan 2024, arXiv:2405.17767"
AMMAR = "Ammar et al. 2024, arXiv:2310.06823"

Compute = Callable[[Statistics], float]


@dataclass(frozen=True)
class Metric:
    """One entry of the table.

    Attributes
    ----------
    name : str
        The name in results.
    long_name : str
        What a person calls it.
    formula : str
        In the notation of ``docs/metrics.md``.
    source : str
        The paper.
    reads : frozenset of str
        The statistics it needs beside counts and means: ``traces``, ``scatter``, ``classifier``,
        ``decisions``, ``ood``, ``test``, ``directional``, or ``pairs.<quantity>``.
    compute : callable
        ``compute(statistics) -> float``; raises `Undefined` where there is no value.
    units : str
        ``1`` for a ratio.
    floor, random : callable, optional
        Yardsticks: what geometry does not let the value fall below, and what Gaussian class means
        with the same traces would give; NaN where the closed form does not hold.
    only_named : bool
        Whether it is measured only when asked for by name, because it needs a read of its own.
    """

    name: str
    long_name: str
    formula: str
    source: str
    reads: frozenset[str]
    compute: Compute
    units: str = "1"
    floor: Compute | None = None
    random: Compute | None = None
    only_named: bool = False

    @property
    def place(self) -> str:
        """NC1 to NC5, or spectrum."""
        return "spectrum" if self.name.startswith("spec") else self.name[:3].upper()

    @property
    def pair_quantities(self) -> frozenset[str]:
        """The quantities of the pair sweep that it reads."""
        prefix = "pairs."
        return frozenset(r.removeprefix(prefix) for r in self.reads if r.startswith(prefix))

    @property
    def has_null(self) -> bool:
        """Whether it can be computed for labels at random, from the same read."""
        return all(r in ("traces", "scatter") or r.startswith("pairs.") for r in self.reads)


def reads(*names: str) -> frozenset[str]:
    """Name the statistics that a metric needs."""
    return frozenset(names)


def finite(value: float, reason: str) -> float:
    """Give `value`, or `Undefined` for `reason` where it is not finite."""
    if not math.isfinite(value):
        raise Undefined(reason)
    return value


def mean(values: Array, what: str) -> float:
    """Average over classes; `what` says what is needed of a class."""
    if values.shape[0] == 0:
        raise Undefined(f"no class has {what}")
    return scalar(namespace(values).mean(values))


def variance(values: Array, what: str, ddof: int) -> float:
    """Variance over classes."""
    n: int = values.shape[0]
    if n < 2:
        raise Undefined(f"fewer than two classes have {what}")
    xp = namespace(values)
    return scalar(xp.sum((values - xp.mean(values)) ** 2)) / (n - ddof)


def tally(statistics: Statistics, quantity: str) -> Tally:
    """Return a tally of the pair sweep that holds any pair."""
    pairs: Tally | None = getattr(statistics.pairs, quantity)
    if pairs is None or not pairs.n:
        raise Undefined("no pair of classes is left: all coincide or have no direction")
    return pairs
