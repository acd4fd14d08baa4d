"""measure: from metric names to passes to a Dataset."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ncbatch import __version__
from ncbatch.choosing import StoreLike, choose_tasks, open_stores, wanted_metrics
from ncbatch.engine import Plan, Progress, check_budget, memory_budget
from ncbatch.errors import UsageError
from ncbatch.execution import Workers
from ncbatch.layer import Options
from ncbatch.metrics import CATALOGUE
from ncbatch.results import to_dataset
from ncbatch.stats.moments import Precision
from ncbatch.task import LayerTask

if TYPE_CHECKING:
    import xarray as xr
    from distributed import Client

# Conventions of papers, as arguments of `measure`.
PRESETS: Mapping[str, Mapping[str, Any]] = {
    # Papyan, Han & Donoho define the global mean as that of the samples; their classes are balanced.
    "papyan2020": {"weighted": True, "dist_exp": 1.0, "min_count": 1},
    # Language models, Wu & Papyan: seen classes, unweighted mean of means, CDNV with p = 2.
    "wu2024": {"weighted": False, "dist_exp": 2.0, "min_count": 1},
}


def measure(
    stores: StoreLike | Sequence[StoreLike],
    layers: Iterable[str] | None = None,
    *,
    train: str = "train",
    test: str | None = None,
    ood: str | None = None,
    metrics: Iterable[str] | None = None,
    min_count: int = 1,
    max_count: int | None = None,
    classes: Iterable[int] | None = None,
    weighted: bool = False,
    dist_exp: float = 1.0,
    skip_nonfinite: bool = False,
    precision: Precision = "exact",
    null: bool = False,
    null_seed: int = 0,
    per_class: bool = False,
    ncc: str = "exact",
    memory: str | int | None = None,
    device: str = "auto",
    cluster: str | os.PathLike[str] | Client | None = None,
    state: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> xr.Dataset:
    """Measure neural collapse on stored features.

    Parameters
    ----------
    stores : store, path, or sequence of them
        What to measure.
    layers : iterable of str, optional
        Which layers; all of the train split by default.
    train : str, optional
        The split that class means come from.
    test, ood : str, optional
        The splits of NC4 and NC5; by default those named ``test`` and ``ood`` where they exist.
        Without a test split NC4 takes the samples of train.
    metrics : iterable of str, optional
        Names from `ncbatch.metrics.CATALOGUE`; by default all that the stores allow.
    min_count, max_count : int, optional
        Use only classes with so many train samples.
    classes : iterable of int, optional
        Use only these classes. A filter drops the samples of all other classes, in test too.
    weighted : bool, optional
        Let m_G be the mean of samples instead of the unweighted mean of class means.
    dist_exp : float, optional
        p of the CDNV; language-model papers use 2.
    skip_nonfinite : bool, optional
        Leave out and count rows with NaN or infinities instead of refusing them.
    precision : {"exact", "fp32", "tf32"}, optional
        Float64 products, or products of residuals in float32 (on a GPU also TF32) folded in
        float64.
    null : bool, optional
        Measure NC1, NC2 and spectra also for labels drawn at random from the label distribution,
        in the same read, as ``<metric>_null``.
    null_seed : int, optional
        Which draw of those labels.
    per_class : bool, optional
        Give results per class too, over the dim ``class``.
    ncc : {"exact", "faiss"}, optional
        Who seeks the nearest class mean; the decisions are the same.
    memory : str or int, optional
        Ceiling of resident memory of each worker, such as ``"8GiB"``; what the machine has left,
        shared by its workers, by default.
    device : {"auto", "cpu", "cuda"}, optional
        Where arrays are; ``"auto"`` takes the GPU when CuPy and one work.
    cluster : str, path or distributed.Client, optional
        ``"sync"`` (the default: a plain loop in this process), ``"threads"``, ``"processes"``,
        ``"cuda"``, the address or the file of a scheduler that runs, or a client.
    state : path, optional
        A directory that keeps finished work: the same call goes on after a crash to the same bits,
        and other metrics of the same states read nothing again. Workers must reach it.
    progress : Progress, optional
        Told how far the passes are.

    Returns
    -------
    xarray.Dataset
        A variable per metric over dims (store, layer), counts of what was used and left out, and
        attributes that say how it was measured. A metric that does not apply is NaN; its
        attribute ``undefined`` says why.

    Raises
    ------
    UnknownNameError
        For a split, layer or metric that does not exist.
    DataError
        For data that cannot be measured: fewer than two classes, values that are not finite.
    CorruptionError
        For a chunk that is missing or altered.
    BudgetError
        When the memory does not suffice; names what would.
    WorkerError
        When no cluster is there, or its workers die of the work.
    """
    options = Options(
        train, test, ood, min_count, max_count, _class_ids(classes), weighted, dist_exp,
        skip_nonfinite, precision, null, null_seed, per_class, ncc,
    )  # fmt: skip
    opened, wanted, named = open_stores(stores), *wanted_metrics(metrics)
    tasks = choose_tasks(opened, layers, options, wanted, named, scanned=True)
    with _cluster(cluster, memory) as client:
        workers = Workers.find(client, memory, device, shares_disk=_is_local(cluster))
        _check_device(precision, workers.device)
        tasks = [replace(t, options=replace(t.options, device=workers.device)) for t in tasks]
        plan, modes = workers.plan(tasks)
        check_budget(plan)
        for task in tasks:
            task.check_chunks()
        found = workers.run(tasks, modes, progress, _state_folder(state))
    cells = {(task.name, task.layer): cell for task, cell in zip(tasks, found, strict=True)}
    applied = [m for m in wanted if named or any(m in t.metrics for t in tasks)]
    return to_dataset(
        cells,
        list(opened),
        list(dict.fromkeys(task.layer for task in tasks)),
        applied,
        _attributes(tasks, workers, [note for cell in found for note in cell.notes]),
    )


def plan(
    stores: StoreLike | Sequence[StoreLike],
    layers: Iterable[str] | None = None,
    *,
    train: str = "train",
    test: str | None = None,
    ood: str | None = None,
    metrics: Iterable[str] | None = None,
    min_count: int = 1,
    max_count: int | None = None,
    classes: Iterable[int] | None = None,
    weighted: bool = False,
    dist_exp: float = 1.0,
    skip_nonfinite: bool = False,
    precision: Precision = "exact",
    null: bool = False,
    null_seed: int = 0,
    per_class: bool = False,
    ncc: str = "exact",
    memory: str | int | None = None,
    device: str = "auto",
    cluster: str | os.PathLike[str] | Client | None = None,
) -> Plan:
    """Say what `measure` would read, compute and hold, from shapes alone; runs nothing.

    The arguments are those of `measure`. No data is read, labels included: the classes used are
    taken to be as many as there can be, so that `measure` needs no more than this.

    Returns
    -------
    Plan
        Prints itself; ``peak_bytes`` and ``items`` are in it.

    Raises
    ------
    BudgetError
        When the memory does not suffice; names what would.
    """
    options = Options(
        train, test, ood, min_count, max_count, _class_ids(classes), weighted, dist_exp,
        skip_nonfinite, precision, null, null_seed, per_class, ncc,
    )  # fmt: skip
    opened, wanted, named = open_stores(stores), *wanted_metrics(metrics)
    tasks = choose_tasks(opened, layers, options, wanted, named, scanned=False)
    with _cluster(cluster, memory) as client:
        workers = Workers.find(client, memory, device)
        _check_device(precision, workers.device)
        tasks = [replace(t, options=replace(t.options, device=workers.device)) for t in tasks]
        found, _ = workers.plan(tasks)
    check_budget(found)
    return found


def _class_ids(classes: Iterable[int] | None) -> tuple[int, ...] | None:
    return None if classes is None else tuple(int(c) for c in classes)


def _check_device(precision: Precision, device: str) -> None:
    if precision == "tf32" and device == "cpu":
        raise UsageError("precision 'tf32' on the CPU", "a GPU for it", "use --precision fp32")


def _cluster(cluster: Any, memory: str | int | None) -> Any:
    """Open a cluster; loading Dask's is left out where a plain loop runs."""
    if cluster is None or cluster == "sync":
        return nullcontext(None)
    from ncbatch.engine.cluster import open_cluster

    return open_cluster(cluster, memory=None if memory is None else memory_budget(memory))


def _is_local(cluster: Any) -> bool:
    """Whether a cluster's workers are of this machine: others may share no disk with it."""
    name = cluster.partition(":")[0] if isinstance(cluster, str) else cluster
    return name in (None, "sync", "threads", "processes", "cuda")


def _state_folder(state: str | os.PathLike[str] | None) -> Path | None:
    """Give the absolute path of the folder of kept states; workers may run elsewhere."""
    if state is None:
        return None
    folder = Path(state).absolute()
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--state '{state}' is a file", "a directory, made if it is not there")
    return folder


def _notes(tasks: list[LayerTask]) -> list[str]:
    """Say once what is missing where."""
    places: dict[tuple[str, str], list[str]] = {}
    for task in tasks:
        applied = {metric.place for metric in task.metrics}
        for why, lost in task.missing.items():
            # A kind of collapse is named as a whole where none of its metrics is left.
            names = [
                name if CATALOGUE[name].place in applied else CATALOGUE[name].place for name in lost
            ]
            layers = places.setdefault((why, ", ".join(dict.fromkeys(names))), [])
            if task.layer not in layers:
                layers.append(task.layer)
    return [
        f"{why} for layer{'s' if len(layers) > 1 else ''} {', '.join(layers)}: {kinds} left out"
        for (why, kinds), layers in places.items()
    ]


def _attributes(
    tasks: list[LayerTask], workers: Workers, notes: list[str]
) -> dict[str, str | int | float]:
    options = tasks[0].options
    attributes: dict[str, str | int | float] = {
        "ncbatch_version": __version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": workers.device_name,
        "ncc": options.ncc,
        "precision": options.precision,
        "store_id": json.dumps({task.name: task.store.id for task in tasks}),
        "store_path": json.dumps({task.name: str(Path(task.store.path)) for task in tasks}),
        "train": options.train,
        "global_mean": "mean of samples" if options.weighted else "unweighted mean of class means",
        "dist_exp": float(options.dist_exp),
        "min_count": options.min_count,
        "skip_nonfinite": int(options.skip_nonfinite),
        "null_seed": options.null_seed if options.null else "no null",
        "nc1_division": "NC1 by pseudo-inverse is divided by K",
        "ddof": "variances over classes 1, over pairs 0; covariances and V_c 0",
        "notes": "\n".join([*_notes(tasks), *notes]),
    }
    if options.max_count is not None:
        attributes["max_count"] = options.max_count
    if options.classes is not None:
        attributes["class_filter"] = (
            f"{len(options.classes)} listed, sha256 {tasks[0].selected.digest}"
        )
    return attributes
