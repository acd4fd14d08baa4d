"""Synthetic results of many stores and layers, as if they had been measured."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import xarray as xr

from ncbatch.metrics import CATALOGUE
from ncbatch.results.dataset import (
    COUNTS,
    DECILES,
    VECTORS,
    Cell,
    StoreNotes,
    coordinates,
    notes_of,
    to_dataset,
    with_collapse,
)
from ncbatch.store import FeatureStore

YARDSTICKS = ("random", "null")
FEW = ("nc1_pinv", "nc1_cdnv", "nc2_etf_err", "nc4_agree", "nc5_ood_dev")
EMPTY = ("nc5_ood_dev", "nc1_test_to_train")
TOPS = 16
LAYERS = ("h.0", "h.1", "h.2")
K, D = 4, 6


def make_cell(rng: np.random.Generator, metrics: Iterable[str]) -> Cell:
    """Make a layer's results: metrics with their yardsticks, counts, deciles, top pairs."""
    names = [name for name in metrics if name not in EMPTY]
    names += [f"{name}_{suffix}" for name in names for suffix in YARDSTICKS]
    values = dict(zip(names, rng.uniform(size=len(names)).tolist(), strict=True))
    values |= dict.fromkeys(COUNTS, 1000.0) | {"smallest_ratio": 0.25}
    vectors = {name: rng.uniform(size=10) for name in DECILES}
    vectors |= {name: rng.uniform(size=TOPS) for name in VECTORS["top"]}
    vectors["cosine_histogram"] = rng.uniform(size=64)
    texts = {name: rng.bytes(16).hex() for name in ("fingerprint", "classifier_fingerprint")}
    texts |= {"cell_version": "1", "cell_date": "2026-01-01T00:00:00+00:00", "source": "rows"}
    texts["remarks"] = "no out-of-distribution data: nc5_ood_dev is left out"
    return Cell(values, vectors, dict.fromkeys(EMPTY, "no split 'ood'"), texts)


def make_cells(
    n_stores: int, n_layers: int, metrics: Iterable[str] = FEW
) -> dict[tuple[str, str], Cell]:
    rng = np.random.default_rng(0)
    places = [(f"step-{i}.zarr", f"h.{j}") for i in range(n_stores) for j in range(n_layers)]
    return {place: make_cell(rng, metrics) for place in places}


def arranged(found: dict[tuple[str, str], Cell]) -> xr.Dataset:
    """Arrange cells as `ncbatch.measure` does."""
    stores, layers = (list(dict.fromkeys(names)) for names in zip(*found, strict=True))
    depths = {layer: j / len(layers) for j, layer in enumerate(layers)}
    notes = {
        store: StoreNotes(f"/runs/{store}", store, "toy", i, depths=depths)
        for i, store in enumerate(stores)
    }
    attributes = {
        "store_id": json.dumps({store: store for store in stores}),
        "store_path": json.dumps({store: f"/runs/{store}" for store in stores}),
        "dist_exp": 1.0,
        "notes": "\n".join(notes_of(found)),
    }
    named = {name for cell in found.values() for name in (*cell.values, *cell.reasons)}
    metrics = [metric for name, metric in CATALOGUE.items() if name in named]
    coords = coordinates(notes, stores, layers)
    dataset = to_dataset(found, stores, layers, metrics, attributes, coords)
    return with_collapse(dataset, None)


def make_store(
    path: Path, seed: int = 0, *, layers=LAYERS, spread=(3.0, 1.0, 0.2), splits=()
) -> FeatureStore:
    """Write a store whose layers are ever more collapsed."""
    rng = np.random.default_rng(seed)
    means = rng.normal(size=(K, D))
    store = FeatureStore.create(path, K, dict.fromkeys(layers, D), "float32")
    for name in ("train", *splits):
        y = np.arange(80) % K
        rows = {
            layer: (means[y] + s * rng.normal(size=(80, D))).astype("f4")
            for layer, s in zip(layers, spread, strict=False)
        }
        with store.writer(name) as writer:
            writer.append(rows, y)
    store.set_classifier(layers[-1], means)
    return store


def make_runs(folder: Path) -> list[Path]:
    """Write three checkpoints."""
    paths = [folder / f"step-{step}.zarr" for step in (100, 20, 3000)]
    for seed, path in enumerate(paths):
        make_store(path, seed)
    return paths


def make_dataset(values, depths=None, **attributes) -> xr.Dataset:
    n_stores, n_layers = np.shape(values)
    layers = [f"h.{j}" for j in range(n_layers)]
    coords = {"store": [f"s{i}" for i in range(n_stores)], "layer": layers}
    if depths is not None:
        coords["depth"] = (("store", "layer"), np.array(depths, float))
    dims = ("store", "layer")
    return xr.Dataset(
        {"nc1_cdnv": (dims, np.array(values, float), {"role": "metric"})},
        coords, {"dist_exp": 1.0, **attributes},
    )  # fmt: skip
