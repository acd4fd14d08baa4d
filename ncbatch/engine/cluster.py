"""Opening a cluster: local threads, processes or GPUs, a running scheduler, or a given client."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import signal
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import psutil

from ncbatch.arrays.threads import processors
from ncbatch.engine.plans import memory_budget
from ncbatch.errors import UsageError, WorkerError, first_line
from ncbatch.version import __version__

# A `distributed.Client`. Importing distributed takes half a second, so only its users do.
Client: TypeAlias = Any

# Seconds that a scheduler has to answer, that its first worker has to come, and that workers have
# to leave, which only a run that failed or was stopped can make last.
CONNECT_SECONDS = 10
WORKER_SECONDS = 30
CLOSE_SECONDS = 10

_EXPECTED = (
    "sync, threads, processes, cuda (or threads:N, processes:N, cuda:N), tcp://HOST:PORT, "
    "tls://HOST:PORT, the path of a scheduler file, or a distributed.Client"
)
_LOCAL = re.compile(r"(threads|processes|cuda)(?::(.*))?")
_LOOPBACK = "127.0.0.1"
# The plan says what a task needs. Dask's own limit would pause workers, spill states to disk and
# kill workers at 95 % of it, whatever the plan says: no limit.
_LOCAL_OPTIONS: Mapping[str, Any] = {
    "memory_limit": 0,
    "dashboard_address": f"{_LOOPBACK}:0",
    "silence_logs": logging.CRITICAL,
}

# What Dask and dask-cuda set in the process that starts workers; see `_same_environment`.
_OTHER_VARIABLES = ("PYTHONHASHSEED", "RAPIDS_NO_INITIALIZE", "__DASK_PARENT_PID")
_BLAS_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")

# Of the device's memory, what RMM's pool takes at first; it grows where that is not enough.
_POOL_SHARE = 0.5


@contextmanager
def open_cluster(
    cluster: str | os.PathLike[str] | Client | None, *, memory: str | int | None = None
) -> Iterator[Client | None]:
    """Open what a user named as the cluster, and close what was opened.

    Parameters
    ----------
    cluster : str, path, distributed.Client or None
        ``None`` or ``"sync"``: no cluster. ``"threads"``: threads of this process.
        ``"processes"``: a process per processor, of one thread. ``"cuda"``: a process per GPU.
        Each of the three may say how many: ``"processes:4"``. ``"tcp://..."``, ``"tls://..."`` or
        the path of a scheduler file: a scheduler that runs. A client is used as it is and stays
        open.
    memory : str or int, optional
        Bytes, or a size such as ``8GiB``, that each worker may use; where the number of processes
        is not given, no more are started than fit into the memory that is free.

    Yields
    ------
    distributed.Client or None
        ``None`` where there is no cluster.

    Raises
    ------
    UsageError
        When `cluster` names nothing known, or when what it needs is not installed.
    WorkerError
        When no scheduler answers, or when workers cannot be used.

    Notes
    -----
    Local clusters and their dashboards listen on the loopback address only. Variables of the
    environment are afterwards as they were.
    """
    budget = None if memory is None else memory_budget(memory)
    if not isinstance(cluster, str | os.PathLike | None):
        _check_client(cluster)
        yield cluster
        return
    name = "sync" if cluster is None else os.fspath(cluster)
    if name == "sync":
        yield None
        return
    # What makes no sense is refused before distributed is imported.
    local = _LOCAL.fullmatch(name)
    n_workers = _number_of_workers(*local.groups()) if local else None
    address = "" if local else _find_address(name)
    with ExitStack() as stack:
        stack.enter_context(_quiet())
        if local:
            client = _start_local(local[1], n_workers, budget, stack)
        else:
            client = _connect(address, stack)
        _check_versions(client)
        yield client


# ------------------------------------------------------------------------------ what was asked for


def _number_of_workers(kind: str, number: str | None) -> int | None:
    if number is None:
        return None
    if not number.isdecimal():
        raise UsageError(f"cluster '{kind}:{number}'", f"a number of workers, as in {kind}:2")
    if int(number) < 1:
        raise UsageError(f"a cluster of {int(number)} workers", "1 or more")
    return int(number)


def _find_address(name: str) -> str:
    """Find the address of the scheduler that is named, itself or by its file."""
    if re.match(r"(tcp|tls)://", name):
        return name
    if Path(name).is_file():
        try:
            return str(json.loads(Path(name).read_text(encoding="utf-8"))["address"])
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"'{name}' is no scheduler file",
                "JSON with an 'address', as a Dask scheduler writes it",
            ) from error
    if "://" not in name and (os.sep in name or name.endswith(".json")):
        raise UsageError(
            f"no scheduler file '{name}'",
            "the file that 'dask scheduler --scheduler-file FILE' writes",
            "start the scheduler first; every machine must see the file under this path",
        )
    raise UsageError(f"cluster '{name}'", _EXPECTED)


def _check_client(client: Client) -> None:
    from distributed import Client as DaskClient

    if not isinstance(client, DaskClient):
        raise UsageError(f"a cluster of type {type(client).__name__}", _EXPECTED)
    if client.asynchronous:
        raise UsageError("an asynchronous client", "one made without asynchronous=True")
    if client.status != "running":
        raise UsageError(f"a client that is {client.status}", "one that is connected")
    _wait_for_worker(client, "the client's scheduler", "start some, or scale the cluster up")
    _check_versions(client)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Dask's log off the terminal: what goes wrong is raised, the rest is its own business."""
    import distributed  # noqa: F401  (it sets its loggers up when it is imported)

    names = ("distributed", "distributed.client", "tornado.application", "bokeh", "asyncio")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


# ------------------------------------------------------------------------- schedulers that run


def _connect(address: str, stack: ExitStack) -> Client:
    """Connect to a scheduler that runs, which must have a worker; `stack` closes the client."""
    from distributed import Client as DaskClient

    _check_scheduler(address)
    client = stack.enter_context(DaskClient(address, timeout=CONNECT_SECONDS, set_as_default=False))
    _wait_for_worker(
        client, f"the scheduler at {address}", f"start some with: dask worker {address}"
    )
    return client


def _wait_for_worker(client: Client, scheduler: str, remedy: str) -> None:
    try:
        client.wait_for_workers(1, timeout=WORKER_SECONDS)
    except TimeoutError as error:
        raise WorkerError(
            f"{scheduler} has no workers", f"one within {WORKER_SECONDS} seconds", remedy
        ) from error


def _check_scheduler(address: str) -> None:
    """Ask who listens at an address.

    A client that cannot connect leaves threads behind that complain when the process ends, so none
    is made before the scheduler has answered. The question has an event loop, and so a thread, of
    its own: the caller may be a notebook whose loop is running.
    """
    from distributed.security import Security

    arguments = Security().get_connection_args("client")
    if address.startswith("tls") and arguments.get("ssl_context") is None:
        raise UsageError(
            f"cluster '{address}' without certificates",
            "those of this cluster",
            "name them in Dask's configuration: "
            "distributed.comm.tls.ca-file, client.cert, client.key",
        )
    try:
        with ThreadPoolExecutor(1) as pool:
            identity = pool.submit(asyncio.run, _identity(address, arguments)).result()
    except ValueError as error:
        raise UsageError(
            f"cluster '{address}': {error}", "tcp://HOST:PORT or tls://HOST:PORT"
        ) from error
    except (OSError, RuntimeError) as error:
        raise WorkerError(
            f"no Dask scheduler answers at {address}",
            f"one that does within {CONNECT_SECONDS} seconds",
            f"start one with 'dask scheduler', or check the address ({first_line(error)})",
        ) from error
    if identity.get("type") != "Scheduler":
        raise WorkerError(
            f"a {identity.get('type', 'stranger')} at {address}",
            "a scheduler",
            "give the address that the scheduler printed when it started",
        )


async def _identity(address: str, arguments: dict[str, Any]) -> dict[str, Any]:
    from distributed.core import rpc

    async with rpc(address, timeout=CONNECT_SECONDS, connection_args=arguments) as scheduler:
        answer = await asyncio.wait_for(scheduler.identity(), CONNECT_SECONDS)
        return dict(answer)


# --------------------------------------------------------------------------------- local clusters


def _start_local(kind: str, n_workers: int | None, memory: int | None, stack: ExitStack) -> Client:
    """Start a cluster on this machine; `stack` closes it."""
    from distributed import Client as DaskClient

    stack.enter_context(_same_environment())
    with _same_environment():
        if kind == "cuda":
            cluster = _cuda_cluster(n_workers)
        elif kind == "threads":
            cluster = _thread_cluster(n_workers or len(processors()))
        else:
            cluster = _process_cluster(n_workers or _fitting(len(processors()), memory))
    stack.callback(_close, cluster)
    return stack.enter_context(DaskClient(cluster, set_as_default=False))


def _close(cluster: Any) -> None:
    # What is still running after that is killed with this process, whose children they are.
    with suppress(TimeoutError):
        cluster.close(CLOSE_SECONDS)


def _thread_cluster(n_threads: int) -> Any:
    from distributed import LocalCluster

    # States stay in this process and are not copied: its "inproc" addresses have no host to give.
    return LocalCluster(
        n_workers=1,
        threads_per_worker=n_threads,
        processes=False,
        worker_dashboard_address=f"{_LOOPBACK}:0",
        **_LOCAL_OPTIONS,
    )


def _process_cluster(n_workers: int) -> Any:
    import dask
    from distributed import LocalCluster

    # A nanny would set one thread in each worker, whatever the number of workers; a variable that
    # the user has set is left alone.
    threads = dict.fromkeys(_BLAS_VARIABLES, max(1, len(processors()) // n_workers))
    with dask.config.set({"distributed.nanny.pre-spawn-environ": _nanny_variables() | threads}):
        try:
            return LocalCluster(
                n_workers=n_workers,
                threads_per_worker=1,
                processes=True,
                host=_LOOPBACK,
                preload=[__name__],
                **_LOCAL_OPTIONS,
            )
        except RuntimeError as error:
            raise WorkerError(
                f"{n_workers} worker processes did not start: {first_line(error)}",
                "processes that can import what this one runs",
                "a script that starts processes needs: if __name__ == '__main__':",
            ) from error


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
    try:
        return dask_cuda.LocalCUDACluster(
            n_workers=n_workers,
            threads_per_worker=1,
            device_memory_limit=0,
            host=_LOOPBACK,
            preload=[__name__],
            **_memory_pool(),
            **_LOCAL_OPTIONS,
        )
    except Exception as error:  # the driver's own errors have no common class
        number = f", {n_workers} of them" if n_workers else ""
        raise WorkerError(
            f"no cluster of GPUs: {first_line(error)}",
            f"an NVIDIA GPU and driver that dask-cuda can use{number}",
            "see what 'nvidia-smi' says; without a GPU use 'processes'",
        ) from error


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
            os.environ.pop(name, None)
            if name in before:
                os.environ[name] = before[name]


# --------------------------------------------------------------------------------------- workers


def _check_versions(client: Client) -> None:
    """Refuse workers that run another ncbatch: their states would not fit together."""
    for worker, version in client.run(_version, on_error="return").items():
        if isinstance(version, ImportError):
            raise WorkerError(
                f"worker {worker} cannot import ncbatch ({version})",
                f"ncbatch {__version__} on every worker",
                f"install it there: pip install ncbatch=={__version__}",
            )
        if isinstance(version, str) and version != __version__:
            raise WorkerError(
                f"worker {worker} runs ncbatch {version}",
                f"{__version__}, as here",
                f"install it there: pip install ncbatch=={__version__}",
            )


def _version() -> str:
    return __version__


# ------------------------------------------------------------------------------ threads of a task


def task_slots(client: Any) -> Mapping[str, int]:
    """Count the threads that each task may use, so that neither idle cores nor a crowd remain.

    Parameters
    ----------
    client : distributed.Client
        Of any cluster.

    Returns
    -------
    mapping of str to int
        For each host and set of processors that a worker there may use, the threads of a task;
        to be passed to the tasks, for `task_threads`.

    Notes
    -----
    A processor is shared by the task slots of all workers of its host that may use it. So workers
    that are bound to sockets (as dask-cuda's are), and jobs on parts of a node, get what is theirs.
    """
    places = client.run(_place, on_error="ignore").values()
    n_slots: Counter[tuple[str, int]] = Counter()
    for place in places:
        for processor in place.processors:
            n_slots[place.host, processor] += place.n_threads
    threads: dict[str, int] = {}
    for place in places:
        share = sum(1 / n_slots[place.host, processor] for processor in place.processors)
        # A container may be given less time than the processors it sees.
        share *= place.quota / len(place.processors)
        # 1/3 + 1/3 + 1/3 may come out a little below 1.
        threads[place.key] = max(1, int(share + 1e-9))
    return threads


def task_threads(slots: Mapping[str, int]) -> int:
    """Count the threads that the running task may use.

    Parameters
    ----------
    slots : mapping of str to int
        From `task_slots`.

    Returns
    -------
    int
        At least 1. A worker that came later counts as alone on its host; outside of a worker, all
        processors.
    """
    from distributed import get_worker

    try:
        worker = get_worker()
    except ValueError:
        return len(processors())
    place = _place(worker)
    return slots.get(place.key, max(1, place.quota // place.n_threads))


class _Place(NamedTuple):
    """A worker's host, processors and threads, and how many processors' time it gets."""

    host: str
    processors: tuple[int, ...]
    n_threads: int
    quota: int

    @property
    def key(self) -> str:
        return f"{self.host} {','.join(map(str, self.processors))}"


def _place(dask_worker: Any) -> _Place:
    # The argument's name makes `Client.run` pass the worker.
    from dask.system import cpu_count
    from distributed.comm import get_address_host

    usable = tuple(sorted(processors()))
    host = get_address_host(dask_worker.address)
    return _Place(host, usable, dask_worker.state.nthreads, min(len(usable), cpu_count()))
