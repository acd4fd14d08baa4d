"""measure: from metric names to passes to a Dataset."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ncbatch import __version__
from ncbatch.engine import Price, Progress, check_budget, memory_budget, resident_bytes, run
from ncbatch.errors import DataError, UsageError
from ncbatch.metrics import ClassView, Metric, Statistics, Undefined, find_metrics
from ncbatch.passes import (
    DecisionsPass,
    DirectionalPass,
    MomentsPass,
    PairPass,
    RowSource,
    Selection,
    count_labels,
    select_classes,
)
from ncbatch.results import Cell, to_dataset
from ncbatch.stats import (
    Decisions,
    DirectionalVariance,
    Moments,
    Rule,
    linear_rule,
    nearest_mean_rule,
)
from ncbatch.stats.moments import Precision
from ncbatch.stats.pair_tiles import PairTiles
from ncbatch.store import FeatureStore, Split

if TYPE_CHECKING:
    import xarray as xr

# The unit of rounding of float32, and the relative error that --precision fp32 promises traces.
_FLOAT32_ERROR = 6e-8
_PROMISED_ERROR = 1e-6

# Conventions of papers, as arguments of `measure`.
PRESETS: Mapping[str, Mapping[str, Any]] = {
    # The notebook of Papyan, Han & Donoho: the global mean is that of the samples.
    "papyan2020": {"weighted": True, "dist_exp": 1.0, "min_count": 1},
    # Language models, Wu & Papyan: seen classes, unweighted mean of means, CDNV with p = 2.
    "wu2024": {"weighted": False, "dist_exp": 2.0, "min_count": 1},
}

StoreLike = FeatureStore | str | os.PathLike[str]


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


def measure(
    stores: StoreLike | Sequence[StoreLike],
    layers: Iterable[str] | None = None,
    *,
    train: str = "train",
    test: str | None = None,
    ood: str | None = None,
    metrics: Iterable[str] | None = None,
    min_count: int = 1,
    max_count: int | None = None,
    classes: Iterable[int] | None = None,
    weighted: bool = False,
    dist_exp: float = 1.0,
    skip_nonfinite: bool = False,
    precision: Precision = "exact",
    null: bool = False,
    null_seed: int = 0,
    per_class: bool = False,
    memory: str | int | None = None,
    progress: Progress | None = None,
) -> xr.Dataset:
    """Measure neural collapse on stored features.

    Parameters
    ----------
    stores : store, path, or sequence of them
        What to measure.
    layers : iterable of str, optional
        Which layers; all of the train split by default.
    train : str, optional
        The split that class means come from.
    test, ood : str, optional
        The splits of NC4 and NC5; by default those named ``test`` and ``ood`` where they exist.
        Without a test split NC4 takes the samples of train.
    metrics : iterable of str, optional
        Names from `ncbatch.metrics.CATALOGUE`; by default all that the stores allow.
    min_count, max_count : int, optional
        Use only classes with so many train samples.
    classes : iterable of int, optional
        Use only these classes. A filter drops the samples of all other classes, in test too.
    weighted : bool, optional
        Let m_G be the mean of samples instead of the unweighted mean of class means.
    dist_exp : float, optional
        p of the CDNV; language-model papers use 2.
    skip_nonfinite : bool, optional
        Leave out and count rows with NaN or infinities instead of refusing them.
    precision : {"exact", "fp32"}, optional
        Float64 products, or products of residuals in float32 folded in float64.
    null : bool, optional
        Measure NC1, NC2 and spectra also for labels drawn at random from the label distribution,
        in the same read, as ``<metric>_null``.
    null_seed : int, optional
        Which draw of those labels.
    per_class : bool, optional
        Give results per class too, over the dim ``class``.
    memory : str or int, optional
        Ceiling of resident memory, such as ``"8GiB"``; what the machine has left by default.
    progress : Progress, optional
        Told how far the passes are.

    Returns
    -------
    xarray.Dataset
        A variable per metric over dims (store, layer), counts of what was used and left out, and
        attributes that say how it was measured. A metric that does not apply is NaN; its
        attribute ``undefined`` says why.

    Raises
    ------
    UnknownNameError
        For a split, layer or metric that does not exist.
    DataError
        For data that cannot be measured: fewer than two classes, values that are not finite.
    CorruptionError
        For a chunk that is missing or altered.
    BudgetError
        When the memory does not suffice; names what would.
    """
    if precision not in ("exact", "fp32"):
        raise UsageError(f"precision '{precision}'", "exact or fp32")
    if not dist_exp > 0:
        raise UsageError(f"dist_exp {dist_exp}", "a number above 0")
    options = Options(
        train, test, ood, min_count, max_count,
        None if classes is None else tuple(int(c) for c in classes),
        weighted, dist_exp, skip_nonfinite, precision, null, null_seed, per_class,
    )  # fmt: skip
    wanted = find_metrics(metrics)
    opened = _open_all(stores)
    tasks = [
        task
        for name, store in opened.items()
        for task in _tasks(name, store, None if layers is None else list(layers), options, wanted)
    ]
    if metrics is not None:
        _refuse_impossible(wanted, tasks)
    prices = [price for task in tasks for price in task.prices()]
    check_budget(prices, memory_budget(memory), resident_bytes())
    for task in tasks:
        task.check_chunks()
    cells = {(task.name, task.layer): task.measure(progress) for task in tasks}
    applied = [m for m in wanted if metrics is not None or any(m in t.metrics for t in tasks)]
    return to_dataset(
        cells,
        list(opened),
        list(dict.fromkeys(task.layer for task in tasks)),
        applied,
        _attributes(options, tasks, [note for cell in cells.values() for note in cell.notes]),
    )


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


@dataclass(frozen=True)
class _Task:
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
        if "decisions" in self._reads:
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
            peak += self.store.n_classes * d * 8
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
            statistics = replace(statistics, ood_mean=seen.means.mean(axis=0))
        if "test" in self._reads:
            tested, _ = run(self._test_pass(classes, skipped), progress)
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
        _check_classes(len(seen), self.train, "after rows that are not finite were left out")
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


def _computed(compute: Callable[[Statistics], float], statistics: Statistics) -> float | None:
    """Give a yardstick, or None where it has no value."""
    try:
        value = compute(statistics)
    except Undefined:
        return None
    return value if np.isfinite(value) else None


def _open_all(stores: StoreLike | Sequence[StoreLike]) -> dict[str, FeatureStore]:
    if isinstance(stores, FeatureStore | str | os.PathLike):
        stores = [stores]
    if not stores:
        raise UsageError("no store to measure", "at least one")
    opened = [s if isinstance(s, FeatureStore) else FeatureStore.open(s) for s in stores]
    return dict(zip(store_names([s.path for s in opened]), opened, strict=True))


def _tasks(
    name: str,
    store: FeatureStore,
    layers: list[str] | None,
    options: Options,
    wanted: list[Metric],
) -> list[_Task]:
    train = store.split(options.train)
    test = _optional_split(store, options.test, "test")
    ood = _optional_split(store, options.ood, "ood")
    names = train.layers if layers is None else layers
    if not names:
        raise DataError(f"split '{train.name}' of {store.path} has no complete layer")
    for layer in names:
        train.feature(layer)
    selection = select_classes(
        count_labels(train),
        min_count=options.min_count,
        max_count=options.max_count,
        classes=options.classes,
    )
    if not selection.counts.any():
        raise DataError(
            f"split '{train.name}' of {store.path} has no rows",
            "labelled rows",
            "dump or import some",
        )
    _check_classes(
        len(selection.classes), train, "with these filters" if selection.filtered else ""
    )
    tasks = []
    for layer in names:
        decided = test if test is not None and layer in test.features else train
        outside = ood if ood is not None and layer in ood.features and ood.n_samples else None
        applied, missing = _applicable(store, layer, train, decided, outside, wanted)
        tasks.append(
            _Task(name, store, layer, options, selection, train, decided, outside, applied, missing)
        )
    return tasks


def _optional_split(store: FeatureStore, asked: str | None, default: str) -> Split | None:
    if asked is not None:
        return store.split(asked)
    return store.split(default) if default in store.splits else None


def _check_classes(n_classes: int, split: Split, why: str) -> None:
    if n_classes < 2:
        found = f"{n_classes} class{'' if n_classes == 1 else 'es'} in split '{split.name}' of {split.where}"
        raise DataError(
            f"{found} {why}".rstrip(),
            "at least 2: collapse is measured between classes",
            "add samples of other classes, or loosen the class filter",
        )


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


def _refuse_impossible(wanted: list[Metric], tasks: list[_Task]) -> None:
    """Refuse a metric that was named but that no store and layer allows."""
    for metric in wanted:
        if not any(metric in task.metrics for task in tasks):
            why = next(r for r, metrics in tasks[0].missing.items() if metric in metrics)
            raise DataError(
                f"metric '{metric.name}' cannot be measured: {why}",
                "a store that has what it reads",
                "see 'ncbatch metrics' for what each metric reads, 'ncbatch info' for what is there",
            )


def _notes(tasks: list[_Task]) -> list[str]:
    """Say once what is missing where."""
    places: dict[tuple[str, str], list[str]] = {}
    for task in tasks:
        for why, metrics in task.missing.items():
            kinds = ", ".join(dict.fromkeys(metric.place for metric in metrics))
            layers = places.setdefault((why, kinds), [])
            if task.layer not in layers:
                layers.append(task.layer)
    return [
        f"{why} for layer{'s' if len(layers) > 1 else ''} {', '.join(layers)}: {kinds} left out"
        for (why, kinds), layers in places.items()
    ]


def _attributes(
    options: Options, tasks: list[_Task], notes: list[str]
) -> dict[str, str | int | float]:
    attributes: dict[str, str | int | float] = {
        "ncbatch_version": __version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": "cpu",
        "precision": options.precision,
        "store_id": json.dumps({task.name: task.store.id for task in tasks}),
        "store_path": json.dumps({task.name: str(Path(task.store.path)) for task in tasks}),
        "train": options.train,
        "global_mean": "mean of samples" if options.weighted else "unweighted mean of class means",
        "dist_exp": float(options.dist_exp),
        "min_count": options.min_count,
        "skip_nonfinite": int(options.skip_nonfinite),
        "null_seed": options.null_seed if options.null else "no null",
        "nc1_division": "NC1 by pseudo-inverse is divided by K",
        "ddof": "variances over classes 1, over pairs 0; covariances and V_c 0",
        "notes": "\n".join([*_notes(tasks), *notes]),
    }
    if options.max_count is not None:
        attributes["max_count"] = options.max_count
    if options.classes is not None:
        attributes["class_filter"] = (
            f"{len(options.classes)} listed, sha256 {tasks[0].selection.digest}"
        )
    return attributes
