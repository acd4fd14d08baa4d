"""Results as files: saved whole or not at all, and loaded."""

from __future__ import annotations

import csv
import json
import math
import os
import warnings
from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path
from tempfile import TemporaryFile

import dask
import xarray as xr
from zarr.core.buffer import Buffer
from zarr.storage import MemoryStore

from ncbatch.arrays.atomic import replacing
from ncbatch.errors import OutputError
from ncbatch.results.dataset import KIND, column_names
from ncbatch.store.format import ATTRIBUTE

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
    if target.suffix == ".zarr":
        if target.exists() and not _is_result(target):
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
    # Into memory first: a thread's turn for each of a thousand small files takes longer than all.
    files: dict[str, Buffer] = {}
    with warnings.catch_warnings():
        # zarr 3.0 warns that its string type is young; zarr and xarray both read it back.
        warnings.filterwarnings("ignore", message=".*does not have a Zarr V3 specification")
        dataset.to_zarr(MemoryStore(files), zarr_format=3, consolidated=False)
    for name, content in files.items():
        file = path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content.to_bytes())


def _write_netcdf(dataset: xr.Dataset, path: Path) -> None:
    # Else xarray loads distributed, only to ask whether a cluster of it runs.
    with dask.config.set(scheduler="synchronous"):
        # Coordinates first: a dimension that gets its values later is attached anew everywhere.
        dataset[[]].assign(dataset.data_vars).to_netcdf(str(path), engine="h5netcdf")


def _lines(dataset: xr.Dataset) -> Iterator[tuple[str, str, tuple[float | None, ...]]]:
    """Yield every store and layer with its values, None where there is none."""
    columns = []
    for name in column_names(dataset):
        grid = dataset[name].transpose("store", "layer").values.ravel().tolist()
        columns.append([None if math.isnan(value) else value for value in grid])
    places = product(dataset["store"].values.tolist(), dataset["layer"].values.tolist())
    for (store, layer), values in zip(places, zip(*columns, strict=True), strict=True):
        yield store, layer, values


def _write_csv(dataset: xr.Dataset, path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["store", "layer", *column_names(dataset)])
        # Floats are written so that they round-trip, None as an empty cell.
        writer.writerows([store, layer, *values] for store, layer, values in _lines(dataset))


def _write_json(dataset: xr.Dataset, path: Path) -> None:
    # Laid out as by json.dumps(indent=1), which would leave its compiled encoder for it.
    names = column_names(dataset)
    nested: dict[str, dict[str, str]] = {}
    for store, layer, values in _lines(dataset):
        text = json.dumps(dict(zip(names, values, strict=True)), separators=(",\n   ", ": "))
        nested.setdefault(store, {})[layer] = f"{{\n   {text[1:-1]}\n  }}"
    stores = {store: _json_object(by_layer, 2) for store, by_layer in nested.items()}
    path.write_text(_json_object(stores, 1) + "\n", encoding="utf-8")


def _json_object(texts: Mapping[str, str], depth: int) -> str:
    """Join values that are JSON already."""
    lines = [f"{' ' * depth}{json.dumps(name)}: {text}" for name, text in texts.items()]
    return "{\n" + ",\n".join(lines) + f"\n{' ' * (depth - 1)}}}"
