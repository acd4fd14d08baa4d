"""Pages that are made from the code are up to date, and examples in docstrings run."""

import doctest
import importlib
import pkgutil
from pathlib import Path

import pytest

import ncbatch
from ncbatch.metrics import CATALOGUE, Metric
from tests.generated import FILES

ROOT = Path(__file__).parents[1]
METRICS = ROOT / "docs" / "metrics.md"
MODULES = sorted(
    m.name
    for m in pkgutil.walk_packages(ncbatch.__path__, "ncbatch.")
    if m.name != "ncbatch.__main__"
)


def row(metric: Metric) -> str:
    """Lay a metric out as a line of the table in ``docs/metrics.md``."""
    reads = ", ".join(sorted(metric.reads)) or "means"
    formula = metric.formula.replace("|", "\\|")
    marks = {"floor": metric.floor, "random": metric.random, "null": metric.has_null or None}
    yardsticks = ", ".join(name for name, mark in marks.items() if mark is not None)
    return (
        f"| `{metric.name}` | {metric.long_name} | {formula} | {metric.units} | {reads} "
        f"| {cost(metric)} | {yardsticks} | {metric.source} |"
    )


def cost(metric: Metric) -> str:
    """Say what a metric costs, in the letters of ``docs/metrics.md``."""
    letter = "B" if "scatter" in metric.reads else "A"
    if metric.reads & {"decisions", "test", "directional"}:
        letter += "+C"
    return letter + "+P" if metric.pair_quantities else letter


def with_table(page: str) -> str:
    """Put the table of metrics as it is now into the page, in the place of the old one."""
    head, rows = page.split("| name | what it is |")
    rule, tail = rows.split("\n\n", 1)
    table = "\n".join([*rule.splitlines()[:2], *map(row, CATALOGUE.values())])
    return f"{head}| name | what it is |{table}\n\n{tail}"


def test_table_of_metrics_is_up_to_date():
    page = METRICS.read_text(encoding="utf-8")
    assert page.count("| `") == len(CATALOGUE) + 2  # and two presets
    assert with_table(page) == page, "run: python -m tests.test_docs"


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run(name: str):
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    assert doctest.testmod(importlib.import_module(name), optionflags=flags).failed == 0


def test_readme_names_only_what_exists():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for link in (
        "docs/design.md",
        "docs/store.md",
        "docs/metrics.md",
        "docs/benchmarks.md",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
    ):
        assert link in text
        assert (ROOT / link).is_file()


@pytest.mark.parametrize("name", FILES)
def test_files_made_from_declarations_are_up_to_date(name: str):
    assert (ROOT / name).read_text(encoding="utf-8") == FILES[name](), "python -m tests.generated"


if __name__ == "__main__":
    METRICS.write_text(with_table(METRICS.read_text(encoding="utf-8")), encoding="utf-8")
