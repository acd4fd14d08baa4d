"""Listings for a person at a terminal: what is in a store."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from dask.utils import format_bytes
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from ncbatch.ingest.merging import PART, RUNNING
from ncbatch.store import FeatureStore


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
