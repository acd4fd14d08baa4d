"""Sweeps over checkpoints and layers: coordinates, depth of collapse, and updates of saved results."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

import ncbatch as nc
from ncbatch.errors import DataError, OutputError, UsageError
from ncbatch.results.dataset import StoreNotes, coordinates, step_in_name, with_collapse
from ncbatch.results.tables import collapse_lines, labels_of
from ncbatch.store import FeatureStore
from ncbatch.store.split import Split
from tests.conftest import run_here, tree

LAYERS = ("h.0", "h.1", "h.2")
K, D = 4, 6


def make(
    path: Path, seed: int = 0, *, layers=LAYERS, spread=(3.0, 1.0, 0.2), splits=()
) -> FeatureStore:
    """Write a store whose layers are ever more collapsed."""
    rng = np.random.default_rng(seed)
    means = rng.normal(size=(K, D))
    store = FeatureStore.create(path, K, dict.fromkeys(layers, D), "float32")
    for name in ("train", *splits):
        y = np.arange(80) % K
        rows = {
            layer: (means[y] + s * rng.normal(size=(80, D))).astype("f4")
            for layer, s in zip(layers, spread, strict=False)
        }
        with store.writer(name) as writer:
            writer.append(rows, y)
    store.set_classifier(layers[-1], means)
    return store


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Give three checkpoints."""
    paths = [tmp_path / f"step-{step}.zarr" for step in (100, 20, 3000)]
    for seed, path in enumerate(paths):
        make(path, seed)
    return paths


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """List the stores of which features are read, from now on."""
    stores: list[str] = []
    original = Split.read

    def counted(self: Split, *arguments, **options):
        stores.append(Path(self.where).name)
        return original(self, *arguments, **options)

    monkeypatch.setattr(Split, "read", counted)
    return stores


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


def dataset(values, depths=None, **attributes) -> xr.Dataset:
    n_stores, n_layers = np.shape(values)
    layers = [f"h.{j}" for j in range(n_layers)]
    coords = {"store": [f"s{i}" for i in range(n_stores)], "layer": layers}
    if depths is not None:
        coords["depth"] = (("store", "layer"), np.array(depths, float))
    dims = ("store", "layer")
    return xr.Dataset(
        {"nc1_cdnv": (dims, np.array(values, float), {"role": "metric"})},
        coords, {"dist_exp": 1.0, **attributes},
    )  # fmt: skip


def test_the_first_layer_in_order_of_depth_counts():
    nan = math.nan
    values = [[0.05, 0.5, 0.02], [0.5, 0.3, 0.2], [nan, 0.09, 0.01], [0.5, 0.05, 0.01]]
    depths = [[1, 0, 0.5], [0, 0.5, 1], [0, 0.5, 1], [0, nan, 1]]
    found = with_collapse(dataset(values, depths), None)
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
    other = with_collapse(dataset(values, depths), 0.4)
    assert other.collapse_layer.values.tolist() == ["h.2", "h.1", "h.1", "h.1"]


def test_another_exponent_has_no_threshold_of_its_own():
    found = with_collapse(dataset([[0.01, 0.001]], dist_exp=2.0), None)
    assert found.collapse_layer.values.tolist() == [""]
    assert "depends on the scale" in found.collapse_depth.attrs["undefined"]
    given = with_collapse(dataset([[0.01, 0.001]], dist_exp=2.0), 0.005)
    assert given.collapse_layer.values.tolist() == ["h.1"]


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


# ---------------------------------------------------------------------------------------- updates


def assert_same(found: xr.Dataset, wanted: xr.Dataset) -> None:
    """All values, coordinates and notes are those of a run in one go."""
    assert set(found.data_vars) == set(wanted.data_vars)
    ordered = wanted.sel(store=found.store.values.tolist(), layer=found.layer.values.tolist())
    for name in [*found.data_vars, *found.coords]:
        xr.testing.assert_equal(found[name].variable, ordered[name].variable)
    for name in set(found.attrs) | set(wanted.attrs):
        if name in ("date", "cell_date"):
            continue
        a, b = found.attrs[name], wanted.attrs[name]
        if isinstance(a, str) and a.startswith("{"):
            a, b = json.loads(a), json.loads(b)
        assert a == b, name


@pytest.mark.parametrize("ending", ["zarr", "nc"])
def test_an_update_measures_only_what_is_new(runs, tmp_path, read, ending: str):
    out = f"r.{ending}"
    assert (
        run_here("measure", *runs[:2], "--out", out, "--update", "--per-class", cwd=tmp_path).code
        == 0
    )
    assert set(read) == {path.name for path in runs[:2]}
    read.clear()
    answer = run_here("measure", *runs, "--out", out, "--update", "--per-class", cwd=tmp_path)
    assert answer.code == 0
    assert set(read) == {runs[2].name}
    assert f"6 of 9 layers are taken from '{out}'" in answer.err
    updated = nc.load_results(tmp_path / out)
    assert updated.store.values.tolist() == [path.name for path in runs]
    assert_same(updated, nc.measure(runs, per_class=True))


def test_a_new_store_alone_joins_what_was_saved(runs, tmp_path, read):
    nc.save_results(nc.measure(runs[:2]), tmp_path / "r.zarr")
    read.clear()
    found = nc.measure(runs[2], update=tmp_path / "r.zarr")
    assert set(read) == {runs[2].name}
    assert_same(found, nc.measure(runs))


def test_nothing_is_read_when_nothing_is_new(runs, read):
    whole = nc.measure(runs)
    read.clear()
    assert_same(nc.measure(runs, update=whole), whole)
    assert read == []


def test_a_changed_store_is_measured_anew(runs, read):
    earlier = nc.measure(runs)
    shutil.rmtree(runs[1])
    make(runs[1], 77)
    read.clear()
    found = nc.measure(runs, update=earlier)
    assert set(read) == {runs[1].name}
    assert_same(found, nc.measure(runs))


def test_a_new_classifier_is_noticed(runs, read):
    earlier = nc.measure(runs[:2])
    FeatureStore.open(runs[0]).set_classifier("h.2", np.eye(K, D))
    read.clear()
    found = nc.measure(runs[:2], update=earlier)
    assert set(read) == {runs[0].name}
    assert float(found.nc3_dual_err[0, 2]) != float(earlier.nc3_dual_err[0, 2])
    FeatureStore.open(runs[1]).set_classifier("h.0", np.eye(K, D))
    gained = nc.measure(runs[:2], update=earlier)
    assert_same(gained, nc.measure(runs[:2]))


def test_more_metrics_are_added_to_those_of_before(runs, read):
    earlier = nc.measure(runs[:2], metrics=["nc2_etf_err", "nc1_quot"])
    found = nc.measure(runs[:2], metrics=["nc1_cdnv", "nc1_quot"], update=earlier)
    wanted = nc.measure(runs[:2], metrics=["nc1_quot", "nc1_cdnv", "nc2_etf_err"])
    for name in ("nc1_quot", "nc1_cdnv", "nc2_etf_err"):
        np.testing.assert_allclose(found[name], wanted[name], rtol=1e-12)
    only = nc.measure(runs[2], metrics="nc1_cdnv", update=found)
    assert np.isnan(only.nc2_etf_err.sel(store=runs[2].name)).all()
    np.testing.assert_array_equal(only.nc2_etf_err[:2], found.nc2_etf_err)


def test_more_layers_are_added(runs, read):
    earlier = nc.measure(runs[:1], ["h.0"])
    read.clear()
    found = nc.measure(runs[:1], update=earlier)
    assert len(read) == 3  # h.1, and h.2 twice: its decisions need its means
    assert_same(found, nc.measure(runs[:1]))


def test_per_class_and_null_are_not_taken_from_results_without(runs):
    earlier = nc.measure(runs[:1])
    found = nc.measure(runs[:1], per_class=True, null=True, update=earlier)
    assert_same(found, nc.measure(runs[:1], per_class=True, null=True))
    kept = nc.measure(runs[:1], update=found)
    assert "nc1_cdnv_null" in kept
    assert kept.attrs["null_seed"] == 0


@pytest.mark.parametrize(
    ("earlier", "now", "match"),
    [
        (
            {},
            {"weighted": True},
            "global_mean was unweighted mean of class means there and is mean",
        ),
        ({}, {"dist_exp": 2.0}, "dist_exp was 1.0 there and is 2.0 now"),
        ({}, {"min_count": 3}, "min_count was 1 there and is 3 now"),
        ({}, {"classes": [0, 1, 2]}, "class_filter was not set there"),
        ({"classes": [0, 1]}, {}, "class_filter was 2 listed"),
        ({"classes": [0, 1]}, {"classes": [0, 2]}, "class_filter was 2 listed"),
        ({"max_count": 50}, {}, "max_count was 50 there and is not set now"),
        ({}, {"precision": "fp32"}, "precision was exact there and is fp32 now"),
        ({}, {"skip_nonfinite": True}, "skip_nonfinite was 0 there and is 1 now"),
        ({"null": True}, {"null": True, "null_seed": 3}, "null_seed was 0 there and is 3 now"),
        ({}, {"ddof": 1}, "ddof was 0 there and is 1 now"),
    ],
    ids=str,
)
def test_other_conventions_are_refused(runs, earlier, now, match: str, read):
    saved = nc.measure(runs[0], "h.1", metrics="nc1_quot", **earlier)
    read.clear()
    with pytest.raises(UsageError, match=re.escape(match)):
        nc.measure(runs[1], "h.1", metrics="nc1_quot", update=saved, **now)
    assert read == []


def test_a_refused_update_leaves_the_file(runs, tmp_path):
    run_here("measure", runs[0], "--out", "r.zarr", cwd=tmp_path)
    before = tree(tmp_path / "r.zarr")
    answer = run_here("measure", *runs, "--out", "r.zarr", "--update", "--weighted", cwd=tmp_path)
    assert answer.code == 1
    assert "'r.zarr' cannot be updated: global_mean was" in answer.err
    assert tree(tmp_path / "r.zarr") == before


def test_results_of_another_version_are_measured_anew(runs, read):
    earlier = nc.measure(runs[:1])
    texts = json.loads(earlier.attrs["cell_version"])
    texts[runs[0].name]["h.1"] = "0.0.1"
    earlier.attrs["cell_version"] = json.dumps(texts)
    read.clear()
    nc.measure(runs[:1], update=earlier)
    assert len(read) == 1


def test_names_stay_apart_when_stores_share_them(tmp_path):
    paths = [tmp_path / run / "features.zarr" for run in ("a", "b")]
    for seed, path in enumerate(paths):
        path.parent.mkdir()
        make(path, seed)
    earlier = nc.measure(paths[0])
    assert earlier.store.values.tolist() == ["features.zarr"]
    found = nc.measure(paths[1], update=earlier)
    assert found.store.values.tolist() == ["a/features.zarr", "b/features.zarr"]
    assert_same(found, nc.measure(paths))


def test_a_moved_store_is_found_again(runs, tmp_path, read):
    earlier = nc.measure(runs[:2])
    moved = tmp_path / "elsewhere"
    runs[0].rename(moved)
    read.clear()
    found = nc.measure([moved, runs[1]], update=earlier)
    assert read == []
    assert found.store.values.tolist() == ["elsewhere", runs[1].name]


def test_reasons_and_notes_of_before_stay(tmp_path):
    paths = [tmp_path / "a.zarr", tmp_path / "b.zarr"]
    for path in paths:
        store = FeatureStore.create(path, 3, {"h": 2}, "float32")
        with store.writer("train") as writer:  # both means are one: no direction
            writer.append({"h": np.ones((4, 2), "f4")}, [0, 0, 1, 1])
    earlier = nc.measure(paths[0])
    found = nc.measure(paths[1], update=earlier)
    assert_same(found, nc.measure(paths))
    assert "a.zarr/h: " in found.nc2_etf_err.attrs["undefined"]


def test_update_needs_results_to_update(runs, tmp_path):
    answer = run_here("measure", runs[0], "--out", "r.csv", "--update", cwd=tmp_path)
    assert answer.code == 1
    assert "--update without a .zarr or .nc" in answer.err
    with pytest.raises(OutputError, match="no results at"):
        nc.measure(runs[0], update=tmp_path / "none.zarr")
    xr.Dataset({"x": ("a", [1])}).to_netcdf(tmp_path / "other.nc", engine="h5netcdf")
    with pytest.raises(OutputError, match="no results of ncbatch"):
        nc.measure(runs[0], update=tmp_path / "other.nc")


def test_kept_states_spare_old_checkpoints_too(runs, tmp_path, read):
    nc.measure(runs[:2], state=tmp_path / "kept")
    read.clear()
    found = nc.measure(runs, state=tmp_path / "kept")
    assert set(read) == {runs[2].name}
    wanted = nc.measure(runs)
    np.testing.assert_array_equal(found.nc1_cdnv, wanted.nc1_cdnv)


# --------------------------------------------------------------------------- splits without a layer


def test_a_test_split_without_a_layer_is_said(tmp_path):
    store = make(tmp_path / "s.zarr")
    y = np.arange(40) % K
    with store.writer("test", layers={"h.0": D}, dtype="float32") as writer:
        writer.append({"h.0": np.random.default_rng(0).normal(size=(40, D))}, y)
    for layer in LAYERS:
        store.set_classifier(layer, np.eye(K, D))
    for options in ({}, {"test": "test"}):
        ds = nc.measure(store, **options)
        assert json.loads(ds.attrs["nc4_split"])["s.zarr"] == {
            "h.0": "test", "h.1": "train", "h.2": "train",
        }  # fmt: skip
        (line,) = [x for x in ds.attrs["notes"].splitlines() if "in split 'test'" in x]
        assert line == (
            "no test data in split 'test' for layers h.1, h.2: NC4 takes the samples of 'train'"
        )
    out = run_here("measure", store.path, cwd=tmp_path).out
    assert out.count("no test data in split 'test'") == 1


@pytest.mark.parametrize("part", ["test", "ood"])
def test_a_named_split_without_any_layer_is_refused(tmp_path, part: str):
    store = make(tmp_path / "s.zarr")
    with store.writer("other", layers={"g": D}, dtype="float32") as writer:
        writer.append({"g": np.ones((4, D))}, np.arange(4) % K)
    with pytest.raises(DataError, match=r"nothing in split 'other' of layers h.0, h.1, h.2"):
        nc.measure(store, **{part: "other"})


def test_an_ood_split_without_a_layer_has_its_reason(tmp_path):
    store = make(tmp_path / "s.zarr")
    with store.writer("ood", layers={"h.0": D}, dtype="float32") as writer:
        writer.append({"h.0": np.ones((4, D))}, np.zeros(4, int))
    ds = nc.measure(store, ood="ood")
    assert "no out-of-distribution data in split 'ood' for layers h.1, h.2" in ds.attrs["notes"]
    assert not np.isnan(ds.nc5_ood_dev[0, 0])


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
    ds = dataset([[1.0], [2.0]])
    assert labels_of(ds) == ["s0", "s1"]
    same = ds.assign_coords(step=("store", [5, 5], {"units": "step"}))
    assert labels_of(same) == ["s0", "s1"]
    apart = ds.assign_coords(step=("store", [5, 6000], {"units": "epoch"}))
    assert labels_of(apart) == ["epoch 5", "epoch 6,000"]
