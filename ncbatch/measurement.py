"""measure: from metric names to passes to a Dataset."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ncbatch.cells import Cell
from ncbatch.choosing import StoreLike, choose_tasks, open_stores, wanted_metrics
from ncbatch.engine import Plan, Progress, check_budget, memory_budget
from ncbatch.errors import UsageError
from ncbatch.execution import Workers
from ncbatch.layer import Options
from ncbatch.metrics import Metric
from ncbatch.provenance import arranged, conventions
from ncbatch.stats.moments import Precision
from ncbatch.sweeps import with_collapse
from ncbatch.task import LayerTask
from ncbatch.updating import Saved

if TYPE_CHECKING:
    import xarray as xr
    from distributed import Client

# Conventions of papers, as arguments of `measure`.
PRESETS: Mapping[str, Mapping[str, Any]] = {
    # The notebook that Papyan, Han & Donoho published: the unweighted mean of class means, covariances
    # over N, NC1 not divided by K, torch.std over classes, and everything on the training samples.
    "papyan2020": {
        "weighted": False, "dist_exp": 1.0, "min_count": 1, "ddof": 0, "class_ddof": 1,
        "divide_by_k": False, "test": "train",
    },
    # Language models, Wu & Papyan: seen classes, unweighted mean of means, CDNV with p = 2.
    "wu2024": {
        "weighted": False, "dist_exp": 2.0, "min_count": 1, "ddof": 0, "class_ddof": 1,
        "divide_by_k": True,
    },
}  # fmt: skip


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
    ddof: int = 0,
    class_ddof: int = 1,
    divide_by_k: bool = True,
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
    collapse_below: float | None = None,
    update: xr.Dataset | str | os.PathLike[str] | None = None,
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
    ddof : {0, 1}, optional
        V_c is divided by n_c - ddof, S_W by N - ddof K. With 1 a class of one sample has no V_c: it
        is left out of what reads V_c, and counted.
    class_ddof : {0, 1}, optional
        Variances over classes are divided by K - class_ddof.
    divide_by_k : bool, optional
        Divide NC1 by pseudo-inverse by K.
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
    collapse_below : float, optional
        Collapse sets in at the first layer, in order of depth, whose ``nc1_cdnv`` is under this;
        by default 0.1, where ``dist_exp`` is 1.
    update : xarray.Dataset or path, optional
        Earlier results, ``.zarr`` or ``.nc``. What they hold of the same data by the same version
        is taken from there, the rest is measured, and the result is the union of both.

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
    options = Options(
        train, test, ood, min_count, max_count, _class_ids(classes), weighted, dist_exp,
        skip_nonfinite, precision, null, null_seed, per_class, ncc,
        ddof=ddof, class_ddof=class_ddof, divide_by_k=divide_by_k,
    )  # fmt: skip
    opened, wanted, named = open_stores(stores), *wanted_metrics(metrics)
    _check_threshold(collapse_below, wanted)
    saved = None if update is None else Saved.of(update)
    if saved is not None:
        saved.check(conventions(options))
        saved, opened = saved.renamed(opened)
    tasks = choose_tasks(opened, layers, options, wanted, named, scanned=True)
    applied = [m for m in wanted if named or any(m in t.metrics for t in tasks)]
    with _cluster(cluster, memory) as client:
        workers = Workers.find(client, memory, device, shares_disk=_is_local(cluster))
        _check_device(precision, workers.device)
        tasks = [replace(t, options=replace(t.options, device=workers.device)) for t in tasks]
        left = tasks if saved is None else _to_measure(tasks, saved, progress)
        cells = _measured(left, workers, progress, _state_folder(state))
    return with_collapse(
        arranged(tasks, cells, applied, workers.device_name, saved), collapse_below
    )


def _to_measure(tasks: list[LayerTask], saved: Saved, progress: Progress | None) -> list[LayerTask]:
    """Give the layers that saved results do not serve."""
    left = [task for task in tasks if not saved.serves(task)]
    if progress and len(left) < len(tasks):
        served = len(tasks) - len(left)
        progress.note(f"{served} of {len(tasks)} layers are taken from {saved.where}")
    return left


def _measured(
    tasks: list[LayerTask], workers: Workers, progress: Progress | None, state: Path | None
) -> dict[tuple[str, str], Cell]:
    """Measure layers, once it is sure that they fit and that their chunks are there."""
    plan, modes = workers.plan(tasks)
    check_budget(plan)
    for task in tasks:
        task.check_chunks()
    found = workers.run(tasks, modes, progress, state) if tasks else []
    return {(task.name, task.layer): cell for task, cell in zip(tasks, found, strict=True)}


def _check_threshold(below: float | None, wanted: list[Metric]) -> None:
    if below is None:
        return
    if not below > 0.0:
        raise UsageError(f"collapse_below {below}", "a number above 0")
    if not any(metric.name == "nc1_cdnv" for metric in wanted):
        raise UsageError(
            "collapse_below without metric nc1_cdnv", "it among the metrics", "add it to --metrics"
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
    ddof: int = 0,
    class_ddof: int = 1,
    divide_by_k: bool = True,
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
        ddof=ddof, class_ddof=class_ddof, divide_by_k=divide_by_k,
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
