"""Pages that are made from the code are up to date, and examples in docstrings run."""

import doctest
import importlib
import pkgutil
from pathlib import Path

import pytest

import ncbatch
from ncbatch.results.tables import metrics_page

ROOT = Path(__file__).parents[1]
MODULES = sorted(
    m.name
    for m in pkgutil.walk_packages(ncbatch.__path__, "ncbatch.")
    if m.name != "ncbatch.__main__"
)


def test_page_of_metrics_is_up_to_date():
    made = metrics_page()
    written = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert written == made, "write metrics_page() to it"


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
