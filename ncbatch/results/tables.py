"""Tables and progress for a person at a terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import xarray as xr
from rich.console import RenderableType
from rich.table import Column, Table
from rich.text import Text

from ncbatch.metrics.catalogue import CATALOGUE
from ncbatch.results.dataset import YARDSTICKS, metric_names, named_layers

# With more metrics than this, of several layers, one of each kind is printed.
_MOST_GRIDS = 8
_HEADLINES = [
    "nc1_pinv",
    "nc1_cdnv",
    "nc2_etf_err",
    "nc2_norm_cv",
    "nc3_dual_err",
    "nc4_agree",
    "nc5_ood_dev",
    "spec_rankme",
]
# With more layers than this, layers become lines and metrics columns.
_MOST_COLUMNS = 5
_LEFT_OUT = {
    "n_rows_skipped": "rows with values that are not finite were left out",
    "n_classes_filtered": "classes were left out by a filter",
    "n_coincident_pairs": "pairs of classes with equal means were left out of ratios",
    "n_coincident_directions": "pairs of classes with equal directions were left out of logarithms",
    "n_means_without_direction": "class means equal to m_G were left out of cosines",
    "n_classes_without_variance": ("classes of one sample, without V_c of ddof 1, were left out"),
}


# Results of one store.


def result_tables(dataset: xr.Dataset, width: int = 100) -> list[RenderableType]:
    """Lay out results as tables: of one store by metric, or by kind where layers are many.

    Of several stores the values of a metric stand side by side; see `comparison`.

    Parameters
    ----------
    dataset : xarray.Dataset
        From `ncbatch.measure`.
    width : int, optional
        Columns of the terminal; where layers are lines, metrics that need more get a table more.
    """
    if dataset.sizes["store"] > 1:
        return comparison(dataset, width)
    names = metric_names(dataset)
    title = _titles(dataset)[0]
    if dataset.sizes["layer"] <= _MOST_COLUMNS:
        return [_by_metric(dataset, names, title)]
    layers = [str(layer) for layer in dataset["layer"].values.tolist()]
    tables: list[RenderableType] = [Text(title, style="bold")]
    for place in dict.fromkeys(CATALOGUE[name].place for name in names):
        chosen = [name for name in names if CATALOGUE[name].place == place]
        columns = {name: dataset[name].values[0] for name in chosen}
        tables += _tables(place, "layer", layers, columns, width)
    return tables


def _by_metric(dataset: xr.Dataset, names: Sequence[str], title: str) -> Table:
    """Lay out metrics as lines; a single layer's values stand beside their yardsticks."""
    layers = [str(layer) for layer in dataset["layer"].values.tolist()]
    suffixes = [
        suffix
        for suffix in YARDSTICKS
        if len(layers) == 1 and any(f"{name}_{suffix}" in dataset for name in names)
    ]
    table = Table("metric", "what it is", title=title, title_justify="left")
    for column in [*layers, *suffixes]:
        table.add_column(column, justify="right", no_wrap=True)
    for name in names:
        cells = [number(value) for value in dataset[name].values[0]]
        for suffix in suffixes:
            yardstick = f"{name}_{suffix}"
            cells.append(number(dataset[yardstick].values[0, 0]) if yardstick in dataset else "")
        table.add_row(name, str(dataset[name].attrs.get("long_name", "")), *cells)
    return table


def _titles(dataset: xr.Dataset) -> list[str]:
    """Say of how many samples and classes each store's results are, and of which step."""
    coords = dataset.coords
    counts = ("n_samples", "n_classes", "n_classes_unseen")
    columns = [dataset[name].max("layer").values.tolist() for name in counts]
    titles = []
    for i, (n, k, unseen) in enumerate(zip(*columns, strict=True)):
        facts = [f"{int(n):,} samples", f"{int(k):,} classes"]
        if unseen:
            facts.append(f"{int(unseen):,} unseen")
        if "model" in coords and (model := str(coords["model"].values[i])):
            facts.append(f"model {model}")
        if "step" in coords and not np.isnan(step := coords["step"].values[i]):
            facts.append(f"{coords['step'].attrs.get('units', 'step')} {int(step):,}")
        titles.append(f"{coords['store'].values[i]}: {', '.join(facts)}")
    return titles


def number(value: float) -> str:
    """Write a value; nothing where there is none."""
    return "" if math.isnan(value) else f"{value:.5g}"


# Results of several stores: checkpoints and models side by side, a metric at a time.


def comparison(dataset: xr.Dataset, width: int) -> list[RenderableType]:
    """Lay out results of several stores so that a metric's values stand side by side.

    Parameters
    ----------
    dataset : xarray.Dataset
        From `ncbatch.measure`, of two stores or more.
    width : int
        Columns of the terminal.
    """
    ordered = dataset.isel(store=order(dataset))
    labels = labels_of(ordered)
    names = metric_names(ordered)
    lines: list[RenderableType] = [Text(title, style="bold") for title in _titles(ordered)]
    layers = [str(layer) for layer in ordered["layer"].values.tolist()]
    if len(layers) == 1:
        columns = np.array([ordered[name].values[:, 0] for name in names]).T
        by_store = dict(zip(labels, columns, strict=True))
        return [*lines, *_tables(f"layer {layers[0]}", "metric", names, by_store, width)]
    shown = names if len(names) <= _MOST_GRIDS else [n for n in _HEADLINES if n in names]
    for name in shown:
        title = f"{name}: {ordered[name].attrs.get('long_name', '')}"
        grid = ordered[name].values
        across = _tables(title, "", labels, dict(zip(layers, grid.T, strict=True)), width)
        down = _tables(title, "", layers, dict(zip(labels, grid, strict=True)), width)
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
    steps = dataset["step"].values.tolist()
    return sorted(range(n), key=lambda i: (models.index(models[i]), steps[i]))


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


def collapse_lines(dataset: xr.Dataset) -> list[str]:
    """Say of every store at which layer collapse sets in, where there are several layers."""
    if "collapse_layer" not in dataset.coords or dataset.sizes["layer"] < 2:
        return []
    about = dataset["collapse_layer"].attrs
    reasons = dict(
        part.split(": ", 1) for part in str(about.get("undefined", "")).split("; ") if ": " in part
    )
    names = dataset["store"].values.tolist()
    layers = dataset["collapse_layer"].values.tolist()
    depths = dataset["collapse_depth"].values.tolist()
    lines = []
    for i in order(dataset):
        if not layers[i]:
            lines.append(f"{names[i]}: collapse sets in nowhere: {reasons.get(names[i], '')}")
            continue
        where = "no depths recorded" if math.isnan(depths[i]) else f"depth {depths[i]:.3g}"
        limit = f"the first nc1_cdnv under {about['threshold']:g}"
        lines.append(f"{names[i]}: collapse sets in at {layers[i]}, {limit} ({where})")
    return lines


def _tables(
    title: str,
    corner: str,
    lines: Sequence[str],
    columns: Mapping[str, npt.NDArray[np.float64]],
    width: int,
) -> list[RenderableType]:
    """Lay out columns of numbers, a line each, in as many tables as the terminal needs."""
    parts: list[list[tuple[str, str]]] = []
    room = 0
    for name, values in columns.items():
        numbers = [number(value) for value in values]
        needed = max(map(len, [name, *numbers])) + 3
        if room < needed:
            parts.append([(corner, "\n".join(lines))])
            room = width - max(map(len, [corner, *lines])) - 4
        parts[-1].append((name, "\n".join(numbers)))
        room -= needed
    tables: list[RenderableType] = [Text(title, style="italic")]  # a table's own would wrap
    for part in parts:
        (head, *names), texts = zip(*part, strict=True)
        numeric = [Column(name, justify="right", no_wrap=True) for name in names]
        table = Table(Column(head, no_wrap=True), *numeric)
        # One row of cells that hold all lines: rich needs a third of the time that many rows take.
        table.add_row(*texts)
        tables.append(table)
    return tables


def notes(dataset: xr.Dataset) -> list[str]:
    """Say what was left out of the results, and why."""
    lines = [line for line in str(dataset.attrs.get("notes", "")).splitlines() if line]
    for name, meaning in _LEFT_OUT.items():
        if name in dataset and (most := float(dataset[name].max())) > 0:
            layers = dataset["layer"].values[(dataset[name].values > 0).any(axis=0)].tolist()
            lines.append(f"up to {int(most)} {meaning} ({named_layers(layers)})")
    told = "\n".join(lines)
    # Metrics that are empty for one reason at the same places are named together.
    alike: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for name in metric_names(dataset):
        places: dict[str, list[str]] = {}
        for reason in filter(None, dataset[name].attrs.get("undefined", "").split("; ")):
            place, _, why = reason.partition(": ")
            places.setdefault(why, []).append(place)
        for why, empty in places.items():
            if why not in told:
                alike.setdefault((why, tuple(empty)), []).append(name)
    for (why, same), names in alike.items():
        where = same[0] if len(same) == 1 else f"{len(same)} places, {same[0]} first"
        verb = "is" if len(names) == 1 else "are"
        lines.append(f"{', '.join(names)} {verb} empty at {where}: {why}")
    return lines
