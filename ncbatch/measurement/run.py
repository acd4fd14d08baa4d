"""measure: from metric names to passes to a Dataset."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Unpack

import psutil
import xarray as xr

from ncbatch.arrays.devices import find_device
from ncbatch.engine.cluster import open_cluster
from ncbatch.engine.graph import run_graph
from ncbatch.engine.jobs import Progress
from ncbatch.engine.kept import About, Kept
from ncbatch.engine.loop import run_jobs
from ncbatch.engine.options import takes
from ncbatch.engine.plans import Plan, check_budget, format_bytes, memory_budget, resident_bytes
from ncbatch.errors import BudgetError, UsageError
from ncbatch.measurement.layers import Layer, StoreLike, open_stores
from ncbatch.measurement.options import MeasureRequest, PlanRequest, conventions
from ncbatch.measurement.samples import Mode
from ncbatch.measurement.steps import choose_mode, choose_tasks, job_of
from ncbatch.measurement.update import Saved
from ncbatch.metrics.catalogue import CATALOGUE
from ncbatch.results.dataset import (
    Cell,
    Place,
    StoreNotes,
    coordinates,
    metric_names,
    notes_of,
    to_dataset,
    with_collapse,
)
from ncbatch.version import __version__

if TYPE_CHECKING:
    from ncbatch.measurement.option_types import MeasureOptions, PlanOptions


# Where tasks run, whether they fit there, and running them.


# Of a GPU's free memory, what arrays may take; the rest is for libraries' own work space.
_DEVICE_SHARE = 0.85
_BASE_STEP = 128 * 2**20
# Clusters of this machine.
_LOCAL = ("sync", "threads", "processes", "cuda")


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
    shares_disk: bool

    @classmethod
    def find(cls, client: Any, asked: PlanRequest) -> Workers:
        """Ask this process, or the workers of `client`, what they have.

        Raises
        ------
        UsageError
            When the memory is no size, or the device is not there.
        """
        at_once = sharers = 1
        if client is None:
            machines = [_Machine.look(asked.device)]
        else:
            machines = list(client.run(_Machine.look, asked.device).values())
            workers = client.scheduler_info(n_workers=-1)["workers"].values()
            at_once = max(worker["nthreads"] for worker in workers)
            # Workers of one host share its memory, each of them may take its part.
            hosts = [worker["host"] for worker in workers]
            sharers = max(hosts.count(host) for host in hosts)
        first = machines[0]
        if any(machine.device != first.device for machine in machines):
            raise UsageError(
                "workers with and without a GPU", "one kind", "say --device cpu or --device cuda"
            )
        # Any worker may get any task: what the poorest has is what tasks are chosen for.
        available = min(machine.available for machine in machines)
        base = max(machine.resident for machine in machines)
        budget = base + available // sharers
        if asked.memory is not None:
            budget = memory_budget(asked.memory)
        rooms = [m.device_memory for m in machines if m.device_memory is not None]
        room = int(min(rooms) * _DEVICE_SHARE) if rooms else None
        # Workers elsewhere may share no disk with this machine.
        name = asked.cluster
        is_local = name is None or str(name).partition(":")[0] in _LOCAL
        return cls(client, budget, base, at_once, first.device, first.name, room, is_local)

    def place(self, tasks: Sequence[Layer]) -> list[Layer]:
        """Let tasks run where these workers compute."""
        if self.device == "cpu" and any(task.options.precision == "tf32" for task in tasks):
            raise UsageError("precision 'tf32' on the CPU", "a GPU for it", "use --precision fp32")
        return [replace(t, options=replace(t.options, device=self.device)) for t in tasks]

    def plan(self, tasks: Sequence[Layer]) -> tuple[Plan, list[Mode]]:
        """Choose how each task is measured, and say what all of it costs."""
        # What an interpreter holds varies by a few MiB; class blocks shall not vary with it, or a
        # run that was killed could not go on with its kept blocks.
        base = -(-self.base_bytes // _BASE_STEP) * _BASE_STEP
        room = (self.budget - base) // self.at_once
        merged = self.client is not None
        modes = [choose_mode(task, room, self.device_memory, merged) for task in tasks]
        chosen = list(zip(tasks, modes, strict=True))
        prices = [price for task, mode in chosen for price in job_of(task, mode).prices]
        notes = [
            f"class means of {task.where} are kept in a file, and the data is read "
            f"{mode.class_blocks} time{'s' if mode.class_blocks > 1 else ''}: "
            f"K x D = {task.n_used:,} x {task.train.n_features:,} does not fit into the memory"
            for task, mode in chosen
            if mode.stored
        ]
        return Plan(prices, self.base_bytes, self.budget, self.at_once, notes), modes

    def measure(
        self, tasks: Sequence[Layer], progress: Progress | None, state: Path | None
    ) -> list[Cell]:
        """Measure every task, once it is sure that all fit and that their chunks are there."""
        plan, modes = self.plan(tasks)
        check_budget(plan)
        for task in tasks:
            task.check_chunks()
        if any(mode.stored for mode in modes) and not self.shares_disk and state is None:
            raise UsageError(
                "class means that must go to files, on a cluster that may share no disk with this "
                "machine",
                "a directory that every worker reaches",
                "give it with --state DIR, or give the workers more --memory",
            )
        with _folders(plan.disk_bytes, state) as folder_of:
            jobs = [job_of(task, mode, folder_of) for task, mode in zip(tasks, modes, strict=True)]
            if self.client is None or not jobs:
                return run_jobs(jobs, progress, state)
            return run_graph(self.client, jobs, progress, state)


class _Machine(NamedTuple):
    """What a process has: its device, and bytes of memory resident, of the device, available."""

    device: Literal["cpu", "cuda"]
    name: str
    resident: int
    device_memory: int | None
    available: int

    @classmethod
    def look(cls, asked: str) -> _Machine:
        """Find what this process has, on the device that was asked for."""
        device = find_device(asked)
        kind: Literal["cpu", "cuda"] = "cpu" if device.name == "cpu" else "cuda"
        available = int(psutil.virtual_memory().available)
        return cls(kind, device.name, resident_bytes(), device.free_bytes(), available)


@contextmanager
def _folders(needed: int, state: Path | None) -> Iterator[Callable[[About], Path]]:
    """Make room for `needed` bytes of class means; yields what tells the folder for a state's.

    It is where the state is kept or, without kept states, a folder that is deleted in the end.
    """
    scratch: Any = nullcontext(state or Path())
    if needed and state is None:
        scratch = tempfile.TemporaryDirectory(prefix="ncbatch-", ignore_cleanup_errors=True)
    with scratch as folder:
        if needed:
            Path(folder).mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(folder).free
            if free < needed:
                raise BudgetError(
                    f"{format_bytes(free)} free in '{folder}' for class means in files",
                    f"{format_bytes(needed)}",
                    "give --state a directory with more room, or more --memory",
                )
        yield lambda about: Path(folder) if state is None else Kept(state, about).folder


# Provenance: cells become a Dataset that says what was measured, how, when and where.


def arrange(
    tasks: list[Layer], measured: Mapping[Place, Cell], device: str, saved: Saved | None = None
) -> xr.Dataset:
    """Arrange what was measured, and what was saved before, as a Dataset with its provenance.

    Parameters
    ----------
    tasks : list of Layer
        The layers of this run.
    measured : mapping of (store, layer) to Cell
        What was measured of them now.
    device : str
        Where it was measured.
    saved : Saved, optional
        Earlier results, by the same names of stores; they hold what was not measured now.
    """
    now = datetime.now(UTC).isoformat(timespec="seconds")
    for cell in measured.values():
        cell.texts |= {"cell_version": __version__, "cell_date": now, "cell_device": device}
    stores = list(dict.fromkeys(task.name for task in tasks))
    layers = list(dict.fromkeys(task.layer for task in tasks))
    notes = {task.name: StoreNotes.of(task.store) for task in tasks}
    attributes = conventions(tasks[0].options)
    names = {name for task in tasks for name in task.metric_names}
    cells = dict(measured)
    if saved is not None:
        cells, stores = saved.union(tasks, measured)
        layers = list(dict.fromkeys([*saved.results["layer"].values.tolist(), *layers]))
        notes = saved.notes | notes
        names |= set(metric_names(saved.results))
        if attributes["null_seed"] == "no null":
            attributes["null_seed"] = saved.results.attrs["null_seed"]
    return to_dataset(
        cells,
        stores,
        layers,
        [metric for name, metric in CATALOGUE.items() if name in names],
        {
            "ncbatch_version": __version__,
            "date": now,
            "device": device,
            "store_id": json.dumps({store: notes[store].id for store in stores}),
            "store_path": json.dumps({store: notes[store].path for store in stores}),
            **attributes,
            "notes": "\n".join(notes_of(cells)),
        },
        coordinates(notes, stores, layers),
    )


@takes(MeasureRequest)
def measure(
    stores: StoreLike | Sequence[StoreLike],
    layers: Iterable[str] | None = None,
    *,
    progress: Progress | None = None,
    **options: Unpack[MeasureOptions],
) -> xr.Dataset:
    """Measure neural collapse on stored features.

    Parameters
    ----------
    stores : store, path, or sequence of them
        What to measure.
    layers : iterable of str, optional
        Which layers; all of the train split by default.
    progress : Progress, optional
        Told how far the passes are.

    Returns
    -------
    xarray.Dataset
        A variable per metric over dims (store, layer), counts of what was used and left out, and
        attributes that say how it was measured. A metric that does not apply is NaN; its
        attribute ``undefined`` says why. Coordinates ``step`` and ``model`` (store) and ``depth``
        (store, layer) are there where a store records them (`FeatureStore.describe`); a step may
        also be read off a store's name, such as ``step-1000.zarr``. ``collapse_layer`` and
        ``collapse_depth`` (store) say where collapse sets in.

    Raises
    ------
    UnknownNameError
        For a split, layer or metric that does not exist.
    UsageError
        For options that make no sense, or that differ from those of the results to update.
    DataError
        For data that cannot be measured: fewer than two classes, values that are not finite.
    CorruptionError
        For a chunk that is missing or altered.
    BudgetError
        When the memory does not suffice; names what would.
    WorkerError
        When no cluster is there, or its workers die of the work.
    """
    asked = MeasureRequest.of(options)
    opened = open_stores(stores)
    saved = None if asked.update is None else Saved.of(asked.update)
    if saved is not None:
        saved.check(conventions(asked))
        saved, opened = saved.renamed(opened)
    tasks = choose_tasks(opened, layers, asked.options, scanned=True)
    if asked.partial is False or (asked.partial is None and saved is not None):
        for task in tasks:
            task.check_complete()
    with open_cluster(asked.cluster, memory=asked.memory) as client:
        workers = Workers.find(client, asked)
        tasks = workers.place(tasks)
        todo = [task for task in tasks if saved is None or not saved.serves(task)]
        if saved is not None and progress is not None and len(todo) < len(tasks):
            n_served = len(tasks) - len(todo)
            progress.note(f"{n_served} of {len(tasks)} layers are taken from {saved.where}")
        cells = workers.measure(todo, progress, _state_folder(asked.state))
    measured = {(task.name, task.layer): cell for task, cell in zip(todo, cells, strict=True)}
    dataset = arrange(tasks, measured, workers.device_name, saved)
    return with_collapse(dataset, asked.collapse_below)


@takes(PlanRequest)
def plan(
    stores: StoreLike | Sequence[StoreLike],
    layers: Iterable[str] | None = None,
    **options: Unpack[PlanOptions],
) -> Plan:
    """Say what `measure` would read, compute and hold, from shapes alone; runs nothing.

    No data is read, labels included: the classes used are taken to be as many as there can be, so
    that `measure` needs no more than this.

    Parameters
    ----------
    stores, layers
        As `measure` takes them.

    Returns
    -------
    Plan
        Prints itself; ``peak_bytes`` and ``items`` are in it.

    Raises
    ------
    BudgetError
        When the memory does not suffice; names what would.
    """
    asked = PlanRequest.of(options)
    opened = open_stores(stores)
    tasks = choose_tasks(opened, layers, asked.options, scanned=False)
    with open_cluster(asked.cluster, memory=asked.memory) as client:
        workers = Workers.find(client, asked)
        plan, _ = workers.plan(workers.place(tasks))
    check_budget(plan)
    return plan


def _state_folder(state: str | os.PathLike[str] | None) -> Path | None:
    """Make the absolute path of the folder of kept states; workers may run elsewhere."""
    if state is None:
        return None
    folder = Path(state).absolute()
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--state '{state}' is a file", "a directory, made if it is not there")
    return folder
