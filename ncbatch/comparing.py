"""Tables that compare stores: checkpoints and models side by side, a metric at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import xarray as xr
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from ncbatch.cells import metric_names

# With more metrics than this, of several layers, one of each kind is printed.
_MOST_GRIDS = 8
_HEADLINES = (
    "nc1_pinv", "nc1_cdnv", "nc2_etf_err", "nc2_norm_cv", "nc3_dual_err", "nc4_agree",
    "nc5_ood_dev", "spec_rankme",
)  # fmt: skip
_NUMBER = len("-1.2346e-300")


def comparison(dataset: xr.Dataset, width: int) -> list[RenderableType]:
    """Lay out results of several stores so that a metric's values stand side by side.

    Parameters
    ----------
    dataset : xarray.Dataset
        From `ncbatch.measure`, of two stores or more.
    width : int
        Columns of the terminal.
    """
    dataset = dataset.isel(store=order(dataset))
    labels = labels_of(dataset)
    names = metric_names(dataset)
    lines: list[RenderableType] = [
        Text(f"{store}: {summary(dataset.sel(store=store))}", style="bold")
        for store in dataset["store"].values.tolist()
    ]
    layers = [str(layer) for layer in dataset["layer"].values.tolist()]
    if len(layers) == 1:
        values = {name: dataset[name].values[:, 0] for name in names}
        return [*lines, *_tables(f"layer {layers[0]}", "metric", names, labels, values, width)]
    shown = names if len(names) <= _MOST_GRIDS else [n for n in _HEADLINES if n in names]
    for name in shown:
        title = f"{name}: {dataset[name].attrs.get('long_name', '')}"
        grid = dataset[name].values
        by_store = {label: grid[i] for i, label in enumerate(labels)}
        by_layer = {layer: grid[:, j] for j, layer in enumerate(layers)}
        across = _tables(title, "", labels, layers, by_store, width)
        down = _tables(title, "", layers, labels, by_layer, width)
        lines += across if len(across) <= len(down) else down
    if len(shown) < len(names):
        lines.append(
            Text(
                f"{len(names) - len(shown)} metrics more are in the results: "
                "--out saves all, --metrics prints those that it names"
            )
        )
    return lines


def order(dataset: xr.Dataset) -> list[int]:
    """Order stores by model and step where all steps are known, else as they were given."""
    n = dataset.sizes["store"]
    if "step" not in dataset.coords or np.isnan(dataset["step"].values.astype(float)).any():
        return list(range(n))
    models = dataset["model"].values.tolist() if "model" in dataset.coords else [""] * n
    first = {model: i for i, model in reversed(list(enumerate(models)))}
    steps = dataset["step"].values.tolist()
    return sorted(range(n), key=lambda i: (first[models[i]], steps[i]))


def labels_of(dataset: xr.Dataset) -> list[str]:
    """Name stores by their steps where those tell them apart, else by their names."""
    stores = [str(store) for store in dataset["store"].values.tolist()]
    if "step" not in dataset.coords:
        return stores
    steps = dataset["step"].values.astype(float).tolist()
    if len(set(steps)) < len(steps) or any(map(math.isnan, steps)):
        return stores
    unit = dataset["step"].attrs.get("units", "step")
    return [f"{unit} {int(step):,}" for step in steps]


def summary(found: xr.Dataset) -> str:
    """Say of how many samples and classes a store's results are, and of which step."""
    n, k = found["n_samples"].max(), found["n_classes"].max()
    unseen = int(found["n_classes_unseen"].max())
    said = [f"{int(n):,} samples", f"{int(k):,} classes"]
    said += [f"{unseen:,} unseen"] if unseen else []
    if "model" in found.coords and str(found["model"].values):
        said.append(f"model {found['model'].values}")
    if "step" in found.coords and not math.isnan(float(found["step"])):
        said.append(f"{found['step'].attrs.get('units', 'step')} {int(found['step']):,}")
    return ", ".join(said)


def collapse_lines(dataset: xr.Dataset) -> list[str]:
    """Say of every store at which layer collapse sets in, where there are several layers."""
    if "collapse_layer" not in dataset.coords or dataset.sizes["layer"] < 2:
        return []
    about = dataset["collapse_layer"].attrs
    reasons = dict(
        part.split(": ", 1) for part in str(about.get("undefined", "")).split("; ") if ": " in part
    )
    lines = []
    for i in order(dataset):
        found = dataset.isel(store=i)
        store, layer = str(found["store"].values), str(found["collapse_layer"].values)
        depth = float(found["collapse_depth"])
        if not layer:
            lines.append(f"{store}: collapse sets in nowhere: {reasons.get(store, '')}")
            continue
        at = f"depth {depth:.3g}" if not math.isnan(depth) else "no depths recorded"
        limit = f"the first nc1_cdnv under {about['threshold']:g}"
        lines.append(f"{store}: collapse sets in at {layer}, {limit} ({at})")
    return lines


def number(value: float) -> str:
    """Write a value; nothing where there is none."""
    return "" if math.isnan(value) else f"{value:.5g}"


def fitting(
    head: Sequence[str], names: Sequence[str], width: int, need: Callable[[str], int]
) -> list[list[str]]:
    """Part columns so that a table of each part fits the terminal, its first column included.

    Parameters
    ----------
    head : sequence of str
        The entries of the first column.
    names : sequence of str
        The other columns.
    width : int
        Columns of the terminal.
    need : callable
        How wide a column is.
    """
    parts: list[list[str]] = []
    room = 0
    for name in names:
        wide = need(name) + 3
        if room < wide:
            parts.append([])
            room = width - max(map(len, head)) - 4
        parts[-1].append(name)
        room -= wide
    return parts


def _tables(
    title: str,
    corner: str,
    lines: Sequence[str],
    columns: Sequence[str],
    values: Mapping[str, npt.NDArray[np.float64]],
    width: int,
) -> list[RenderableType]:
    """Lay out values by line and column, in as many tables as the terminal needs."""
    texts = {
        column: [number(float(values[line][j])) for line in lines]
        for j, column in enumerate(columns)
    }
    parts = fitting([corner, *lines], columns, width, lambda c: max(len(c), *map(len, texts[c])))
    found: list[RenderableType] = [Text(title, style="italic")]  # a table's own would wrap
    for part in parts:
        table = Table()
        table.add_column(corner, no_wrap=True)
        for column in part:
            table.add_column(column, justify="right", no_wrap=True)
        for i, line in enumerate(lines):
            table.add_row(line, *(texts[column][i] for column in part))
        found.append(table)
    return found
