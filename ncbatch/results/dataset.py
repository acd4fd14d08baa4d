"""Cells: the results of a layer of a store, and their arrangement as an xarray Dataset and back."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray as xr

from ncbatch.metrics.metric import Metric
from ncbatch.store.feature_store import FeatureStore

# Sweeps: what is known of the stores and layers of a run, and the depth at which collapse sets in.


# V < 0.1 d^2: the radius of a class is under a third of its distance to another, so that by Chebyshev's
# inequality at most 4 V / d^2 of its samples, four in ten, can be beyond the middle, whatever their law.
COLLAPSE_BELOW = 0.1
_WORDS = {"epoch": "epoch"} | dict.fromkeys(("step", "checkpoint", "ckpt", "iteration"), "step")
_NAMED = re.compile(
    rf"(?<![a-z])({'|'.join(_WORDS)})s?[-_=]?(\d+)(?![\da-z])", re.IGNORECASE | re.ASCII
)
_RECORDED = "recorded"


@dataclass(frozen=True)
class StoreNotes:
    """What is known of a store.

    Attributes
    ----------
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

    model: str | None = None
    step: int | None = None
    unit: str = "step"
    source: str = _RECORDED
    depths: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, store: FeatureStore) -> StoreNotes:
        """Find what a store records, or else what its name shows of the step."""
        depths = {
            layer: float(notes["depth"])
            for layer, notes in store.layer_notes.items()
            if "depth" in notes
        }
        if store.step is not None:
            return cls(store.model, store.step, depths=depths)
        named = step_in_name(store.path)
        if named is None:
            return cls(store.model, depths=depths)
        return cls(store.model, named[0], named[1], "name", depths)


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
    for part in reversed(parts[-2:]):
        found = _NAMED.findall(part)
        if found:
            word, number = found[-1]
            return int(number), _WORDS[word.lower()]
    return None


def coordinates(
    notes: Mapping[str, StoreNotes], stores: Sequence[str], layers: Sequence[str]
) -> dict[str, Any]:
    """Give the coordinates ``step`` and ``model`` (store), ``depth`` (store, layer), where known.

    Steps read off names are left out where they count another thing than the steps of other
    stores: a coordinate never mixes epochs and steps.
    """
    known = [notes.get(store, StoreNotes()) for store in stores]
    found: dict[str, Any] = {}
    stepped = {
        store: note for store, note in zip(stores, known, strict=True) if note.step is not None
    }
    units = {note.unit for note in stepped.values()}
    if len(units) > 1:
        stepped = {store: note for store, note in stepped.items() if note.unit == "step"}
    if stepped:
        steps = [stepped[store].step if store in stepped else None for store in stores]
        values: Any = (
            np.array(steps, np.int64)
            if None not in steps
            else np.array([math.nan if step is None else step for step in steps])
        )
        unit = next(iter(stepped.values())).unit
        about = {
            "long_name": f"training {unit}", "units": unit,
            "source": json.dumps({store: note.source for store, note in stepped.items()}),
        }  # fmt: skip
        found["step"] = ("store", values, about)
    if any(note.model is not None for note in known):
        models = [note.model or "" for note in known]
        found["model"] = ("store", models, {"long_name": "model that made the features"})
    depths = [[note.depths.get(layer, math.nan) for layer in layers] for note in known]
    if depths and not np.isnan(depths).all():
        about = {
            "long_name": "share of the model's blocks that come before the layer",
            "units": "1",
        }
        found["depth"] = (("store", "layer"), np.array(depths), about)
    return found


def notes_in(dataset: xr.Dataset) -> dict[str, StoreNotes]:
    """Take the coordinates of a Dataset apart into what is known of each store."""
    found = {}
    source: dict[str, str] = {}
    if "step" in dataset.coords:
        source = json.loads(dataset["step"].attrs["source"])
    for store in dataset["store"].values.tolist():
        at = dataset.sel(store=store)
        model = str(at["model"].values) if "model" in dataset.coords else ""
        depths = {}
        if "depth" in dataset.coords:
            pairs = zip(at["layer"].values.tolist(), at["depth"].values.tolist(), strict=True)
            depths = {layer: depth for layer, depth in pairs if not math.isnan(depth)}
        step = int(at["step"]) if store in source else None
        unit = str(dataset["step"].attrs["units"]) if store in source else "step"
        found[store] = StoreNotes(model or None, step, unit, source.get(store, _RECORDED), depths)
    return found


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
        ``collapse_depth`` (store), NaN where there is none or depths are unknown; layers are taken in their order then.
    """
    if "nc1_cdnv" not in dataset:
        return dataset
    scale_free = float(dataset.attrs.get("dist_exp", 1.0)) == 1.0
    limit = COLLAPSE_BELOW if below is None and scale_free else below
    places, depths, reasons = [], [], {}
    for store in dataset["store"].values.tolist():
        layer, depth, reason = _first_below(dataset.sel(store=store), limit)
        places.append(layer)
        depths.append(depth)
        if reason:
            reasons[store] = reason
    about: dict[str, Any] = {"role": "sweep"}
    if limit is not None:
        about["threshold"] = float(limit)
    if reasons:
        about["undefined"] = "; ".join(f"{store}: {why}" for store, why in reasons.items())
    text = "layer at which collapse sets in: the first whose nc1_cdnv is under the threshold"
    # A name is no number: as a coordinate it is in nobody's way who computes with the variables.
    dataset = dataset.assign_coords(
        collapse_layer=("store", np.array(places, dtype=str), {"long_name": text, **about})
    )
    long_name = "depth at which collapse sets in"
    return dataset.assign(
        collapse_depth=("store", np.array(depths), {"long_name": long_name, "units": "1", **about})
    )


def _first_below(found: xr.Dataset, limit: float | None) -> tuple[str, float, str]:
    """Give a store's first layer under the limit, its depth, and why either is missing."""
    layers, values = found["layer"].values.tolist(), found["nc1_cdnv"].values
    measured = [i for i in range(len(layers)) if not math.isnan(values[i])]
    if limit is None:
        exponent = f"{float(found.attrs['dist_exp']):g}"
        return "", math.nan, f"no threshold: the CDNV of exponent {exponent} depends on the scale"
    if not measured:
        return "", math.nan, "nc1_cdnv has no value"
    depths = found["depth"].values if "depth" in found.coords else np.full(len(layers), math.nan)
    known = not np.isnan(depths[measured]).any()
    order = sorted(measured, key=lambda i: float(depths[i])) if known else measured
    first = next((i for i in order if values[i] < limit), None)
    if first is None:
        least = min(measured, key=lambda i: float(values[i]))
        return "", math.nan, (
            f"no layer under {limit:g}, least nc1_cdnv {values[least]:.3g} at {layers[least]}"
        )  # fmt: skip
    if not known:
        return layers[first], math.nan, "depths are not recorded, layers taken in their order"
    return layers[first], float(depths[first]), ""


KIND = "ncbatch results"
# More layers than these are not named one by one.
_MOST_NAMED = 4

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
    "n_classes_without_variance": "classes left out of V_c: one sample has none of ddof 1",
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
            about["undefined"] = _joined(reasons)
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
    axes: dict[str, Any] = {"store": list(stores), "layer": list(layers), **(coordinates or {})}
    if any(cell.deciles for cell in cells.values()):
        axes["decile"] = np.arange(1, 11)
    if "cosine_histogram" in variables:
        edges = np.linspace(-1.0, 1.0, variables["cosine_histogram"][1].shape[-1] + 1)
        axes["bin"] = 0.5 * (edges[1:] + edges[:-1])
    return xr.Dataset(
        variables,
        coords=axes,
        attrs={"kind": KIND, **attributes, **_per_cell(cells)},
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


def _joined(reasons: Mapping[str, str]) -> str:
    """Write reasons by place as one text, which `_reasons_of` takes apart."""
    return "; ".join(f"{at}: {why.replace('; ', ', ')}" for at, why in reasons.items())


def cells_of(dataset: xr.Dataset) -> dict[tuple[str, str], Cell]:
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
    texts = _texts_of(dataset)
    measured = [
        (store, layer) for store, found in texts.get("fingerprint", {}).items() for layer in found
    ]
    cells = {at: Cell(notes=[]) for at in measured}
    picks = {"metric": "values", "yardstick": "yardsticks", "provenance": "counts"}
    vectors = {"decile": "deciles", "class": "classes", "bin": "bins", "top": "tops"}
    for name, variable in dataset.data_vars.items():
        role = variable.attrs.get("role")
        if role not in picks and role not in vectors:
            continue
        for (store, layer), cell in cells.items():
            found = dataset[name].sel(store=store, layer=layer).values
            if role in picks and not math.isnan(found):
                getattr(cell, picks[role])[str(name)] = float(found)
            elif role in vectors and not np.isnan(found).all():
                getattr(cell, vectors[role])[str(name)] = found
        if role == "metric":
            for (store, layer), why in _reasons_of(variable, measured).items():
                cells[store, layer].reasons[str(name)] = why
    for name, by_store in texts.items():
        for store, by_layer in by_store.items():
            for layer, text in by_layer.items():
                if name not in COUNTS and (store, layer) in cells:
                    cells[store, layer].texts[name] = str(text)
    for cell in cells.values():
        cell.notes += [line for line in cell.texts.get("warnings", "").splitlines() if line]
    return cells


def _texts_of(dataset: xr.Dataset) -> dict[str, dict[str, dict[str, Any]]]:
    """Find the attributes that hold a value per store and layer."""
    found = {}
    for name, text in dataset.attrs.items():
        if isinstance(text, str) and text.startswith("{"):
            nested = json.loads(text)
            if all(isinstance(by_layer, dict) for by_layer in nested.values()):
                found[str(name)] = nested
    return found


def _reasons_of(
    variable: xr.DataArray, places: Sequence[tuple[str, str]]
) -> dict[tuple[str, str], str]:
    """Take the text of `_joined` apart."""
    by_name = {f"{store}/{layer}": (store, layer) for store, layer in places}
    found = {}
    for part in str(variable.attrs.get("undefined", "")).split("; "):
        at = next((at for at in by_name if part.startswith(f"{at}: ")), None)
        if at is not None:
            found[by_name[at]] = part.removeprefix(f"{at}: ")
    return found


def merged(earlier: Cell, later: Cell) -> Cell:
    """Add to a cell what an earlier measurement of the same data gave beside it."""
    whole = Cell(notes=list(dict.fromkeys([*earlier.notes, *later.notes])))
    for pick in ("values", "yardsticks", "deciles", "classes", "bins", "tops", "counts", "texts"):
        setattr(whole, pick, {**getattr(earlier, pick), **getattr(later, pick)})
    reasons = {**earlier.reasons, **later.reasons}
    whole.reasons = {name: why for name, why in reasons.items() if name not in whole.values}
    for name in ("remarks", "warnings"):
        lines = [x for c in (earlier, later) for x in c.texts.get(name, "").splitlines() if x]
        if lines:
            whole.texts[name] = "\n".join(dict.fromkeys(lines))
    return whole


def notes_of(cells: Mapping[tuple[str, str], Cell]) -> list[str]:
    """Say once what is left out, or taken from elsewhere, at which layers; then the warnings."""
    places: dict[str, list[str]] = {}
    for (_, layer), cell in cells.items():
        for line in filter(None, cell.texts.get("remarks", "").splitlines()):
            layers = places.setdefault(line, [])
            if layer not in layers:
                layers.append(layer)
    said = []
    for line, layers in places.items():
        why, _, what = line.partition(": ")
        said.append(f"{why} for {named_layers(layers)}: {what}")
    return said + list(dict.fromkeys(note for cell in cells.values() for note in cell.notes))


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
