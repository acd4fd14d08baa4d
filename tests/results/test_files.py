"""Results as files: the same values in every format, and many stores and layers in little time."""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Iterable
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from rich.console import Console

import ncbatch as nc
from ncbatch.metrics import CATALOGUE
from ncbatch.results.dataset import cells_of, column_names
from ncbatch.results.files import ENDINGS, load_results, save_results
from ncbatch.results.tables import collapse_lines, notes, result_tables
from ncbatch.results.terminal import show
from tests.results.sweeps import FEW, arranged, make_cells


@pytest.fixture(scope="module")
def results() -> xr.Dataset:
    return arranged(make_cells(3, 2))


@pytest.mark.parametrize("ending", ["zarr", "nc"])
def test_saved_results_are_the_same_when_loaded(results, tmp_path: Path, ending: str):
    path = tmp_path / f"r.{ending}"
    nc.save_results(results, path)
    loaded = nc.load_results(path)
    xr.testing.assert_identical(loaded, results)
    assert set(loaded.data_vars) == set(results.data_vars)


def test_csv_and_json_hold_every_value(results, tmp_path: Path):
    for ending in ("csv", "json"):
        save_results(results, tmp_path / f"r.{ending}")
    lines = list(csv.DictReader((tmp_path / "r.csv").read_text().splitlines()))
    text = (tmp_path / "r.json").read_text()
    nested = json.loads(text)
    assert text == json.dumps(nested, indent=1) + "\n"
    names = column_names(results)
    assert len(lines) == 6
    assert list(lines[0]) == ["store", "layer", *names]
    for line in lines:
        values = nested[line["store"]][line["layer"]]
        assert list(values) == names
        for name in names:
            value = float(results[name].sel(store=line["store"], layer=line["layer"]))
            assert line[name] == ("" if np.isnan(value) else repr(value))
            assert values[name] is None if np.isnan(value) else values[name] == value


def test_dims_in_another_order_are_saved_alike(results, tmp_path: Path):
    save_results(results, tmp_path / "a.csv")
    save_results(results.transpose("layer", "store", ...), tmp_path / "b.csv")
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()


def saved_and_printed(
    n_stores: int, n_layers: int, folder: Path, metrics: Iterable[str] = FEW
) -> dict[str, float]:
    """Arrange finished cells, save, take apart and print them; return seconds of the processor."""
    cells = make_cells(n_stores, n_layers, metrics)
    seconds = {}
    clock = time.process_time()

    def lap(name: str) -> None:
        nonlocal clock
        now = time.process_time()
        seconds[name] = now - clock
        clock = now

    dataset = arranged(cells)
    lap("arranged")
    for ending in ENDINGS:
        save_results(dataset, folder / f"r{ending}")
        lap(ending)
    console = Console(file=StringIO(), width=200, markup=False, emoji=False)
    show(console, result_tables(dataset, 200))
    assert len(collapse_lines(dataset) + notes(dataset)) > n_stores
    lap("printed")
    loaded = load_results(folder / "r.zarr")
    lap("loaded")
    assert len(cells_of(loaded)) == n_stores * n_layers
    lap("taken apart")
    return seconds


@pytest.mark.slow
def test_a_hundred_stores_of_fifty_layers_take_seconds(tmp_path: Path, capsys):
    saved_and_printed(2, 2, tmp_path)  # imports, and what is made once
    seconds = saved_and_printed(100, 50, tmp_path, CATALOGUE)
    with capsys.disabled():
        print("\n" + ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items()))
    slowest = max(seconds[ending] for ending in ENDINGS)
    assert seconds["arranged"] + slowest + seconds["printed"] < 10.0
    assert seconds["loaded"] + seconds["taken apart"] < 10.0


def test_work_with_xarray_does_not_grow_with_stores_and_layers(tmp_path: Path, monkeypatch):
    """Values are taken out of whole arrays: a selection for each would take minutes of a sweep."""
    selections = []
    for kind in (xr.Dataset, xr.DataArray):
        select = kind.isel

        def counted(self, *arguments, select=select, **options):
            selections.append(type(self))
            return select(self, *arguments, **options)

        monkeypatch.setattr(kind, "isel", counted)
    saved_and_printed(2, 2, tmp_path)
    few = len(selections)
    selections.clear()
    saved_and_printed(8, 7, tmp_path)
    assert len(selections) <= few + 2
