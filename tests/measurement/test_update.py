"""Updates of saved results: what still holds is kept, everything else is measured anew."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

import ncbatch as nc
from ncbatch.errors import DataError, OutputError, UsageError
from ncbatch.store import FeatureStore
from ncbatch.store.split import Split
from tests.conftest import run_here, tree
from tests.results.sweeps import LAYERS, D, K, make_runs, make_store

# Enough to see what is measured; other tests take every metric.
FEW = {"metrics": ["nc1_cdnv", "nc1_quot", "nc2_etf_err"]}


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    return make_runs(tmp_path)


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


@pytest.mark.parametrize("ending", ["zarr", pytest.param("nc", marks=pytest.mark.slow)])
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
    nc.save_results(nc.measure(runs[:2], **FEW), tmp_path / "r.zarr")
    read.clear()
    found = nc.measure(runs[2], update=tmp_path / "r.zarr", **FEW)
    assert set(read) == {runs[2].name}
    assert_same(found, nc.measure(runs, **FEW))


def test_nothing_is_read_when_nothing_is_new(runs, read):
    whole = nc.measure(runs, **FEW)
    read.clear()
    assert_same(nc.measure(runs, update=whole, **FEW), whole)
    assert read == []


def test_a_changed_store_is_measured_anew(runs, read):
    earlier = nc.measure(runs, **FEW)
    shutil.rmtree(runs[1])
    make_store(runs[1], 77)
    read.clear()
    found = nc.measure(runs, update=earlier, **FEW)
    assert set(read) == {runs[1].name}
    assert_same(found, nc.measure(runs, **FEW))


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
    earlier = nc.measure(runs[:1], **FEW)
    texts = json.loads(earlier.attrs["cell_version"])
    texts[runs[0].name]["h.1"] = "0.0.1"
    earlier.attrs["cell_version"] = json.dumps(texts)
    read.clear()
    nc.measure(runs[:1], update=earlier, **FEW)
    assert len(read) == 1


def test_names_stay_apart_when_stores_share_them(tmp_path):
    paths = [tmp_path / run / "features.zarr" for run in ("a", "b")]
    for seed, path in enumerate(paths):
        path.parent.mkdir()
        make_store(path, seed)
    earlier = nc.measure(paths[0], **FEW)
    assert earlier.store.values.tolist() == ["features.zarr"]
    found = nc.measure(paths[1], update=earlier, **FEW)
    assert found.store.values.tolist() == ["a/features.zarr", "b/features.zarr"]
    assert_same(found, nc.measure(paths, **FEW))


def test_a_moved_store_is_found_again(runs, tmp_path, read):
    earlier = nc.measure(runs[:2], **FEW)
    moved = tmp_path / "elsewhere"
    runs[0].rename(moved)
    read.clear()
    found = nc.measure([moved, runs[1]], update=earlier, **FEW)
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
    nc.measure(runs[:2], state=tmp_path / "kept", **FEW)
    read.clear()
    found = nc.measure(runs, state=tmp_path / "kept", **FEW)
    assert set(read) == {runs[2].name}
    wanted = nc.measure(runs, **FEW)
    np.testing.assert_array_equal(found.nc1_cdnv, wanted.nc1_cdnv)


# --------------------------------------------------------------------------- splits without a layer


def test_a_test_split_without_a_layer_is_said(tmp_path):
    store = make_store(tmp_path / "s.zarr")
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
    store = make_store(tmp_path / "s.zarr")
    with store.writer("other", layers={"g": D}, dtype="float32") as writer:
        writer.append({"g": np.ones((4, D))}, np.arange(4) % K)
    with pytest.raises(DataError, match=r"nothing in split 'other' of layers h.0, h.1, h.2"):
        nc.measure(store, **{part: "other"})


def test_an_ood_split_without_a_layer_has_its_reason(tmp_path):
    store = make_store(tmp_path / "s.zarr")
    with store.writer("ood", layers={"h.0": D}, dtype="float32") as writer:
        writer.append({"h.0": np.ones((4, D))}, np.zeros(4, int))
    ds = nc.measure(store, ood="ood")
    assert "no out-of-distribution data in split 'ood' for layers h.1, h.2" in ds.attrs["notes"]
    assert not np.isnan(ds.nc5_ood_dev[0, 0])
