"""Tables at a terminal."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ncbatch.results.tables import labels_of
from tests.conftest import run_here
from tests.results.sweeps import make_dataset, make_runs


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    return make_runs(tmp_path)


# ------------------------------------------------------------------------------------------ tables


def test_checkpoints_stand_side_by_side_in_order_of_steps(runs, tmp_path):
    out = run_here("measure", *runs, cwd=tmp_path).out
    lines = [line for line in out.splitlines() if line.startswith("│ step ")]
    steps = [re.sub(r"[│,]", "", line).split()[1] for line in lines]
    assert steps[:3] == ["20", "100", "3000"]
    assert len(steps) % 3 == 0
    assert "nc1_cdnv: class-distance normalised variance" in out
    assert re.search(r"\d+ metrics more are in the results", out)
    few = run_here("measure", *runs, "--metrics", "nc2_cos_std,nc2_tammes", cwd=tmp_path).out
    assert "nc2_tammes:" in few
    assert "metrics more" not in few


def test_one_layer_of_several_stores_is_one_table(runs, tmp_path):
    out = run_here("measure", *runs, "--layer", "h.2", cwd=tmp_path).out
    (line,) = [x for x in out.splitlines() if x.startswith("│ nc2_tammes ")]
    assert len([x for x in line.split("│") if x.strip()]) == 4
    assert "metrics more" not in out


def test_stores_of_unknown_or_equal_steps_keep_their_names():
    ds = make_dataset([[1.0], [2.0]])
    assert labels_of(ds) == ["s0", "s1"]
    same = ds.assign_coords(step=("store", [5, 5], {"units": "step"}))
    assert labels_of(same) == ["s0", "s1"]
    apart = ds.assign_coords(step=("store", [5, 6000], {"units": "epoch"}))
    assert labels_of(apart) == ["epoch 5", "epoch 6,000"]
