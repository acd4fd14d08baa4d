"""Figures and a table of what `ncbatch.measure` found over layers and checkpoints.

`tiny_lm.py` and `hf_layerwise.py` share them. They need the coordinates ``depth`` (store, layer)
and, over training, ``step`` (store) that a store dumped from a language model gives to its results.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator
from rich.table import Table

# How a yardstick is drawn, and what the legend calls it.
YARDSTICKS = {
    "random": ("--", "Gaussian class means"),
    "null": ("-.", "labels at random"),
    "floor": (":", "least that geometry allows"),
}
SHARES = ("nc4_agree", "nc4_ncc_accuracy", "nc4_clf_accuracy")
SHARES_OF_DEPTH = {"0": 0, "¼": 0.25, "½": 0.5, "¾": 0.75, "1": 1}
# The head's input lies after the last block; it is drawn a little to the right of it.
HEAD = 1.12


def plot_over_depth(results: xr.Dataset, metrics: Sequence[str], title: str, path: Path) -> None:
    """Draw metrics over depth, a line per store, and the last store's yardsticks.

    Parameters
    ----------
    results : xarray.Dataset
        From `ncbatch.measure`, with the coordinate ``depth``.
    metrics : sequence of str
        Which of them; those that fewer than two layers have are left out.
    title : str
        What the figure is headed.
    path : path
        Where it goes, ``.png`` or ``.pdf``.
    """
    drawn = [m for m in metrics if m in results and count(results[m], "layer") > 1]
    figure, axes = panels(drawn, results)
    stores = results["store"].values.tolist()
    labels = store_labels(results)
    places = [places_of(results.sel(store=store)) for store in stores]
    colors = shades(len(stores))
    beyond = {HEAD: "head"} if any(HEAD in place for place in places) else {}
    for ax, name in zip(axes, drawn, strict=True):
        for store, place, color in zip(stores, places, colors, strict=True):
            line(ax, place, results[name].sel(store=store), color, "o-", label=labels[store])
        yardsticks(ax, results.sel(store=stores[-1]), name, places[-1])
        ax.set_xticks([*SHARES_OF_DEPTH.values(), *beyond], [*SHARES_OF_DEPTH, *beyond.values()])
    label_outer(axes, "depth (share of the blocks before)")
    several = len(stores) > 1
    measured_by = f"Yardsticks of {labels[stores[-1]]}" if several else "Yardsticks"
    finish(figure, axes, title, "checkpoint" if several else "", measured_by, path)


def plot_over_training(results: xr.Dataset, metrics: Sequence[str], title: str, path: Path) -> None:
    """Draw metrics over training steps, a line per layer, and the last layer's yardsticks.

    The arguments are those of `plot_over_depth`; `results` has the coordinate ``step``.
    """
    results = results.sortby("step")
    drawn = [m for m in metrics if m in results and count(results[m], "store") > 1]
    figure, axes = panels(drawn, results)
    layers = in_order(results.isel(store=-1))
    steps = np.asarray(results["step"].values, dtype=np.float64)
    for ax, name in zip(axes, drawn, strict=True):
        for layer, color in zip(layers, shades(len(layers)), strict=True):
            line(ax, steps, results[name].sel(layer=layer), color, "o-", label=short(layer))
        yardsticks(ax, results.sel(layer=layers[-1]), name, steps)
        first = steps[steps > 0].min()
        ax.set_xscale("symlog", linthresh=first, linscale=0.5)  # step 0 has a place, too
        ax.set_xlim(-0.2 * first, steps[-1] * 1.3)
        ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
        ax.xaxis.set_minor_locator(NullLocator())
    label_outer(axes, "training step")
    finish(figure, axes, title, "layer", f"Yardsticks of {short(layers[-1])}", path)


def depth_tables(results: xr.Dataset, metrics: Sequence[str]) -> list[Table]:
    """Lay out one store's metrics by depth, then those that one layer only has.

    Parameters
    ----------
    results : xarray.Dataset
        Results of one store, over ``layer``.
    metrics : sequence of str
        Which of them; those without any value are left out.
    """
    name = f"{results['store'].item()}, value (for Gaussian class means)"
    shown = [m for m in metrics if m in results and count(results[m], "layer") > 0]
    deep = [m for m in shown if count(results[m], "layer") > 1]
    tables = [
        table_over_depth(results, deep[first : first + 3], f"over depth: {name}")
        for first in range(0, len(deep), 3)  # so many fit a narrow terminal
    ]
    columns = ("metric", "what it is", "layer", "value")
    single = Table(*columns, title=f"at one layer: {name}", title_justify="left")
    for metric in (m for m in shown if m not in deep):
        layer = str(results["layer"].values[results[metric].notnull().values][0])
        about = str(results[metric].attrs.get("long_name", ""))
        single.add_row(metric, about, short(layer), number(results.sel(layer=layer), metric))
    return [*tables, single] if single.row_count else tables


def table_over_depth(results: xr.Dataset, metrics: Sequence[str], title: str) -> Table:
    """Lay out some metrics of one store, a line per layer."""
    table = Table("depth", "layer", title=title, title_justify="left")
    for metric in metrics:
        table.add_column(metric, justify="right", no_wrap=True)
    for layer in in_order(results):
        values = results.sel(layer=layer)
        cells = [number(values, metric) for metric in metrics]
        table.add_row(f"{float(values['depth']):.2f}", short(layer), *cells)
    return table


def in_order(results: xr.Dataset) -> list[str]:
    """List the layers that one store has, from the first to the last."""
    place = places_of(results)
    layers = [str(layer) for layer in results["layer"].values]
    return [layers[i] for i in np.argsort(place, kind="stable") if np.isfinite(place[i])]


def short(layer: str) -> str:
    """Name a layer by the last two parts of its module's path."""
    return ".".join(layer.split(".")[-2:])


def number(values: xr.Dataset, name: str) -> str:
    """Write a value with its random value behind it."""
    value, random = (
        float(values[key]) if key in values else math.nan for key in (name, f"{name}_random")
    )
    if math.isnan(value):
        return ""
    return f"{value:.3g}" if math.isnan(random) else f"{value:.3g} ({random:.3g})"


def only(results: xr.Dataset, metrics: Sequence[str]) -> xr.Dataset:
    """Leave out the metrics that are not shown, so that nothing is said of them."""
    named = [name for name, values in results.items() if values.attrs.get("role") == "metric"]
    return results.drop_vars([name for name in named if name not in metrics])


def count(values: xr.DataArray, dim: str) -> int:
    """Count the coordinates along `dim` that have any value."""
    other = [d for d in values.dims if d != dim]
    return int(values.notnull().any(other).sum())


def places_of(results: xr.Dataset) -> np.ndarray:
    """Place the layers of one store on the axis of depth."""
    depth = np.array(results["depth"].values, dtype=np.float64)
    is_input = np.array([str(layer).endswith(":input") for layer in results["layer"].values])
    return np.where(is_input & (depth == 1), HEAD, depth)


def store_labels(results: xr.Dataset) -> dict[str, str]:
    """Name stores in a legend: by step where that tells them apart, else by their own names."""
    stores = results["store"].values.tolist()
    steps = results["step"].values.tolist() if "step" in results.coords else []
    if len(set(steps)) < len(stores) or not np.isfinite(steps).all():
        return {store: str(store).removesuffix(".zarr") for store in stores}
    return {store: f"step {int(step):,}" for store, step in zip(stores, steps, strict=True)}


def shades(n: int) -> np.ndarray:
    """Choose n colors from light to dark."""
    return plt.get_cmap("viridis_r")(np.linspace(0.1, 1, n) if n > 1 else [1.0])


def panels(drawn: Sequence[str], results: xr.Dataset) -> tuple[Figure, list[Axes]]:
    """Make a panel per metric, three beside each other, headed with what the metric is."""
    columns = min(3, max(1, len(drawn)))
    rows = max(1, math.ceil(len(drawn) / columns))
    size = (4.1 * columns + 2.6, 3.5 * rows + 0.6)
    figure, grid = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    axes = list(grid.flat)
    for ax in axes[len(drawn) :]:
        ax.axis("off")
    for ax, name in zip(axes, drawn, strict=False):
        ax.set_title(name, fontweight="bold", pad=20)
        about = str(results[name].attrs.get("long_name", ""))
        ax.text(0.5, 1.025, about, transform=ax.transAxes, ha="center", fontsize=8)
        ax.grid(alpha=0.3)
        if name.startswith("nc1"):
            ax.set_yscale("log")
            ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
            ax.yaxis.set_minor_formatter(NullFormatter())
        elif name in SHARES:
            ax.set_ylim(0, 1.02)
    return figure, axes[: len(drawn)]


def line(
    ax: Axes, x: np.ndarray, values: xr.DataArray, color: object, style: str, label: str
) -> None:
    """Draw what there is of a line, in the order of x."""
    y = np.asarray(values.values, dtype=np.float64)
    known = np.flatnonzero(np.isfinite(x) & np.isfinite(y))
    order = known[np.argsort(x[known], kind="stable")]
    ax.plot(x[order], y[order], style, color=color, label=label, markersize=3.5)


def yardsticks(ax: Axes, results: xr.Dataset, name: str, x: np.ndarray) -> None:
    """Draw a metric's yardsticks where they exist."""
    for suffix, (style, _) in YARDSTICKS.items():
        if f"{name}_{suffix}" in results:
            line(ax, x, results[f"{name}_{suffix}"], "0.25", style, suffix)


def label_outer(axes: Sequence[Axes], text: str) -> None:
    """Label the horizontal axis of every panel."""
    for ax in axes:
        ax.set_xlabel(text)


def finish(
    figure: Figure, axes: Sequence[Axes], title: str, what: str, measured_by: str, path: Path
) -> None:
    """Add the legends of lines and of yardsticks to the right, and save."""
    lines: dict[str, object] = {}
    marks: dict[str, object] = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            (marks if label in YARDSTICKS else lines).setdefault(label, handle)
    known = [suffix for suffix in YARDSTICKS if suffix in marks]
    figure.legend(
        list(lines.values()), list(lines), title=what, loc="outside right upper", frameon=False
    )
    if known:
        figure.legend(
            [marks[suffix] for suffix in known],
            [YARDSTICKS[suffix][1] for suffix in known],
            title=fill(measured_by, 24, break_long_words=False),
            loc="outside right lower",
            frameon=False,
        )
    figure.suptitle(title, fontsize=13)
    figure.get_layout_engine().set(h_pad=0.12, w_pad=0.08)
    figure.savefig(path, dpi=110)
    plt.close(figure)
