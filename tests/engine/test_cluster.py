"""Opening clusters: what may be named, where they listen, what they leave, who may use them."""

from __future__ import annotations

import importlib
import json
import os
import socket
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from distributed import Client
from distributed.client import default_client
from distributed.security import Security

from ncbatch.engine import cluster as opening
from ncbatch.engine.cluster import open_cluster, task_slots, task_threads
from ncbatch.errors import UsageError, WorkerError
from ncbatch.version import __version__
from tests.clusters import ROOT, dask_process, kill_worker, wait_for_file, wait_for_workers

PROCESSORS = len(os.sched_getaffinity(0))


def double(number: int) -> int:
    return 2 * number


def listening_addresses() -> set[str]:
    """Where this process and its children listen."""
    own = psutil.Process()
    connections = [
        connection
        for process in [own, *own.children(recursive=True)]
        for connection in process.net_connections()
    ]
    return {c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN}


# ------------------------------------------------------------------------------------- no cluster


@pytest.mark.parametrize("name", [None, "sync"])
def test_sync_is_no_cluster(name: str | None):
    with open_cluster(name) as client:
        assert client is None


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("thread", "expected sync, threads, processes, cuda"),
        ("http://127.0.0.1:8786", "expected sync, threads"),
        ("processes:many", "a number of workers, as in processes:2"),
        ("threads:0", "1 or more"),
        ("nowhere/scheduler.json", "no scheduler file"),
        (3, "a cluster of type int"),
        ("tcp://127.0.0.1", "missing port"),
    ],
)
def test_unknown_names_are_refused_at_once(name: Any, says: str):
    with pytest.raises(UsageError, match=says), open_cluster(name):
        pass


def test_a_file_that_is_no_scheduler_file_is_refused(tmp_path: Path):
    for text in ("{", "[]", '{"id": 1}'):
        file = tmp_path / "scheduler"
        file.write_text(text)
        with pytest.raises(UsageError, match="is no scheduler file"), open_cluster(file):
            pass


# --------------------------------------------------------------------------------- local clusters


@pytest.mark.parametrize(
    ("name", "bokeh"),
    [
        ("threads", False),
        pytest.param("threads", True, marks=pytest.mark.slow),
        pytest.param("processes:2", False, marks=pytest.mark.slow),
        pytest.param("processes:2", True, marks=pytest.mark.slow),
    ],
)
def test_local_clusters_listen_on_loopback_only_and_leave_the_environment_alone(
    name: str, bokeh: bool, monkeypatch: pytest.MonkeyPatch
):
    if bokeh:
        pytest.importorskip("bokeh")
    else:  # None in place of a module makes its import fail
        monkeypatch.setitem(sys.modules, "bokeh", None)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("MKL_NUM_THREADS", "7")
    before, outside = dict(os.environ), listening_addresses()
    with open_cluster(name) as client:
        assert client is not None
        assert client.submit(double, 4).result() == 8
        assert dict(os.environ) == before
        assert listening_addresses() - outside <= {"127.0.0.1"}
        assert listening_addresses()
        assert sum(client.nthreads().values()) == (2 if "processes" in name else PROCESSORS)
        with pytest.raises(ValueError, match="No clients"):
            default_client()
    assert dict(os.environ) == before


@pytest.mark.slow
def test_processes_get_their_share_of_threads_and_keep_what_the_user_set(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    monkeypatch.setenv("MKL_NUM_THREADS", "7")
    with open_cluster("processes:1") as client:
        [found] = client.run(lambda: dict(os.environ)).values()
    assert found["OMP_NUM_THREADS"] == found["OPENBLAS_NUM_THREADS"] == str(PROCESSORS)
    assert found["MKL_NUM_THREADS"] == "7"


def test_as_many_threads_start_as_are_asked_for():
    with open_cluster("threads:2") as client:
        assert list(client.nthreads().values()) == [2]


def test_no_more_processes_start_than_fit_into_free_memory(monkeypatch: pytest.MonkeyPatch):
    free = types.SimpleNamespace(available=10 * 2**30)
    monkeypatch.setattr(opening.psutil, "virtual_memory", lambda: free)
    assert [opening._fitting(8, m and m * 2**30) for m in (None, 1, 3, 5, 99)] == [8, 8, 3, 2, 1]


@pytest.mark.slow
def test_a_dead_local_worker_is_replaced():
    with open_cluster("processes:1") as client:
        dead = kill_worker(client)
        assert client.submit(double, 21).result(timeout=60) == 42
        assert dead not in client.nthreads()


@pytest.mark.slow
def test_nothing_is_printed_by_a_whole_run(tmp_path: Path):
    script = tmp_path / "script.py"
    script.write_text(
        "import os\n"
        "from ncbatch.engine.cluster import open_cluster\n"
        "if __name__ == '__main__':\n"
        "    for name in ('threads', 'processes:1'):\n"
        "        with open_cluster(name) as client:\n"
        "            client.submit(print, 'hello').result()\n"
        "    with open_cluster('processes:1') as client:\n"
        "        pid = next(iter(client.run(os.getpid).values()))\n"
        "        os.kill(pid, 9)\n"
        "        print(client.submit(sum, [1, 2]).result())\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", script], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "hello\nhello\n3\n", "")


@pytest.mark.slow
def test_a_script_without_a_guard_is_told_so(tmp_path: Path):
    script = tmp_path / "script.py"
    script.write_text(
        "from ncbatch.engine.cluster import open_cluster\n"
        "with open_cluster('processes:1') as client:\n"
        "    pass\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "a script that starts processes needs: if __name__ == '__main__':" in done.stderr


# ----------------------------------------------------------------------------------------- GPUs


def test_cuda_without_dask_cuda_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "dask_cuda", None)
    with (
        pytest.raises(UsageError, match=r"without dask-cuda(.|\n)*pip install 'ncbatch\[gpu\]'"),
        open_cluster("cuda"),
    ):
        pass


@pytest.fixture
def fake_dask_cuda(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    def install(cluster: Any) -> None:
        module = types.SimpleNamespace(LocalCUDACluster=cluster)
        monkeypatch.setattr(opening, "import_module", lambda name: module)

    return install


@pytest.mark.slow
def test_cuda_asks_for_a_worker_of_one_thread_per_gpu(
    fake_dask_cuda: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch
):
    from distributed import LocalCluster

    asked = {}

    def cluster(**options: Any) -> Any:
        asked.update(options)
        own = ("device_memory_limit", "rmm_pool_size", "rmm_track_allocations")
        kept = {k: v for k, v in options.items() if k not in own and "allocator" not in k}
        os.environ["RAPIDS_NO_INITIALIZE"] = "True"  # as dask-cuda does
        return LocalCluster(**kept)

    fake_dask_cuda(cluster)
    monkeypatch.setattr(opening, "find_spec", lambda name: object() if name == "rmm" else None)
    with open_cluster("cuda:1") as client:
        assert client.submit(double, 1).result() == 2
        assert "RAPIDS_NO_INITIALIZE" not in os.environ
    assert asked["threads_per_worker"] == asked["n_workers"] == 1
    assert asked["device_memory_limit"] == asked["memory_limit"] == 0
    assert asked["rmm_allocator_external_lib_list"] == ["cupy"]
    assert asked["rmm_track_allocations"]
    assert asked["host"] == "127.0.0.1"
    assert asked["dashboard_address"] == "127.0.0.1:0"


def test_cuda_without_a_gpu_says_what_the_driver_said(fake_dask_cuda: Callable[[Any], None]):
    def cluster(**options: Any) -> Any:
        raise OSError("NVML Shared Library Not Found\nand more")

    fake_dask_cuda(cluster)
    with pytest.raises(WorkerError, match=r"no cluster of GPUs: NVML .* Found;") as raised:
        open_cluster("cuda").__enter__()
    assert "and more" not in str(raised.value)


@pytest.mark.gpu
@pytest.mark.skipif(importlib.util.find_spec("dask_cuda") is None, reason="no dask-cuda")
def test_cuda_computes_on_a_gpu():
    def total() -> float:
        import cupy

        return float(cupy.arange(5.0).sum())

    with open_cluster("cuda") as client:
        assert client.submit(total).result() == 10


# --------------------------------------------------------------------------- schedulers that run


@pytest.fixture(scope="module")
def near_scheduler() -> Iterator[str]:
    """Start a scheduler with two workers in this process; yields its address, on loopback."""
    from distributed import LocalCluster

    options: dict[str, Any] = {"processes": False, "protocol": "tcp", "host": "127.0.0.1"}
    with LocalCluster(
        n_workers=2,
        threads_per_worker=1,
        dashboard_address="127.0.0.1:0",
        memory_limit=0,
        **options,
    ) as cluster:
        yield cluster.scheduler_address


@pytest.mark.slow
def test_a_scheduler_of_another_process_is_reached(scheduler_address: str, scheduler_file: Path):
    for cluster in (scheduler_address, scheduler_file):
        with open_cluster(cluster) as client:
            assert client.submit(double, 4).result() == 8
            assert len(client.nthreads()) == 2


def test_an_address_a_file_and_a_client_reach_the_scheduler(near_scheduler: str, tmp_path: Path):
    scheduler_address = near_scheduler
    scheduler_file = tmp_path / "scheduler.json"
    scheduler_file.write_text(json.dumps({"address": scheduler_address}))
    for cluster in (scheduler_address, scheduler_file, str(scheduler_file)):
        with open_cluster(cluster) as client:
            assert client.submit(double, 4).result() == 8
            assert len(client.nthreads()) == 2
        assert client.status == "closed"
    with Client(scheduler_address, set_as_default=False) as own:
        with open_cluster(own) as client:
            assert client is own
        assert own.status == "running"
    with pytest.raises(UsageError, match="a client that is closed"), open_cluster(own):
        pass


def test_nobody_at_an_address_is_an_error_soon(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(opening, "CONNECT_SECONDS", 0.5)
    with (
        pytest.raises(WorkerError, match=r"no Dask scheduler answers at tcp://127.0.0.1:1;"),
        open_cluster("tcp://127.0.0.1:1"),
    ):
        pass


def test_somebody_else_at_an_address_is_an_error_soon(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(opening, "CONNECT_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(WorkerError, match="no Dask scheduler answers"), open_cluster(address):
            pass


def test_the_address_of_a_worker_is_no_scheduler(near_scheduler: str):
    with open_cluster(near_scheduler) as client:
        worker = next(iter(client.nthreads()))
    with pytest.raises(WorkerError, match="a Worker at tcp://"), open_cluster(worker):
        pass


@pytest.mark.slow
def test_an_address_that_nobody_answers_prints_two_lines(tmp_path: Path):
    script = (
        "import sys; from ncbatch.engine import cluster; cluster.CONNECT_SECONDS = 1\n"
        "from ncbatch.errors import NcbatchError\n"
        "try: cluster.open_cluster('tcp://127.0.0.1:1').__enter__()\n"
        "except NcbatchError as error: sys.exit(str(error))\n"
    )
    command = [sys.executable, "-W", "error", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 2


@pytest.mark.slow
def test_a_scheduler_without_workers_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(opening, "WORKER_SECONDS", 0.5)
    file = tmp_path / "scheduler.json"
    options = ("--host", "127.0.0.1", "--port", 0, "--dashboard-address", "127.0.0.1:0")
    log = tmp_path / "log"
    with dask_process("scheduler", "--scheduler-file", file, *options, log=log):
        wait_for_file(file)
        with pytest.raises(WorkerError, match="has no workers"), open_cluster(file):
            pass


@pytest.mark.slow
def test_a_killed_worker_of_a_scheduler_is_replaced(scheduler_address: str):
    with open_cluster(scheduler_address) as client:
        kill_worker(client)
        assert client.submit(double, 21).result(timeout=60) == 42
    wait_for_workers(scheduler_address, 2)


@pytest.mark.slow
def test_workers_of_another_version_are_refused(
    scheduler_address: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(opening, "__version__", "999.0")
    with (
        pytest.raises(WorkerError, match=f"runs ncbatch {__version__}; expected 999.0"),
        open_cluster(scheduler_address),
    ):
        pass


def test_workers_without_ncbatch_are_refused(near_scheduler: str, monkeypatch: pytest.MonkeyPatch):
    def version() -> str:
        raise ModuleNotFoundError("No module named 'ncbatch'")

    monkeypatch.setattr(opening, "_version", version)
    with (
        pytest.raises(WorkerError, match=r"cannot import ncbatch(.|\n)*pip install"),
        open_cluster(near_scheduler),
    ):
        pass


def test_workers_that_run_another_version_are_named(
    near_scheduler: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(opening, "_version", lambda: "999.0")
    with (
        pytest.raises(WorkerError, match=f"runs ncbatch 999.0; expected {__version__}"),
        open_cluster(near_scheduler),
    ):
        pass


@pytest.mark.slow
def test_tls(tmp_path: Path):
    pytest.importorskip("cryptography")
    import dask

    keys = Security.temporary()
    files = {}
    for name in ("tls_ca_file", "tls_client_cert", "tls_client_key"):
        files[name] = tmp_path / f"{name}.pem"
        files[name].write_text(getattr(keys, name))
    ca, cert, key = files.values()
    tls = ("--tls-ca-file", ca, "--tls-cert", cert, "--tls-key", key, "--host", "tls://127.0.0.1")
    file, quiet = tmp_path / "scheduler.json", ("--dashboard-address", "127.0.0.1:0")
    config = {
        "distributed.comm.tls.ca-file": str(ca),
        "distributed.comm.tls.client.cert": str(cert),
        "distributed.comm.tls.client.key": str(key),
    }
    scheduler = ("scheduler", "--scheduler-file", file, "--port", 0)
    with dask_process(*scheduler, *tls, *quiet, log=tmp_path / "scheduler.log"):
        address = wait_for_file(file)["address"]
        assert address.startswith("tls://127.0.0.1")
        with pytest.raises(UsageError, match="without certificates"), open_cluster(address):
            pass
        with (
            dask_process("worker", address, *tls, *quiet, log=tmp_path / "worker.log"),
            dask.config.set(config),
            open_cluster(address) as client,
        ):
            assert client.submit(double, 3).result() == 6


# ------------------------------------------------------------------------------ threads of a task


class Workers:
    """A client whose workers are where they are said to be."""

    def __init__(self, *places: tuple[str, tuple[int, ...], int, int]) -> None:
        self.places = places

    def run(self, function: Any, on_error: str) -> dict[str, Any]:
        return {f"tcp://{i}": opening._Place(*place) for i, place in enumerate(self.places)}


def threads(*places: tuple[str, tuple[int, ...], int, int]) -> list[int]:
    slots = task_slots(Workers(*places))
    return [slots[opening._Place(*place).key] for place in places]


def test_processors_are_dealt_out_to_the_slots_that_may_use_them():
    every, low, high = tuple(range(8)), tuple(range(4)), tuple(range(4, 8))
    assert threads(("a", every, 1, 8)) == [8]
    assert threads(("a", every, 1, 8), ("a", every, 1, 8)) == [4, 4]
    assert threads(("a", every, 1, 8), ("b", every, 2, 8)) == [8, 4]
    # Bound to sockets, as dask-cuda's workers are: nothing is shared.
    assert threads(("a", low, 1, 4), ("a", high, 1, 4)) == [4, 4]
    assert threads(("a", low, 1, 4), ("a", low, 1, 4), ("a", high, 1, 4)) == [2, 2, 4]
    # More slots than processors.
    assert threads(*[("a", low, 2, 4)] * 4) == [1] * 4
    # A container with the time of two of the eight processors that it sees.
    assert threads(("a", every, 1, 2)) == [2]
    assert threads(("a", every, 1, 4), ("a", every, 1, 4)) == [2, 2]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("threads", 1),
        ("threads:1", PROCESSORS),
        pytest.param("processes:1", PROCESSORS, marks=pytest.mark.slow),
        pytest.param("processes:2", PROCESSORS // 2, marks=pytest.mark.slow),
    ],
)
def test_a_task_finds_its_threads(name: str, expected: int):
    with open_cluster(name) as client:
        slots = task_slots(client)
        json.dumps(slots)  # plain, so that it travels with any task
        assert client.submit(task_threads, slots).result() == max(1, expected)
        later: dict[str, int] = {}  # a worker that was not there when the slots were counted
        alone = PROCESSORS // next(iter(client.nthreads().values()))
        assert client.submit(task_threads, later).result() == alone


def test_outside_of_a_worker_all_processors_are_free():
    assert task_threads({}) == PROCESSORS


def test_the_engine_is_imported_without_distributed():
    code = "import sys, ncbatch.engine.cluster; sys.exit('distributed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
