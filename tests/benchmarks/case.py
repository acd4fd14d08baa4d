"""Cases of the benchmark: what is measured, against what, and what it must reach."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


class MissingError(Exception):
    """What a case needs is not on this machine; the message says what."""


@dataclass(frozen=True)
class Shape:
    """N samples, D features, K classes; None where the work has none."""

    k: int
    d: int
    n: int | None = None

    def __str__(self) -> str:
        sizes = (("N", self.n), ("K", self.k), ("D", self.d))
        return ", ".join(f"{name} = {size:,}" for name, size in sizes if size is not None)


@dataclass(frozen=True)
class Aim:
    """What a case must reach.

    Attributes
    ----------
    at_most, at_least : float, optional
        Of its ratio.
    peak_mib : float, optional
        Of its peak of resident memory.
    """

    at_most: float | None = None
    at_least: float | None = None
    peak_mib: float | None = None

    def __str__(self) -> str:
        parts = [
            (self.at_most, "<= {:.3g}"),
            (self.at_least, ">= {:.3g} x"),
            (self.peak_mib, "<= {:.0f} MiB"),
        ]
        return ", ".join(text.format(value) for value, text in parts if value is not None)

    def met(self, ratio: float, peak_bytes: float | None) -> bool | None:
        """Say whether it is reached; None where there is no aim."""
        found = []
        if self.at_most is not None:
            found.append(ratio <= self.at_most)
        if self.at_least is not None:
            found.append(ratio >= self.at_least)
        if self.peak_mib is not None and peak_bytes is not None:
            found.append(peak_bytes <= self.peak_mib * 2**20)
        return all(found) if found else None


@dataclass(frozen=True)
class Sample:
    """What one run of a case gave.

    Attributes
    ----------
    value : float
        Seconds, or the unit of the case.
    against : float
        What it is held against, in the same unit.
    peak_bytes : int or None
        Peak of resident memory while the work ran; None where it says nothing.
    against_peak_bytes : int or None
        The same of what it is held against.
    parts : mapping of str to float
        What `against` is made of, and other figures worth keeping.
    notes : sequence of str
        What a reader must know, such as samples that were scaled up.
    """

    value: float
    against: float
    peak_bytes: int | None
    against_peak_bytes: int | None = None
    parts: Mapping[str, float] = field(default_factory=dict)
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Case:
    """One row of the benchmark: work of ncbatch.

    Attributes
    ----------
    name : str
        Short, for the command line.
    work : str
        What is done, for a person.
    against : str
        What it is held against: its limit, or a peer's work on the same data.
    run : callable
        ``run(shape) -> Sample``, in a process of its own.
    shape : Shape
        How large.
    quick : Shape or None
        How large with ``--quick``, where an aim holds for the full shape only; None leaves it out.
    aim : Aim
        What it must reach.
    peer : bool
        Whether it is held against a peer: the ratio is then how many times as fast it is.
    unit : {"s", "MiB"}
        Of its figures; bytes are given as MiB.
    repeats : int or None
        Runs, where it takes too long for the usual number.
    """

    name: str
    work: str
    against: str
    run: Callable[[Shape], Sample]
    shape: Shape
    quick: Shape | None = None
    aim: Aim = Aim()
    peer: bool = False
    unit: str = "s"
    repeats: int | None = None

    def row(self, runs: Sequence[Mapping[str, Any]], quick: bool) -> dict[str, Any]:
        """Take medians over runs, each the fields of a `Sample`."""
        shape = self.quick if quick and self.quick else self.shape
        ratio = statistics.median(self._ratio(run["value"], run["against"]) for run in runs)
        peak = _median(runs, "peak_bytes")
        return {
            "work": f"{self.work}, {shape}",
            "unit": self.unit,
            "value": _median(runs, "value"),
            "peak_bytes": peak,
            "against": self.against,
            "against_value": _median(runs, "against"),
            "against_peak_bytes": _median(runs, "against_peak_bytes") if self.peer else None,
            "ratio": ratio,
            "times_as_fast": self.peer,
            "aim": str(self.aim),
            "met": self.aim.met(ratio, peak) if shape == self.shape else None,
            "parts": {
                name: statistics.median(run["parts"].get(name, 0.0) for run in runs)
                for name in runs[0]["parts"]
            },
            "notes": list(dict.fromkeys(note for run in runs for note in run["notes"])),
            "runs": len(runs),
        }

    def _ratio(self, value: float, against: float) -> float:
        return against / value if self.peer else value / against


def _median(runs: Sequence[Mapping[str, Any]], name: str) -> float | None:
    found = [run[name] for run in runs if run[name] is not None]
    return statistics.median(found) if found else None
