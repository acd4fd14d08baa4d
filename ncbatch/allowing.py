"""What the contents of a store allow: metrics that can be measured, and the reasons of the others."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ncbatch.errors import DataError
from ncbatch.layer import NO_SAMPLES, AnySplit, Options, check_classes
from ncbatch.metrics import Metric
from ncbatch.rows import Selection, count_labels, select_classes
from ncbatch.store import FeatureStore, Split
from ncbatch.summed import DECISIONS, MOMENTS, SummedSplit


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
