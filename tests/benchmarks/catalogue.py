"""All cases by name, in the order in which they are run."""

from __future__ import annotations

from tests.benchmarks import cases, gpu, language, pairs, peers
from tests.benchmarks.case import Case

CASES: dict[str, Case] = {
    case.name: case
    for case in [*cases.CASES, *peers.CASES, *pairs.CASES, *language.CASES, *gpu.CASES]
}
