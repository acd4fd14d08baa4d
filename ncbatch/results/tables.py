"""Tables and progress for a person at a terminal."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray as xr
from dask.utils import format_bytes
from rich.console import Console, RenderableType
from rich.progress import BarColumn, ProgressColumn, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.table import Table
from rich.text import Text

from ncbatch.metrics.catalogue import CATALOGUE
from ncbatch.results.dataset import YARDSTICKS, metric_names, named_layers
from ncbatch.store.feature_store import FeatureStore
from ncbatch.store.states import PART, RUNNING

# Tables that compare stores: checkpoints and models side by side, a metric at a time.


# With more metrics than this, of several layers, one of each kind is printed.
_MOST_GRIDS = 8
_HEADLINES = (
    "nc1_pinv", "nc1_cdnv", "nc2_etf_err", "nc2_norm_cv", "nc3_dual_err", "nc4_agree",
    "nc5_ood_dev", "spec_rankme",
)  # fmt: skip


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


# Listings for a person at a terminal: what is in a store.


def info_tables(store: FeatureStore) -> list[RenderableType]:
    """Lay out what is in a store: splits, layers, sizes and classifiers."""
    head = f"{store.path}: format 1, id {store.id}, K = {store.n_classes} classes"
    table = Table("split", "layer", "samples", "features", "dtype", "bytes", "rows per chunk", "")
    for name in store.splits:
        split = store.split(name)
        state = "" if split.finalized else "being written, or interrupted"
        n = f"{split.n_samples:,}" + (
            "" if split.n_rows == split.n_samples or not split.finalized
            else f" of {split.n_rows:,} rows"
        )  # fmt: skip
        for layer in split.layers:
            spec, array = split.spec(layer), split.feature(layer)
            marks = [state] if state else []
            if layer in store.classifiers:
                marks.append("classifier")
            if split.head == layer:
                marks.append("predictions")
            size = format_bytes(split.n_rows * spec.row_bytes)
            table.add_row(
                name, layer, n, f"{spec.n_features:,}", spec.dtype, size,
                f"{array.chunks[0]:,}", ", ".join(marks),
            )  # fmt: skip
        for layer in split.incomplete_layers:
            table.add_row(name, layer, "", "", "", "", "", "incomplete: write it again")
    for name in store.state_splits:
        kinds = store.state_kinds(name)
        for layer, kind in kinds:
            if not kind.startswith((RUNNING, PART)):
                table.add_row(name, layer, *_state_row(store, name, layer, kind))
        for layer in dict.fromkeys(layer for layer, _ in kinds):
            for text in _unmerged(kinds, layer):
                table.add_row(name, layer, "", "", "", "", "", text)
    return [*(Text(line) for line in (head, *_recorded(store))), table]


def _state_row(store: FeatureStore, split: str, layer: str, kind: str) -> tuple[str, ...]:
    """Give the cells of a state; of its arrays only the counts are read."""
    arrays = store.state_arrays(split, layer, kind) or {}
    counts = next((arrays[name] for name in ("count", "samples") if name in arrays), None)
    mean, size = arrays.get("mean"), sum(int(array.nbytes) for array in arrays.values())
    return (
        "" if counts is None else f"{int(np.asarray(counts[:]).sum()):,}",
        "" if mean is None else f"{mean.shape[1]:,}",
        "" if mean is None else str(mean.dtype), format_bytes(size), "",
        f"{kind}, without the samples" if layer not in _feature_layers(store, split) else kind,
    )  # fmt: skip


def _unmerged(kinds: list[tuple[str, str]], layer: str) -> Iterator[str]:
    """Say what processes that folded a layer have left, and what is to be done with it."""
    for prefix, what in (
        (PART, "to be merged: 'ncbatch finalize'"),
        (RUNNING, "being folded, or interrupted: 'ncbatch dump --resume'"),
    ):
        own = [
            kind.removeprefix(prefix) for each, kind in kinds if each == layer and prefix in kind
        ]
        ranks = sorted(int(rank) for rank in own if rank.isdecimal())
        if ranks:
            said = f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
            yield f"{prefix.removesuffix('-')} of {said}, {what}"


def _feature_layers(store: FeatureStore, split: str) -> list[str]:
    return store.split(split).layers if split in store.splits else []


def _recorded(store: FeatureStore) -> list[str]:
    """Say which model and step the features are of, where that is recorded."""
    found = [
        f"model {store.model}" if store.model is not None else "",
        f"step {store.step:,}" if store.step is not None else "",
    ]
    return [", ".join(filter(None, found))] if any(found) else []


# How commands print.


def open_console() -> Any:
    """Open the console that tables are printed to."""
    from rich.console import Console

    console = Console(markup=False, emoji=False)  # layer names may hold brackets and colons
    if not console.is_terminal:  # never cut a table there
        console.width = max(console.width, 1000)
    return console


def show(console: Any, parts: list[Any]) -> None:
    """Print tables and texts one after another."""
    for part in parts:
        console.print(part)


# With more layers than this, layers become lines and metrics columns.
_WIDE = 5
_NUMBER = len("-1.2346e-300")
_LEFT_OUT = (
    ("n_rows_skipped", "rows with values that are not finite were left out"),
    ("n_classes_filtered", "classes were left out by a filter"),
    ("n_coincident_pairs", "pairs of classes with equal means were left out of ratios"),
    (
        "n_coincident_directions",
        "pairs of classes with equal directions were left out of logarithms",
    ),
    ("n_means_without_direction", "class means equal to m_G were left out of cosines"),
    ("n_classes_without_variance", "classes of one sample, without V_c of ddof 1, were left out"),
)


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
    tables: list[RenderableType] = []
    names = metric_names(dataset)
    for store in dataset["store"].values.tolist():
        found = dataset.sel(store=store)
        if dataset.sizes["layer"] <= _WIDE:
            tables.append(_by_metric(found, names, f"{store}: {summary(found)}"))
            continue
        places = dict.fromkeys(CATALOGUE[name].place for name in names)
        layers = [str(layer) for layer in found["layer"].values.tolist()]
        tables.append(Text(f"{store}: {summary(found)}", style="bold"))
        for place in places:
            chosen = [name for name in names if CATALOGUE[name].place == place]
            parts = fitting(["layer", *layers], chosen, width, lambda name: max(len(name), _NUMBER))
            tables.extend(_by_layer(found, part, place) for part in parts)
    return tables


def notes(dataset: xr.Dataset) -> list[str]:
    """Say what was left out of the results, and why."""
    said = [line for line in str(dataset.attrs.get("notes", "")).splitlines() if line]
    for name, meaning in _LEFT_OUT:
        if name in dataset and (most := float(dataset[name].max())) > 0:
            at = dataset[name].where(dataset[name] > 0, drop=True)
            said.append(
                f"up to {int(most)} {meaning} ({named_layers(at['layer'].values.tolist())})"
            )
    empty: dict[tuple[str, str], list[str]] = {}
    for name in metric_names(dataset):
        undefined = dataset[name].attrs.get("undefined", "")
        for reason in undefined.split("; ") if undefined else ():
            place, _, why = reason.partition(": ")
            if not any(why in line for line in said):
                empty.setdefault((name, why), []).append(place)
    alike: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for (name, why), places in empty.items():
        alike.setdefault((why, tuple(places)), []).append(name)
    for (why, at_all), names in alike.items():
        where = at_all[0] if len(at_all) == 1 else f"{len(at_all)} places, {at_all[0]} first"
        verb = "is" if len(names) == 1 else "are"
        said.append(f"{', '.join(names)} {verb} empty at {where}: {why}")
    return said


def metric_table() -> Table:
    """Lay out the table of metrics: name, formula, what it reads, source."""
    table = Table("name", "what it is", "formula", "reads", "source")
    for metric in CATALOGUE.values():
        reads = ", ".join(sorted(metric.reads)) or "means"
        table.add_row(metric.name, metric.long_name, Text(metric.formula), reads, metric.source)
    return table


def _by_metric(found: xr.Dataset, names: Sequence[str], title: str) -> Table:
    """Give metrics as lines; a single layer's values stand beside their yardsticks."""
    layers = [str(layer) for layer in found["layer"].values.tolist()]
    table = Table("metric", "what it is", title=title, title_justify="left")
    for layer in layers:
        table.add_column(layer, justify="right", no_wrap=True)
    suffixes = [
        suffix
        for suffix in YARDSTICKS
        if len(layers) == 1 and any(f"{name}_{suffix}" in found for name in names)
    ]
    for suffix in suffixes:
        table.add_column(suffix, justify="right", no_wrap=True)
    for name in names:
        cells = [number(float(v)) for v in found[name].values]
        for suffix in suffixes:
            yardstick = f"{name}_{suffix}"
            cells.append(number(float(found[yardstick][0])) if yardstick in found else "")
        table.add_row(name, str(found[name].attrs.get("long_name", "")), *cells)
    return table


def _by_layer(found: xr.Dataset, names: Sequence[str], title: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("layer", no_wrap=True)
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for layer in found["layer"].values.tolist():
        cells = [number(float(found[name].sel(layer=layer))) for name in names]
        table.add_row(str(layer), *cells)
    return table


class _Rate(ProgressColumn):
    """Shows how much is done, of how much, and how fast."""

    def render(self, task: Task) -> Text:
        unit = task.fields["unit"]
        speed = task.finished_speed or task.speed
        return Text(
            f"{_amount(task.completed, unit)} of {_amount(task.total or 0, unit)}"
            + (f", {_amount(speed, unit)}/s" if speed else "")
        )


def _amount(value: float, unit: str) -> str:
    return format_bytes(int(value)) if unit == "B" else f"{value:,.0f} {unit}"


class ProgressBar:
    """Shows a run's progress on a terminal, with rate and time left; silent elsewhere."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._bar: RichProgress | None = None
        self._task: TaskID | None = None

    def begin(self, label: str, total: int, unit: str) -> None:
        """Start a bar for a pass."""
        columns: list[Any] = [TextColumn("{task.description}", markup=False), BarColumn(), _Rate()]
        self._bar = RichProgress(
            *columns, TimeRemainingColumn(), console=self._console,
            transient=True, disable=not self._console.is_terminal,
        )  # fmt: skip
        self._task = self._bar.add_task(label, total=total, unit=unit)
        self._bar.start()

    def advance(self, size: int) -> None:
        """Move the bar."""
        if self._bar is not None and self._task is not None:
            self._bar.advance(self._task, size)

    def note(self, text: str) -> None:
        """Say something beside the bar."""
        self._console.print(f"note: {text}", markup=False, highlight=False, soft_wrap=True)

    def end(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
