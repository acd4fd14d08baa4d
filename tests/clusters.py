"""A real scheduler with two workers, as processes on loopback, and a way to kill a worker."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


@contextmanager
def dask_process(*arguments: object, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run ``dask ...``; tests can be imported there, so that tasks may be theirs."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "dask", *map(str, arguments)],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=log.parent,
        )
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def wait_for_file(file: Path, seconds: float = 60) -> dict[str, Any]:
    """Wait until a scheduler has written its file."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            return json.loads(file.read_text())
        except (FileNotFoundError, ValueError):
            time.sleep(0.05)
    raise TimeoutError(f"no {file} within {seconds} seconds")


@pytest.fixture(scope="session")
def scheduler_file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Start a scheduler with two workers of one thread, whose nannies restart them; its file."""
    folder = tmp_path_factory.mktemp("dask")
    file = folder / "scheduler.json"
    loopback = ("--host", "127.0.0.1", "--dashboard-address", "127.0.0.1:0")
    worker = ("worker", "--scheduler-file", file, "--nthreads", 1, "--memory-limit", 0, *loopback)
    with dask_process(
        "scheduler", "--scheduler-file", file, "--port", 0, *loopback, log=folder / "scheduler.log"
    ):
        wait_for_file(file)
        with (
            dask_process(*worker, log=folder / "worker-0.log"),
            dask_process(*worker, log=folder / "worker-1.log"),
        ):
            wait_for_workers(wait_for_file(file)["address"], 2)
            yield file


@pytest.fixture(scope="session")
def scheduler_address(scheduler_file: Path) -> str:
    """Return the address of that scheduler."""
    return str(wait_for_file(scheduler_file)["address"])


def wait_for_workers(address: str, n_workers: int, seconds: float = 60) -> None:
    """Wait until a scheduler has so many workers."""
    from distributed import Client

    with Client(address, timeout=seconds, set_as_default=False) as client:
        client.wait_for_workers(n_workers, timeout=seconds)


def kill_worker(client: Any) -> str:
    """Kill a worker with SIGKILL, as the system's memory killer does; gives its address.

    Its nanny starts another one; `wait_for_workers` waits for it.
    """
    worker, process = next(iter(client.run(os.getpid).items()))
    os.kill(process, signal.SIGKILL)
    return str(worker)


def wait_until_idle(client: Any, seconds: float = 60) -> None:
    """Wait until no worker computes or is about to: items that were begun are finished, and kept."""
    end = time.monotonic() + seconds
    while any(client.run(_count_tasks).values()):
        if time.monotonic() > end:
            raise TimeoutError(f"workers are still busy after {seconds} seconds")
        time.sleep(0.05)


def _count_tasks(dask_worker: Any) -> int:
    state = dask_worker.state
    return len(state.executing) + len(state.ready) + len(state.waiting)
