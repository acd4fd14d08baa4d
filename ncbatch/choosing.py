"""Choosing what is measured: stores, layers, splits, classes and the metrics that they allow."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from ncbatch.allowing import Classes, Contents, check_width
from ncbatch.errors import DataError, StoreError, UsageError, unknown_name
from ncbatch.layer import AnySplit, Options
from ncbatch.metrics import Metric, find_metrics
from ncbatch.store import FeatureStore, Split
from ncbatch.summed import DECISIONS, MOMENTS, SummedSplit
from ncbatch.task import LayerTask

StoreLike: TypeAlias = FeatureStore | str | os.PathLike[str]


def store_names(paths: Sequence[str]) -> list[str]:
    """Name stores by the shortest suffix of their paths that tells them apart.

    Raises
    ------
    UsageError
        When a path is given twice.

    Examples
    --------
    >>> store_names(["/runs/a/features.zarr", "/runs/b/features.zarr"])
    ['a/features.zarr', 'b/features.zarr']
    """
    whole = [path if "://" in path else os.path.abspath(path) for path in paths]
    parts = [[part for part in path.split(os.sep) if part] for path in whole]
    for depth in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    twice = next(path for path in whole if whole.count(path) > 1)
    raise UsageError(f"store '{twice}' is given twice", "each store once")


def open_stores(stores: StoreLike | Sequence[StoreLike]) -> dict[str, FeatureStore]:
    """Open the stores of a run, by their names in its results."""
    if isinstance(stores, FeatureStore | str | os.PathLike):
        stores = [stores]
    if not stores:
        raise UsageError("no store to measure", "at least one")
    opened = [s if isinstance(s, FeatureStore) else FeatureStore.open(s) for s in stores]
    return dict(zip(store_names([s.path for s in opened]), opened, strict=True))


def wanted_metrics(metrics: Iterable[str] | None) -> tuple[list[Metric], bool]:
    """Find the metrics asked for, and whether they were named."""
    names = [metrics] if isinstance(metrics, str) else metrics
    return find_metrics(names), metrics is not None


def choose_tasks(
    opened: Mapping[str, FeatureStore],
    layers: Iterable[str] | None,
    options: Options,
    wanted: list[Metric],
    named: bool,
    *,
    scanned: bool,
) -> list[LayerTask]:
    """Make a task for every layer of every store.

    Parameters
    ----------
    opened : mapping of str to FeatureStore
        The stores by name.
    layers : iterable of str, or None
        Which layers; all of the train split by default.
    options : Options
        How to measure.
    wanted : list of Metric
        The metrics; those that a layer does not allow are left out there.
    named : bool
        Whether the user named them: one that no layer allows is refused then.
    scanned : bool
        Whether labels may be read; without, tasks know no classes.

    Raises
    ------
    UnknownNameError
        For a split or layer that does not exist.
    DataError
        When there is nothing to measure.
    """
    chosen = [layers] if isinstance(layers, str) else layers
    names = None if chosen is None else list(chosen)
    tasks = [
        task
        for name, store in opened.items()
        for task in _tasks(name, store, names, options, wanted, scanned)
    ]
    _refuse_absent(options, tasks)
    if named:
        _refuse_impossible(wanted, tasks)
    return tasks


@dataclass(frozen=True)
class _Place:
    """A split of a store: what is there with samples, and what as finished states."""

    rows: Split | None
    summed: SummedSplit

    @classmethod
    def find(cls, store: FeatureStore, name: str) -> _Place | None:
        """Find a split; None when the store has neither samples nor states of that name."""
        there = name in store.splits
        if not there and name not in store.state_splits:
            return None
        return cls(store.split(name) if there else None, SummedSplit(store, name))

    @property
    def name(self) -> str:
        """Its name."""
        return self.summed.name

    @property
    def layers(self) -> list[str]:
        """Layers with features in the order written, then those with moments."""
        features = [] if self.rows is None else self.rows.layers
        return [*features, *(x for x in self.summed.layers if x not in features)]

    def of(self, layer: str, *kinds: str) -> AnySplit | None:
        """Give what is there of a layer: features, or else a state of one of `kinds`."""
        if self.rows is not None and layer in self.rows.features:
            return self.rows
        return self.summed if any(self.summed.has(layer, kind) for kind in kinds) else None


def _tasks(
    name: str,
    store: FeatureStore,
    layers: list[str] | None,
    options: Options,
    wanted: list[Metric],
    scanned: bool,
) -> list[LayerTask]:
    train = _place(store, options.train, required=True)
    assert train is not None
    test = _place(store, options.test or "test", required=options.test is not None)
    ood = _place(store, options.ood or "ood", required=options.ood is not None)
    names = train.layers if layers is None else layers
    for place in (train, test, ood):
        if place is not None:
            _refuse_unmerged(store, place, layers)
    if not names:
        raise DataError(f"split '{train.name}' of {store.path} has no complete layer")
    classes = Classes(options) if scanned else None
    return [
        _task(name, store, layer, options, (train, test, ood), wanted, classes) for layer in names
    ]


def _refuse_unmerged(store: FeatureStore, place: _Place, layers: list[str] | None) -> None:
    """Refuse to measure the rest of a split as if it were all."""
    rows = () if place.rows is None else place.rows.features
    found = [
        layer
        for layer in place.summed.unmerged
        if layer not in rows and (layers is None or layer in layers)
    ]
    if found:
        raise StoreError(
            f"split '{place.name}' of {store.path} has unfinished moments of layers "
            f"{', '.join(found)}",
            "all processes ended, and their parts merged",
            f"'ncbatch finalize {store.path} --split {place.name}' merges them; resume processes "
            "that stopped; or name other layers",
        )


def _task(
    name: str,
    store: FeatureStore,
    layer: str,
    options: Options,
    places: tuple[_Place, _Place | None, _Place | None],
    wanted: list[Metric],
    classes: Classes | None,
) -> LayerTask:
    train_place, test, ood = places
    train = train_place.of(layer, MOMENTS)
    if train is None:
        raise unknown_name(
            "layer", layer, train_place.layers, f"split '{train_place.name}' of {store.path}"
        )
    check_width(store, layer, train)
    decided = None if test is None else test.of(layer, MOMENTS, DECISIONS)
    outside = None if ood is None else ood.of(layer, MOMENTS)
    if isinstance(outside, Split) and not (
        outside.n_rows and (classes is None or outside.n_samples)
    ):
        outside = None
    selection = None if classes is None else classes.used(train, layer)
    named = {"test": None if test is None else test.name, "ood": None if ood is None else ood.name}
    contents = Contents(store, layer, train, decided, outside, named, selection)
    applied, missing = contents.part(wanted)
    return LayerTask(
        name,
        store,
        layer,
        options,
        train,
        train if decided is None else decided,
        outside,
        tuple(metric.name for metric in applied),
        {why: tuple(metric.name for metric in lost) for why, lost in missing.items()},
        selection,
        None if test is None or decided is not None else test.name,
    )


def _place(store: FeatureStore, name: str, *, required: bool) -> _Place | None:
    found = _Place.find(store, name)
    if found is None and required:
        known = list(dict.fromkeys([*store.splits, *store.state_splits]))
        raise unknown_name("split", name, known, store.path)
    return found


def _refuse_impossible(wanted: list[Metric], tasks: list[LayerTask]) -> None:
    """Refuse a metric that was named but that no store and layer allows."""
    for metric in wanted:
        if not any(metric in task.metrics for task in tasks):
            why = next(r for r, names in tasks[0].missing.items() if metric.name in names)
            raise DataError(
                f"metric '{metric.name}' cannot be measured: {why}",
                "a store that has what it reads",
                "see 'ncbatch metrics' for what each metric reads, 'ncbatch info' for what is there",
            )


def _refuse_absent(options: Options, tasks: list[LayerTask]) -> None:
    """Refuse a split of test or outside data that was named and has none of the layers."""
    for name, has in (
        (options.test, [task.lacking_test is None for task in tasks]),
        (options.ood, [task.ood is not None for task in tasks]),
    ):
        if name is not None and not any(has):
            layers = ", ".join(dict.fromkeys(task.layer for task in tasks))
            raise DataError(
                f"nothing in split '{name}' of layer{'s' if ', ' in layers else ''} {layers}",
                "features or states of one of them at least",
                "see 'ncbatch info'; name another split, or layers that it has",
            )
