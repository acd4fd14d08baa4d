"""LayerTask: one layer of one store, from its passes to the values of its metrics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from ncbatch.engine import Price, Progress, run
from ncbatch.errors import DataError
from ncbatch.metrics import ClassView, Metric, Statistics, Undefined
from ncbatch.passes import DecisionsPass, DirectionalPass, MomentsPass, PairPass
from ncbatch.results import Cell
from ncbatch.rows import RowSource, Selection, count_labels, select_classes
from ncbatch.stats import (
    Decisions,
    DirectionalVariance,
    Moments,
    PairTiles,
    Rule,
    linear_rule,
    nearest_mean_rule,
)
from ncbatch.stats.moments import Precision
from ncbatch.store import FeatureStore, Split

# The unit of rounding of float32, and the relative error that --precision fp32 promises traces.
_FLOAT32_ERROR = 6e-8
_PROMISED_ERROR = 1e-6


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


@dataclass(frozen=True)
class LayerTask:
    """One layer of one store, with all that is known before its features are read."""

    name: str
    store: FeatureStore
    layer: str
    options: Options
    selection: Selection
    train: Split
    decided: Split
    ood: Split | None
    metrics: list[Metric]
    missing: dict[str, list[Metric]]

    @property
    def _where(self) -> str:
        return f"{self.name}/{self.layer}"

    @cached_property
    def _reads(self) -> frozenset[str]:
        return frozenset().union(*(metric.reads for metric in self.metrics))

    @cached_property
    def _quantities(self) -> frozenset[str]:
        return frozenset[str]().union(*(metric.pair_quantities for metric in self.metrics))

    @property
    def _by_predictions(self) -> bool:
        return self.decided.head == self.layer

    def _source(
        self, split: Split, index: npt.NDArray[np.int64] | None, skipped: list[int]
    ) -> RowSource:
        return RowSource(split, self.layer, index, self.options.skip_nonfinite, skipped)

    def _moments_pass(self, skipped: list[int]) -> MomentsPass:
        return MomentsPass(
            self._source(self.train, self.selection.index, skipped),
            len(self.selection.classes),
            scatter="scatter" in self._reads,
            precision=self.options.precision,
            null_counts=self.selection.counts[self.selection.classes]
            if self.options.null
            else None,
            null_seed=self.options.null_seed,
        )

    def _ood_pass(self, ood: Split, skipped: list[int]) -> MomentsPass:
        counts = count_labels(ood)
        seen = select_classes(counts)
        return MomentsPass(
            self._source(ood, seen.index, skipped), len(seen.classes), False, self.options.precision
        )

    def check_chunks(self) -> None:
        """Refuse missing chunks in every split that will be read."""
        used = [self.train]
        if self._reads & {"decisions", "test"}:
            used.append(self.decided)
        if "ood" in self._reads and self.ood is not None:
            used.append(self.ood)
        for split in {split.name: split for split in used}.values():
            split.check_chunks(self.layer)

    def prices(self) -> list[Price]:
        """Give the peak memory of each step."""
        k, d = len(self.selection.classes), self.train.spec(self.layer).n_features
        # Means and moments stay; metrics hold centred means, directions and S_B's factors.
        state = k * (d * 8 + 48) + (d * d * 8 if "scatter" in self._reads else 0)
        if self._reads & {"classifier", "decisions"} and self.layer in self.store.classifiers:
            state += (self.store.n_classes + k) * d * 8  # the classifier, and its rows used
        if self.options.null:
            state += k * (d * 8 + 48) + (d * d * 8 if "scatter" in self._reads else 0)
        labels = self.store.n_classes * 32
        prices = [
            Price(f"the moments of {self._where}", self._moments_pass([]).peak_bytes + labels)
        ]
        factors = d * d * 8 * 8 if "scatter" in self._reads else d * d * 8 * 2
        formulas = state + k * d * 8 * 6 + factors
        if "ood" in self._reads and self.ood is not None:
            prices.append(
                Price(
                    f"the outside data of {self._where}",
                    state + self._ood_pass(self.ood, []).peak_bytes,
                )
            )
        if self._quantities:
            peak = state + PairTiles.peak_bytes(k, d, self._quantities)
            prices.append(Price(f"the pair sweep of {self._where}", peak))
        if "decisions" in self._reads:
            prices.append(
                Price(f"the decisions of {self._where}", state + self._decision_bytes(k, d))
            )
        if "test" in self._reads:
            classes = self.selection.classes
            peak = state + self._test_pass(classes, []).peak_bytes
            prices.append(Price(f"the test moments of {self._where}", peak))
        if "directional" in self._reads:
            source = self._source(self.train, None, [])
            peak = DirectionalVariance.peak_bytes(k, d, source.block_rows) + source.read_bytes
            prices.append(Price(f"the directional variance of {self._where}", state + peak))
        prices.append(Price(f"the formulas of {self._where}", formulas + labels))
        return prices

    def _decision_bytes(self, k: int, d: int) -> int:
        source = self._source(self.decided, None, [])
        itemsize = 8 if self.train.spec(self.layer).dtype == "float64" else 4
        rows = source.block_rows
        peak = source.read_bytes + k * d * 16 + Rule.peak_bytes(k, d, rows, itemsize)
        if not self._by_predictions:
            peak += Rule.peak_bytes(self.store.n_classes, d, rows, itemsize)
        return peak

    def measure(self, progress: Progress | None) -> Cell:
        """Read the layer and compute its metrics."""
        skipped: list[int] = []
        moments, null = run(self._moments_pass(skipped), progress)
        moments, classes = self._seen(moments)
        weight, bias = self._classifier()
        statistics = Statistics(
            moments,
            weighted=self.options.weighted,
            dist_exp=self.options.dist_exp,
            weight=None if weight is None else weight[classes],
            bias=None if bias is None else bias[classes],
        )
        statistics = self._with_pairs(statistics, self._quantities, self._where, progress)
        if "decisions" in self._reads:
            decisions = self._decisions(statistics, classes, weight, bias, skipped, progress)
            statistics = replace(statistics, decisions=decisions)
        if "ood" in self._reads and self.ood is not None:
            outside, _ = run(self._ood_pass(self.ood, skipped), progress)
            seen = outside.select(np.flatnonzero(outside.counts))
            if len(seen.counts):
                statistics = replace(statistics, ood_mean=seen.means.mean(axis=0))
        if "test" in self._reads:
            tested, _ = run(
                self._test_pass(classes, [] if "decisions" in self._reads else skipped), progress
            )
            statistics = replace(statistics, test=tested)
        if "directional" in self._reads:
            found = run(self._directional_pass(statistics, classes), progress)
            statistics = replace(statistics, directional=found)
        cell = self._values(statistics)
        if null is not None:
            cell.yardsticks |= self._null_values(null, progress)
        view = ClassView(statistics, classes, self.store.n_classes)
        cell.deciles, cell.bins, cell.tops = view.deciles(), view.bins(), view.tops()
        if self.options.per_class:
            cell.classes = view.classes()
        cell.counts["n_rows_skipped"] = float(sum(skipped))
        return cell

    def _seen(self, moments: Moments) -> tuple[Moments, npt.NDArray[np.int64]]:
        """Drop classes of which every row was skipped."""
        seen = np.flatnonzero(moments.counts)
        check_classes(len(seen), self.train, "after rows that are not finite were left out")
        if len(seen) < len(moments.counts):
            moments = moments.select(seen)
        return moments, self.selection.classes[seen]

    def _classifier(self) -> tuple[npt.NDArray[Any] | None, npt.NDArray[Any] | None]:
        if not self._reads & {"classifier", "decisions"}:
            return None, None
        return self.store.classifier(self.layer) or (None, None)

    def _with_pairs(
        self,
        statistics: Statistics,
        quantities: frozenset[str],
        what: str,
        progress: Progress | None,
    ) -> Statistics:
        if not quantities:
            return statistics
        moments = statistics.moments
        tiles = PairTiles(
            moments.means,
            statistics.global_mean,
            moments.variances,
            counts=moments.counts,
            within=moments.within_covariance if "cdnv_directional" in quantities else None,
            quantities=quantities,
            dist_exp=self.options.dist_exp,
        )
        return replace(statistics, pairs=run(PairPass(tiles, what), progress))

    def _null_values(self, null: Moments, progress: Progress | None) -> dict[str, float]:
        """Compute the metrics that labels at random have a value for."""
        metrics = [metric for metric in self.metrics if metric.has_null]
        quantities = frozenset[str]().union(*(metric.pair_quantities for metric in metrics))
        seen = null.select(np.flatnonzero(null.counts))
        if len(seen.counts) < 2:
            return {}
        chance = Statistics(seen, weighted=self.options.weighted, dist_exp=self.options.dist_exp)
        chance = self._with_pairs(chance, quantities, f"null of {self._where}", progress)
        values = {f"{metric.name}_null": _computed(metric.compute, chance) for metric in metrics}
        return {name: value for name, value in values.items() if value is not None}

    def _directional_pass(
        self, statistics: Statistics, classes: npt.NDArray[np.int64]
    ) -> DirectionalPass:
        index = np.full(self.store.n_classes, -1, np.int64)
        index[classes] = np.arange(len(classes))
        pairs = PairTiles(statistics.moments.means, statistics.global_mean, quantities=[])
        # Rows that are not finite were counted already when train was read.
        return DirectionalPass(self._source(self.train, index, []), pairs)

    def _test_pass(self, classes: npt.NDArray[np.int64], skipped: list[int]) -> MomentsPass:
        index = np.full(self.store.n_classes, -1, np.int64)
        index[classes] = np.arange(len(classes))
        source = self._source(self.decided, index, skipped)
        return MomentsPass(source, len(classes), False, self.options.precision)

    def _decisions(
        self,
        statistics: Statistics,
        classes: npt.NDArray[np.int64],
        weight: npt.NDArray[Any] | None,
        bias: npt.NDArray[Any] | None,
        skipped: list[int],
        progress: Progress | None,
    ) -> Decisions:
        means = statistics.moments.means
        wide = self.train.spec(self.layer).dtype == "float64"
        dtype = np.float64 if wide else np.float32
        classifier = None
        if not self._by_predictions and weight is not None:
            classifier = linear_rule(weight, bias, statistics.global_mean, dtype=dtype)
        index = None
        if self.selection.filtered:
            index = np.where(self.selection.index >= 0, np.arange(self.store.n_classes), -1)
        # Rows that are not finite were counted already when train was read.
        again = self.decided.name == self.train.name
        source = self._source(self.decided, index, [] if again else skipped)
        return run(
            DecisionsPass(source, nearest_mean_rule(means, classes, dtype=dtype), classifier),
            progress,
        )

    def _values(self, statistics: Statistics) -> Cell:
        fingerprint = self.train.fingerprint(self.layer, self.selection.digest)
        cell = Cell(texts={"fingerprint": fingerprint})
        if "decisions" in self._reads:
            cell.texts["nc4_split"] = self.decided.name
            cell.texts["nc4_classifier"] = "predictions" if self._by_predictions else "weights"
            if statistics.decisions is not None:
                cell.counts["n_decided"] = float(statistics.decisions.samples.sum())
        for metric in self.metrics:
            try:
                cell.values[metric.name] = metric.compute(statistics)
            except Undefined as reason:
                cell.reasons[metric.name] = str(reason)
                continue
            for kind, compute in (("floor", metric.floor), ("random", metric.random)):
                value = None if compute is None else _computed(compute, statistics)
                if value is not None:
                    cell.yardsticks[f"{metric.name}_{kind}"] = value
        for reason_text, metrics in self.missing.items():
            cell.reasons |= {metric.name: reason_text for metric in metrics}
        cell.counts |= self._counts(statistics)
        if "rank" in cell.counts and self.options.precision == "fp32":
            error = _FLOAT32_ERROR / max(cell.counts["smallest_ratio"], _FLOAT32_ERROR)
            if error > _PROMISED_ERROR:
                cell.notes.append(
                    f"{self._where}: products in float32 leave nc1_pinv and nc1_svd an error of up to "
                    f"{error:.0e} here; --precision exact has none"
                )
        return cell

    def _counts(self, statistics: Statistics) -> dict[str, float]:
        k = statistics.n_classes
        counts = self.selection.counts
        found: dict[str, float] = {
            "n_samples": statistics.moments.n_samples,
            "n_classes": k,
            "n_classes_unseen": int(np.count_nonzero(counts == 0)),
            "n_classes_filtered": int(np.count_nonzero(counts)) - len(self.selection.classes),
            "n_means_without_direction": k - statistics.n_directed,
        }
        if statistics.pairs is not None:
            if "cdnv" in self._quantities:
                found["n_coincident_pairs"] = statistics.pairs.coincident_means
            if self._quantities & {"log", "riesz"}:
                found["n_coincident_directions"] = statistics.pairs.coincident_directions
        if "scatter" in self._reads and statistics.n_directed:
            found["rank"] = statistics.spectrum.rank
            found["smallest_ratio"] = statistics.spectrum.smallest_ratio
        return {name: float(value) for name, value in found.items()}


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


def _computed(compute: Callable[[Statistics], float], statistics: Statistics) -> float | None:
    """Give a yardstick, or None where it has no value."""
    try:
        value = compute(statistics)
    except Undefined:
        return None
    return value if np.isfinite(value) else None
