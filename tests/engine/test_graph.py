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
from tests.clusters import ROOT, dask_process, kill_worker, wait_for_file, wait_for_workers
from tests.engine.counting import Counting
from tests.engine.test_loop import NUMBERS, Recorder, _give, _text

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::ResourceWarning")]
N = 24
MANY = tuple(NUMBERS[i % len(NUMBERS)] + i for i in range(N))


@pytest.fixture
def client(scheduler_address):
    from distributed import Client

    with Client(scheduler_address, set_as_default=False) as client:
        client.wait_for_workers(2, timeout=60)
        yield client


def job(work: Counting, name="job", items=None, grain=1, about=None) -> Job:
    items = items or [Item(i, i + 3, 3) for i in range(0, N, 3)]
    about = about or {"state": "count", "place": name, "fingerprint": name}
    sweep = Sweep("count", f"counting {name}", partial(_give, work), items, grain, about=about)
    double = Sweep(
        "double", f"double {name}", _doubled, [Item(0, 1, 1)], needs=("count",),
        about={**about, "state": "double"},
    )  # fmt: skip
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


def test_a_killed_worker_is_survived(client, scheduler_address, tmp_path):
    work = Counting(MANY, tmp_path / "log", slow=0.3)
    killer = threading.Timer(0.8, kill_worker, [client])
    killer.start()
    assert run_graph(client, [job(work)]) == run_graph(client, [job(Counting(MANY))])
    killer.join()
    wait_for_workers(scheduler_address, 2)


def test_an_item_that_kills_workers_is_halved_and_then_reported(
    client, scheduler_address, tmp_path
):
    log = tmp_path / "log"
    with pytest.raises(WorkerError, match=r"counting job: rows 7\.\.7 kill every worker"):
        run_graph(client, [job(Counting(MANY, log, deadly=(7,)))])
    assert {"0-3", "8-9"} <= set(log.read_text().split())  # what is beside it was done
    wait_for_workers(scheduler_address, 2)


def test_a_merge_that_kills_workers_is_reported(client, scheduler_address):
    with pytest.raises(WorkerError, match="workers died of task 'ncbatch-merge-"):
        run_graph(client, [job(Unmergeable(MANY))])
    wait_for_workers(scheduler_address, 2)


class Unmergeable(Counting):
    def merge(self, a, b):
        os.kill(os.getpid(), signal.SIGKILL)


def test_halves_that_live_give_the_result(client, scheduler_address):
    # Kills its process while an item of more than one row is folded.
    whole = run_graph(client, [job(Counting(MANY))])
    found = run_graph(client, [job(Picky(MANY))])
    assert found[0].split()[0] == whole[0].split()[0]
    wait_for_workers(scheduler_address, 2)


class Picky(Counting):
    def fold(self, accumulator, item):
        if item.start <= 4 < item.stop and item.stop - item.start > 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().fold(accumulator, item)


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


def test_kept_items_are_not_done_again(client, tmp_path):
    log, state = tmp_path / "log", tmp_path / "state"
    bad = Counting((*MANY[:-1], -1), log)
    with pytest.raises(ValueError, match="negative"):
        run_graph(client, [job(bad)], state=state)
    done = log.read_text().split()
    time.sleep(0.5)  # items that workers had begun are finished, and kept
    done = log.read_text().split()
    kept = {path.stem.removeprefix("item-") for path in state.glob("*/item-*.npz")}
    assert kept == set(done)
    assert kept
    found = run_graph(client, [job(Counting(MANY, log))], state=state)
    assert sorted(log.read_text().split()) == sorted(f"{i}-{i + 3}" for i in range(0, N, 3))
    assert found == run_graph(client, [job(Counting(MANY))])
    assert not list(state.glob("*/item-*.npz"))
    done = log.read_text()
    assert run_graph(client, [job(Counting(MANY, log))], state=state) == found
    assert run_jobs([job(Counting(MANY, log))], state=state) == found
    assert log.read_text() == done


def test_a_killed_client_resumes_to_the_same_bits(client, scheduler_address, tmp_path):
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
        time.sleep(0.05)
    process.kill()
    process.wait()
    time.sleep(1.5)  # items that workers had begun are finished, and kept
    done = log.read_text().split()
    assert len(done) < N // 3
    found = run_graph(client, [job(Counting(MANY, log))], state=state)
    again = log.read_text().split()[len(done) :]
    assert not set(done) & set(again)
    assert found == run_graph(client, [job(Counting(MANY))])
