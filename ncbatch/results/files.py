"""Results as files: saved whole or not at all, and loaded."""

from __future__ import annotations

import csv
import json
import math
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryFile

import xarray as xr

from ncbatch.arrays.atomic import replacing
from ncbatch.errors import OutputError
from ncbatch.results.dataset import KIND, column_names, metric_names
from ncbatch.store.format import ATTRIBUTE

__all__ = [
    "ENDINGS", "check_output", "column_names", "load_results", "metric_names", "save_results",
]  # fmt: skip

ENDINGS = (".zarr", ".nc", ".csv", ".json")


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
    try:
        with replacing(target) as temporary:
            writers[target.suffix](dataset, temporary)
    except OSError as error:
        raise OutputError(f"output '{target}' cannot be written: {error}") from error


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
    return attributes.get("kind") == KIND and ATTRIBUTE not in attributes


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
