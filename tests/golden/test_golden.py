"""Results are those recorded, to the bit where the machine is the one of the records."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.golden import records
from tests.golden.cases import CASES, Stores, pinned
from tests.golden.records import Record, changed_numbers, changed_texts, machine

FOLDER = Path(os.environ.get("NCBATCH_GOLDEN", records.FOLDER))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stores]:
    with pinned():
        yield Stores(tmp_path_factory.mktemp("golden"))


@pytest.mark.parametrize("name", CASES)
def test_results_are_those_recorded(made: Stores, name: str):
    found, recorded = Record.of(CASES[name](made)), Record.read(FOLDER / f"{name}.json")
    exact = json.loads((FOLDER / records.MACHINE).read_text()) == machine()
    faults = changed_numbers(found, recorded, exact=exact, float32=name == "many")
    faults += changed_texts(found, recorded)
    assert not faults, f"{len(faults)} differ:\n" + "\n".join(faults[:50])


def test_every_record_belongs_to_a_case():
    wanted = {records.MACHINE, *(f"{name}.json" for name in CASES)}
    assert {path.name for path in records.FOLDER.iterdir()} == wanted


def test_one_bit_is_a_difference():
    recorded = Record({"x": [1.0, float("nan"), 0.0]}, {"name": "a"})
    assert not changed_numbers(recorded, recorded, exact=True, float32=False)
    for i, other in ((0, float(np.nextafter(1.0, 2.0))), (1, 1.0), (2, -0.0)):
        values = list(recorded.numbers["x"])
        values[i] = other
        [fault] = changed_numbers(Record({"x": values}, {}), recorded, exact=True, float32=False)
        assert fault.startswith(f"x[{i}]: ")


def test_rounding_is_none_on_another_machine():
    recorded = Record({"x": [1.0, 0.0]}, {})
    near, far = Record({"x": [1 + 1e-12, 1e-15]}, {}), Record({"x": [1 + 1e-8, 0.0]}, {})
    assert not changed_numbers(near, recorded, exact=False, float32=False)
    assert changed_numbers(far, recorded, exact=False, float32=False)
    assert changed_texts(Record({}, {"name": "b"}), Record({}, {"name": "a"}))
