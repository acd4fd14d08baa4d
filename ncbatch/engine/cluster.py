"""Opening a cluster: local threads, processes or GPUs, a scheduler that runs, or the caller's client."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from ncbatch import __version__
from ncbatch.engine.local import first_line, start_local
from ncbatch.engine.slots import task_slots, task_threads
from ncbatch.errors import UsageError, WorkerError

__all__ = ["open_cluster", "task_slots", "task_threads"]

# A `distributed.Client`; importing distributed takes half a second, so it is named where it is used.
Client: TypeAlias = Any

# Seconds that a scheduler has to answer, and that its first worker has to come.
CONNECT_SECONDS, WORKER_SECONDS = 10, 30

_EXPECTED = (
    "sync, threads, processes, cuda (or threads:N, processes:N, cuda:N), tcp://HOST:PORT, "
    "tls://HOST:PORT, the path of a scheduler file, or a distributed.Client"
)
_LOCAL = re.compile(r"(threads|processes|cuda)(?::(.*))?")


@contextmanager
def open_cluster(
    cluster: str | os.PathLike[str] | Client | None,
    *,
    memory: int | None = None,
    n_workers: int | None = None,
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
    memory : int, optional
        Bytes that each worker may use; where the number of processes is not given, no more are
        started than fit into the memory that is free.
    n_workers : int, optional
        How many threads or processes, instead of the number in `cluster`.

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
    if not isinstance(cluster, str | os.PathLike | None):
        yield _given_client(cluster)
        return
    asked = _parse(cluster, n_workers)
    if asked is None:
        yield None
        return
    with ExitStack() as stack:
        stack.enter_context(_quiet())
        if isinstance(asked, _Local):
            client = start_local(asked.kind, asked.n_workers, memory, stack)
        else:
            client = _connect(asked.address, stack)
        _check_versions(client)
        yield client


# ------------------------------------------------------------------------------ what was asked for


@dataclass(frozen=True)
class _Local:
    kind: str
    n_workers: int | None


@dataclass(frozen=True)
class _Running:
    address: str


def _parse(
    cluster: str | os.PathLike[str] | None, n_workers: int | None
) -> _Local | _Running | None:
    name = "sync" if cluster is None else os.fspath(cluster)
    if name == "sync":
        return None
    if local := _LOCAL.fullmatch(name):
        kind, number = local.groups()
        if number is not None and not number.isdecimal():
            raise UsageError(f"cluster '{name}'", f"a number of workers, as in {kind}:2")
        count = n_workers if n_workers is not None else None if number is None else int(number)
        if count is not None and count < 1:
            raise UsageError(f"a cluster of {count} workers", "1 or more")
        return _Local(kind, count)
    if re.match(r"(tcp|tls)://", name):
        return _Running(name)
    if Path(name).is_file():
        return _Running(_address_in(Path(name)))
    if "://" not in name and (os.sep in name or name.endswith(".json")):
        raise UsageError(
            f"no scheduler file '{name}'",
            "the file that 'dask scheduler --scheduler-file FILE' writes",
            "start the scheduler first; every machine must see the file under this path",
        )
    raise UsageError(f"cluster '{name}'", _EXPECTED)


def _address_in(file: Path) -> str:
    """Read the address from a scheduler file."""
    try:
        return str(json.loads(file.read_text(encoding="utf-8"))["address"])
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"'{file}' is no scheduler file",
            "JSON with an 'address', as a Dask scheduler writes it",
        ) from error


def _given_client(client: Client) -> Client:
    from distributed import Client as DaskClient

    if not isinstance(client, DaskClient):
        raise UsageError(f"a cluster of type {type(client).__name__}", _EXPECTED)
    if client.asynchronous:
        raise UsageError("an asynchronous client", "one made without asynchronous=True")
    if client.status != "running":
        raise UsageError(f"a client that is {client.status}", "one that is connected")
    _wait_for_worker(client, "the client's scheduler", "start some, or scale the cluster up")
    _check_versions(client)
    return client


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
            f"cluster '{address}' without certificates", "those of this cluster",
            "name them in Dask's configuration: distributed.comm.tls.ca-file, client.cert, client.key",
        )  # fmt: skip
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
            f"a {identity.get('type', 'stranger')} at {address}", "a scheduler",
            "give the address that the scheduler printed when it started",
        )  # fmt: skip


async def _identity(address: str, arguments: dict[str, Any]) -> dict[str, Any]:
    from distributed.core import rpc

    async with rpc(address, timeout=CONNECT_SECONDS, connection_args=arguments) as scheduler:
        answer = await asyncio.wait_for(scheduler.identity(), CONNECT_SECONDS)
        return dict(answer)


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
