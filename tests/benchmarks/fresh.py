"""Running a case in a process of its own, so that its peak of memory is its own."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from typing import Any

from tests.benchmarks.case import Case, MissingError

COMMAND = (sys.executable, "-m", "tests.benchmarks")


class FailedError(Exception):
    """A case that raised; the message is the last line that it printed."""


def fresh_sample(name: str, quick: bool) -> dict[str, Any]:
    """Run a case once in a new process and give the fields of its `Sample`.

    Raises
    ------
    MissingError
        When something it needs is not here.
    FailedError
        When it fails.
    """
    command = [*COMMAND, "--case", name, *(["--quick"] if quick else [])]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        lines = ended.stderr.strip().splitlines()
        raise FailedError(lines[-1] if lines else f"exit status {ended.returncode}")
    found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    if "missing" in found:
        raise MissingError(found["missing"])
    return found


def print_sample(case: Case, quick: bool, base_bytes: int) -> None:
    """Run a case in this process and print its sample as JSON.

    Parameters
    ----------
    case : Case
        Which.
    quick : bool
        Whether in its smaller shape.
    base_bytes : int
        What the bare interpreter holds: peaks count from there.
    """
    shape = case.quick if quick and case.quick else case.shape
    try:
        found = asdict(case.run(shape))
    except MissingError as error:
        print(json.dumps({"missing": str(error)}))
        return
    for peak in ("peak_bytes", "against_peak_bytes"):
        if found[peak] is not None:
            found[peak] -= base_bytes
    print(json.dumps(found))
