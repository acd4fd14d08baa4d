"""Commands that measure: where and how a measurement runs; plans, clusters, kept work, devices."""

import importlib.util
import json
import re

import numpy as np
import pytest

import ncbatch as nc
from ncbatch.errors import DataError
from ncbatch.store import FeatureStore
from tests.conftest import Answer, make_toy, run_command

TOY = make_toy(300, 6)
DASK = pytest.mark.filterwarnings("ignore::ResourceWarning")


@pytest.fixture
def toys(tmp_path, small_chunks) -> None:
    """Put ``run.zarr`` with a classifier, a test and an OOD split into the current folder."""
    store = FeatureStore.create(tmp_path / "run.zarr", 5, {"fc": 6}, "float32")
    splits = {"train": (TOY.X, TOY.y), "test": (TOY.X_test, TOY.y_test), "ood": (TOY.X_ood, None)}
    for name, (X, y) in splits.items():
        with store.writer(name) as writer:
            writer.append({"fc": X}, np.zeros(len(X), int) if y is None else y)
    store.set_classifier("fc", TOY.W, TOY.b)


def good(answer: Answer) -> str:
    assert answer.code == 0, answer.err
    return answer.out


@pytest.mark.usefixtures("toys")
def test_plan_says_what_measure_would_do_and_does_nothing(ncbatch, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    out = good(ncbatch("plan", "run.zarr", "--memory", "4GiB"))
    for step in ("moments", "pairs", "decisions", "outside data", "formulas"):
        assert f"{step} of run.zarr/fc" in out
    assert re.search(r"peak memory of a worker: .* of 4\.00 GiB allowed", out)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    few = good(ncbatch("plan", "run.zarr", "--metrics", "nc1_quot"))
    assert "pairs" not in few
    refused = ncbatch("plan", "run.zarr", "--memory", "1MiB")
    assert refused.code == 1
    assert "give at least --memory" in refused.err


@pytest.mark.usefixtures("toys")
def test_an_interrupted_split_is_noted_and_refused_where_results_are_kept(ncbatch, tmp_path):
    store = FeatureStore.open(tmp_path / "run.zarr")
    store.delete_split("train")
    writer = store.writer("train")
    writer.append({"fc": TOY.X}, TOY.y)
    writer.discard()
    line = ("measure", "run.zarr", "--metrics", "nc1_cdnv,nc4_agree")
    there_is = "288 samples of an interrupted writer"
    note = f"note: split 'train' is not complete, {there_is} for layer fc: measured as it is"
    assert note in good(ncbatch(*line))
    for options in (("--out", "r.nc"), ("--out", "r.nc", "--update")):
        refused = ncbatch(*line, *options)
        assert refused.code == 1
        assert f"split 'train' of run.zarr/fc is not complete: {there_is}; expected" in refused.err
        assert "--partial" in refused.err
        assert not (tmp_path / "r.nc").exists()
    assert note in good(ncbatch(*line, "--out", "r.nc", "--partial"))
    kept = nc.load_results(tmp_path / "r.nc")
    assert json.loads(kept.attrs["incomplete"]) == {"run.zarr": {"fc": f"train: {there_is}"}}

    with store.writer("train", resume=True) as writer:
        writer.append({"fc": TOY.X[writer.position :]}, TOY.y[writer.position :])
    assert "not complete" not in good(ncbatch(*line, "--out", "r.nc", "--update"))
    whole = nc.load_results(tmp_path / "r.nc")
    assert "incomplete" not in whole.attrs
    assert float(whole.n_samples[0, 0]) == 300
    assert float(whole.nc1_cdnv[0, 0]) != float(kept.nc1_cdnv[0, 0])


def test_updates_in_python_refuse_interrupted_splits_too(tmp_path, small_chunks):
    store = FeatureStore.create(tmp_path / "s.zarr", 5, {"fc": 6}, "float32")
    writer = store.writer("train")
    writer.append({"fc": TOY.X}, TOY.y)
    writer.discard()
    few = {"metrics": ["nc1_cdnv"]}
    earlier = nc.measure(store, **few)
    with pytest.raises(DataError, match="not complete: 288 samples"):
        nc.measure(store, update=earlier, **few)
    again = nc.measure(store, update=earlier, partial=True, **few)
    assert float(again.nc1_cdnv[0, 0]) == float(earlier.nc1_cdnv[0, 0])
    with pytest.raises(DataError, match="not complete: 288 samples"):
        nc.measure(store, partial=False, **few)


@pytest.mark.usefixtures("toys")
def test_state_is_used_again_and_says_what_changed(ncbatch, tmp_path):
    line = ("measure", "run.zarr", "--state", "kept")
    first = good(ncbatch(*line, "--out", "a.csv"))
    assert good(ncbatch(*line, "--out", "b.csv")) == first
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()
    changed = ncbatch(*line, "--precision", "fp32")
    assert "starts anew: precision was exact, is fp32" in changed.err
    (tmp_path / "file").write_text("")
    answer = ncbatch("measure", "run.zarr", "--state", "file")
    assert (answer.code, answer.err.count("\n")) == (1, 1)
    assert "--state 'file' is a file" in answer.err


@pytest.mark.slow
@DASK
@pytest.mark.usefixtures("toys")
@pytest.mark.parametrize("cluster", ["threads", "processes:2"])
def test_clusters_print_what_a_plain_loop_prints(tmp_path, cluster):
    plain = run_command("measure", "run.zarr", "--out", "plain.csv", cwd=tmp_path)
    answer = run_command(
        "measure", "run.zarr", "--cluster", cluster, "--out", "cluster.csv", cwd=tmp_path
    )
    assert good(answer) == good(plain)
    assert answer.err == ""  # nothing of Dask's own business


@pytest.mark.usefixtures("toys")
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--cluster", "everywhere"), "expected sync, threads, processes"),
        (("--cluster", "tcp://127.0.0.1:9"), "no Dask scheduler answers at tcp://127.0.0.1:9"),
        (("--cluster", "none/scheduler.json"), "no scheduler file 'none/scheduler.json'"),
        (("--precision", "tf32", "--device", "cpu"), "precision 'tf32' on the CPU"),
    ],
)
def test_what_is_not_there_is_named_in_two_lines(ncbatch, options, said, monkeypatch):
    monkeypatch.setattr("ncbatch.engine.cluster.CONNECT_SECONDS", 0.5)
    answer = ncbatch("measure", "run.zarr", *options)
    assert answer.code == 1
    assert said in answer.err
    assert 1 <= answer.err.count("\n") <= 2


@pytest.mark.usefixtures("toys")
@pytest.mark.skipif(importlib.util.find_spec("cupy") is not None, reason="CuPy is installed")
def test_a_gpu_that_is_asked_for_is_never_replaced_in_silence(ncbatch):
    answer = ncbatch("measure", "run.zarr", "--device", "cuda")
    assert answer.code == 1
    assert "CuPy is not installed" in answer.err
    assert "ncbatch[gpu]" in answer.err
    assert "device: cpu" in good(ncbatch("measure", "run.zarr"))
