"""Sweeps: what is known of the stores and layers of a run, and the depth at which collapse sets in."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xarray as xr

from ncbatch.store import FeatureStore

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
