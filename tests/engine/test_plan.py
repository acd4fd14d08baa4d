"""Budgets are read, and refused with the smallest that would work."""

import pytest

from ncbatch.engine import Price, check_budget, memory_budget, resident_bytes
from ncbatch.errors import BudgetError, UsageError


def test_budget_is_the_ceiling_of_the_dearest_step():
    prices = [Price("small", 10), Price("large", 100)]
    assert check_budget(prices, 150, 50) == 150
    with pytest.raises(BudgetError, match=r"large needs .*\n.*--memory 32MiB"):
        check_budget(prices, 149, 50)


@pytest.mark.parametrize(("text", "size"), [("2GiB", 2**31), ("500MB", 5 * 10**8), (1000, 1000)])
def test_sizes_are_read(text, size):
    assert memory_budget(text) == size


@pytest.mark.parametrize("text", ["much", "-1GiB", "0"])
def test_nonsense_is_refused(text):
    with pytest.raises(UsageError, match="memory"):
        memory_budget(text)


def test_default_is_what_the_machine_has_left():
    assert memory_budget(None) > resident_bytes()
