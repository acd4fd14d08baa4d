"""Layers: which are there, what they are called, and why they cannot be measured."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import ncbatch as nc
from ncbatch.errors import CorruptionError, DataError, StoreError, UnknownNameError, UsageError
from ncbatch.store import FeatureStore
from tests.measurement.stores import assert_equal, make_store, moments_of
from tests.strategies import REGIMES, Features


def test_names_that_do_not_exist_suggest_the_nearest(tmp_path):
    store = make_store(tmp_path / "s.zarr", REGIMES["k_less_d"](0))
    for options, said in (
        ({"layers": ["hh"]}, "did you mean 'h'"),
        ({"train": "trian"}, "did you mean 'train'"),
        ({"test": "tset"}, "no split 'tset'"),
        ({"metrics": ["nc1_pinf"]}, "did you mean 'nc1_pinv'"),
    ):
        with pytest.raises(UnknownNameError, match=said):
            nc.measure(store, **options)


def test_what_cannot_be_measured_is_refused(tmp_path):
    data = REGIMES["k_less_d"](0)
    store = make_store(tmp_path / "s.zarr", data)
    with pytest.raises(DataError, match="no classifier"):
        nc.measure(store, metrics=["nc3_dual_err"])
    with pytest.raises(DataError, match="out-of-distribution"):
        nc.measure(store, metrics=["nc1_quot", "nc5_ood_dev"])
    with pytest.raises(DataError, match="at least 2"):
        nc.measure(store, classes=[0])
    with pytest.raises(DataError, match=r"class 99\d* in the list"):
        nc.measure(store, classes=[0, 99999])
    with pytest.raises(UsageError, match="given twice"):
        nc.measure([store, store])
    with pytest.raises(UsageError, match="exact, fp32 or tf32"):
        nc.measure(store, precision="double")
    one = make_store(tmp_path / "one.zarr", Features(data.X, np.zeros_like(data.y), data.n_classes))
    with pytest.raises(DataError, match="1 class in split 'train'"):
        nc.measure(one)
    none = make_store(tmp_path / "none.zarr", Features(data.X, np.full_like(data.y, -1), 5))
    with pytest.raises(DataError, match="no rows"):
        nc.measure(none)


def test_sweep_of_stores_and_layers_gives_one_dataset(tmp_path):
    data = REGIMES["k_less_d"](0)
    for run in ("a", "b"):
        (tmp_path / run).mkdir()
        store = make_store(tmp_path / run / "s.zarr", data, splits={"test": (data.X, data.y)})
    with store.add_layers("train", {"only_b": 2}, "float32") as writer:
        writer.append({"only_b": data.X[:, :2]})
    ds = nc.measure([tmp_path / "a" / "s.zarr", tmp_path / "b" / "s.zarr"])
    assert ds.store.values.tolist() == ["a/s.zarr", "b/s.zarr"]
    assert ds.layer.values.tolist() == ["h", "only_b"]
    quot = ds.nc1_quot
    assert np.isfinite(quot.sel(store="b/s.zarr")).all()
    assert np.isnan(quot.sel(store="a/s.zarr", layer="only_b"))
    assert float(quot[0, 0]) == float(quot[1, 0])
    assert "nc3_dual_err" not in ds
    assert ds.attrs["notes"].count("no classifier") >= 1
    assert len(ds.attrs["notes"].splitlines()) <= 3


def test_features_win_and_states_fill_what_lacks_them(pair, tmp_path):
    mixed = FeatureStore.create(tmp_path / "mixed.zarr", pair.k)
    X, y = pair.splits["train"]
    mixed.set_state("train", "h", "moments", moments_of(X, y, pair.k))
    mixed.set_state("train", "g.10", "moments", moments_of(2 * X, y, pair.k))
    mixed.set_state("train", "g.9", "moments", moments_of(3 * X, y, pair.k))
    X_test, y_test = pair.splits["test"]
    with mixed.writer("test", layers={"h": X.shape[1]}, dtype="float64") as writer:
        writer.append({"h": X_test}, y_test)
    mixed.set_classifier("h", pair.W, pair.b)
    # A stale state beside features is not looked at.
    mixed.set_state("test", "h", "moments", moments_of(X_test + 9, y_test, pair.k))
    found = nc.measure(mixed)
    assert found.layer.values.tolist() == ["g.9", "g.10", "h"]
    wanted = nc.measure(pair.features)
    at_h = found.sel(layer=["h"])
    assert_equal(at_h, wanted, ["nc1_pinv", "nc4_agree", "nc4_ncc_accuracy", "nc3_dual_err"])
    assert json.loads(found.attrs["source"])["mixed.zarr"]["h"] == "train: states, test: features"
    tests = {"metrics": "nc1_test_to_train"}
    assert_equal(
        nc.measure(mixed, "h", **tests), nc.measure(pair.features, **tests), [tests["metrics"]]
    )


def test_unknown_names_list_what_is_there(pair):
    with pytest.raises(UnknownNameError, match="one of: h"):
        nc.measure(pair.states, "hh")
    with pytest.raises(UnknownNameError, match="one of: ood, test, train"):
        nc.measure(pair.states, train="val")


def test_parts_of_several_processes_are_to_be_merged_first(tmp_path):
    store = FeatureStore.create(tmp_path / "s.zarr", 3)
    store.set_state("train", "h", "part-0", {"class": np.arange(2)}, {"holds": ["moments"]})
    with pytest.raises(StoreError, match=r"'ncbatch finalize .*s.zarr --split train' merges them"):
        nc.measure(store)


def test_moments_and_classifier_of_other_widths_are_refused(pair):
    pair.states.delete_state("train", "h", "moments")
    narrow = moments_of(pair.splits["train"][0][:, :2], pair.splits["train"][1], pair.k)
    pair.states.set_state("train", "h", "moments", narrow)
    with pytest.raises(DataError, match="moments of layer 'h' with 2 features"):
        nc.measure(pair.states)


def test_the_fingerprint_follows_the_state(pair):
    def fingerprint(**options) -> str:
        ds = nc.measure(pair.states, metrics="nc1_quot", **options)
        return json.loads(ds.attrs["fingerprint"])["states.zarr"]["h"]

    before = fingerprint()
    assert fingerprint() == before
    assert fingerprint(classes=range(4)) != before
    arrays = moments_of(*pair.splits["train"], pair.k)
    pair.states.set_state("train", "h", "moments", {**arrays, "trace": arrays["trace"] * 2})
    assert fingerprint() != before


def test_a_lost_chunk_is_named_before_anything_is_measured(pair):
    Path(pair.states.path, "train/states/h/moments/mean/c/0/0").unlink()
    with pytest.raises(CorruptionError, match="mean/c/0/0"):
        nc.measure(pair.states)
