"""Budgets are read, and refused with the smallest that would work; plans print themselves."""

import pytest

from ncbatch.engine.jobs import Price, cut
from ncbatch.engine.plans import Plan, check_budget, memory_budget, resident_bytes
from ncbatch.errors import BudgetError, UsageError


def plan(budget: int, at_once: int = 1) -> Plan:
    prices = [Price("small", 10, bytes_read=7, n_items=2, flops=5), Price("large", 100, n_items=3)]
    return Plan(prices, 50, budget, at_once)


def test_budget_is_the_ceiling_of_the_dearest_step():
    check_budget(plan(150))
    assert plan(150).peak_bytes == 150
    with pytest.raises(BudgetError, match=r"large needs .*\n.*--memory 32MiB"):
        check_budget(plan(149))


def test_tasks_of_one_worker_share_its_budget():
    check_budget(plan(250, at_once=2))
    with pytest.raises(BudgetError, match="large, 2 at once, needs"):
        check_budget(plan(249, at_once=2))


def test_a_plan_adds_up_and_prints_itself():
    found = plan(2**30)
    assert (found.items, found.bytes_read, found.flops, found.device_bytes) == (5, 7, 5, 0)
    text = str(found)
    assert "small" in text
    assert "peak memory of a worker: 150 B" in text
    assert "GPU" not in text
    assert "GPU peak" in str(Plan([Price("step", 1, device_bytes=2**20)], 0, 10))


@pytest.mark.parametrize(("text", "size"), [("2GiB", 2**31), ("500MB", 5 * 10**8), (1000, 1000)])
def test_sizes_are_read(text, size):
    assert memory_budget(text) == size


@pytest.mark.parametrize("text", ["much", "-1GiB", "0"])
def test_nonsense_is_refused(text):
    with pytest.raises(UsageError, match="memory"):
        memory_budget(text)


def test_default_is_what_the_machine_has_left():
    assert memory_budget(None) > resident_bytes()


@pytest.mark.parametrize(
    ("n", "grain", "most", "parts"),
    [(0, 4, 64, 16), (1, 4, 64, 16), (1000, 7, 3, 16), (999, 8, 64, 4)],
)
def test_ranges_cover_everything_once_in_whole_grains(n, grain, most, parts):
    ranges = list(cut(0, n, grain, most, parts))
    assert [i for start, stop in ranges for i in range(start, stop)] == list(range(n))
    assert all(start % grain == 0 for start, _ in ranges)
    assert all(stop - start <= most * grain for start, stop in ranges)
    assert len(ranges) <= parts or all(stop - start == most * grain for start, stop in ranges[:-1])
