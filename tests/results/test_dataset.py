"""Cells as a Dataset and back; coordinates of stores and layers; the depth of collapse."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

import ncbatch as nc
from ncbatch.errors import UsageError
from ncbatch.results.dataset import StoreNotes, cells_of, coordinates, step_in_name, with_collapse
from ncbatch.results.tables import collapse_lines
from ncbatch.store import FeatureStore
from tests.conftest import run_here
from tests.results.sweeps import LAYERS, arranged, make_cells, make_dataset, make_runs


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    return make_runs(tmp_path)


def test_cells_come_back_out_of_a_dataset():
    cells = make_cells(3, 2)
    del cells["step-1.zarr", "h.0"]
    taken = cells_of(arranged(cells))
    assert list(taken) == list(cells)
    for place, cell in cells.items():
        assert taken[place].values == cell.values
        assert taken[place].reasons.items() <= cell.reasons.items()
        assert taken[place].texts == cell.texts
        assert taken[place].vectors.keys() == cell.vectors.keys()
        for name, vector in cell.vectors.items():
            np.testing.assert_array_equal(taken[place].vectors[name], vector)


def test_the_later_of_two_measurements_wins():
    earlier, later = make_cells(1, 2).values()
    earlier.values["nc5_ood_dev"] = 0.5
    earlier.texts["warnings"] = "a"
    later.texts["warnings"] = "b"
    merged = earlier.merged(later)
    assert merged.values == {**later.values, "nc5_ood_dev": 0.5}
    assert "nc5_ood_dev" not in merged.reasons
    assert merged.lines("warnings") == ["a", "b"]
    assert earlier.lines("warnings") == ["a"]


# ------------------------------------------------------------------------------------ coordinates


@pytest.mark.parametrize(
    ("path", "wanted"),
    [
        ("runs/step-1000.zarr", (1000, "step")),
        ("runs/step1000", (1000, "step")),
        ("runs/checkpoint-500", (500, "step")),
        ("a/checkpoint-500/features.zarr", (500, "step")),
        ("gpt_step_20.zarr", (20, "step")),
        ("epoch3.zarr", (3, "epoch")),
        ("Epoch=7.zarr", (7, "epoch")),
        ("epoch-3/step-50.zarr", (50, "step")),
        ("resnet18.zarr", None),
        ("footstep9.zarr", None),
        ("step-1b.zarr", None),
        ("step-5/a/b.zarr", None),
        ("s3://bucket/run/step-40.zarr", (40, "step")),
    ],
)
def test_steps_in_names(path: str, wanted):
    assert step_in_name(path) == wanted


def test_recorded_notes_become_coordinates(runs, tmp_path):
    for path, step in zip(runs, (7, 8, 9), strict=True):
        depths = {layer: {"depth": i / 2} for i, layer in enumerate(LAYERS)}
        FeatureStore.open(path).describe(model="toy", step=step, layers=depths)
    ds = nc.measure(runs, metrics="nc1_cdnv")
    assert ds.store.values.tolist() == [path.name for path in runs]
    assert ds.step.values.tolist() == [7, 8, 9]  # not what the names say
    assert ds.step.dtype == np.int64
    assert set(json.loads(ds.step.attrs["source"]).values()) == {"recorded"}
    assert ds.model.values.tolist() == ["toy"] * 3
    assert ds.depth.dims == ("store", "layer")
    np.testing.assert_array_equal(ds.depth, [[0, 0.5, 1]] * 3)
    for ending in ("zarr", "nc", "csv", "json"):
        nc.save_results(ds, tmp_path / f"r.{ending}")
    for ending in ("zarr", "nc"):
        loaded = nc.load_results(tmp_path / f"r.{ending}")
        for name in ("step", "model", "depth"):
            xr.testing.assert_equal(loaded[name], ds[name])
            assert name in loaded.coords
    header = (tmp_path / "r.csv").read_text().splitlines()[0]
    assert header == "store,layer,nc1_cdnv,nc1_cdnv_random"


def test_steps_are_read_off_names_where_none_is_recorded(runs):
    FeatureStore.open(runs[0]).describe(step=5)
    ds = nc.measure(runs, metrics="nc1_quot")
    assert ds.step.values.tolist() == [5, 20, 3000]
    assert json.loads(ds.step.attrs["source"])[runs[1].name] == "name"
    assert "model" not in ds.coords
    assert "depth" not in ds.coords
    assert "collapse_depth" not in ds


def test_unknown_steps_are_nan_and_epochs_do_not_mix_with_steps():
    notes = {"a": StoreNotes(step=5), "b": StoreNotes(step=2, unit="epoch", source="name")}
    found = coordinates(notes, ["a", "b", "c"], ["h"])
    np.testing.assert_array_equal(found["step"][1], [5, math.nan, math.nan])
    assert found["step"][2]["units"] == "step"
    alone = coordinates({"b": notes["b"]}, ["b"], ["h"])
    assert alone["step"][1].tolist() == [2]
    assert alone["step"][2]["units"] == "epoch"
    assert coordinates({}, ["a"], ["h"]) == {}


def test_describe_records_by_hand(runs, tmp_path):
    answer = run_here("describe", runs[0], "--model", "tiny", "--step", 12, cwd=tmp_path)
    assert answer.code == 0
    assert "model tiny, step 12" in answer.out
    store = FeatureStore.open(runs[0])
    assert (store.model, store.step) == ("tiny", 12)
    run_here("describe", runs[0], "--step", 13, cwd=tmp_path)
    store = FeatureStore.open(runs[0])
    assert (store.model, store.step) == ("tiny", 13)
    assert "model tiny, step 13" in run_here("info", runs[0], cwd=tmp_path).out
    nothing = run_here("describe", runs[0], cwd=tmp_path)
    assert nothing.code == 1
    assert "nothing to record" in nothing.err


# ------------------------------------------------------------------------------ depth of collapse


def test_the_first_layer_in_order_of_depth_counts():
    nan = math.nan
    values = [[0.05, 0.5, 0.02], [0.5, 0.3, 0.2], [nan, 0.09, 0.01], [0.5, 0.05, 0.01]]
    depths = [[1, 0, 0.5], [0, 0.5, 1], [0, 0.5, 1], [0, nan, 1]]
    found = with_collapse(make_dataset(values, depths), None)
    assert found.collapse_layer.values.tolist() == ["h.2", "", "h.1", "h.1"]
    np.testing.assert_array_equal(found.collapse_depth, [0.5, nan, 0.5, nan])
    assert found.collapse_depth.attrs["threshold"] == 0.1
    reasons = found.collapse_depth.attrs["undefined"]
    assert "s1: no layer under 0.1, least nc1_cdnv 0.2 at h.2" in reasons
    assert "s3: depths are not recorded, layers taken in their order" in reasons
    assert "s0" not in reasons
    lines = collapse_lines(found)
    assert lines[0] == "s0: collapse sets in at h.2, the first nc1_cdnv under 0.1 (depth 0.5)"
    assert lines[1].startswith("s1: collapse sets in nowhere: no layer under 0.1")
    other = with_collapse(make_dataset(values, depths), 0.4)
    assert other.collapse_layer.values.tolist() == ["h.2", "h.1", "h.1", "h.1"]


def test_another_exponent_has_no_threshold_of_its_own():
    found = with_collapse(make_dataset([[0.01, 0.001]], dist_exp=2.0), None)
    assert found.collapse_layer.values.tolist() == [""]
    assert "depends on the scale" in found.collapse_depth.attrs["undefined"]
    given = with_collapse(make_dataset([[0.01, 0.001]], dist_exp=2.0), 0.005)
    assert given.collapse_layer.values.tolist() == ["h.1"]


@pytest.mark.slow
def test_collapse_of_real_stores(runs, tmp_path):
    ds = nc.measure(runs[:1])
    values = ds.nc1_cdnv[0].values
    first = next(layer for layer, v in zip(LAYERS, values, strict=True) if v < 0.1)
    assert ds.collapse_layer.values.tolist() == [first]
    strict = nc.measure(runs[:1], metrics="nc1_cdnv", collapse_below=1e-9)
    assert strict.collapse_layer.values.tolist() == [""]
    said = run_here("measure", runs[0], "--collapse-below", 100, cwd=tmp_path).out
    assert f"{runs[0].name}: collapse sets in at h.0" in said
    nc.save_results(ds, tmp_path / "r.nc")
    assert nc.load_results(tmp_path / "r.nc").collapse_layer.values.tolist() == [first]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"collapse_below": 0.0}, "a number above 0"),
        ({"collapse_below": 0.1, "metrics": "nc1_quot"}, "without metric nc1_cdnv"),
    ],
)
def test_thresholds_that_make_no_sense(runs, options, match: str):
    with pytest.raises(UsageError, match=match):
        nc.measure(runs[0], **options)
