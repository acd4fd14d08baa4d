"""Layer: one layer of one store, and how it shall be measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from ncbatch.arrays import Array, StoredRows, find_device
from ncbatch.errors import DataError, UsageError
from ncbatch.metrics import CATALOGUE, Metric
from ncbatch.rows import Selection
from ncbatch.stats.moments import Precision
from ncbatch.store import FeatureStore, Split

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

    def __post_init__(self) -> None:
        if self.precision not in ("exact", "fp32", "tf32"):
            raise UsageError(f"precision '{self.precision}'", "exact, fp32 or tf32")
        if not 0.0 < self.dist_exp <= _MAX_DIST_EXP:
            raise UsageError(
                f"dist_exp {self.dist_exp}", f"a number above 0, at most {_MAX_DIST_EXP:g}"
            )
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
    train, decided, ood : Split
        The splits of class means, of decisions, and of outside data, if there is one.
    metric_names : tuple of str
        What is measured.
    missing : dict of str to tuple of str
        Metrics that the store's contents rule out, by reason.
    selection : Selection or None
        The classes used; None in a plan, which reads no labels.
    """

    name: str
    store: FeatureStore
    layer: str
    options: Options
    train: Split
    decided: Split
    ood: Split | None
    metric_names: tuple[str, ...]
    missing: dict[str, tuple[str, ...]]
    selection: Selection | None = None

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

    @cached_property
    def null_quantities(self) -> frozenset[str]:
        """The same under labels at random."""
        chosen = [m for m in self.metrics if m.has_null] if self.options.null else []
        return frozenset[str]().union(*(metric.pair_quantities for metric in chosen))

    @property
    def has_classifier(self) -> bool:
        """Whether the store has a classifier of the layer."""
        return self.layer in self.store.classifiers

    @property
    def by_predictions(self) -> bool:
        """Whether stored predictions are the classifier's decisions."""
        return self.decided.head == self.layer

    def classifier(self, *, stored: bool) -> tuple[Array, Array | None]:
        """Read the classifier, or open it where it shall not be held in memory."""
        found = self.store.classifier(self.layer, lazily=stored)
        assert found is not None
        return found

    def check_chunks(self) -> None:
        """Refuse missing chunks in every split that will be read."""
        used = [self.train]
        if self.reads & {"decisions", "test"}:
            used.append(self.decided)
        if "ood" in self.reads and self.ood is not None:
            used.append(self.ood)
        for split in {split.name: split for split in used}.values():
            split.check_chunks(self.layer)


def check_classes(n_classes: int, split: Split, why: str) -> None:
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
