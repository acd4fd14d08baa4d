"""Choosing what is measured: stores, layers, splits, classes and the metrics that they allow."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

from ncbatch.errors import DataError, UsageError
from ncbatch.layer import Options, check_classes
from ncbatch.metrics import Metric, find_metrics
from ncbatch.rows import Selection, count_labels, select_classes
from ncbatch.store import FeatureStore, Split
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
    if named:
        _refuse_impossible(wanted, tasks)
    return tasks


def _tasks(
    name: str,
    store: FeatureStore,
    layers: list[str] | None,
    options: Options,
    wanted: list[Metric],
    scanned: bool,
) -> list[LayerTask]:
    train = store.split(options.train)
    test = _optional_split(store, options.test, "test")
    ood = _optional_split(store, options.ood, "ood")
    names = train.layers if layers is None else layers
    if not names:
        raise DataError(f"split '{train.name}' of {store.path} has no complete layer")
    for layer in names:
        train.feature(layer)
    selection = _selection(train, options) if scanned else None
    tasks = []
    for layer in names:
        decided = test if test is not None and layer in test.features else train
        outside = ood if ood is not None and layer in ood.features and ood.n_rows else None
        if scanned and outside is not None and not outside.n_samples:
            outside = None
        applied, missing = _applicable(store, layer, train, decided, outside, wanted)
        tasks.append(
            LayerTask(
                name,
                store,
                layer,
                options,
                train,
                decided,
                outside,
                tuple(metric.name for metric in applied),
                {why: tuple(metric.name for metric in lost) for why, lost in missing.items()},
                selection,
            )
        )
    return tasks


def _selection(train: Split, options: Options) -> Selection:
    """Choose the classes used, from the labels."""
    selection = select_classes(
        count_labels(train),
        min_count=options.min_count,
        max_count=options.max_count,
        classes=options.classes,
    )
    if not selection.counts.any():
        raise DataError(
            f"split '{train.name}' of {train.where} has no rows",
            "labelled rows",
            "dump or import some",
        )
    check_classes(len(selection.classes), train, "with these filters" if selection.filtered else "")
    return selection


def _optional_split(store: FeatureStore, asked: str | None, default: str) -> Split | None:
    if asked is not None:
        return store.split(asked)
    return store.split(default) if default in store.splits else None


def _applicable(
    store: FeatureStore,
    layer: str,
    train: Split,
    decided: Split,
    ood: Split | None,
    wanted: list[Metric],
) -> tuple[list[Metric], dict[str, list[Metric]]]:
    """Split metrics into those that the store's contents allow, and the rest by reason."""
    has_classifier = layer in store.classifiers
    lacking = {
        "classifier": None if has_classifier else "no classifier",
        "decisions": None
        if has_classifier or decided.head == layer
        else "no classifier and no predictions",
        "ood": None if ood is not None else "no out-of-distribution split",
        "test": None if decided.name != train.name else "no test split",
    }
    applied: list[Metric] = []
    missing: dict[str, list[Metric]] = {}
    for metric in wanted:
        why = next((lacking[r] for r in sorted(metric.reads) if lacking.get(r)), None)
        if why is None:
            applied.append(metric)
        else:
            missing.setdefault(why, []).append(metric)
    return applied, missing


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
