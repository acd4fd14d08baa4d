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
from ncbatch.metrics.metric import Metric
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


def metrics_page() -> str:
    """Write ``docs/metrics.md``: notation, conventions, the table of metrics, known answers."""
    lines = [_PAGE_HEAD]
    for metric in CATALOGUE.values():
        reads = ", ".join(sorted(metric.reads)) or "means"
        formula = metric.formula.replace("|", "\\|")
        marks = (
            ("floor", metric.floor),
            ("random", metric.random),
            ("null", metric.has_null or None),
        )
        yardsticks = ", ".join(name for name, there in marks if there is not None)
        lines.append(
            f"| `{metric.name}` | {metric.long_name} | {formula} | {metric.units} | {reads} "
            f"| {_cost(metric)} | {yardsticks} | {metric.source} |"
        )
    return "\n".join(lines) + "\n" + _PAGE_TAIL


def _cost(metric: Metric) -> str:
    """Give what a metric costs, in the letters of ``docs/metrics.md``."""
    cost = "B" if "scatter" in metric.reads else "A"
    if metric.reads & {"decisions", "test", "directional"}:
        cost += "+C"
    return cost + "+P" if metric.pair_quantities else cost


_PAGE_HEAD = """\
# Metrics

This page is made from the table in `ncbatch/metrics`; `ncbatch metrics` prints the same.

## Notation

n_c samples of class c, N in all; m_c mean; V_c = mean |x - m_c|^2; S_W = pooled within-class scatter / N; m_G = global
mean; Mc_c = m_c - m_G; u_c = Mc_c / |Mc_c|; S_B = Mc^T Mc / K; d_ij = |m_i - m_j|; W (K, D) and b (K) classifier;
pairs are unordered, i < j.

## Conventions, which differ silently between tools

- K counts the classes used: those with a sample in train (or `--min-count` of them) that pass the filters.
- m_G is the unweighted mean of class means; `--weighted` makes it the mean of samples, and changes nothing else.
- `nc1_vci` takes every eigenvalue of S_W as at least 1e-12 of the largest. Sums leave errors of some 2e-16 of the largest, and layer
  normalisation a direction in which S_W is rounding alone, at 1e-14: counted as it is, the fourth digit would hang on the order of sums.
- `--ddof` (0): V_c = sum |x - m_c|^2 / (n_c - ddof), S_W = scatter / (N - ddof K). With ddof 1 a class of one sample has no V_c
  (0 / 0): it is left out of `nc1_cdnv`, `nc1_cdnv_nearest`, `nc1_v_ratio_*` and results by class, keeps its place in all else, and is
  counted in `n_classes_without_variance`; a store of such classes alone has no S_W. `nc1_cdnv_corrected` takes ddof 1 in
  any case; `nc1_cdnv_directional_exact`, `nc1_test_to_train` and the sample covariance are plain means over samples, ddof 0.
- `--class-ddof` (1): variances and standard deviations over classes are divided by K - ddof. Over pairs ddof is 0.
- `--no-divide-by-k`: `nc1_pinv` and `nc1_svd` without the division by K. The pseudo-inverse keeps eigenvalues of S_B above D * 2.2e-16
  of the largest; the result's `rank` and `smallest_ratio` say what that kept.
- The CDNV has the factor 1/2 and the exponent p = `--dist-exp` on d^2; language-model papers use p = 2.
- NC4 takes means from train and samples from test, or from train where there is no test; the nearest mean is sought among
  the classes used, the classifier's maximum among all. Without a class filter every sample counts, also of classes
  unseen in train; a filter drops the samples of all other classes. Where the layer is the head of stored predictions,
  those are the classifier's decisions. Equal scores go to the lowest class.
- NC5 takes m_G^ood as the unweighted mean of the OOD split's class means, and uncentred m_c.
- Left out, and counted in the result: pairs with d^2 <= 1e-24 (|m_i|^2 + |m_j|^2), from the CDNV (`n_coincident_pairs`); pairs
  with equal directions, from logarithmic and Riesz energies (`n_coincident_directions`); means equal to m_G, from
  everything that needs a direction (`n_means_without_direction`).
- Where all class means are one, S_B is 0: `nc1_trace_share` and `nc1_vci` are 1, what divides by S_B is empty.
- `nc1_cdnv_corrected` leaves out pairs whose corrected squared distance is not above 1e-9 of the terms it is a difference of.
- A metric without a value is empty, and its attribute `undefined` says why.
- Every one of these choices is an attribute of the result: `global_mean`, `dist_exp`, `ddof`, `class_ddof`, `nc1_division`, the class
  filter, `train`, and by layer the samples decided (`nc4_split`).

## Presets

`--preset` sets defaults of these options; an option given beside it wins.

| preset | m_G | p | ddof | class ddof | NC1 / K | samples of NC4 | after |
|---|---|---|---|---|---|---|---|
| none | of class means | 1 | 0 | 1 | yes | test, or train without one | |
| `papyan2020` | of class means | 1 | 0 | 1 | no | train | the notebook to Papyan, Han & Donoho 2020 |
| `wu2024` | of class means | 2 | 0 | 1 | yes | test, or train without one | Wu & Papyan 2024, language models |

The notebook's names: `Sw_invSb` is `nc1_svd` (and `nc1_pinv` where S_B has rank K - 1), `norm_M_CoV` `nc2_norm_cv`, `norm_W_CoV`
`nc2_weight_norm_cv`, `cos_M` `nc2_cos_dev_mean`, `W_M_dist` `nc3_papyan`, `NCC_mismatch` 1 - `nc4_agree`. Its `cos_W` is not measured.

## The table

"reads" names what a metric needs beside counts and class means: `traces` and `scatter` come with the same read,
`pairs.*` from one sweep over pairs of means, `decisions` from a read of the test split, `ood` from a read of the OOD split,
`test` and `directional` from a read that only naming the metric causes. Cost: **A** counts, sums and traces; **B** A and
the D x D scatter, same read; **C** a second read; **P** the pair sweep. "yardsticks" are variables named `<metric>_floor`,
`<metric>_random` and, with `--null`, `<metric>_null`.

| name | what it is | formula | units | reads | cost | yardsticks | source |
|---|---|---|---|---|---|---|---|"""

_PAGE_TAIL = """
## Yardsticks

- **floor**: what geometry does not let the value fall below. K vectors in D < K - 1 dimensions cannot be a simplex ETF:
  `nc2_etf_err` and `nc3_dual_err` >= sqrt(2 - 2 sqrt(D/(K-1))). Welch: `nc2_coherence` >= sqrt((K-D)/(D(K-1))).
- **random**: the value for class means from N(m, tau^2 I) and S_W = sigma^2 I, with V_c and the traces of S_W and S_B as measured,
  and for classifier rows whose directions know nothing of the means; closed forms in `ncbatch/metrics/yardsticks.py`. With K far above D
  raw values sit next to it: the difference is what was learnt. What each takes for granted:
  - angles (`nc2g_*` but the Riesz energies, `nc2_cos_*`, `nc2_uniformity`): any K and D. Subtracting the unweighted m_G correlates two means by -1/(K-1), so that the
    cosine is distributed as a sample correlation; one quadrature over its density gives all. A variance, standard deviation or log of a
    mean is that of one pair over draws. Over the pairs of one set it is the same within 1 % from K = 10 on, and lower for
    fewer: K = 3, D = 64 and D = 2, `nc2g_dist` by 0.5 % and 5 %, `nc2g_log` by 1 % and 17 %, `nc2_cos_std` by 12 % and 9 %, and
    `nc2_uniformity` by 0.005 and 1.0.
  - `nc2_etf_err`: exact for K = 2 and for one feature, within 1 % elsewhere. `nc3_dual_err`: within 0.5 %.
  - `nc1_pinv`, `nc1_svd`, `nc1_cdnv`, `nc1_cdnv_directional`, `nc1_v_ratio_mean`, `nc2_norm_mean`: exact for any K and D for which the moment
    exists (K > D + 2 or D > K; D > 2p), with tr S_B as measured. `nc2_norm_var`, `nc2_norm_cv`, `nc2_lognorm_var`: within 2 % from K = 10 on,
    11 % off for K = 3 in two dimensions.
  - `nc2g_riesz_mean`, `nc2g_riesz_log_mean`: typical values, not expectations. For D above about 10 the expectation is that of pairs so
    near that no set of K means has one: K = 1500, D = 256 have a log mean of about -57, the expectation is -0.17. The least of the
    K (K-1) / 2 distances is taken at its median and the others at the expectation beyond it, pairs counted as independent. For K from 3 to 1500
    and D from 3 to 768 the log mean is within a quarter of a standard deviation of the median of simulated draws. That standard deviation is
    0.1 to 4 (K = 10, D = 30: -8.01 for a median of -8.06, standard deviation 1.3), and values within two of it are those of chance.
  - with `--weighted` and classes of unequal size m_G is another point than the mean of class means: what is computed from Mc or u
    (`nc1_pinv`, `nc1_svd`, `nc1_v_ratio_mean`, NC2, `spec_between_participation`) has no random value. `nc1_cdnv` and `nc1_cdnv_directional`
    do not depend on m_G, nor do their random values; those of NC3 and NC5 hold about any point.
  - no value: what is a maximum, a minimum or a quantile, and what the measured traces determine alone.
- **null** (`--null`): the metric itself for labels drawn anew, row by row, from the distribution of labels, in the same read.
  The draw of a row depends on its number and `--null-seed` only. Its scatter needs no second product:
  S_W' N = T - sum_c n'_c (m'_c - x)(m'_c - x)^T, where T, the scatter about the sample mean x, does not depend on labels.

## Known answers

Exact simplex ETF of norm s, S_W = sigma^2 I, D >= K - 1: `nc1_pinv` = sigma^2 (K-1)^2 / (K s^2), `nc1_quot` = D sigma^2 / s^2,
`nc1_cdnv` = D sigma^2 (K-1) / (2 K s^2), `nc1_cdnv_directional` = `nc1_cdnv` / D, `nc1_vci` = sigma^2 / (sigma^2 + s^2/(K-1)),
`nc2_etf_err` = 0, `nc2g_dist_mean` = sqrt(2K/(K-1)), `nc2g_log_mean` = -log(2K/(K-1))/2, ranks of S_B = K - 1.
Labels at random, n per class: `nc1_pinv` ~ (n-1) D / (K-D-2), `nc1_quot` = (n-1) K/(K-1), `nc1_cdnv` = (n-1) D / (2 (D-2)).
W = 2M with b = -|m|^2: `nc4_agree` = 1. Two classes at distance d, isotropic sigma: nearest-mean error Phi(-d / (2 sigma)).

## By class and by decile

`decile_*` are over tenths of the classes used, from the rarest (1) to the most frequent (10): rates weigh classes by their
samples, everything else weighs them equally. `--per-class` adds `class_*` over dim `class` (all K; NaN where not used).
"""
