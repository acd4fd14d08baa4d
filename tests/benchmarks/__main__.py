"""The benchmark: a table of cases with their limits, and a JSON file.

Run it from the project's root::

    python -m tests.benchmarks [CASE...] [--list] [--quick] [--repeats N] [--json FILE]

Each run of a case has a process of its own, so that its peak of resident memory is its own. What
it is held against is measured before and after it in the same process: on a machine that is shared
the ratios are what to read. Data is made once, in a folder ``ncbatch-benchmarks`` of the system's
temporary files.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.benchmarks.case import MissingError
from tests.benchmarks.fresh import FailedError, fresh_sample, print_sample
from tests.benchmarks.memory import resident_bytes

if TYPE_CHECKING:
    from tests.benchmarks.case import Case

_HEAD = ("case", "work", "ours", "peak MiB", "against", "its figure", "ratio", "aim", "met")
_REPEATS = 3


def main() -> int:
    """Run what the command line asks for."""
    base_bytes = resident_bytes()  # before libraries are loaded, which the work needs
    options = _parser().parse_args()
    from tests.benchmarks.catalogue import CASES

    if options.case:
        print_sample(CASES[options.case], options.quick, base_bytes)
        return 0
    chosen = _chosen(options.cases, CASES, options.quick)
    if options.list:
        for case in chosen:
            aim = f"  [{case.aim}]" if str(case.aim) else ""
            print(f"{case.name:<28}{case.work}, {case.shape}; against {case.against}{aim}")
        return 0
    return _run(chosen, options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("cases", nargs="*", metavar="CASE", help="names or how they begin; all")
    parser.add_argument("--list", action="store_true", help="list the cases and run nothing")
    parser.add_argument("--quick", action="store_true", help="smaller shapes, once: 2 minutes")
    parser.add_argument("--repeats", type=int, help=f"medians of so many runs, {_REPEATS}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write what was measured")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    return parser


def _chosen(names: Sequence[str], cases: dict[str, Case], quick: bool) -> list[Case]:
    found = [case for name, case in cases.items() if not names or name.startswith(tuple(names))]
    if not found:
        raise SystemExit(f"no case begins with {' or '.join(names)}: see --list")
    return [case for case in found if case.quick or not quick]


def _run(chosen: Sequence[Case], options: argparse.Namespace) -> int:
    from tests.benchmarks.machine import about

    found: dict[str, Any] = {**about(), "quick": options.quick, "rows": {}}
    _print_about(found)
    failed = False
    for case in chosen:
        try:
            row = _measure(case, options)
        except MissingError as error:
            row = {"work": case.work, "missing": str(error)}
        except FailedError as error:
            row, failed = {"work": case.work, "missing": f"failed: {error}"}, True
        found["rows"][case.name] = row
        print("| " + " | ".join(_cells(case.name, row)) + " |", flush=True)
        if options.json:  # what is done is kept, whatever comes
            options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    _print_notes(found["rows"])
    return int(failed)


def _measure(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    repeats = options.repeats or (1 if options.quick else case.repeats or _REPEATS)
    runs = [fresh_sample(case.name, options.quick) for _ in range(repeats)]
    return case.row(runs, options.quick)


def _print_about(found: dict[str, Any]) -> None:
    machine, versions = found["machine"], found["versions"]
    print(
        f"{found['date']}: {machine['processor']}, {machine['cores']} cores, "
        f"{machine['memory_gib']:g} GiB, {machine['gpu'] or 'no GPU'}\n"
    )
    print(", ".join(f"{name} {version}" for name, version in versions.items()) + "\n")
    if found["quick"]:
        print("Smaller shapes than those that the aims are for, measured once.\n")
    print("| " + " | ".join(_HEAD) + " |\n|" + "---|" * len(_HEAD))


def _cells(name: str, row: dict[str, Any]) -> list[str]:
    """Give the cells of a row of the table."""
    if "missing" in row:
        return [name, row["work"], row["missing"], *[""] * (len(_HEAD) - 3)]
    met = {True: "yes", False: "no", None: ""}[row["met"]]
    against = _figure(row["against_value"], row["unit"])
    if row["against_peak_bytes"]:
        against += f", {_mib(row['against_peak_bytes'])} MiB"
    return [
        name, row["work"] + ("" if row["runs"] > 1 else " (one run)"),
        _figure(row["value"], row["unit"]), _mib(row["peak_bytes"]), row["against"], against,
        f"{row['ratio']:.2f}" + (" x as fast" if row["times_as_fast"] else ""), row["aim"], met,
    ]  # fmt: skip


def _figure(value: float, unit: str) -> str:
    return f"{_mib(value)} MiB" if unit == "MiB" else f"{value:.3g} s"


def _mib(n_bytes: float | None) -> str:
    return "" if n_bytes is None else f"{n_bytes / 2**20:,.0f}"


def _print_notes(rows: dict[str, Any]) -> None:
    """Print what the cells leave out: parts of limits, and what a reader must know."""
    print()
    for name, row in rows.items():
        parts = [f"{part} {value:.3g} s" for part, value in row.get("parts", {}).items()]
        if len(parts) > 1 or row.get("notes"):
            print(f"- {name}: " + "; ".join([*parts, *row["notes"]]))


if __name__ == "__main__":
    sys.exit(main())
