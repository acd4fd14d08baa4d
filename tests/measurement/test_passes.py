"""Passes: class blocks, means in files, precisions and predictions change no metric."""

from __future__ import annotations

from functools import reduce

import numpy as np
import pytest

import ncbatch as nc
from ncbatch.arrays.named_arrays import Arrays, pack
from ncbatch.engine.jobs import Item
from ncbatch.measurement import run as execution
from ncbatch.measurement.options import Options
from ncbatch.measurement.passes import MomentsFold, MomentsPass
from ncbatch.measurement.samples import Mode, MomentsRead, Samples, select_classes
from tests.engine.test_loop import Recorder
from tests.measurement.stores import assert_same, make_store, refuse_to_read
from tests.oracles import base_metrics
from tests.strategies import REGIMES

OPTIONS = Options(device="cpu")


def every_metric() -> list[str]:
    return [*nc.metrics.CATALOGUE]


def test_fp32_keeps_traces(tmp_path, small_chunks):
    data = REGIMES["offset"](0)
    store = make_store(tmp_path / "s.zarr", data)
    exact, fast = nc.measure(store), nc.measure(store, precision="fp32")
    for name in ("nc1_quot", "nc1_cdnv"):
        assert float(fast[name][0, 0]) == pytest.approx(float(exact[name][0, 0]), rel=1e-6)
    assert fast.attrs["precision"] == "fp32"
    assert "products in fp32 leave nc1_pinv" in fast.attrs["notes"]
    assert "float32" not in exact.attrs["notes"]


def test_predictions_stand_for_the_classifier_at_their_head(tmp_path, small_chunks):
    data = REGIMES["k_less_d"](0)
    rng = np.random.default_rng(0)
    predictions = rng.integers(0, data.n_classes, len(data.y))
    W = rng.normal(size=(data.n_classes, data.X.shape[1]))
    store = make_store(tmp_path / "s.zarr", data, W=W, predictions={"train": predictions})
    with store.add_layers("train", {"other": data.X.shape[1]}, "float64") as writer:
        writer.append({"other": data.X})
    store.set_classifier("other", W)
    ds = nc.measure(store)
    by_predictions = base_metrics(data.X, data.y, data.n_classes, predictions=predictions)
    by_weights = base_metrics(data.X, data.y, data.n_classes, W=W)
    assert float(ds.nc4_agree.sel(layer="h")[0]) == by_predictions["nc4_agree"]
    assert float(ds.nc4_agree.sel(layer="other")[0]) == by_weights["nc4_agree"]


@pytest.mark.parametrize("blocks", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_means_in_files_and_class_blocks_change_no_metric(stores, tmp_path, monkeypatch, blocks):
    asked = {"per_class": True, "null": True, "metrics": every_metric()}
    plain = nc.measure(stores, **asked)
    monkeypatch.setattr(execution, "choose_mode", lambda *_: Mode(blocks, stored=True))
    assert_same(nc.measure(stores, **asked), plain, 1e-9)
    found = nc.measure(stores, **asked, state=tmp_path / "state")
    assert_same(found, plain, 1e-9)
    refuse_to_read(monkeypatch)
    assert_same(nc.measure(stores, **asked, state=tmp_path / "state"), found, 0.0)


def test_kept_class_blocks_of_other_options_stay_apart(stores, tmp_path, monkeypatch):
    monkeypatch.setattr(execution, "choose_mode", lambda *_: Mode(2, stored=True))
    state, store = tmp_path / "state", stores[0]
    few = ["nc1_pinv", "nc2_norm_mean"]
    for seed in (0, 1):
        nc.measure(store, state=state, null=True, null_seed=seed, metrics=few)
    more = [*few, "nc1_quot"]
    found = nc.measure(store, state=state, null=True, null_seed=0, metrics=more)
    assert_same(found, nc.measure(store, null=True, null_seed=0, metrics=more), 1e-12)
    files = {path.name for path in state.rglob("*") if path.is_file()}
    assert not [name for name in files if name.endswith(".partial") or name == "running.npz"]
    next(state.rglob("means-*.rows")).write_bytes(b"cut short")
    again = nc.measure(store, state=state, null=True, null_seed=0, metrics=more)
    assert_same(again, found, 1e-12)


def test_the_first_class_blocks_say_nothing_of_changes(stores, tmp_path, monkeypatch):
    monkeypatch.setattr(execution, "choose_mode", lambda *_: Mode(2, stored=True))
    said = Recorder()
    nc.measure(stores, state=tmp_path, progress=said)
    assert said.notes == []


def test_any_partition_of_the_items_gives_the_same_state(tmp_path, small_chunks):
    data = REGIMES["zipf"](1)
    samples = Samples(make_store(tmp_path / "s.zarr", data).split("train"), "h")
    selection = select_classes(samples.counts(), Options())
    counts = selection.counts[selection.classes]
    moments = MomentsPass(
        samples.labelled(selection.index, OPTIONS), len(counts), True, "exact", null_counts=counts
    )
    items = samples.items
    assert len(items) > 3

    def folded(some: list[Item], arrays: Arrays | None = None) -> MomentsFold:
        fold = moments.start()
        if arrays is not None:
            fold.restore(arrays)
        for item in some:
            moments.fold(fold, item)
        return fold

    whole = folded(items).seal()
    parts = [folded([item]).seal() for item in reversed(items)]
    merged = reduce(MomentsRead.merge, parts)
    for one, other in ((merged.moments, whole.moments), (merged.null, whole.null)):
        assert one.classes.tolist() == other.classes.tolist()
        assert one.counts.tolist() == other.counts.tolist()
        np.testing.assert_allclose(one.means, other.means, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(one.traces, other.traces, rtol=1e-9)
    np.testing.assert_allclose(merged.moments.scatter, whole.moments.scatter, rtol=1e-9, atol=1e-9)
    resumed = folded(items[2:], folded(items[:2]).arrays()).seal()
    for name, array in pack(resumed).items():
        np.testing.assert_array_equal(array, pack(whole)[name], err_msg=name)
