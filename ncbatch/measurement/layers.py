"""Which layers of which stores are measured, and what those stores have of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeAlias

from ncbatch.arrays.devices import find_device
from ncbatch.arrays.namespace import Array
from ncbatch.arrays.rows import StoredRows
from ncbatch.engine.kept import About
from ncbatch.errors import DataError, StoreError, UsageError, unknown_name
from ncbatch.measurement.finished import DECISIONS, MOMENTS, Finished, Source
from ncbatch.measurement.options import Options
from ncbatch.measurement.samples import Index, Samples, Selection, count_labels, select_classes
from ncbatch.metrics.catalogue import CATALOGUE
from ncbatch.metrics.metric import Metric
from ncbatch.store.feature_store import FeatureStore
from ncbatch.store.format import natural_key
from ncbatch.store.place import absolute
from ncbatch.store.split import Split

# Changed when kept states of earlier versions would no longer be right.
_STATE_VERSION = 2


@dataclass(frozen=True)
class Layer:
    """One layer of one store: what there is of it, what is measured of it, and how.

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
    train : Source
        Where class means come from.
    test, ood : Source or None
        What is there of it in the splits of test and outside data.
    test_split, ood_split : str or None
        The names of those splits, where they exist.
    selection : Selection or None
        The classes used; None in a plan, which reads no labels.
    metric_names : tuple of str
        What is measured.
    missing : dict of str to tuple of str
        Metrics that the store's contents rule out, by reason.
    """

    name: str
    store: FeatureStore
    layer: str
    options: Options
    train: Source
    test: Source | None
    ood: Source | None
    test_split: str | None
    ood_split: str | None
    selection: Selection | None
    metric_names: tuple[str, ...] = ()
    missing: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def where(self) -> str:
        """Store and layer, for a person."""
        return f"{self.name}/{self.layer}"

    @property
    def decided(self) -> Source:
        """Whose samples are decided: without a test split those of train."""
        return self.train if self.test is None else self.test

    @cached_property
    def has_classifier(self) -> bool:
        """Whether the store has a classifier of the layer; found once, it may be far away."""
        return self.layer in self.store.classifiers

    @cached_property
    def weight_bytes(self) -> int:
        """Bytes of an element of the classifier in memory; bfloat16 is read as float32."""
        weight = self.store.classifier_arrays(self.layer)[-1]
        return 4 if str(weight.dtype) == "bfloat16" else int(weight.dtype.itemsize)

    @property
    def selected(self) -> Selection:
        """The classes used, once labels were read."""
        assert self.selection is not None
        return self.selection

    @cached_property
    def n_used(self) -> int:
        """How many classes are used, or can be as far as metadata says."""
        if self.selection is not None:
            return len(self.selection.classes)
        n_used = min(self.store.n_classes, max(self.train.most_classes, 1))
        # A filter by counts may use all classes, as far as a plan can know.
        listed = self.options.classes
        return n_used if listed is None else min(n_used, len(set(listed)))

    # ---------------------------------------------------------------------------- what is measured

    @property
    def metrics(self) -> list[Metric]:
        """What is measured."""
        return [CATALOGUE[name] for name in self.metric_names]

    @cached_property
    def reads(self) -> frozenset[str]:
        """Statistics that the metrics need."""
        return frozenset[str]().union(*(metric.reads for metric in self.metrics))

    @property
    def null(self) -> bool:
        """Whether labels at random are measured: they are drawn as samples are read."""
        return self.options.null and self.train.no_samples is None

    def quantities(self, *, null: bool) -> frozenset[str]:
        """Find the quantities of the pair sweep, under the labels or under labels at random."""
        chosen = [m for m in self.metrics if not null or (self.null and m.has_null)]
        return frozenset[str]().union(*(metric.pair_quantities for metric in chosen))

    @property
    def weighs(self) -> bool:
        """Whether the classifier is read."""
        return self.has_classifier and bool(self.reads & {"classifier", "decisions"})

    @property
    def used(self) -> dict[str, Source]:
        """What the metrics read, by its part in it."""
        sources = {"train": self.train}
        if self.reads & {"decisions", "test"}:
            sources["test"] = self.decided
        if "ood" in self.reads and self.ood is not None:
            sources["ood"] = self.ood
        return sources

    @property
    def source(self) -> str:
        """Say what the splits were read as: features, states, or which is which."""
        kinds = {part: source.kind for part, source in self.used.items()}
        if len(set(kinds.values())) == 1:
            return kinds["train"]
        return ", ".join(f"{part}: {kind}" for part, kind in kinds.items())

    @property
    def incomplete(self) -> dict[str, str]:
        """What there is of splits whose writing has not ended, by the part they have."""
        parts = {part: source.incomplete for part, source in self.used.items()}
        return {part: there_is for part, there_is in parts.items() if there_is is not None}

    def check_complete(self) -> None:
        """Refuse splits whose writing has not ended; names the first."""
        for part, there_is in self.incomplete.items():
            raise DataError(
                f"split '{self.used[part].name}' of {self.where} is not complete: {there_is}",
                "complete splits, for results that are kept",
                "finish that writer with resume, or take what is there with --partial "
                "(partial=True)",
            )

    @property
    def remarks(self) -> list[str]:
        """Say what is left out or taken from elsewhere, a line of reason and consequence each."""
        applied = {metric.place for metric in self.metrics}
        lines = []
        for why, lost in self.missing.items():
            # A kind of collapse is named as a whole where none of its metrics is left.
            names = [
                name if CATALOGUE[name].place in applied else CATALOGUE[name].place for name in lost
            ]
            lines.append(f"{why}: {', '.join(dict.fromkeys(names))} left out")
        if self.options.null and not self.null:
            lines.append(f"{self.train.no_samples}: labels at random left out")
        for part, there_is in self.incomplete.items():
            name = self.used[part].name
            lines.append(f"split '{name}' is not complete, {there_is}: measured as it is")
        if "decisions" in self.reads and self.test is None and self.test_split is not None:
            taken = f"NC4 takes the samples of '{self.train.name}'"
            lines.append(f"no test data in split '{self.test_split}': {taken}")
        return lines

    # ------------------------------------------------------------------- why statistics are absent

    @property
    def absent(self) -> dict[str, str | None]:
        """Why statistics cannot be had, by their names; None for those that can."""
        # A plan, which knows no classes, takes it that a filter leaves out none with samples.
        drops_classes = self.selection is not None and self.selection.drops_classes
        no_test: str | None = "no test split"
        if self.test is None:
            no_test = _absent(self.test_split, "test")
        elif self.test.name != self.train.name:
            no_test = self.test.no_moments
        return {
            "scatter": self.train.no_scatter(drops_classes=drops_classes),
            "ood": _absent(self.ood_split, "out-of-distribution") if self.ood is None else None,
            "classifier": None if self.has_classifier else "no classifier",
            "decisions": self.decided.undecided(
                self.train, classifier=self.has_classifier, drops_classes=drops_classes
            ),
            "test": no_test,
            "directional": self.train.no_samples,
        }

    # ----------------------------------------------------------------------- what results depend on

    @cached_property
    def fingerprint(self) -> str:
        """What the features, labels and classes used amount to."""
        return self.train.fingerprint(self.selected.digest)

    @cached_property
    def _fingerprints(self) -> dict[str, str]:
        """Fingerprints of sources by the name of their split; of train, the classes used too."""
        return {self.train.name: self.fingerprint}

    def fingerprint_of(self, source: Source) -> str:
        """Compute what a source's data amounts to, once."""
        if source.name not in self._fingerprints:
            self._fingerprints[source.name] = source.fingerprint()
        return self._fingerprints[source.name]

    @cached_property
    def classifier_fingerprint(self) -> str | None:
        """Fingerprint of the classifier, if there is one."""
        return self.store.classifier_fingerprint(self.layer) if self.has_classifier else None

    @property
    def deciding_fingerprint(self) -> str | None:
        """Fingerprint of what decides beside the class means: predictions or a classifier."""
        return self.decided.deciding_fingerprint or self.classifier_fingerprint

    @property
    def inputs(self) -> dict[str, str]:
        """Fingerprints of all that the values depend on, by what they are recorded under."""
        # What was not read is not recorded: it may change, and the values hold.
        needed = {
            "fingerprint": True,
            "test_fingerprint": self.reads & {"decisions", "test"},
            "ood_fingerprint": "ood" in self.reads,
            "classifier_fingerprint": self.weighs,
            "deciding_fingerprint": "decisions" in self.reads,
        }
        prints = {name: self.input(name) for name, read in needed.items() if read}
        return {name: value for name, value in prints.items() if value is not None}

    def input(self, name: str) -> str | None:
        """Compute a fingerprint of `inputs`, read or not; None where there is nothing to hash."""
        if name == "test_fingerprint":
            return self.fingerprint_of(self.decided)
        if name == "ood_fingerprint":
            return None if self.ood is None else self.fingerprint_of(self.ood)
        value: str | None = getattr(self, name)
        return value

    def about(self, state: str, source: Source, **depends: Any) -> About:
        """Say what a kept state is of, and what it depends on."""
        return {
            "state": state,
            "place": f"{self.store.path}/{source.name}/{self.layer}",
            "fingerprint": self.fingerprint_of(source),
            # Sums in another order or of other products must not be mixed with these.
            "precision": self.options.precision,
            "skip_nonfinite": self.options.skip_nonfinite,
            "device": self.options.device,
            "version": _STATE_VERSION,
            **depends,
        }

    # ------------------------------------------------------------------------------------- reading

    def classifier(self, means: Array) -> tuple[Array, Array | None]:
        """Read the classifier to where class means are; beside means in a file it stays in its own.

        Returns
        -------
        array (K, D), and array (K,) or None
            Weight and bias.
        """
        classifier = self.store.classifier(self.layer, lazily=isinstance(means, StoredRows))
        assert classifier is not None
        weight, bias = classifier
        put = device_put(self.options.device, means)
        return put(weight), None if bias is None else put(bias)

    def check_chunks(self) -> None:
        """Refuse missing chunks in every split that will be read."""
        # Train may be test as well; it is looked through once.
        for source in {source.name: source for source in self.used.values()}.values():
            source.check_chunks()


def _absent(split: str | None, kind: str) -> str:
    return f"no {kind} split" if split is None else f"no {kind} data in split '{split}'"


def check_classes(n_classes: int, source: Source, why: str) -> None:
    """Refuse to measure with fewer than two classes.

    Raises
    ------
    DataError
        Names the split, and `why` so few are left.
    """
    if n_classes < 2:
        classes = f"{n_classes} class{'' if n_classes == 1 else 'es'}"
        raise DataError(
            f"{classes} in split '{source.name}' of {source.where} {why}".rstrip(),
            "at least 2: collapse is measured between classes",
            "add samples of other classes, or loosen the class filter",
        )


def device_put(device: str, means: Array) -> Callable[[Any], Any]:
    """Find what brings arrays to where class means are; means in a file stay on the host."""
    if isinstance(means, StoredRows):
        return lambda values: values
    return find_device(device).put


# Choosing stores and layers.

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
    places = [absolute(path) for path in paths]
    parts = [[part for part in path.split(os.sep) if part] for path in places]
    # Suffixes, not paths: names stay when the folder of all stores moves.
    for depth in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    twice = next(path for path in places if places.count(path) > 1)
    raise UsageError(f"store '{twice}' is given twice", "each store once")


def open_stores(stores: StoreLike | Sequence[StoreLike]) -> dict[str, FeatureStore]:
    """Open the stores of a run, by their names in its results."""
    if isinstance(stores, FeatureStore | str | os.PathLike):
        stores = [stores]
    if not stores:
        raise UsageError("no store to measure", "at least one")
    opened = [s if isinstance(s, FeatureStore) else FeatureStore.open(s) for s in stores]
    return dict(zip(store_names([s.path for s in opened]), opened, strict=True))


def find_layers(
    opened: Mapping[str, FeatureStore],
    layers: Iterable[str] | None,
    options: Options,
    *,
    scanned: bool,
) -> list[Layer]:
    """Find the layers of every store, with nothing measured of them yet.

    Parameters
    ----------
    opened : mapping of str to FeatureStore
        The stores by name.
    layers : iterable of str, or None
        Which layers; all of the train split by default.
    options : Options
        How to measure.
    scanned : bool
        Whether labels may be read; without, layers know no classes.

    Raises
    ------
    UnknownNameError
        For a split or layer that does not exist.
    DataError
        When there is nothing to measure.
    """
    chosen = [layers] if isinstance(layers, str) else layers
    names = None if chosen is None else list(chosen)
    every = [
        layer
        for name, store in opened.items()
        for layer in _layers_of_store(name, store, names, options, scanned)
    ]
    # A split that was named and gives nothing is a mistake; one taken by default is not.
    for split, part in ((options.test, "test"), (options.ood, "ood")):
        if split is not None and all(getattr(layer, part) is None for layer in every):
            listed = ", ".join(dict.fromkeys(layer.layer for layer in every))
            raise DataError(
                f"nothing in split '{split}' of layer{'s' if ', ' in listed else ''} {listed}",
                "features or states of one of them at least",
                "see 'ncbatch info'; name another split, or layers that it has",
            )
    return every


@dataclass(frozen=True)
class _Part:
    """A split of a store: its rows, if it has any, beside finished states."""

    store: FeatureStore
    name: str
    rows: Split | None

    @classmethod
    def find(cls, store: FeatureStore, name: str, *, required: bool) -> _Part | None:
        """Find a split; None when the store has neither samples nor states of that name."""
        rows = store.split(name) if name in store.splits else None
        if rows is not None or name in store.state_splits:
            return cls(store, name, rows)
        if required:
            raise unknown_name("split", name, {*store.splits, *store.state_splits}, store.path)
        return None

    @cached_property
    def layers(self) -> list[str]:
        """Layers with features in the order written, then those with moments by their depth."""
        features = [] if self.rows is None else self.rows.layers
        notes = self.store.layer_notes
        summed = sorted(
            self.store.state_layers(self.name, MOMENTS),
            key=lambda layer: (notes.get(layer, {}).get("depth", 2.0), natural_key(layer)),
        )
        return [*features, *(layer for layer in summed if layer not in features)]

    @cached_property
    def _label_counts(self) -> Index:
        """Samples per class of its rows, which are the same for all layers."""
        assert self.rows is not None
        return count_labels(self.rows)

    def source(self, layer: str, *kinds: str) -> Source | None:
        """Find what is there of a layer: features, or else a state of one of `kinds`."""
        if self.rows is not None and layer in self.rows.features:
            return Samples(self.rows, layer)
        finished = Finished(self.store, self.name, layer)
        return finished if any(finished.has(kind) for kind in kinds) else None

    def select(self, source: Source, options: Options) -> Selection:
        """Choose the classes used of one of its sources.

        Raises
        ------
        DataError
            When there are no samples, or fewer than two classes.
        """
        # Labels are read once for all layers, states are each of their own samples.
        counts = source.counts() if source.no_samples else self._label_counts
        selection = select_classes(counts, options)
        if not counts.any():
            raise DataError(
                f"split '{source.name}' of {source.where} has no rows",
                "labelled rows",
                "dump or import some",
            )
        why = "with these filters" if selection.filtered else ""
        check_classes(len(selection.classes), source, why)
        return selection

    def refuse_unmerged(self, layers: list[str] | None) -> None:
        """Refuse to measure the rest of a split as if it were all."""
        rows = () if self.rows is None else self.rows.features
        unfinished = [
            layer
            for layer in self.store.unmerged_layers(self.name)
            if layer not in rows and (layers is None or layer in layers)
        ]
        if unfinished:
            raise StoreError(
                f"split '{self.name}' of {self.store.path} has unfinished moments of layers "
                f"{', '.join(unfinished)}",
                "all processes ended, and their parts merged",
                f"'ncbatch finalize {self.store.path} --split {self.name}' merges them; resume "
                "processes that stopped; or name other layers",
            )


def _layers_of_store(
    name: str, store: FeatureStore, layers: list[str] | None, options: Options, scanned: bool
) -> Iterator[Layer]:
    train = _Part.find(store, options.train, required=True)
    assert train is not None
    test = _Part.find(store, options.test or "test", required=options.test is not None)
    ood = _Part.find(store, options.ood or "ood", required=options.ood is not None)
    # Layers that were named need not be in every split, only in train.
    names = train.layers if layers is None else layers
    for part in filter(None, (train, test, ood)):
        part.refuse_unmerged(layers)
    if not names:
        raise DataError(f"split '{train.name}' of {store.path} has no complete layer")
    for layer in names:
        means = train.source(layer, MOMENTS)
        if means is None:
            where = f"split '{train.name}' of {store.path}"
            raise unknown_name("layer", layer, train.layers, where)
        means.check_width()
        # Decisions may stand alone in test; the other splits are of use by their moments only.
        outside = None if ood is None else ood.source(layer, MOMENTS)
        if outside is not None and outside.is_empty(scanned=scanned):
            outside = None
        yield Layer(
            name,
            store,
            layer,
            options,
            means,
            None if test is None else test.source(layer, MOMENTS, DECISIONS),
            outside,
            None if test is None else test.name,
            None if ood is None else ood.name,
            train.select(means, options) if scanned else None,
        )
