"""A cluster of processes that have one processor each, so that their number is what is compared."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from tests.benchmarks.case import MissingError

_ROOT = Path(__file__).parents[2]
_WAIT_SECONDS = 60


@contextmanager
def one_thread_workers(n_workers: int) -> Iterator[Any]:
    """Start workers of one thread, each bound to a processor, and give a client of them.

    A worker that is alone on a machine would otherwise use all of it: products have as many
    threads as there are processors for a task.
    """
    from distributed import Client, LocalCluster

    processors = sorted(os.sched_getaffinity(0))
    if len(processors) < n_workers:
        raise MissingError(f"{n_workers} processors")
    with ExitStack() as stack:
        cluster = stack.enter_context(
            LocalCluster(n_workers=0, host="127.0.0.1", dashboard_address="127.0.0.1:0")
        )
        for processor in processors[:n_workers]:
            stack.enter_context(_worker(cluster.scheduler_address, processor))
        # The client goes first: results on workers that went before it would be missed.
        client = stack.enter_context(Client(cluster, set_as_default=False))
        client.wait_for_workers(n_workers, timeout=_WAIT_SECONDS)
        yield client


@contextmanager
def _worker(scheduler: str, processor: int) -> Iterator[None]:
    paths = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.benchmarks.one_thread", str(processor), scheduler],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _run_worker(processor: int, scheduler: str) -> None:
    """Be a worker, until the scheduler ends."""
    os.sched_setaffinity(0, {processor})  # before any library starts threads: they inherit it
    from distributed.cli.dask_worker import main

    main([
        *(scheduler, "--host", "127.0.0.1", "--dashboard-address", "127.0.0.1:0"),
        *("--nthreads", "1", "--no-nanny", "--memory-limit", "0"),
        *("--death-timeout", "20"),  # without a scheduler it ends by itself
    ])  # fmt: skip


if __name__ == "__main__":
    _run_worker(int(sys.argv[1]), sys.argv[2])
