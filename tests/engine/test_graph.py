"""One graph of pure tasks on real workers: the same results, whatever dies on the way."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from functools import partial

import pytest

from ncbatch.engine.graph import run_graph
from ncbatch.engine.jobs import Call, Item, Job, Sweep
from ncbatch.engine.loop import run_jobs
from ncbatch.errors import WorkerError
from tests.clusters import (
    ROOT,
    dask_process,
    kill_worker,
    wait_for_file,
    wait_for_workers,
    wait_until_idle,
)
from tests.engine.counting import Adder, Count, Counting
from tests.engine.test_loop import NUMBERS, Recorder, _give, _text

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")
N = 24
MANY = tuple(NUMBERS[i % len(NUMBERS)] + i for i in range(N))


@pytest.fixture(scope="module")
def client():
    """Connect to two workers of one thread, in this process."""
    from distributed import Client, LocalCluster

    workers = {"n_workers": 2, "threads_per_worker": 1, "processes": False}
    with (
        LocalCluster(**workers, dashboard_address="127.0.0.1:0", memory_limit=0) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        yield client


@pytest.fixture
def processes(scheduler_address):
    """Connect to two workers in processes of their own, which may be killed."""
    from distributed import Client

    with Client(scheduler_address, set_as_default=False) as client:
        client.wait_for_workers(2, timeout=60)
        yield client


def job(work: Counting, name="job", about=None) -> Job:
    items = [Item(i, i + 3, 3) for i in range(0, N, 3)]
    about = about or {"state": "count", "place": name, "fingerprint": name}
    sweep = Sweep("count", f"counting {name}", partial(_give, work), items, about=about)
    double = Sweep(
        "double",
        f"double {name}",
        _doubled,
        [Item(0, 1, 1)],
        needs=("count",),
        about={**about, "state": "double"},
    )
    return Job(name, (sweep, double, Call("text", _both, ("count", "double"))))


def _doubled(count):
    return Counting((2 * count.total,))


def _both(count, double):
    return f"{_text(count)}, {_text(double)}"


def test_jobs_give_what_a_plain_loop_gives(client):
    jobs = [job(Counting(MANY[i:] + MANY[:i]), f"job {i}") for i in range(5)]
    recorder = Recorder()
    found = run_graph(client, jobs, recorder)
    plain = run_jobs(jobs)
    assert [text.split()[0] for text in found] == [text.split()[0] for text in plain]
    assert recorder.calls == [("5 layers on 2 workers", 45, "items"), *[1] * 45, "end"]
    assert run_graph(client, jobs) == found  # the tree of merges is fixed


def test_an_error_of_an_item_is_the_users(client):
    with pytest.raises(ValueError, match="negative"):
        run_graph(client, [job(Counting((*MANY[:5], -1, *MANY[6:])))])


def test_a_sweep_without_items_has_the_state_of_none(client):
    sweep = Sweep("count", "counting nothing", partial(_give, Counting(())), [])
    assert run_graph(client, [Job("job", (sweep,))]) == run_jobs([Job("job", (sweep,))])


@pytest.mark.parametrize("damage", [b"", None])
def test_finished_states_are_kept_and_damaged_ones_count_as_absent(client, tmp_path, damage):
    log, state = tmp_path / "log", tmp_path / "state"
    result = run_graph(client, [job(Counting(MANY, log))], state=state)
    n_folded = len(log.read_text().split())
    assert run_graph(client, [job(Counting(MANY, log))], state=state) == result
    assert run_jobs([job(Counting(MANY, log))], state=state) == result
    assert len(log.read_text().split()) == n_folded
    for file in state.glob("*/state.npz"):
        file.write_bytes(file.read_bytes()[:100] if damage is None else damage)
    recorder = Recorder()
    assert run_graph(client, [job(Counting(MANY, log))], recorder, state) == result
    assert len(log.read_text().split()) == 2 * n_folded
    assert recorder.calls[-1] == "end"


# ------------------------------------------------------------------------ processes that are killed


@pytest.mark.slow
def test_a_killed_worker_is_survived(processes, scheduler_address, tmp_path):
    work = Counting(MANY, tmp_path / "log", slow=0.3)
    killer = threading.Timer(0.8, kill_worker, [processes])
    killer.start()
    assert run_graph(processes, [job(work)]) == run_graph(processes, [job(Counting(MANY))])
    killer.join()
    wait_for_workers(scheduler_address, 2)


@pytest.mark.slow
def test_an_item_that_kills_its_workers_is_named_and_what_others_finished_stays_kept(
    processes, scheduler_address, tmp_path
):
    state = tmp_path / "state"
    log = tmp_path / "log"
    jobs = [job(Counting(MANY), "living"), job(Counting(MANY, deadly=(7,)), "deadly")]
    with pytest.raises(WorkerError, match=r"counting deadly: rows 6\.\.8 kill every worker"):
        run_graph(processes, jobs, state=state)
    wait_for_workers(scheduler_address, 2)
    again = [job(Counting(MANY, log), "living")]
    [text] = run_graph(processes, again, state=state)
    assert text.split()[0] == run_jobs([job(Counting(MANY), "living")])[0].split()[0]
    assert not log.exists()


@pytest.mark.slow
def test_a_merge_that_kills_workers_is_reported(processes, scheduler_address):
    with pytest.raises(WorkerError, match="workers died of task 'ncbatch-merge-"):
        run_graph(processes, [job(Unmergeable(MANY))])
    wait_for_workers(scheduler_address, 2)


class DeadlyCount(Count):
    def merge(self, other):
        os.kill(os.getpid(), signal.SIGKILL)


class DeadlyAdder(Adder):
    def seal(self):
        return DeadlyCount(self.count.total, self.count.rounded)


class Unmergeable(Counting):
    def start(self):
        return DeadlyAdder()


@pytest.mark.slow
def test_a_scheduler_that_dies_ends_the_run(tmp_path, monkeypatch):
    from distributed import Client

    from ncbatch.engine import graph

    monkeypatch.setattr(graph, "_LOST_SECONDS", 2.0)
    file = tmp_path / "scheduler.json"
    loopback = ("--host", "127.0.0.1", "--dashboard-address", "127.0.0.1:0")
    with dask_process(
        "scheduler",
        "--scheduler-file",
        file,
        "--port",
        0,
        *loopback,
        log=tmp_path / "scheduler.log",
    ) as scheduler:
        address = wait_for_file(file)["address"]
        worker = ("worker", address, "--nthreads", 1, "--memory-limit", 0, *loopback)
        with (
            dask_process(*worker, log=tmp_path / "worker.log"),
            Client(address, set_as_default=False, timeout=20) as client,
        ):
            client.wait_for_workers(1, timeout=60)
            killer = threading.Timer(1.5, scheduler.kill)
            killer.start()
            with pytest.raises(WorkerError, match="the scheduler has gone"):
                run_graph(client, [job(Counting(MANY, tmp_path / "log", slow=0.5))])


def test_items_that_were_not_begun_are_not_done_after_an_error(client, tmp_path):
    bad = Counting((-1, *MANY[1:]), log := tmp_path / "log", slow=0.5)
    with pytest.raises(ValueError, match="negative") as error:
        run_graph(client, [job(bad)])
    wait_until_idle(client)
    assert len(log.read_text().split()) < 7  # all but the bad one
    assert error.tb is not None  # what a notebook holds, and with it the futures of all items


@pytest.mark.slow
def test_kept_items_are_not_done_again(processes, tmp_path):
    log, state = tmp_path / "log", tmp_path / "state"
    bad = Counting((*MANY[:-1], -1), log)
    with pytest.raises(ValueError, match="negative"):
        run_graph(processes, [job(bad)], state=state)
    wait_until_idle(processes)
    done = log.read_text().split()
    kept = {path.stem.removeprefix("item-") for path in state.glob("*/item-*.npz")}
    assert kept == set(done)
    assert kept
    found = run_graph(processes, [job(Counting(MANY, log))], state=state)
    assert sorted(log.read_text().split()) == sorted(f"{i}-{i + 3}" for i in range(0, N, 3))
    assert found == run_graph(processes, [job(Counting(MANY))])
    assert not list(state.glob("*/item-*.npz"))


@pytest.mark.slow
def test_a_killed_client_resumes_to_the_same_bits(processes, scheduler_address, tmp_path):
    log, state = tmp_path / "log", tmp_path / "state"
    script = f"""
        from pathlib import Path
        from distributed import Client
        from ncbatch.engine.graph import run_graph
        from tests.engine.counting import Counting
        from tests.engine.test_graph import MANY, job
        with Client("{scheduler_address}") as client:
            work = Counting(MANY, Path("{log}"), slow=0.4)
            run_graph(client, [job(work)], state=Path("{state}"))
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], cwd=ROOT)
    while not (log.exists() and len(log.read_text().split()) > 2):
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    wait_until_idle(processes)
    done = log.read_text().split()
    assert len(done) < N // 3
    found = run_graph(processes, [job(Counting(MANY, log))], state=state)
    again = log.read_text().split()[len(done) :]
    assert not set(done) & set(again)
    assert found == run_graph(processes, [job(Counting(MANY))])
