"""Where tasks run, whether they fit there, and running them."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ncbatch.arrays import find_device
from ncbatch.cells import Cell
from ncbatch.engine import (
    About,
    Kept,
    Plan,
    Progress,
    format_bytes,
    memory_budget,
    resident_bytes,
    run_jobs,
)
from ncbatch.errors import BudgetError, UsageError
from ncbatch.pricing import Mode, choose_mode, prices
from ncbatch.task import LayerTask

# Of a GPU's free memory, what arrays may take; the rest is for libraries' own work space.
_DEVICE_SHARE = 0.85
_BASE_STEP = 128 * 2**20


@dataclass(frozen=True)
class Workers:
    """What a run has to work with, in this process or on a cluster.

    Attributes
    ----------
    client : distributed.Client or None
        Of the cluster; None for a plain loop in this process.
    budget : int
        Bytes of resident memory that a worker may hold.
    base_bytes : int
        What a worker holds before it begins.
    at_once : int
        Tasks that a worker runs at once.
    device : str
        ``"cpu"`` or ``"cuda"``.
    device_name : str
        Which device that is.
    device_memory : int or None
        Bytes of a GPU's memory that may be used.
    shares_disk : bool
        Whether workers see the files of this process.
    """

    client: Any
    budget: int
    base_bytes: int
    at_once: int
    device: Literal["cpu", "cuda"]
    device_name: str
    device_memory: int | None
    shares_disk: bool = True

    @classmethod
    def find(
        cls, client: Any, memory: str | int | None, device: str, *, shares_disk: bool = True
    ) -> Workers:
        """Ask this process, or the workers of `client`, what they have.

        Raises
        ------
        UsageError
            When the memory is no size, or the device is not there.
        """
        if client is None:
            found = [_own(device)]
            at_once, sharers = 1, 1
        else:
            found = list(client.run(_own, device).values())
            workers = client.scheduler_info(n_workers=-1)["workers"].values()
            at_once = max(worker["nthreads"] for worker in workers)
            hosts = [worker["host"] for worker in workers]
            sharers = max(hosts.count(host) for host in hosts)
        kind = found[0][0]
        if any(other[0] != kind for other in found):
            raise UsageError(
                "workers with and without a GPU", "one kind", "say --device cpu or --device cuda"
            )
        free = min(available for *_, available in found)
        base = max(resident for _, _, resident, _, _ in found)
        budget = memory_budget(memory) if memory is not None else base + free // sharers
        devices = [own for _, _, _, own, _ in found if own is not None]
        return cls(
            client, budget, base, at_once, kind, found[0][1],
            int(min(devices) * _DEVICE_SHARE) if devices else None, shares_disk,
        )  # fmt: skip

    def plan(self, tasks: Sequence[LayerTask]) -> tuple[Plan, list[Mode]]:
        """Choose how each task is measured, and say what all of it costs."""
        # What an interpreter holds varies by a few MiB; class blocks shall not vary with it, or a run
        # that was killed could not go on with its kept blocks.
        base = -(-self.base_bytes // _BASE_STEP) * _BASE_STEP
        room = (self.budget - base) // self.at_once
        shapes = [task.shape(merged=self.client is not None) for task in tasks]
        modes = [choose_mode(shape, room, self.device_memory) for shape in shapes]
        costs = [price for s, m in zip(shapes, modes, strict=True) for price in prices(s, m)]
        notes = [
            f"class means of {shape.where} are kept in a file, and the data is read "
            f"{mode.class_blocks} time{'s' if mode.class_blocks > 1 else ''}: "
            f"K x D = {shape.n_used:,} x {shape.n_features:,} does not fit into the memory"
            for shape, mode in zip(shapes, modes, strict=True)
            if mode.stored
        ]
        return Plan(costs, self.base_bytes, self.budget, self.at_once, notes), modes

    def run(
        self,
        tasks: Sequence[LayerTask],
        modes: Sequence[Mode],
        progress: Progress | None,
        state: Path | None,
    ) -> list[Cell]:
        """Measure every task."""
        if any(mode.stored for mode in modes) and not self.shares_disk and state is None:
            raise UsageError(
                "class means that must go to files, on a cluster that may share no disk with this machine",
                "a directory that every worker reaches",
                "give it with --state DIR, or give the workers more --memory",
            )
        with _scratch(tasks, modes, state) as scratch:

            def folder_of(about: About) -> Path:
                return scratch if state is None else Kept(state, about).folder

            jobs = [task.job(mode, folder_of) for task, mode in zip(tasks, modes, strict=True)]
            if self.client is None:
                return run_jobs(jobs, progress, state)
            from ncbatch.engine.graph import run_graph

            return run_graph(self.client, jobs, progress, state)


def _own(device: str) -> tuple[Literal["cpu", "cuda"], str, int, int | None, int]:
    """Give this process's device and memory: kind, name, resident, GPU memory, available."""
    import psutil

    found = find_device(device)
    return (
        "cpu" if found.name == "cpu" else "cuda", found.name, resident_bytes(), found.free_bytes(),
        int(psutil.virtual_memory().available),
    )  # fmt: skip


@contextmanager
def _scratch(
    tasks: Sequence[LayerTask], modes: Sequence[Mode], state: Path | None
) -> Iterator[Path]:
    """Give a folder for class means that are not held in memory: of the kept state, or our own."""
    if not any(mode.stored for mode in modes):
        yield Path()
        return
    needed = sum(
        price.disk_bytes
        for task, mode in zip(tasks, modes, strict=True)
        for price in prices(task.shape(), mode)
    )
    if state is not None:
        folder = state
        folder.mkdir(parents=True, exist_ok=True)
    else:
        folder = Path(tempfile.mkdtemp(prefix="ncbatch-"))
    try:
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise BudgetError(
                f"{format_bytes(free)} free in '{folder}' for class means in files",
                f"{format_bytes(needed)}",
                "give --state a directory with more room, or more --memory",
            )
        yield folder
    finally:
        if state is None:
            shutil.rmtree(folder, ignore_errors=True)
