"""The engine knows no neural collapse: a counting state is enough to test it."""

from dataclasses import dataclass, field

import pytest

from ncbatch.engine import Item, run


@dataclass
class Counting:
    """Sums the numbers of its items."""

    numbers: list[int]
    label: str = "counting"
    unit: str = "numbers"
    finished: list[int] = field(default_factory=list)

    @property
    def items(self):
        return [Item(i, i + 1, 10) for i in range(len(self.numbers))]

    def start(self):
        return 0

    def fold(self, accumulator, item):
        if self.numbers[item.start] < 0:
            raise ValueError("negative")
        return accumulator + self.numbers[item.start]

    def finish(self, accumulator):
        self.finished.append(accumulator)
        return accumulator


class Recorder:
    def __init__(self):
        self.calls = []

    def begin(self, label, total, unit):
        self.calls.append((label, total, unit))

    def advance(self, size):
        self.calls.append(size)

    def end(self):
        self.calls.append("end")


def test_items_are_folded_in_order_and_told():
    recorder = Recorder()
    assert run(Counting([1, 2, 3]), recorder) == 6
    assert recorder.calls == [("counting", 30, "numbers"), 10, 10, 10, "end"]
    assert run(Counting([])) == 0


def test_progress_ends_and_nothing_is_finished_when_an_item_fails():
    recorder, work = Recorder(), Counting([1, -1, 1])
    with pytest.raises(ValueError, match="negative"):
        run(work, recorder)
    assert recorder.calls[-1] == "end"
    assert work.finished == []
