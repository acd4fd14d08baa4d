"""Layer: one layer of one store, and how it shall be measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeAlias

from ncbatch.arrays import Array, StoredRows, find_device
from ncbatch.engine import About
from ncbatch.errors import DataError, UsageError
from ncbatch.metrics import CATALOGUE, Metric
from ncbatch.rows import Selection
from ncbatch.stats.moments import Precision
from ncbatch.store import FeatureStore, Split
from ncbatch.summed import DECISIONS, SummedSplit

AnySplit: TypeAlias = Split | SummedSplit

NO_SAMPLES = "no samples of split '{}', only their moments"
# Changed when kept states of earlier versions would no longer be right.
_STATE_VERSION = 2
# Greater exponents of distances leave the range of float64 on ordinary data.
_MAX_DIST_EXP = 16.0


@dataclass(frozen=True)
class Options:
    """How to measure; the arguments of `measure` under their own names."""

    train: str
    test: str | None
    ood: str | None
    min_count: int
    max_count: int | None
    classes: tuple[int, ...] | None
    weighted: bool
    dist_exp: float
    skip_nonfinite: bool
    precision: Precision
    null: bool
    null_seed: int
    per_class: bool
    ncc: str = "exact"
    device: Literal["cpu", "cuda"] = "cpu"
    ddof: int = 0
    class_ddof: int = 1
    divide_by_k: bool = True

    def __post_init__(self) -> None:
        if self.precision not in ("exact", "fp32", "tf32"):
            raise UsageError(f"precision '{self.precision}'", "exact, fp32 or tf32")
        if not 0.0 < self.dist_exp <= _MAX_DIST_EXP:
            raise UsageError(
                f"dist_exp {self.dist_exp}", f"a number above 0, at most {_MAX_DIST_EXP:g}"
            )
        for name in ("ddof", "class_ddof"):
            if getattr(self, name) not in (0, 1):
                raise UsageError(f"{name} {getattr(self, name)}", "0 or 1")
        if self.ncc not in ("exact", "faiss"):
            raise UsageError(f"ncc '{self.ncc}'", "exact or faiss")


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
