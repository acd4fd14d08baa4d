"""Clusters agree, kept work is not done again, class blocks and plans keep their word."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import ncbatch as nc
from ncbatch.engine.plans import memory_budget
from ncbatch.errors import BudgetError, UsageError
from ncbatch.measurement import run as execution
from ncbatch.measurement.layers import choose_tasks, wanted_metrics
from ncbatch.measurement.options import Options
from ncbatch.measurement.steps import Mode, choose_mode, prices, shape_of
from ncbatch.store import FeatureStore, chunks
from ncbatch.store import format as store_format
from tests.engine.test_loop import Recorder
from tests.measurement.test_values import make_store, outside
from tests.strategies import REGIMES

DASK = pytest.mark.filterwarnings("ignore::ResourceWarning")
SECOND_READ = ["nc1_test_to_train", "nc1_cdnv_directional_exact"]


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch):
    """Make many chunks of little data."""
    monkeypatch.setattr(store_format, "CHUNK_BYTES", 4096)


@pytest.fixture
def stores(tmp_path, small_chunks) -> list[FeatureStore]:
    """Give two stores of different regimes, with all splits, one of them with two layers."""
    made = []
    for name, regime in (("a", "zipf"), ("b", "k_less_d")):
        data = REGIMES[regime](3)
        W, b, test, ood = outside(data)
        store = make_store(
            tmp_path / f"{name}.zarr", data, splits={"test": test, "ood": ood}, W=W, b=b
        )
        made.append(store)
    with store.add_layers("train", {"twice": data.X.shape[1]}, "float64") as writer:
        writer.append({"twice": 2.0 * data.X.astype(np.float64)})
    return made


def every_metric() -> list[str]:
    return [*nc.metrics.CATALOGUE]


def assert_same(a, b, rel: float) -> None:
    assert set(a.data_vars) == set(b.data_vars)
    for name in a.data_vars:
        np.testing.assert_allclose(
            a[name].values.astype(float), b[name].values.astype(float),
            rtol=rel, atol=1e-12, equal_nan=True, err_msg=name,
        )  # fmt: skip


# ---------------------------------------------------------------------------------------- clusters


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


# -------------------------------------------------------------------------------------- kept work


def refuse_to_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_, **__):
        raise AssertionError("features were read")

    monkeypatch.setattr("ncbatch.store.split.Split.read", read)


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


# ----------------------------------------------------------------------------- class blocks, plans


@pytest.mark.parametrize("blocks", [1, 3])
def test_means_in_files_and_class_blocks_change_no_metric(stores, tmp_path, monkeypatch, blocks):
    plain = nc.measure(stores, per_class=True, null=True, metrics=every_metric())
    monkeypatch.setattr(execution, "choose_mode", lambda *_: Mode(blocks, stored=True))
    for state in (None, tmp_path / "state"):
        found = nc.measure(stores, per_class=True, null=True, metrics=every_metric(), state=state)
        assert_same(found, plain, 1e-9)
    refuse_to_read(monkeypatch)
    again = nc.measure(
        stores, per_class=True, null=True, metrics=every_metric(), state=tmp_path / "state"
    )
    assert_same(again, found, 0.0)


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


@pytest.mark.slow
@DASK
def test_a_damaged_kept_state_counts_as_absent_on_a_cluster(stores, tmp_path, scheduler_address):
    store, metrics = stores[0], ["nc1_pinv", "nc4_agree"]
    first = nc.measure(store, state=tmp_path, metrics=metrics, cluster=scheduler_address)
    (file,) = tmp_path.glob("moments-*/state.npz")
    file.write_bytes(file.read_bytes()[:100])
    again = nc.measure(store, state=tmp_path, metrics=metrics, cluster=scheduler_address)
    assert_same(again, first, 0.0)


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


def test_planning_reads_no_data(stores, monkeypatch):
    def read(*_):
        raise AssertionError("data was read")

    monkeypatch.setattr(chunks, "read_rows", read)
    for module in ("ncbatch.store.split", "ncbatch.store.chunks"):
        monkeypatch.setattr(f"{module}.read_rows", read)
    monkeypatch.setattr("zarr.Array.__getitem__", read)
    found = nc.plan(stores)
    assert found.items > 0
    assert found.peak_bytes > 0
    assert "moments of a.zarr/h" in str(found)


def test_a_plan_of_shapes_bounds_that_of_the_labels(stores):
    bound = nc.plan(stores, memory="8GiB")
    seen = {}

    def check(plan):
        seen["plan"] = plan

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ncbatch.measurement.run.check_budget", check)
        nc.measure(stores, memory="8GiB")
    assert len(seen["plan"].prices) == len(bound.prices)
    for own, most in zip(seen["plan"].prices, bound.prices, strict=True):
        assert own.peak_bytes <= most.peak_bytes
        assert own.step == most.step


def test_less_memory_means_more_class_blocks_until_nothing_fits(tmp_path):
    store = FeatureStore.create(tmp_path / "s.zarr", 200_000, {"h": 4096}, "float16")
    with store.writer("train", n_samples=100) as writer:
        writer.append({"h": np.zeros((100, 4096), np.float16)}, np.arange(100))
    (task,) = choose_tasks({"s": store}, None, Options(), *wanted_metrics(None), scanned=False)
    shape = replace(shape_of(task), n_used=200_000)
    modes = [choose_mode(shape, gib * 2**30) for gib in (64, 12, 8, 4, 3)]
    assert modes[0] == Mode()
    blocks = [mode.class_blocks for mode in modes[1:]]
    assert blocks == sorted(blocks)
    assert blocks[-1] > 1
    for mode, gib in zip(modes, (64, 12, 8, 4, 3), strict=True):
        found = prices(shape, mode)
        assert max(price.peak_bytes for price in found) <= gib * 2**30
        assert found[0].n_reads == mode.class_blocks
        assert found[0].bytes_read == mode.class_blocks * shape.train.bytes_read


def test_a_budget_that_cannot_work_names_one_that_does(stores):
    with pytest.raises(BudgetError) as refused:
        nc.plan(stores, memory="60MiB")
    named = str(refused.value).split("--memory ")[1].split(",")[0]
    assert nc.plan(stores, memory=named).peak_bytes <= memory_budget(named)


_PEAK = """
import json, re, sys
import ncbatch as nc
arguments = json.loads(sys.argv[1])
plan = nc.plan(**arguments)
found = nc.measure(**arguments)
peak = int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
values = {name: float(found[name][0, 0]) for name in arguments.get("metrics", [])}
print(json.dumps([plan.peak_bytes, peak, max(p.n_reads for p in plan.prices), values]))
"""


def peak_of(**arguments) -> tuple[int, int, int, dict[str, float]]:
    """Measure in a process of its own; gives planned and own peak, number of reads, and values."""
    done = subprocess.run(
        [sys.executable, "-c", _PEAK, json.dumps(arguments)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return tuple(json.loads(done.stdout))


@pytest.mark.slow
def test_k_by_d_larger_than_the_budget_works_by_class_blocks(tmp_path):
    K, D, n = 104_000, 1024, 110_000
    rng = np.random.default_rng(0)
    store = FeatureStore.create(tmp_path / "s.zarr", K, {"h": D}, "float16")
    y = np.concatenate([np.arange(K), rng.integers(0, K, n - K)])
    with store.writer("train", n_samples=n) as writer:
        for start in range(0, n, 10_000):
            X = rng.standard_normal((10_000, D), np.float32) + (y[start : start + 10_000, None] % 7)
            writer.append({"h": X.astype(np.float16)}, y[start : start + 10_000])
    metrics = ["nc1_pinv", "nc1_quot", "nc2_etf_err", "nc2_norm_mean"]
    budget = 800 * 2**20
    assert budget < K * D * 8
    planned, peak, reads, values = peak_of(stores=str(store.path), metrics=metrics, memory=budget)
    assert peak <= planned <= budget
    assert reads > 1
    whole = nc.measure(store, metrics=metrics)
    assert values == pytest.approx({name: float(whole[name][0, 0]) for name in metrics}, rel=1e-9)


@pytest.mark.slow
def test_the_plan_holds_with_a_classifier_outside_data_and_many_class_blocks(tmp_path):
    K, D = 30_000, 1024
    rng = np.random.default_rng(0)
    store = FeatureStore.create(tmp_path / "s.zarr", K, {"h": D}, "float16")
    for name, n in (("train", 40_000), ("test", 2_000), ("ood", 30_000)):
        with store.writer(name, n_samples=n) as writer:
            y = np.arange(n) % K
            for start in range(0, n, 10_000):
                part = y[start : start + 10_000]
                X = rng.standard_normal((len(part), D), np.float32) + (part[:, None] % 5)
                writer.append({"h": X.astype(np.float16)}, part)
    store.set_classifier("h", rng.standard_normal((K, D), np.float32), np.zeros(K, np.float32))
    metrics = [
        "nc1_pinv",
        "nc1_quot",
        "nc3_cos_mean",
        "nc4_agree",
        "nc5_ood_dev",
        "nc1_test_to_train",
    ]
    budget = 840 * 2**20
    planned, peak, reads, values = peak_of(stores=str(store.path), metrics=metrics, memory=budget)
    assert peak <= planned <= budget
    assert reads > 1
    whole = nc.measure(store, metrics=metrics)
    assert values == pytest.approx({name: float(whole[name][0, 0]) for name in metrics}, rel=1e-9)
