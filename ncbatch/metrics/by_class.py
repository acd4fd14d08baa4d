"""The view by class, and by decile of classes: what a mean over all of them hides."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from ncbatch.arrays.namespace import to_numpy
from ncbatch.metrics.statistics import Statistics

Values = npt.NDArray[np.float64]
# What is counted in samples of the class, and so is added over a decile before it is divided.
_RATES = {"agreement": "agreements", "ncc_accuracy": "ncc_hits", "clf_accuracy": "clf_hits"}


@dataclass(frozen=True, eq=False)
class ClassView:
    """Results of the classes used, one by one.

    Attributes
    ----------
    statistics : Statistics
        Of the classes used.
    ids : array (C,) of int
        Their class ids.
    n_classes : int
        K, all classes of the store.
    """

    statistics: Statistics
    ids: npt.NDArray[np.int64]
    n_classes: int

    @cached_property
    def _values(self) -> dict[str, Values]:
        """Give what is known of each class used (C,)."""
        s = self.statistics
        columns: dict[str, Any] = {
            "n_samples": s.moments.counts,
            "norm": s.norms,
            "variance": s.variances,
        }
        if s.pairs is not None and s.pairs.nearest is not None:
            near = s.pairs.nearest
            cdnv, exists = s.nearest_cdnv
            columns["nearest"] = np.where(near.index >= 0, self.ids[near.index], np.nan)
            columns["nearest_distance"] = np.sqrt(near.square)
            columns["nearest_cdnv"] = np.where(exists, cdnv, np.nan)
        if s.weight is not None:
            columns["cos"] = np.full(len(self.ids), np.nan)
            columns["cos"][to_numpy(s.aligned)] = to_numpy(s.cosines)
        return {name: to_numpy(values).astype(np.float64) for name, values in columns.items()}

    @cached_property
    def _counts(self) -> dict[str, Values]:
        """Give samples decided and hits of each class used (C,)."""
        decisions = self.statistics.decisions
        if decisions is None:
            return {}
        kinds = {"n_decided": "samples", **_RATES}
        return {
            name: to_numpy(getattr(decisions, kind))[self.ids].astype(np.float64)
            for name, kind in kinds.items()
        }

    def classes(self) -> dict[str, Values]:
        """Give every value over all K classes; NaN for classes that are not used."""
        arrays = {}
        for name, values in (self._values | _rates(self._counts)).items():
            whole = arrays[f"class_{name}"] = np.full(self.n_classes, np.nan)
            whole[self.ids] = values
        return arrays

    def deciles(self) -> dict[str, Values]:
        """Give means over tenths of the classes, from the rarest to the most frequent.

        Rates weigh classes by their samples; everything else weighs them equally.
        """
        order = np.argsort(self._values["n_samples"], kind="stable")
        tenths = np.array_split(order, 10)
        columns = {
            name: np.array([_mean(values[tenth]) for tenth in tenths])
            for name, values in self._values.items()
            if name != "nearest"
        }
        sums = {
            name: np.array([values[tenth].sum() for tenth in tenths])
            for name, values in self._counts.items()
        }
        return {f"decile_{name}": values for name, values in (columns | _rates(sums)).items()}

    def bins(self) -> dict[str, Values]:
        """Give the histogram of cosines between class means."""
        pairs = self.statistics.pairs
        if pairs is None or not pairs.cosine.n:
            return {}
        return {"cosine_histogram": pairs.histogram.astype(np.float64)}

    def tops(self) -> dict[str, Values]:
        """Give the pairs of classes with the greatest cosines and CDNVs, by class id."""
        pairs = self.statistics.pairs
        arrays: dict[str, Values] = {}
        for name in ("top_cosine", "top_cdnv") if pairs is not None else ():
            top = getattr(pairs, name)
            if len(top.values):
                arrays[name] = top.values
                ids = self.ids[top.classes].astype(np.float64)
                arrays[f"{name}_i"] = ids[:, 0]
                arrays[f"{name}_j"] = ids[:, 1]
        return arrays


def _mean(values: Values) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else np.nan


def _rates(counts: dict[str, Values]) -> dict[str, Values]:
    """Divide hits by the samples decided, which are returned with them."""
    if not counts:
        return {}
    decided = counts["n_decided"]
    some = np.maximum(decided, 1.0)
    rates = {name: np.where(decided > 0, counts[name] / some, np.nan) for name in _RATES}
    return {"n_decided": decided} | rates
