"""The engine knows no neural collapse: a counting state is enough to test it."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from ncbatch.engine.jobs import Call, Item, Job, Sweep
from ncbatch.engine.kept import Kept
from ncbatch.engine.loop import run_jobs
from ncbatch.errors import DataError
from tests.engine.counting import Adder, Count, Counting

ITEMS = [Item(i, i + 1, 10) for i in range(6)]
NUMBERS = (99741, 58916, 61899, 85406, 49757, 27520)


class Recorder:
    def __init__(self):
        self.calls, self.notes = [], []

    def begin(self, label, total, unit):
        self.calls.append((label, total, unit))

    def advance(self, size):
        self.calls.append(size)

    def end(self):
        self.calls.append("end")

    def note(self, text):
        self.notes.append(text)


def job(work: Counting, about=None, items=ITEMS) -> Job:
    about = about or {"state": "count", "place": "here", "fingerprint": "a", "precision": "exact"}
    sweep = Sweep("count", "counting", partial(_give, work), items, unit="numbers", about=about)
    return Job("job", (sweep, Call("text", _text, ("count",))))


def _give(work):
    return work


def run(work: Counting, items: list[Item]) -> Count:
    return run_jobs([Job("job", (Sweep("count", "counting", partial(_give, work), items),))])[0]


def _text(count: Count) -> str:
    return f"{count.total} {count.rounded!r}"


def test_items_are_folded_in_order_and_told():
    recorder = Recorder()
    work = Counting(NUMBERS)
    assert run(work, ITEMS) == run(work, [Item(0, 6, 0)])
    assert run_jobs([job(work)], recorder) == [_text(run(work, ITEMS))]
    assert recorder.calls == [("counting", 60, "numbers"), *[10] * 6, "end"]
    assert run(work, []) == Count(0, 0.0)


def test_progress_ends_and_nothing_is_kept_as_finished_when_an_item_fails(tmp_path):
    recorder, bad = Recorder(), Counting((1, -1, 1, 1, 1, 1))
    with pytest.raises(ValueError, match="negative"):
        run_jobs([job(bad)], recorder, tmp_path)
    assert recorder.calls[-1] == "end"
    assert not list(tmp_path.glob("*/state.npz"))


def test_a_step_takes_the_results_it_needs_and_others_are_let_go():
    def second(count):
        return Counting((count.total,))

    steps = (
        Sweep("a", "a", lambda: Counting((1, 2)), [Item(0, 2, 1)]),
        Sweep("b", "b", second, [Item(0, 1, 1)], needs=("a",)),
        Call("c", lambda b, a: (a.total, b.total), ("b", "a")),
    )
    assert run_jobs([Job("j", steps), Job("k", steps[:1])]) == [(3, 3), Count(3, 1 / 7 + 2 / 7)]


@pytest.fixture
def keeps_every_item(monkeypatch):
    monkeypatch.setattr("ncbatch.engine.loop._KEEP_EVERY", 0.0)


@pytest.mark.usefixtures("keeps_every_item")
def test_a_run_that_broke_off_goes_on_to_the_same_bits(tmp_path):
    whole = run_jobs([job(Counting(NUMBERS))])
    log = tmp_path / "log"
    breaks = Counting((*NUMBERS[:4], -5, NUMBERS[5]), log)
    with pytest.raises(ValueError, match="negative"):
        run_jobs([job(breaks)], state=tmp_path / "state")
    assert log.read_text().split() == ["0-1", "1-2", "2-3", "3-4"]
    recorder = Recorder()
    assert run_jobs([job(Counting(NUMBERS, log))], recorder, tmp_path / "state") == whole
    assert log.read_text().split()[4:] == ["4-5", "5-6"]
    assert recorder.calls == [("counting", 60, "numbers"), *[10] * 6, "end"]
    assert not list((tmp_path / "state").glob("*/running.npz"))


def test_a_running_state_of_another_form_counts_as_absent(tmp_path, monkeypatch):
    """As an earlier version may have kept it."""

    def refuse(self, arrays):
        raise DataError("other arrays", "those of now")

    log = tmp_path / "log"
    kept = Kept(tmp_path / "state", job(Counting(NUMBERS)).steps[0].about)
    kept.save("running", {"old": np.ones(2), "items_done": np.array(4)})
    monkeypatch.setattr(Adder, "restore", refuse)
    run_jobs([job(Counting(NUMBERS, log))], state=tmp_path / "state")
    assert len(log.read_text().split()) == len(ITEMS)


def test_a_finished_state_is_not_made_again(tmp_path):
    log = tmp_path / "log"
    first = run_jobs([job(Counting(NUMBERS, log))], state=tmp_path / "state")
    folded = log.read_text()
    assert run_jobs([job(Counting(NUMBERS, log))], state=tmp_path / "state") == first
    assert log.read_text() == folded


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 cut short", None])
def test_a_damaged_file_counts_as_absent(tmp_path, damage):
    first = run_jobs([job(Counting(NUMBERS))], state=tmp_path)
    (file,) = tmp_path.glob("*/state.npz")
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2] if damage is None else damage)
    assert run_jobs([job(Counting(NUMBERS))], state=tmp_path) == first


def test_other_data_and_options_start_anew_and_say_why(tmp_path):
    about = {"state": "count", "place": "here", "fingerprint": "a", "precision": "exact"}
    run_jobs([job(Counting(NUMBERS), about)], state=tmp_path)
    said = {}
    for name, other in {
        "data": {**about, "fingerprint": "b"},
        "option": {**about, "precision": "fp32"},
        "elsewhere": {**about, "place": "there", "fingerprint": "c"},
    }.items():
        recorder, log = Recorder(), tmp_path / name
        run_jobs([job(Counting(NUMBERS, log), other)], recorder, tmp_path)
        assert len(log.read_text().split()) == 6
        said[name] = recorder.notes
    assert said["data"] == ["counting starts anew: the stored data or the classes used changed"]
    assert said["option"] == ["counting starts anew: precision was exact, is fp32"]
    assert said["elsewhere"] == []


def test_a_state_that_holds_more_serves(tmp_path):
    about = {"state": "count", "place": "here", "fingerprint": "a"}
    run_jobs([job(Counting(NUMBERS), {**about, "holds": ["x", "y"]})], state=tmp_path)
    log = tmp_path / "log"
    run_jobs([job(Counting(NUMBERS, log), {**about, "holds": ["x"]})], state=tmp_path)
    assert not log.exists()
    run_jobs([job(Counting(NUMBERS, log), {**about, "holds": ["x", "z"]})], state=tmp_path)
    assert log.exists()


def test_moved_data_is_known_by_its_fingerprint(tmp_path):
    about = {"state": "count", "place": "here", "fingerprint": "a"}
    run_jobs([job(Counting(NUMBERS), about)], state=tmp_path)
    log = tmp_path / "log"
    run_jobs([job(Counting(NUMBERS, log), {**about, "place": "there"})], state=tmp_path)
    assert not log.exists()


def test_nothing_half_written_takes_a_name(tmp_path, monkeypatch):
    kept = Kept(tmp_path, {"state": "count", "place": "here"})
    kept.save("state", {"a": _numbers(3)})

    def cut_short(file, **arrays):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("numpy.savez", cut_short)
    with pytest.raises(OSError, match="No space left"):
        kept.save("state", {"a": _numbers(4)})
    monkeypatch.undo()
    assert kept.load("state")["a"].tolist() == [0, 1, 2]
    assert sorted(p.name for p in Path(kept.folder).iterdir()) == ["about.json", "state.npz"]


def _numbers(n):
    import numpy as np

    return np.arange(n)


def test_counts_differ_where_the_order_does():
    # The bits compared above would not tell orders apart if this did not hold.
    work = Counting(NUMBERS)
    forward = run(work, ITEMS)
    backward = run(replace(work, numbers=NUMBERS[::-1]), ITEMS)
    assert forward.total == backward.total
    assert forward.rounded != backward.rounded
