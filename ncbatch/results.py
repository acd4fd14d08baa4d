"""Results: values with their provenance as an xarray Dataset, saved and loaded."""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray as xr

from ncbatch.errors import OutputError
from ncbatch.metrics import Metric
from ncbatch.store.format import ATTRIBUTE

ENDINGS = (".zarr", ".nc", ".csv", ".json")
_KIND = "ncbatch results"

# Suffixes of yardsticks, with what they are.
YARDSTICKS: Mapping[str, str] = {
    "floor": "least possible",
    "random": "value for Gaussian class means of",
    "null": "value for labels at random of",
}
# What is given per class, and per decile of classes by their samples (1: the rarest tenth).
CLASSES: Mapping[str, str] = {
    "class_n_samples": "samples in train",
    "class_norm": "norm of the centred mean",
    "class_variance": "mean squared distance to the mean",
    "class_nearest": "class of the nearest mean",
    "class_nearest_distance": "distance to the nearest mean",
    "class_nearest_cdnv": "normalised variance with the nearest class",
    "class_cos": "cosine of classifier row and centred mean",
    "class_n_decided": "samples decided",
    "class_agreement": "share of samples on which nearest mean and classifier agree",
    "class_ncc_accuracy": "share of samples whose nearest mean is their own",
    "class_clf_accuracy": "share of samples that the classifier gets right",
}
DECILES: Mapping[str, str] = {
    name.replace("class_", "decile_"): f"{meaning}, over a tenth of the classes"
    for name, meaning in CLASSES.items()
    if name != "class_nearest"
}
# What is given per bin of the cosine, and for the most confusable pairs of classes.
BINS: Mapping[str, str] = {"cosine_histogram": "pairs of classes per bin of cos(u_i, u_j)"}
TOPS: Mapping[str, str] = {
    "top_cosine": "greatest cosines between class means",
    "top_cosine_i": "first class of the pair of top_cosine",
    "top_cosine_j": "second class of the pair of top_cosine",
    "top_cdnv": "greatest class-distance normalised variances",
    "top_cdnv_i": "first class of the pair of top_cdnv",
    "top_cdnv_j": "second class of the pair of top_cdnv",
}
# What is counted per (store, layer), with what it means.
COUNTS: Mapping[str, str] = {
    "n_samples": "samples of the classes used, in train",
    "n_classes": "classes used (K)",
    "n_classes_unseen": "classes without a sample in train",
    "n_classes_filtered": "classes seen in train but left out by a filter",
    "n_rows_skipped": "rows left out because a feature was not finite",
    "n_decided": "samples that nc4_agree was measured on",
    "n_coincident_pairs": "pairs of classes left out of ratios: their means coincide",
    "n_coincident_directions": "pairs of classes left out of logarithms: their directions coincide",
    "n_means_without_direction": "classes left out of cosines: their mean equals m_G",
    "rank": "rank of S_B",
    "smallest_ratio": "smallest eigenvalue of S_B kept, over the largest",
}


@dataclass
class Cell:
    """The results of one layer of one store."""

    values: dict[str, float] = field(default_factory=dict)
    yardsticks: dict[str, float] = field(default_factory=dict)
    deciles: dict[str, npt.NDArray[np.float64]] = field(default_factory=dict)
    classes: dict[str, npt.NDArray[np.float64]] = field(default_factory=dict)
    bins: dict[str, npt.NDArray[np.float64]] = field(default_factory=dict)
    tops: dict[str, npt.NDArray[np.float64]] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def to_dataset(
    cells: Mapping[tuple[str, str], Cell],
    stores: Sequence[str],
    layers: Sequence[str],
    metrics: Iterable[Metric],
    attributes: Mapping[str, str | int | float],
) -> xr.Dataset:
    """Arrange cells over dims (store, layer).

    Parameters
    ----------
    cells : mapping of (store, layer) to Cell
        What was measured; a missing cell is NaN.
    stores, layers : sequence of str
        The coordinates.
    metrics : iterable of Metric
        The metrics asked for; those without any value are kept, with the reasons.
    attributes : mapping
        Provenance that holds for all cells.
    """

    def grid(pick: str, name: str) -> tuple[tuple[str, str], Any]:
        values = np.full((len(stores), len(layers)), math.nan)
        for (store, layer), cell in cells.items():
            found = getattr(cell, pick).get(name, math.nan)
            values[stores.index(store), layers.index(layer)] = found
        return ("store", "layer"), values

    variables: dict[str, Any] = {}
    for metric in metrics:
        about = {
            "long_name": metric.long_name,
            "units": metric.units,
            "formula": metric.formula,
            "source": metric.source,
            "role": "metric",
        }
        reasons = {
            f"{store}/{layer}": cell.reasons[metric.name]
            for (store, layer), cell in cells.items()
            if metric.name in cell.reasons
        }
        if reasons:
            about["undefined"] = "; ".join(f"{at}: {why}" for at, why in reasons.items())
        variables[metric.name] = (*grid("values", metric.name), about)
        for suffix, meaning in YARDSTICKS.items():
            name = f"{metric.name}_{suffix}"
            if any(name in cell.yardsticks for cell in cells.values()):
                about = {"long_name": f"{meaning} {metric.long_name}", "units": metric.units}
                variables[name] = (*grid("yardsticks", name), {**about, "role": "yardstick"})
    for name, meaning in COUNTS.items():
        if any(name in cell.counts for cell in cells.values()):
            about = {"long_name": meaning, "units": "1", "role": "provenance"}
            variables[name] = (*grid("counts", name), about)
    variables |= _vectors(cells, stores, layers, "deciles", "decile", DECILES)
    variables |= _vectors(cells, stores, layers, "classes", "class", CLASSES)
    variables |= _vectors(cells, stores, layers, "bins", "bin", BINS)
    variables |= _vectors(cells, stores, layers, "tops", "top", TOPS)
    coordinates: dict[str, Any] = {"store": list(stores), "layer": list(layers)}
    if any(cell.deciles for cell in cells.values()):
        coordinates["decile"] = np.arange(1, 11)
    if "cosine_histogram" in variables:
        edges = np.linspace(-1.0, 1.0, variables["cosine_histogram"][1].shape[-1] + 1)
        coordinates["bin"] = 0.5 * (edges[1:] + edges[:-1])
    return xr.Dataset(
        variables,
        coords=coordinates,
        attrs={"kind": _KIND, **attributes, **_per_cell(cells)},
    )


def _vectors(
    cells: Mapping[tuple[str, str], Cell],
    stores: Sequence[str],
    layers: Sequence[str],
    pick: str,
    dimension: str,
    meanings: Mapping[str, str],
) -> dict[str, Any]:
    """Arrange what cells hold per class, or per decile, over dims (store, layer, dimension)."""
    variables: dict[str, Any] = {}
    length = max(
        (len(v) for cell in cells.values() for v in getattr(cell, pick).values()), default=0
    )
    for name, meaning in meanings.items():
        if any(name in getattr(cell, pick) for cell in cells.values()):
            values = np.full((len(stores), len(layers), length), math.nan)
            for (store, layer), cell in cells.items():
                found = getattr(cell, pick).get(name, np.empty(0))
                values[stores.index(store), layers.index(layer), : len(found)] = found
            about = {"long_name": meaning, "units": "1", "role": dimension}
            variables[name] = (("store", "layer", dimension), values, about)
    return variables


def _per_cell(cells: Mapping[tuple[str, str], Cell]) -> dict[str, str]:
    """Write what differs between cells as JSON texts, since attributes must be flat."""
    nested: dict[str, dict[str, dict[str, Any]]] = {}
    for (store, layer), cell in cells.items():
        for name, value in {**cell.texts, **cell.counts}.items():
            if isinstance(value, float) and value.is_integer():
                value = int(value)
            nested.setdefault(name, {}).setdefault(store, {})[layer] = value
    return {name: json.dumps(by_store) for name, by_store in nested.items()}


def metric_names(dataset: xr.Dataset) -> list[str]:
    """Name the metrics among a result's variables, in order."""
    return [str(n) for n, v in dataset.data_vars.items() if v.attrs.get("role") == "metric"]


def column_names(dataset: xr.Dataset) -> list[str]:
    """Name the metrics and their yardsticks, in order."""
    roles = ("metric", "yardstick")
    return [str(n) for n, v in dataset.data_vars.items() if v.attrs.get("role") in roles]


def check_output(path: str | os.PathLike[str]) -> Path:
    """Check that results can be written to `path`, before any work is done.

    Raises
    ------
    OutputError
        For an unknown ending, a folder that is missing or not writable, or something at the path
        that is no earlier result.
    """
    target = Path(path)
    if target.suffix not in ENDINGS:
        raise OutputError(f"output '{target}'", "a name that ends in " + ", ".join(ENDINGS))
    parent = target.absolute().parent
    inside = next((p for p in (parent, *parent.parents) if (p / "zarr.json").is_file()), None)
    if inside is not None:
        raise OutputError(
            f"output '{target}' lies inside the Zarr store '{inside}'", "another place"
        )
    if not parent.is_dir():
        raise OutputError(f"no folder '{parent}' for output '{target}'", "", "create it first")
    try:
        with TemporaryFile(dir=parent):  # permissions alone do not tell
            pass
    except OSError as error:
        raise OutputError(
            f"folder '{parent}' cannot be written to: {error.strerror}", "", "choose another --out"
        ) from error
    if target.suffix == ".zarr" and target.exists():
        if not _is_result(target):
            raise OutputError(
                f"'{target}' exists and holds no results",
                "a free path, or earlier results to replace",
            )
    elif target.is_dir():
        raise OutputError(f"output '{target}' is a folder", "a file's path")
    return target


def save_results(dataset: xr.Dataset, path: str | os.PathLike[str]) -> None:
    """Save results by the ending of `path`: ``.zarr``, ``.nc``, ``.csv`` or ``.json``.

    The file appears complete or not at all. CSV has one line per (store, layer), and an empty
    cell where a metric does not apply; JSON nests store, layer and metric, with null there.

    Raises
    ------
    OutputError
        When the results cannot be written.
    """
    target = check_output(path)
    writers = {".zarr": _write_zarr, ".nc": _write_netcdf, ".csv": _write_csv, ".json": _write_json}
    with _replacing(target) as partial:
        writers[target.suffix](dataset, partial)


def load_results(path: str | os.PathLike[str]) -> xr.Dataset:
    """Load results that were saved as ``.zarr`` or ``.nc``.

    Raises
    ------
    OutputError
        When there are none.
    """
    target = Path(path)
    if target.suffix == ".nc" and target.is_file():
        return xr.load_dataset(target, engine="h5netcdf")
    if target.suffix == ".zarr" and target.is_dir():
        return xr.load_dataset(target, engine="zarr", consolidated=False)
    raise OutputError(f"no results at '{target}'", "an existing .zarr or .nc")


def _is_result(target: Path) -> bool:
    try:
        attributes = json.loads((target / "zarr.json").read_text())["attributes"]
    except (OSError, ValueError, KeyError):
        return False
    return attributes.get("kind") == _KIND and ATTRIBUTE not in attributes


@contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """Give a path to write to that takes the target's name when all went well."""
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        yield partial
        if target.is_dir():
            old = target.with_name(f".{target.name}.{os.getpid()}.old")
            target.rename(old)
            partial.rename(target)
            shutil.rmtree(old)
        else:
            partial.replace(target)
    except OSError as error:
        raise OutputError(f"output '{target}' cannot be written: {error}") from error
    finally:
        if partial.is_dir():
            shutil.rmtree(partial)
        partial.unlink(missing_ok=True)


def _write_zarr(dataset: xr.Dataset, path: Path) -> None:
    with warnings.catch_warnings():
        # zarr 3.0 warns that its string type is young; zarr and xarray both read it back.
        warnings.filterwarnings("ignore", message=".*does not have a Zarr V3 specification")
        dataset.to_zarr(path, zarr_format=3, consolidated=False)


def _write_netcdf(dataset: xr.Dataset, path: Path) -> None:
    dataset.to_netcdf(str(path), engine="h5netcdf")


def _rows(dataset: xr.Dataset) -> Iterator[tuple[str, str, dict[str, float | None]]]:
    names = column_names(dataset)
    for store in dataset["store"].values.tolist():
        for layer in dataset["layer"].values.tolist():
            found = dataset.sel(store=store, layer=layer)
            values = {name: float(found[name]) for name in names}
            yield store, layer, {n: None if math.isnan(v) else v for n, v in values.items()}


def _write_csv(dataset: xr.Dataset, path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["store", "layer", *column_names(dataset)])
        for store, layer, values in _rows(dataset):
            cells = ["" if v is None else repr(v) for v in values.values()]
            writer.writerow([store, layer, *cells])


def _write_json(dataset: xr.Dataset, path: Path) -> None:
    nested: dict[str, dict[str, dict[str, float | None]]] = {}
    for store, layer, values in _rows(dataset):
        nested.setdefault(store, {})[layer] = values
    path.write_text(json.dumps(nested, indent=1) + "\n", encoding="utf-8")
