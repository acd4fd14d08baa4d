"""Provenance: cells become a Dataset that says what was measured, how, when and where."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from datetime import UTC, datetime

import numpy as np
import xarray as xr

from ncbatch import __version__
from ncbatch.cells import Cell, notes_of, to_dataset
from ncbatch.layer import Options
from ncbatch.metrics import CATALOGUE, Metric
from ncbatch.sweeps import StoreNotes, coordinates
from ncbatch.task import LayerTask
from ncbatch.updating import At, Saved, absolute

Attributes = dict[str, str | int | float]


def arranged(
    tasks: list[LayerTask],
    measured: Mapping[At, Cell],
    metrics: list[Metric],
    device: str,
    saved: Saved | None = None,
) -> xr.Dataset:
    """Arrange what was measured, and what was saved before, as a Dataset with its provenance.

    Parameters
    ----------
    tasks : list of LayerTask
        The layers of this run.
    measured : mapping of (store, layer) to Cell
        What was measured of them now.
    metrics : list of Metric
        What this run gives.
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
    ids = {task.name: task.store.id for task in tasks}
    paths = {task.name: absolute(task.store.path) for task in tasks}
    attributes = conventions(tasks[0].options)
    cells = dict(measured)
    if saved is not None:
        cells, stores = saved.union(tasks, measured)
        layers = list(dict.fromkeys([*saved.layers, *layers]))
        notes, ids, paths = saved.notes | notes, saved.ids | ids, saved.paths | paths
        names = dict.fromkeys([*saved.metrics, *(metric.name for metric in metrics)])
        metrics = [metric for name, metric in CATALOGUE.items() if name in names]
        if attributes["null_seed"] == "no null":
            attributes["null_seed"] = saved.attributes["null_seed"]
    return to_dataset(
        cells, stores, layers, metrics,
        {
            "ncbatch_version": __version__, "date": now, "device": device,
            "store_id": json.dumps({store: ids[store] for store in stores}),
            "store_path": json.dumps({store: paths[store] for store in stores}),
            **attributes, "notes": "\n".join(notes_of(cells)),
        },
        coordinates(notes, stores, layers),
    )  # fmt: skip


def conventions(options: Options) -> Attributes:
    """Give the options that a value depends on, as attributes of a Dataset."""
    attributes: Attributes = {
        "ncc": options.ncc,
        "precision": options.precision,
        "train": options.train,
        "global_mean": "mean of samples" if options.weighted else "unweighted mean of class means",
        "dist_exp": float(options.dist_exp),
        "min_count": options.min_count,
        "skip_nonfinite": int(options.skip_nonfinite),
        "null_seed": options.null_seed if options.null else "no null",
        "nc1_division": "by K" if options.divide_by_k else "none",
        "ddof": options.ddof,
        "class_ddof": options.class_ddof,
    }
    if options.max_count is not None:
        attributes["max_count"] = options.max_count
    if options.classes is not None:
        listed = np.unique(np.asarray(options.classes, np.int64))
        digest = hashlib.sha256(listed.tobytes()).hexdigest()[:32]
        attributes["class_filter"] = f"{len(listed)} listed, sha256 {digest}"
    return attributes
