"""Clusters on this machine: threads, processes or GPUs, listening on the loopback address only."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import psutil

from ncbatch.engine.slots import processors_here
from ncbatch.errors import UsageError, WorkerError

# Seconds that workers have to leave, which only a run that failed or was stopped can make last.
CLOSE_SECONDS = 10

_LOOPBACK = "127.0.0.1"

# What Dask and dask-cuda set in the process that starts workers; see `_same_environment`.
_OTHER_VARIABLES = ("PYTHONHASHSEED", "RAPIDS_NO_INITIALIZE", "__DASK_PARENT_PID")
_BLAS_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")

# Of the device's memory, what RMM's pool takes at first; it grows where that is not enough.
_POOL_SHARE = 0.5


def start_local(kind: str, n_workers: int | None, memory: int | None, stack: ExitStack) -> Any:
    """Start a cluster on this machine.

    Parameters
    ----------
    kind : {"threads", "processes", "cuda"}
        What its workers are.
    n_workers : int or None
        How many threads or processes; None for as many as there are processors or GPUs.
    memory : int or None
        Bytes that each process may use, see `open_cluster`.
    stack : ExitStack
        Closes it.

    Returns
    -------
    distributed.Client
        Connected to it.

    Raises
    ------
    UsageError
        When dask-cuda is not installed.
    WorkerError
        When workers do not start.
    """
    from distributed import Client as DaskClient

    stack.enter_context(_same_environment())
    with _same_environment():
        cluster = _cluster(kind, n_workers, memory)
    stack.callback(_close, cluster)
    return stack.enter_context(DaskClient(cluster, set_as_default=False))


def _close(cluster: Any) -> None:
    # What is still running after that is killed with this process, whose children they are.
    with suppress(TimeoutError):
        cluster.close(CLOSE_SECONDS)


def _cluster(kind: str, n_workers: int | None, memory: int | None) -> Any:
    if kind == "cuda":
        return _cuda_cluster(n_workers)
    if kind == "threads":
        return _thread_cluster(n_workers or len(processors_here()))
    return _process_cluster(n_workers or _fitting(len(processors_here()), memory))


def _thread_cluster(n_threads: int) -> Any:
    from distributed import LocalCluster

    # States stay in this process and are not copied: its "inproc" addresses have no host to give.
    return LocalCluster(
        n_workers=1, threads_per_worker=n_threads, processes=False,
        worker_dashboard_address=f"{_LOOPBACK}:0", **_local_options(),
    )  # fmt: skip


def _process_cluster(n_workers: int) -> Any:
    import dask
    from distributed import LocalCluster

    # A nanny would set one thread in each worker, whatever the number of workers; a variable that
    # the user has set is left alone.
    threads = dict.fromkeys(_BLAS_VARIABLES, max(1, len(processors_here()) // n_workers))
    with dask.config.set({"distributed.nanny.pre-spawn-environ": _nanny_variables() | threads}):
        try:
            return LocalCluster(
                n_workers=n_workers, threads_per_worker=1, processes=True, host=_LOOPBACK,
                preload=[__name__], **_local_options(),
            )  # fmt: skip
        except RuntimeError as error:
            raise WorkerError(
                f"{n_workers} worker processes did not start: {first_line(error)}",
                "processes that can import what this one runs",
                "a script that starts processes needs: if __name__ == '__main__':",
            ) from error


def _local_options() -> dict[str, Any]:
    """Give what every local cluster is started with.

    The plan says what a task needs. Dask's own limit would pause workers, spill states to disk and
    kill workers at 95 % of it, whatever the plan says: no limit.
    """
    return {
        "memory_limit": 0,
        "dashboard_address": f"{_LOOPBACK}:0",
        "silence_logs": logging.CRITICAL,
    }


def dask_setup(worker: Any) -> None:
    """Leave Ctrl-C to the process that started the workers; Dask calls this in each of them.

    A terminal sends it to all of them, and each would print where it was.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _nanny_variables() -> dict[str, Any]:
    import dask

    return dict(dask.config.get("distributed.nanny.pre-spawn-environ", {}))


def _fitting(processors: int, memory: int | None) -> int:
    """Count the processes to start: one per processor, but no more than fit into free memory."""
    if not memory:
        return processors
    return max(1, min(processors, int(psutil.virtual_memory().available) // memory))


def _cuda_cluster(n_workers: int | None) -> Any:
    try:
        dask_cuda = import_module("dask_cuda")
    except ImportError as error:
        raise UsageError(
            f"cluster 'cuda' without dask-cuda ({error})",
            "dask-cuda, CuPy and an NVIDIA driver",
            "install them with: pip install 'ncbatch[gpu]'",
        ) from error
    # One thread per GPU: it keeps tasks from sharing a device, and resources would keep Dask from
    # queueing them. Spilling is off: it knows the results of tasks only, not what they hold.
    options = {
        **_local_options(),
        "host": _LOOPBACK,
        "preload": [__name__],
        "threads_per_worker": 1,
    }
    options |= {"n_workers": n_workers, "device_memory_limit": 0} | _memory_pool()
    try:
        return dask_cuda.LocalCUDACluster(**options)
    except Exception as error:  # the driver's own errors have no common class
        raise WorkerError(
            f"no cluster of GPUs: {first_line(error)}",
            "an NVIDIA GPU and driver that dask-cuda can use" + (
                f", {n_workers} of them" if n_workers else ""
            ),
            "see what 'nvidia-smi' says; without a GPU use 'processes'",
        ) from error  # fmt: skip


def _memory_pool() -> dict[str, Any]:
    """Let CuPy and torch draw on one pool, where RMM is installed to make one.

    Allocations are tracked because the pool's free part cannot be told otherwise
    (`CudaDevice.free_bytes`); there are few, and large ones.
    """
    if find_spec("rmm") is None:
        return {}
    libraries = ["cupy"]
    if find_spec("torch") is not None:
        import torch

        if torch.version.cuda:  # a CPU build has no allocator to set
            libraries.append("torch")
    return {
        "rmm_pool_size": _POOL_SHARE,
        "rmm_allocator_external_lib_list": libraries,
        "rmm_track_allocations": True,
    }


@contextmanager
def _same_environment() -> Iterator[None]:
    """Put the variables back that Dask's nannies set here so that workers inherit them."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in (*_OTHER_VARIABLES, *_BLAS_VARIABLES, *_nanny_variables()):
            if name in before:
                os.environ[name] = before[name]
            else:
                os.environ.pop(name, None)


def first_line(error: BaseException) -> str:
    """Give the first line of what an error says."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
