"""Choosing what is measured: stores, layers, splits, classes and the metrics that they allow."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from ncbatch.arrays.devices import find_device
from ncbatch.arrays.namespace import Array
from ncbatch.arrays.rows import StoredRows
from ncbatch.engine.kept import About
from ncbatch.errors import DataError, StoreError, UsageError, unknown_name
from ncbatch.measurement.options import Options
from ncbatch.measurement.samples import (
    DECISIONS,
    MOMENTS,
    Selection,
    SummedSplit,
    count_labels,
    select_classes,
)
from ncbatch.metrics.catalogue import CATALOGUE, find_metrics
from ncbatch.metrics.metric import Metric
from ncbatch.store.feature_store import FeatureStore
from ncbatch.store.place import absolute
from ncbatch.store.split import Split

AnySplit: TypeAlias = Split | SummedSplit

NO_SAMPLES = "no samples of split '{}', only their moments"
# Changed when kept states of earlier versions would no longer be right.
_STATE_VERSION = 2


@dataclass(frozen=True)
class Layer:
    """One layer of one store, and how it shall be measured.

    Attributes
    ----------
    name : str
        The store's name in the results.
    store : FeatureStore
        The store.
    layer : str
        The layer.
    options : Options
        How to measure.
    train, decided, ood : Split or SummedSplit
        The splits of class means, of decisions, and of outside data, if there is one; each with
        the layer's features, or with finished states in their place.
    metric_names : tuple of str
        What is measured.
    missing : dict of str to tuple of str
        Metrics that the store's contents rule out, by reason.
    selection : Selection or None
        The classes used; None in a plan, which reads no labels.
    lacking_test : str or None
        The test split, where it exists and lacks the layer: `decided` is train then.
    """

    name: str
    store: FeatureStore
    layer: str
    options: Options
    train: AnySplit
    decided: AnySplit
    ood: AnySplit | None
    metric_names: tuple[str, ...]
    missing: dict[str, tuple[str, ...]]
    selection: Selection | None = None
    lacking_test: str | None = None

    @property
    def metrics(self) -> list[Metric]:
        """What is measured."""
        return [CATALOGUE[name] for name in self.metric_names]

    @property
    def where(self) -> str:
        """Store and layer, for a person."""
        return f"{self.name}/{self.layer}"

    @cached_property
    def fingerprint(self) -> str:
        """What the features, labels and classes used amount to."""
        return self.train.fingerprint(self.layer, self.selected.digest)

    @property
    def selected(self) -> Selection:
        """The classes used, once labels were read."""
        assert self.selection is not None
        return self.selection

    @cached_property
    def reads(self) -> frozenset[str]:
        """Statistics that the metrics need."""
        return frozenset[str]().union(*(metric.reads for metric in self.metrics))

    @cached_property
    def quantities(self) -> frozenset[str]:
        """Quantities of the pair sweep."""
        return frozenset[str]().union(*(metric.pair_quantities for metric in self.metrics))

    @property
    def null(self) -> bool:
        """Whether labels at random are measured: they are drawn as samples are read."""
        return self.options.null and isinstance(self.train, Split)

    @cached_property
    def null_quantities(self) -> frozenset[str]:
        """The same under labels at random."""
        chosen = [m for m in self.metrics if m.has_null] if self.null else []
        return frozenset[str]().union(*(metric.pair_quantities for metric in chosen))

    @property
    def has_classifier(self) -> bool:
        """Whether the store has a classifier of the layer."""
        return self.layer in self.store.classifiers

    @property
    def by_predictions(self) -> bool:
        """Whether stored predictions are the classifier's decisions."""
        return self.decided.head == self.layer

    @property
    def used_splits(self) -> dict[str, AnySplit]:
        """The splits that the metrics read, by their part in it."""
        used = {"train": self.train}
        if self.reads & {"decisions", "test"}:
            used["test"] = self.decided
        if "ood" in self.reads and self.ood is not None:
            used["ood"] = self.ood
        return used

    @property
    def remarks(self) -> list[str]:
        """Say what is left out or taken from elsewhere, a line of reason and consequence each."""
        applied = {metric.place for metric in self.metrics}
        found = []
        for why, lost in self.missing.items():
            # A kind of collapse is named as a whole where none of its metrics is left.
            names = [
                name if CATALOGUE[name].place in applied else CATALOGUE[name].place for name in lost
            ]
            found.append(f"{why}: {', '.join(dict.fromkeys(names))} left out")
        if self.options.null and not self.null:
            found.append(f"{NO_SAMPLES.format(self.train.name)}: labels at random left out")
        if "decisions" in self.reads and self.lacking_test:
            taken = f"NC4 takes the samples of '{self.decided.name}'"
            found.append(f"no test data in split '{self.lacking_test}': {taken}")
        return found

    @property
    def source(self) -> str:
        """Say what the splits were read as: features, states, or which is which."""
        kinds = {
            part: "features" if isinstance(split, Split) else "states"
            for part, split in self.used_splits.items()
        }
        if len(set(kinds.values())) == 1:
            return kinds["train"]
        return ", ".join(f"{part}: {kind}" for part, kind in kinds.items())

    def classifier(self, *, stored: bool) -> tuple[Array, Array | None]:
        """Read the classifier, or open it where it shall not be held in memory."""
        found = self.store.classifier(self.layer, lazily=stored)
        assert found is not None
        return found

    def check_chunks(self) -> None:
        """Refuse missing chunks in every split that will be read."""
        for split in {split.name: split for split in self.used_splits.values()}.values():
            split.check_chunks(self.layer)

    # ----------------------------------------------------------------------- what results depend on

    @property
    def deciding(self) -> str:
        """Fingerprint of what decides beside the class means: predictions or a classifier."""
        if isinstance(self.decided, SummedSplit):
            return self.decided.fingerprint(self.layer, kind=DECISIONS)
        if self.by_predictions:
            return self.decided.prediction_fingerprint()
        return self.store.classifier_fingerprint(self.layer)

    def split_fingerprint(self, split: AnySplit) -> str:
        """Give what a split's data amounts to; of train, the classes used too."""
        mine = split.name == self.train.name
        return self.fingerprint if mine else split.fingerprint(self.layer)

    @property
    def inputs(self) -> dict[str, str]:
        """Fingerprints of all that the values depend on, by what they are recorded under."""
        names = ["fingerprint"]
        if self.reads & {"decisions", "test"}:
            names.append("test_fingerprint")
        if "ood" in self.reads:
            names.append("ood_fingerprint")
        if self.has_classifier and self.reads & {"classifier", "decisions"}:
            names.append("classifier_fingerprint")
        if "decisions" in self.reads:
            names.append("deciding_fingerprint")
        return {name: found for name in names if (found := self.input(name)) is not None}

    def input(self, name: str) -> str | None:
        """Give a fingerprint of `inputs`, read or not; None where there is nothing of the kind."""
        if name == "fingerprint":
            return self.fingerprint
        if name == "test_fingerprint":
            return self.split_fingerprint(self.decided)
        if name == "ood_fingerprint":
            return None if self.ood is None else self.split_fingerprint(self.ood)
        if name == "classifier_fingerprint":
            return self.store.classifier_fingerprint(self.layer) if self.has_classifier else None
        stored = isinstance(self.decided, SummedSplit) and self.decided.has(self.layer, DECISIONS)
        return self.deciding if self.has_classifier or self.by_predictions or stored else None

    def about(self, state: str, split: AnySplit, **options: Any) -> About:
        """Say what a kept state is of, and what it depends on."""
        return {
            "state": state,
            "place": f"{self.store.path}/{split.name}/{self.layer}",
            "fingerprint": self.split_fingerprint(split),
            "precision": self.options.precision,
            "skip_nonfinite": self.options.skip_nonfinite,
            "device": self.options.device,
            "version": _STATE_VERSION,
            **options,
        }


def check_classes(n_classes: int, split: AnySplit, why: str) -> None:
    """Refuse to measure with fewer than two classes.

    Raises
    ------
    DataError
        Names the split, and `why` so few are left.
    """
    if n_classes < 2:
        found = f"{n_classes} class{'' if n_classes == 1 else 'es'} in split '{split.name}' of {split.where}"
        raise DataError(
            f"{found} {why}".rstrip(),
            "at least 2: collapse is measured between classes",
            "add samples of other classes, or loosen the class filter",
        )


def device_put(device: str, means: Array) -> Callable[[Any], Any]:
    """Give what brings arrays to where the class means are; means in a file stay on the host."""
    if isinstance(means, StoredRows):
        return lambda values: values
    return find_device(device).put


# What the contents of a store allow: metrics that can be measured, and the reasons of the others.


@dataclass(frozen=True)
class Contents:
    """What a store holds of a layer.

    Attributes
    ----------
    store : FeatureStore
        The store.
    layer : str
        The layer.
    train : Split or SummedSplit
        Where its class means come from.
    test, ood : Split, SummedSplit or None
        What is there of it in the splits of test and outside data.
    named : mapping of str to str or None
        The names of those splits, ``test`` and ``ood``, where they exist.
    selection : Selection or None
        The classes used; None in a plan.
    """

    store: FeatureStore
    layer: str
    train: AnySplit
    test: AnySplit | None
    ood: AnySplit | None
    named: dict[str, str | None]
    selection: Selection | None

    def part(self, wanted: list[Metric]) -> tuple[list[Metric], dict[str, list[Metric]]]:
        """Split metrics into those that can be measured, and the rest by reason."""
        lacking = {
            "classifier": None if self._has_classifier else "no classifier",
            "decisions": self._undecided(),
            "directional": None if isinstance(self.train, Split) else self._no_samples,
            "ood": None if self.ood is not None else self._absent("ood", "out-of-distribution"),
            "scatter": self._no_scatter(),
            "test": self._untested(),
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

    @property
    def _has_classifier(self) -> bool:
        return self.layer in self.store.classifiers

    @property
    def _no_samples(self) -> str:
        return NO_SAMPLES.format(self.train.name)

    def _absent(self, part: str, kind: str) -> str:
        name = self.named[part]
        return f"no {kind} split" if name is None else f"no {kind} data in split '{name}'"

    def _untested(self) -> str | None:
        if self.test is None or self.test.name == self.train.name:
            return self._absent("test", "test") if self.test is None else "no test split"
        if isinstance(self.test, SummedSplit) and not self.test.has(self.layer, MOMENTS):
            return f"no samples and no moments of split '{self.test.name}'"
        return None

    def _no_scatter(self) -> str | None:
        if not isinstance(self.train, SummedSplit):
            return None
        if not self.train.has_scatter(self.layer):
            return f"no scatter in the moments of split '{self.train.name}'"
        if self._drops_classes:
            return "the pooled scatter of some classes cannot be had from finished moments"
        return None

    def _undecided(self) -> str | None:
        decided = self.train if self.test is None else self.test
        if isinstance(decided, Split):
            decides = self._has_classifier or decided.head == self.layer
            return None if decides else "no classifier and no predictions"
        if not self._has_classifier and not decided.has(self.layer, DECISIONS):
            return "no classifier and no predictions"
        train = self.train if isinstance(self.train, SummedSplit) else None
        deciding = self.store.classifier_fingerprint(self.layer) if self._has_classifier else None
        reason = decided.undecided(train, self.layer, deciding)
        if not reason and self._drops_classes:
            return f"decisions of split '{decided.name}' are among all classes, not some"
        return reason or None

    @property
    def _drops_classes(self) -> bool:
        """Whether a filter leaves out a class that has samples; a plan takes it that none does."""
        chosen = self.selection
        return chosen is not None and len(chosen.classes) < int(np.count_nonzero(chosen.counts))


class Classes:
    """Chooses the classes used in a split of a store, by samples; labels are read once."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._of_rows: Selection | None = None

    def used(self, split: AnySplit, layer: str) -> Selection:
        """Give the classes used of a layer.

        Raises
        ------
        DataError
            When there are no samples, or fewer than two classes.
        """
        if isinstance(split, SummedSplit):
            return self._selected(split, split.counts(layer))
        if self._of_rows is None:
            self._of_rows = self._selected(split, count_labels(split))
        return self._of_rows

    def _selected(self, split: AnySplit, counts: npt.NDArray[np.int64]) -> Selection:
        options = self._options
        selection = select_classes(
            counts, min_count=options.min_count, max_count=options.max_count,
            classes=options.classes,
        )  # fmt: skip
        if not selection.counts.any():
            raise DataError(
                f"split '{split.name}' of {split.where} has no rows",
                "labelled rows",
                "dump or import some",
            )
        why = "with these filters" if selection.filtered else ""
        check_classes(len(selection.classes), split, why)
        return selection


def check_width(store: FeatureStore, layer: str, train: AnySplit) -> None:
    """Refuse moments of another width than the layer's classifier; with features this is long done.

    Raises
    ------
    DataError
        Names both widths.
    """
    if isinstance(train, SummedSplit) and layer in store.classifiers:
        arrays = {array.basename: array for array in store.classifier_arrays(layer)}
        width, own = int(arrays["weight"].shape[1]), train.spec(layer).n_features
        if width != own:
            raise DataError(
                f"moments of layer '{layer}' with {own} features in {store.path}",
                f"{width}, as its classifier there reads",
                "store the moments or the classifier under another layer",
            )


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
    whole = [absolute(path) for path in paths]
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
) -> list[Layer]:
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
) -> list[Layer]:
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
) -> Layer:
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
    return Layer(
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


def _refuse_impossible(wanted: list[Metric], tasks: Sequence[Layer]) -> None:
    """Refuse a metric that was named but that no store and layer allows."""
    for metric in wanted:
        if not any(metric in task.metrics for task in tasks):
            why = next(r for r, names in tasks[0].missing.items() if metric.name in names)
            raise DataError(
                f"metric '{metric.name}' cannot be measured: {why}",
                "a store that has what it reads",
                "see 'ncbatch metrics' for what each metric reads, 'ncbatch info' for what is there",
            )


def _refuse_absent(options: Options, tasks: Sequence[Layer]) -> None:
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
