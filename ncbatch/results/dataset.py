"""Cells: the results of a layer of a store, arranged as a Dataset with coordinates, and back."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt
import xarray as xr

from ncbatch.store.place import absolute

if TYPE_CHECKING:
    from ncbatch.metrics.metric import Metric
    from ncbatch.store.feature_store import FeatureStore

Place: TypeAlias = tuple[str, str]  # a store's name, and a layer of it

KIND = "ncbatch results"
# V < 0.1 d^2: the radius of a class is under a third of its distance to another, so that by
# Chebyshev's inequality at most 4 V / d^2 of its samples, four in ten, can be beyond the middle,
# whatever their law.
COLLAPSE_BELOW = 0.1
# More layers than these are not named one by one.
_MOST_NAMED = 4
_WORDS = {"epoch": "epoch"} | dict.fromkeys(("step", "checkpoint", "ckpt", "iteration"), "step")
_NAMED = re.compile(
    rf"(?<![a-z])({'|'.join(_WORDS)})s?[-_=]?(\d+)(?![\da-z])", re.IGNORECASE | re.ASCII
)

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
# What has a dimension beside store and layer, by its name.
VECTORS: Mapping[str, Mapping[str, str]] = {
    "decile": DECILES,
    "class": CLASSES,
    "bin": {"cosine_histogram": "pairs of classes per bin of cos(u_i, u_j)"},
    "top": {
        "top_cosine": "greatest cosines between class means",
        "top_cosine_i": "first class of the pair of top_cosine",
        "top_cosine_j": "second class of the pair of top_cosine",
        "top_cdnv": "greatest class-distance normalised variances",
        "top_cdnv_i": "first class of the pair of top_cdnv",
        "top_cdnv_j": "second class of the pair of top_cdnv",
    },
}
# The roles of variables that have no dimension beside store and layer.
_SCALARS = ("metric", "yardstick", "provenance")
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
    "n_classes_without_variance": "classes left out of V_c: one sample has none of ddof 1",
    "rank": "rank of S_B",
    "smallest_ratio": "smallest eigenvalue of S_B kept, over the largest",
}


@dataclass
class Cell:
    """The results of one layer of one store.

    Attributes
    ----------
    values : dict of str to float
        Of metrics, their yardsticks and what is counted, by the names of variables.
    vectors : dict of str to array
        What is given per class, per decile of classes, per bin, or for the top pairs.
    reasons : dict of str to str
        Why a metric has no value.
    texts : dict of str to str
        Of what, how and when it was measured; of ``remarks`` and ``warnings`` every line is one.
    """

    values: dict[str, float] = field(default_factory=dict)
    vectors: dict[str, npt.NDArray[np.float64]] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)

    def lines(self, name: str) -> list[str]:
        """Return the lines of a text."""
        return [line for line in self.texts.get(name, "").splitlines() if line]

    def merged(self, later: Cell) -> Cell:
        """Return what was measured of the same data at two times; the later one wins."""
        values = self.values | later.values
        reasons = {
            name: why for name, why in (self.reasons | later.reasons).items() if name not in values
        }
        texts = self.texts | later.texts
        for name in ("remarks", "warnings"):
            lines = dict.fromkeys([*self.lines(name), *later.lines(name)])
            if lines:
                texts[name] = "\n".join(lines)
        return Cell(values, self.vectors | later.vectors, reasons, texts)


def to_dataset(
    cells: Mapping[Place, Cell],
    stores: Sequence[str],
    layers: Sequence[str],
    metrics: Iterable[Metric],
    attributes: Mapping[str, str | int | float],
    coordinates: Mapping[str, Any] | None = None,
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
    coordinates : mapping, optional
        More coordinates, over ``store`` or over both dims.
    """
    rows = [stores.index(store) for store, _ in cells]
    columns = [layers.index(layer) for _, layer in cells]
    names = set[str]().union(*(cell.values for cell in cells.values()))
    # A cell at a time, which is twice as fast as a name at a time; None becomes NaN.
    table = np.array([list(map(cell.values.get, names)) for cell in cells.values()], np.float64)
    scalars = dict(zip(names, table.T, strict=True))
    lengths = _lengths(cells)
    variables: dict[str, Any] = {}
    for name, about in _descriptions(metrics):
        dimension = about["role"]
        if dimension in VECTORS:
            if name in lengths:
                length = max(lengths.get(other, 0) for other in VECTORS[dimension])
                grid = np.full((len(stores), len(layers), length), math.nan)
                for row, column, cell in zip(rows, columns, cells.values(), strict=True):
                    vector = cell.vectors.get(name, ())
                    grid[row, column, : len(vector)] = vector
                variables[name] = (("store", "layer", dimension), grid, about)
        elif dimension == "metric" or name in scalars:
            grid = np.full((len(stores), len(layers)), math.nan)
            grid[rows, columns] = scalars.get(name, math.nan)
            if dimension == "metric":
                about |= _undefined(cells, name)
            variables[name] = (("store", "layer"), grid, about)
    axes: dict[str, Any] = {"store": list(stores), "layer": list(layers), **(coordinates or {})}
    if lengths.keys() & DECILES.keys():
        axes["decile"] = np.arange(1, 11)
    if "cosine_histogram" in variables:
        edges = np.linspace(-1.0, 1.0, lengths["cosine_histogram"] + 1)
        axes["bin"] = 0.5 * (edges[1:] + edges[:-1])
    return xr.Dataset(variables, axes, {"kind": KIND, **attributes, **_texts(cells)})


def _descriptions(metrics: Iterable[Metric]) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield every variable that results can have, in order, with its attributes."""
    for metric in metrics:
        copied = ("long_name", "units", "formula", "source")
        yield metric.name, {**{key: getattr(metric, key) for key in copied}, "role": "metric"}
        for suffix, meaning in YARDSTICKS.items():
            about = {"long_name": f"{meaning} {metric.long_name}", "units": metric.units}
            yield f"{metric.name}_{suffix}", {**about, "role": "yardstick"}
    for role, meanings in {"provenance": COUNTS, **VECTORS}.items():
        for name, meaning in meanings.items():
            yield name, {"long_name": meaning, "units": "1", "role": role}


def _lengths(cells: Mapping[Place, Cell]) -> dict[str, int]:
    """Find the greatest length of every vector."""
    lengths: dict[str, int] = {}
    for cell in cells.values():
        for name, vector in cell.vectors.items():
            lengths[name] = max(lengths.get(name, 0), len(vector))
    return lengths


def _undefined(cells: Mapping[Place, Cell], name: str) -> dict[str, str]:
    """Write why a metric has no value as one text, which `_reasons_in` takes apart."""
    reasons = [
        f"{store}/{layer}: {cell.reasons[name].replace('; ', ', ')}"
        for (store, layer), cell in cells.items()
        if name in cell.reasons
    ]
    return {"undefined": "; ".join(reasons)} if reasons else {}


def _texts(cells: Mapping[Place, Cell]) -> dict[str, str]:
    """Write what differs between cells as JSON, since attributes must be flat."""
    nested: dict[str, dict[str, dict[str, Any]]] = {}
    for (store, layer), cell in cells.items():
        counts = {
            name: int(value) if value.is_integer() else value
            for name, value in cell.values.items()
            if name in COUNTS
        }
        for name, value in {**cell.texts, **counts}.items():
            nested.setdefault(name, {}).setdefault(store, {})[layer] = value
    return {name: json.dumps(by_store) for name, by_store in nested.items()}


def cells_of(dataset: xr.Dataset) -> dict[Place, Cell]:
    """Take a Dataset apart into the cells that `to_dataset` arranged.

    Parameters
    ----------
    dataset : xarray.Dataset
        From `to_dataset`, or loaded.

    Returns
    -------
    dict of (store, layer) to Cell
        Of those that were measured.
    """
    texts = _texts_in(dataset)
    cells = {
        (store, layer): Cell()
        for store, by_layer in texts.get("fingerprint", {}).items()
        for layer in by_layer
    }
    stores: list[str] = dataset["store"].values.tolist()
    layers: list[str] = dataset["layer"].values.tolist()
    rows = [stores.index(store) for store, _ in cells]
    columns = [layers.index(layer) for _, layer in cells]
    for name, variable in dataset.data_vars.items():
        role = variable.attrs.get("role")
        if role not in _SCALARS and role not in VECTORS:
            continue
        values = variable.transpose("store", "layer", ...).values[rows, columns]
        known = ~np.isnan(values) if role in _SCALARS else ~np.isnan(values).all(axis=-1)
        for cell, value, holds in zip(cells.values(), values, known, strict=True):
            if holds and role in _SCALARS:
                cell.values[str(name)] = float(value)
            elif holds:
                cell.vectors[str(name)] = value
        for at, why in _reasons_in(variable, cells):
            cells[at].reasons[str(name)] = why
    for name, by_store in texts.items():
        for store, by_layer in by_store.items():
            for layer, text in by_layer.items():
                if name not in COUNTS and (store, layer) in cells:
                    cells[store, layer].texts[name] = str(text)
    return cells


def _texts_in(dataset: xr.Dataset) -> dict[str, dict[str, dict[str, Any]]]:
    """Find the attributes that hold a value per store and layer."""
    return {
        str(name): json.loads(text)
        for name, text in dataset.attrs.items()
        if str(text).startswith("{") and name not in ("store_id", "store_path")
    }


def _reasons_in(variable: xr.DataArray, places: Iterable[Place]) -> Iterator[tuple[Place, str]]:
    """Take the text of `_undefined` apart."""
    by_name = {f"{store}/{layer}": (store, layer) for store, layer in places}
    for part in str(variable.attrs.get("undefined", "")).split("; "):
        # Names may hold colons too: the one that is known counts.
        ends = [match.start() for match in re.finditer(": ", part)]
        end = next((end for end in ends if part[:end] in by_name), None)
        if end is not None:
            yield by_name[part[:end]], part[end + 2 :]


def metric_names(dataset: xr.Dataset) -> list[str]:
    """Name the metrics among a result's variables, in order."""
    return [str(name) for name in dataset.filter_by_attrs(role="metric")]


def column_names(dataset: xr.Dataset) -> list[str]:
    """Name the metrics and their yardsticks, in order."""
    wanted = dataset.filter_by_attrs(role=lambda role: role in ("metric", "yardstick"))
    return [str(name) for name in wanted]


def notes_of(cells: Mapping[Place, Cell]) -> list[str]:
    """Say once what is left out, or taken from elsewhere, at which layers; then the warnings."""
    layers_of: dict[str, dict[str, None]] = {}
    for (_, layer), cell in cells.items():
        for line in cell.lines("remarks"):
            layers_of.setdefault(line, {})[layer] = None
    lines = []
    for line, layers in layers_of.items():
        why, _, what = line.partition(": ")
        lines.append(f"{why} for {named_layers(list(layers))}: {what}")
    warnings = [line for cell in cells.values() for line in cell.lines("warnings")]
    return lines + list(dict.fromkeys(warnings))


def named_layers(layers: Sequence[str]) -> str:
    """Name layers in a sentence; of many the first, the last and their number.

    Examples
    --------
    >>> named_layers(["a", "b"])
    'layers a, b'
    >>> named_layers([f"h.{i}" for i in range(12)])
    'layers h.0, h.1, ..., h.11 (12 in all)'
    """
    if len(layers) > _MOST_NAMED:
        return f"layers {layers[0]}, {layers[1]}, ..., {layers[-1]} ({len(layers)} in all)"
    return f"layer{'s' if len(layers) > 1 else ''} {', '.join(layers)}"


# Sweeps: what is known of the stores and layers of a run, and the depth at which collapse sets in.


@dataclass(frozen=True)
class StoreNotes:
    """What is known of a store.

    Attributes
    ----------
    path, id : str
        Where it is, wherever a process runs, and which it is.
    model : str or None
        The model that made its features.
    step : int or None
        The training step of it.
    unit : str
        What the step counts: ``step`` or ``epoch``.
    source : str
        ``recorded``, or ``name`` when the step was read off the store's name.
    depths : dict of str to float
        For layers, the share of the model's blocks that come before.
    """

    path: str = ""
    id: str = ""
    model: str | None = None
    step: int | None = None
    unit: str = "step"
    source: str = "recorded"
    depths: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, store: FeatureStore) -> StoreNotes:
        """Find what a store records, or else what its name shows of the step."""
        depths = {
            layer: float(notes["depth"])
            for layer, notes in store.layer_notes.items()
            if "depth" in notes
        }
        notes = cls(absolute(store.path), store.id, store.model, store.step, depths=depths)
        named = step_in_name(store.path) if store.step is None else None
        if named is None:
            return notes
        return replace(notes, step=named[0], unit=named[1], source="name")


def step_in_name(path: str) -> tuple[int, str] | None:
    """Read a step off a path's last part, or the one before it.

    Returns
    -------
    (int, str) or None
        The number, and what it counts.

    Examples
    --------
    >>> step_in_name("runs/step-1000.zarr")
    (1000, 'step')
    >>> step_in_name("runs/epoch3/features.zarr")
    (3, 'epoch')
    >>> step_in_name("runs/resnet18.zarr")
    """
    parts = [part for part in re.split(r"[/\\]", path) if part]
    steps = _NAMED.findall("/".join(parts[-2:]))
    if not steps:
        return None
    word, number = steps[-1]
    return int(number), _WORDS[word.lower()]


def coordinates(
    notes: Mapping[str, StoreNotes], stores: Sequence[str], layers: Sequence[str]
) -> dict[str, Any]:
    """Make the coordinates ``step`` and ``model`` (store), ``depth`` (store, layer), where known.

    Steps read off names are left out where they count another thing than the steps of other
    stores: a coordinate never mixes epochs and steps.
    """
    known = [notes.get(store, StoreNotes()) for store in stores]
    coords: dict[str, Any] = {}
    units = {note.unit for note in known if note.step is not None}
    unit = "step" if "step" in units else "epoch"
    steps = [note.step if note.unit == unit else None for note in known]
    sources = {
        store: note.source
        for store, note, step in zip(stores, known, steps, strict=True)
        if step is not None
    }
    if sources:
        about = {"long_name": f"training {unit}", "units": unit, "source": json.dumps(sources)}
        # None becomes NaN; whole numbers stay what they are where all are known.
        values = np.array(steps, np.int64 if len(sources) == len(stores) else np.float64)
        coords["step"] = ("store", values, about)
    if any(note.model is not None for note in known):
        models = [note.model or "" for note in known]
        coords["model"] = ("store", models, {"long_name": "model that made the features"})
    depths = [[note.depths.get(layer, math.nan) for layer in layers] for note in known]
    if depths and not np.isnan(depths).all():
        about = {
            "long_name": "share of the model's blocks that come before the layer",
            "units": "1",
        }
        coords["depth"] = (("store", "layer"), np.array(depths), about)
    return coords


def notes_in(dataset: xr.Dataset) -> dict[str, StoreNotes]:
    """Read what is known of each store off a Dataset's coordinates and attributes."""
    paths, ids = (json.loads(dataset.attrs[name]) for name in ("store_path", "store_id"))
    coords = {str(name): coord.values.tolist() for name, coord in dataset.coords.items()}
    about = dataset["step"].attrs if "step" in coords else {"source": "{}"}
    sources: dict[str, str] = json.loads(about["source"])
    notes = {}
    for i, store in enumerate(coords["store"]):
        depths = zip(coords["layer"], coords["depth"][i], strict=True) if "depth" in coords else ()
        note = StoreNotes(
            paths[store],
            ids[store],
            coords["model"][i] or None if "model" in coords else None,
            depths={name: depth for name, depth in depths if not math.isnan(depth)},
        )
        if store in sources:
            step = int(coords["step"][i])
            note = replace(note, step=step, unit=str(about["units"]), source=sources[store])
        notes[store] = note
    return notes


def with_collapse(dataset: xr.Dataset, below: float | None) -> xr.Dataset:
    """Add the first layer of each store, in order of depth, whose CDNV is under a threshold.

    Parameters
    ----------
    dataset : xarray.Dataset
        Results; without ``nc1_cdnv`` it is given back as it is.
    below : float, optional
        The threshold of ``nc1_cdnv``; `COLLAPSE_BELOW` by default, where the exponent is 1.

    Returns
    -------
    xarray.Dataset
        With the coordinate ``collapse_layer`` (store), empty where there is none, and the variable
        ``collapse_depth`` (store), NaN where there is none or depths are unknown; layers are taken
        in their order then.
    """
    if "nc1_cdnv" not in dataset:
        return dataset
    exponent = float(dataset.attrs.get("dist_exp", 1.0))
    limit = COLLAPSE_BELOW if below is None and exponent == 1.0 else below
    layers = dataset["layer"].values.tolist()
    values = dataset["nc1_cdnv"].values
    depths = dataset["depth"].values if "depth" in dataset.coords else np.full_like(values, np.nan)
    about: dict[str, Any] = {"role": "sweep"}
    if limit is None:
        reason = f"no threshold: the CDNV of exponent {exponent:g} depends on the scale"
        firsts = [("", math.nan, reason)] * len(values)
    else:
        firsts = [_first_below(layers, *of, limit) for of in zip(values, depths, strict=True)]
        about["threshold"] = float(limit)
    names, places, reasons = zip(*firsts, strict=True)
    if any(reasons):
        stores = dataset["store"].values.tolist()
        parts = [f"{s}: {why}" for s, why in zip(stores, reasons, strict=True) if why]
        about["undefined"] = "; ".join(parts)
    text = "layer at which collapse sets in: the first whose nc1_cdnv is under the threshold"
    # A name is no number: as a coordinate it is in nobody's way who computes with the variables.
    dataset = dataset.assign_coords(
        collapse_layer=("store", np.array(names, dtype=str), {"long_name": text, **about})
    )
    about = {"long_name": "depth at which collapse sets in", "units": "1", **about}
    return dataset.assign(collapse_depth=("store", np.array(places), about))


def _first_below(
    layers: Sequence[str],
    values: npt.NDArray[np.float64],
    depths: npt.NDArray[np.float64],
    limit: float,
) -> tuple[str, float, str]:
    """Return a store's first layer under the limit, its depth, and why either is missing."""
    measured = np.flatnonzero(~np.isnan(values))
    if not len(measured):
        return "", math.nan, "nc1_cdnv has no value"
    known = not np.isnan(depths[measured]).any()
    order = measured[np.argsort(depths[measured], kind="stable")] if known else measured
    first = next((i for i in order if values[i] < limit), None)
    if first is None:
        least = measured[np.argmin(values[measured])]
        nearest = f"least nc1_cdnv {values[least]:.3g} at {layers[least]}"
        return "", math.nan, f"no layer under {limit:g}, {nearest}"
    if not known:
        return layers[first], math.nan, "depths are not recorded, layers taken in their order"
    return layers[first], float(depths[first]), ""
