"""The package keeps the shape that docs/design.md describes; `tests/house.py` measures it."""

from __future__ import annotations

import ncbatch
from tests.house import House, top_entries

HOUSE = House.read()


def test_modules_are_few_and_stand_in_rooms():
    assert len(HOUSE.modules) <= 110
    assert len(top_entries()) <= 13


def test_imports_go_straight_down():
    assert len(HOUSE.longest_chain) <= 12, HOUSE.longest_chain  # a circle raises


def test_imports_stand_at_the_top():
    assert len(HOUSE.function_imports()) <= 29
    assert len(HOUSE.function_imports(outside="cli")) <= 10, HOUSE.function_imports(outside="cli")


def test_no_module_is_named_like_a_public_function():
    functions = {name for name in ncbatch.__all__ if callable(getattr(ncbatch, name))}
    assert functions.isdisjoint(name.rpartition(".")[2] for name in HOUSE.modules)


def test_code_is_short():
    assert HOUSE.figures["lines of code"] <= 16_000


def test_code_is_explained():
    assert HOUSE.figures["comment lines per 100 of code"] >= 4


def test_lines_do_one_thing():
    assert len(HOUSE.packed_assignments) <= 20, HOUSE.packed_assignments
    assert len(HOUSE.skipped_formatting) <= 10, HOUSE.skipped_formatting
    assert not HOUSE.vague_names
