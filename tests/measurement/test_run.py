"""measure: clusters agree, kept work is not done again, results say how they were made."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import ncbatch as nc
from ncbatch.engine.plans import memory_budget
from ncbatch.errors import BudgetError, UsageError
from ncbatch.measurement import run as execution
from ncbatch.measurement.samples import Mode
from ncbatch.results.dataset import metric_names
from tests.conftest import run_here
from tests.engine.test_loop import Recorder
from tests.measurement.stores import assert_equal, assert_same, make_store, refuse_to_read
from tests.strategies import REGIMES

DASK = pytest.mark.filterwarnings("ignore::ResourceWarning")


SECOND_READ = ["nc1_test_to_train", "nc1_cdnv_directional_exact"]


def test_provenance_is_complete_and_flat(tmp_path):

    data = REGIMES["zipf"](0)
    store = make_store(tmp_path / "s.zarr", data)
    ds = nc.measure(store, metrics=["nc1_cdnv", "nc2g_log"])
    assert list(metric_names(ds)) == ["nc1_cdnv", "nc2g_log"]
    for key in ("ncbatch_version", "date", "device", "precision", "dist_exp", "global_mean"):
        assert ds.attrs[key] != ""
    assert json.loads(ds.attrs["store_id"]) == {"s.zarr": store.id}
    fingerprint = json.loads(ds.attrs["fingerprint"])["s.zarr"]["h"]
    assert len(fingerprint) == 32
    other = nc.measure(store, metrics=["nc1_cdnv"], classes=range(3))
    assert json.loads(other.attrs["fingerprint"])["s.zarr"]["h"] != fingerprint
    for key in (
        "n_samples",
        "n_classes",
        "n_classes_unseen",
        "n_rows_skipped",
        "n_coincident_pairs",
    ):
        assert json.loads(ds.attrs[key])["s.zarr"]["h"] == int(ds[key][0, 0])
    assert all(isinstance(v, str | int | float) for v in ds.attrs.values())
    for variable in ds.data_vars.values():
        assert {"long_name", "units"} <= variable.attrs.keys()
    assert {"source", "formula"} <= ds.nc1_cdnv.attrs.keys()


@pytest.mark.slow
@DASK
def test_all_clusters_agree(stores, scheduler_address, scheduler_file):
    paths = [store.path for store in stores]
    plain = nc.measure(paths, per_class=True, null=True)
    assert int(plain["n_classes"].max()) > 5
    for cluster in ("threads:2", "processes:2", scheduler_address, str(scheduler_file)):
        found = nc.measure(paths, per_class=True, null=True, cluster=cluster)
        assert_same(found, plain, 1e-9)


@pytest.mark.slow
@DASK
def test_any_client_will_do_and_stays_open(stores, scheduler_address):
    from distributed import Client

    with Client(scheduler_address, set_as_default=False) as client:
        found = nc.measure(stores, cluster=client, metrics=["nc1_pinv", "nc4_agree", *SECOND_READ])
        assert client.status == "running"
    assert_same(found, nc.measure(stores, metrics=["nc1_pinv", "nc4_agree", *SECOND_READ]), 1e-9)


@pytest.mark.slow
@DASK
def test_a_workers_error_is_the_users(stores, scheduler_address):
    store = stores[0]
    array = store.split("train").feature("h")
    rows = array[0:1]
    rows[0, 0] = np.nan
    array[0:1] = rows
    with pytest.raises(nc.NcbatchError, match="row 0 of"):
        nc.measure(store, cluster=scheduler_address)


@pytest.mark.slow
@DASK
def test_class_blocks_on_a_cluster(stores, tmp_path, monkeypatch, scheduler_address):
    plain = nc.measure(stores)
    monkeypatch.setattr(execution, "choose_mode", lambda *_: Mode(2, stored=True))
    with pytest.raises(UsageError, match="may share no disk"):
        nc.measure(stores, cluster=scheduler_address)
    found = nc.measure(stores, cluster=scheduler_address, state=tmp_path / "state")
    assert_same(found, plain, 1e-9)
    assert_same(nc.measure(stores, cluster="processes:2"), plain, 1e-9)
    refuse_to_read(monkeypatch)
    assert_same(nc.measure(stores, state=tmp_path / "state"), found, 1e-12)


def test_a_cluster_gives_the_same(pair):
    found = nc.measure(pair.states, cluster="threads:2", device="cpu")
    assert_equal(found, nc.measure(pair.states))


@pytest.mark.slow
@DASK
def test_a_damaged_kept_state_counts_as_absent_on_a_cluster(stores, tmp_path, scheduler_address):
    store, metrics = stores[0], ["nc1_pinv", "nc4_agree"]
    first = nc.measure(store, state=tmp_path, metrics=metrics, cluster=scheduler_address)
    (file,) = tmp_path.glob("moments-*/state.npz")
    file.write_bytes(file.read_bytes()[:100])
    again = nc.measure(store, state=tmp_path, metrics=metrics, cluster=scheduler_address)
    assert_same(again, first, 0.0)


def test_other_metrics_of_the_same_states_read_nothing_again(stores, tmp_path, monkeypatch):
    state = tmp_path / "state"
    first = nc.measure(stores, state=state, null=True)
    refuse_to_read(monkeypatch)
    assert_same(nc.measure(stores, state=state, null=True), first, 0.0)
    few = nc.measure(stores, state=state, metrics=["nc1_quot", "nc2g_dist", "nc4_agree"])
    for name in ("nc1_quot", "nc2g_dist", "nc4_agree"):
        np.testing.assert_array_equal(few[name], first[name])
    with pytest.raises(AssertionError, match="features were read"):
        nc.measure(stores, state=state, precision="fp32")


def test_a_changed_store_or_option_starts_anew_and_says_why(stores, tmp_path):
    state, store = tmp_path / "state", stores[0]
    before = nc.measure(store, state=state)
    said = Recorder()
    nc.measure(store, state=state, precision="fp32", progress=said)
    assert any("precision was exact, is fp32" in note for note in said.notes)
    array = store.split("train").feature("h")
    array[0:64] = array[0:64] * np.float64(1.5).astype(array.dtype)
    said = Recorder()
    after = nc.measure(store, state=state, progress=said)
    assert any("the stored data or the classes used changed" in note for note in said.notes)
    assert float(after["nc1_pinv"][0, 0]) != float(before["nc1_pinv"][0, 0])
    assert_same(after, nc.measure(store), 0.0)


def test_a_changed_classifier_is_noticed(stores, tmp_path):
    state, store = tmp_path / "state", stores[0]
    before = nc.measure(store, state=state, metrics=["nc4_agree"])
    k, d = store.n_classes, store.split("train").spec("h").n_features
    store.set_classifier("h", np.random.default_rng(9).standard_normal((k, d)), np.zeros(k))
    after = nc.measure(store, state=state, metrics=["nc4_agree"])
    assert float(after["nc4_agree"][0, 0]) != float(before["nc4_agree"][0, 0])


_MEASURE = """
import importlib, sys, time
import ncbatch as nc
from ncbatch.store.split import Split
importlib.import_module("ncbatch.engine.loop")._KEEP_EVERY = 0.0
read = Split.read
def slowly(self, *a, **b):
    with open("{log}", "a") as log:
        log.write(f"{{a[1]}}\\n")
    time.sleep({delay})
    return read(self, *a, **b)
Split.read = slowly
ds = nc.measure("{store}", metrics=["nc1_pinv", "nc2_etf_err", "nc1_quot"], state="{state}")
nc.save_results(ds, "{out}")
"""


def _kept_run(delay: float, store: str, folder: Path, name: str) -> subprocess.Popen[bytes]:
    text = _MEASURE.format(
        delay=delay, store=store, state=folder / "state", out=folder / f"{name}.csv",
        log=folder / f"{name}.log",
    )  # fmt: skip
    return subprocess.Popen(
        [sys.executable, "-c", text], env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


@pytest.mark.slow
def test_a_killed_run_recomputes_what_is_missing_to_the_same_bits(stores, tmp_path):
    store = stores[0].path
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    assert _kept_run(0.0, store, tmp_path / "whole", "run").wait() == 0
    killed = _kept_run(0.15, store, tmp_path / "killed", "first")
    log = tmp_path / "killed" / "first.log"
    while not log.exists() or len(log.read_text().split()) < 6:
        time.sleep(0.02)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    assert _kept_run(0.0, store, tmp_path / "killed", "again").wait() == 0
    again = (tmp_path / "killed" / "again.log").read_text().split()
    whole = (tmp_path / "whole" / "run.log").read_text().split()
    assert 0 < len(again) < len(whole)
    assert (tmp_path / "killed/again.csv").read_bytes() == (tmp_path / "whole/run.csv").read_bytes()


def test_budget_is_refused_before_reading_and_what_it_names_works(tmp_path, monkeypatch):
    data = REGIMES["zipf"](0)
    store = make_store(tmp_path / "s.zarr", data)
    with pytest.raises(BudgetError, match=r"--memory (\d+)MiB") as refused:
        nc.measure(store, memory="10MiB")
    smallest = str(refused.value).split("--memory ")[1].split(",")[0]
    assert nc.measure(store, memory=smallest).nc1_quot[0, 0] > 0


def test_a_budget_that_cannot_work_names_one_that_does(stores):
    with pytest.raises(BudgetError) as refused:
        nc.plan(stores, memory="60MiB")
    named = str(refused.value).split("--memory ")[1].split(",")[0]
    assert nc.plan(stores, memory=named).peak_bytes <= memory_budget(named)


def test_the_command_line_measures_states(pair, tmp_path):
    answer = run_here("measure", "states.zarr", "--out", "r.csv", cwd=tmp_path)
    assert answer.code == 0
    assert "nc4_agree" in answer.out
    assert (tmp_path / "r.csv").read_text().startswith("store,layer,nc1_pinv")
    assert run_here("plan", "states.zarr", cwd=tmp_path).code == 0
