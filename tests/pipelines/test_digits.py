"""The digits recipe runs from the command line, and collapse can be seen in what it leaves."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import ncbatch as nc

pytest.importorskip("torch")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

RECIPE = Path(__file__).parents[2] / "pipelines" / "digits.py"

pytestmark = pytest.mark.slow


def run(out: Path, *options: str) -> str:
    command = [sys.executable, "-W", "error", str(RECIPE), "--out", str(out), *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=250, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_recipe_shows_collapse(tmp_path):
    said = run(tmp_path, "--epochs", "40")
    stores = sorted(tmp_path.glob("epoch-*.zarr"))
    assert [stores[0].name, stores[-1].name] == ["epoch-0000.zarr", "epoch-0040.zarr"]
    store = nc.FeatureStore.open(stores[-1])
    assert store.validate() == []
    assert {name: store.split(name).n_samples for name in store.splits} == {
        "ood": 500, "test": 500, "train": 1297,
    }  # fmt: skip
    for name in store.splits:
        assert store.split(name).layers == ["input", "hidden1", "hidden2", "hidden3"]
        assert store.split(name).head == "hidden3"

    results = nc.load_results(tmp_path / "results.zarr")
    assert (results.sizes["store"], results.sizes["layer"]) == (len(stores), 4)
    last = results.sel(layer="hidden3")
    assert last["nc1_pinv"].values[-1] < last["nc1_pinv"].values[0] / 10
    assert last["nc2_etf_err"].values[-1] < last["nc2_etf_err"].values[0] / 2
    assert last["nc4_agree"].values[-1] > 0.95
    # The input does not train, and its value is known (METRICS.md, section 6).
    np.testing.assert_allclose(
        results["nc1_pinv"].sel(layer="input"), 0.8656647848724994, rtol=1e-9
    )
    assert len((tmp_path / "results.csv").read_text().splitlines()) == 1 + 4 * len(stores)
    assert (tmp_path / "collapse.png").read_bytes().startswith(b"\x89PNG")
    assert "nc4_agree" in said
    assert "epoch-0040.zarr" in said


def test_the_recipe_repeats_itself_over_its_own_leavings(tmp_path):
    said = []
    for _ in range(2):
        run(tmp_path, "--epochs", "2")
        said.append((tmp_path / "results.csv").read_text())
    assert said[0] == said[1]
