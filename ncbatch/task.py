"""LayerTask: one layer of one store, from its passes to the values of its metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ncbatch.arrays import Array, StoredRows, find_device
from ncbatch.engine import About, Call, Item, Job, Step, Sweep, cut
from ncbatch.errors import DataError, UsageError
from ncbatch.metrics import CATALOGUE, ClassView, Metric, Statistics, Undefined
from ncbatch.passes import (
    DecisionsPass,
    DecisionsRead,
    DirectionalPass,
    MomentsPass,
    MomentsRead,
    PairPass,
    gather,
)
from ncbatch.pricing import Mode, Rows, Shape
from ncbatch.results import Cell
from ncbatch.rows import RowSource, Selection, count_labels, select_classes
from ncbatch.stats import (
    DirectionalVariance,
    Moments,
    PairStats,
    PairTiles,
    SeenMoments,
    faiss_nearest_rule,
    linear_rule,
    nearest_mean_rule,
    null_scatter,
)
from ncbatch.stats.moments import Precision
from ncbatch.store import FeatureStore, Split

# The unit of rounding of float32, and the relative error that --precision fp32 promises traces.
_FLOAT32_ERROR = 6e-8
_PROMISED_ERROR = 1e-6
# Greater exponents of distances leave the range of float64 on ordinary data.
_MAX_DIST_EXP = 16.0
# Tiles of an item of the pair sweep at most, for resume and balance.
_ITEM_TILES, _ITEMS = 256, 16
# Changed when kept states of earlier versions would no longer be right.
_STATE_VERSION = 1


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


@dataclass(frozen=True, eq=False)
class Measured:
    """What the first read gives, as later steps take it.

    Attributes
    ----------
    statistics : Statistics
        Of the classes with samples.
    null : Statistics or None
        The same under labels at random.
    classes : array (C,) of int64
        Ids of the classes with samples.
    skipped : int
        Rows left out because they are not finite.
    """

    statistics: Statistics
    null: Statistics | None
    classes: npt.NDArray[np.int64]
    skipped: int


@dataclass(frozen=True)
class LayerTask:
    """One layer of one store, with all that is known before its features are read.

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
    def _reads(self) -> frozenset[str]:
        return frozenset[str]().union(*(metric.reads for metric in self.metrics))

    @cached_property
    def _quantities(self) -> frozenset[str]:
        return frozenset[str]().union(*(metric.pair_quantities for metric in self.metrics))

    @cached_property
    def _null_quantities(self) -> frozenset[str]:
        chosen = [m for m in self.metrics if m.has_null] if self.options.null else []
        return frozenset[str]().union(*(metric.pair_quantities for metric in chosen))

    @property
    def _has_classifier(self) -> bool:
        return self.layer in self.store.classifiers

    @property
    def _by_predictions(self) -> bool:
        return self.decided.head == self.layer

    def check_chunks(self) -> None:
        """Refuse missing chunks in every split that will be read."""
        used = [self.train]
        if self._reads & {"decisions", "test"}:
            used.append(self.decided)
        if "ood" in self._reads and self.ood is not None:
            used.append(self.ood)
        for split in {split.name: split for split in used}.values():
            split.check_chunks(self.layer)

    # ------------------------------------------------------------------------------- its cost

    def shape(self, *, merged: bool = False) -> Shape:
        """Give the numbers that its cost depends on; reads nothing but metadata."""
        spec = self.train.spec(self.layer)
        n_used = min(self.store.n_classes, max(self.train.n_rows, 1))
        if self.options.classes is not None:
            n_used = min(n_used, len(set(self.options.classes)))
        if self.selection is not None:
            n_used = len(self.selection.classes)
        weighs = self._has_classifier and self._reads & {"classifier", "decisions"}
        reads = self._reads
        return Shape(
            where=self.where,
            n_classes=self.store.n_classes,
            n_used=n_used,
            n_features=spec.n_features,
            wide=spec.dtype == "float64",
            train=self._rows(self.train),
            decided=self._rows(self.decided) if reads & {"decisions", "test"} else None,
            outside=None if self.ood is None or "ood" not in reads else self._rows(self.ood),
            reads=reads,
            quantities=self._quantities,
            null_quantities=self._null_quantities,
            null=self.options.null,
            weight_bytes=self._weight_bytes if weighs else 0,
            classifier_decides=not self._by_predictions,
            on_device=self.options.device != "cpu",
            merged=merged,
        )

    @property
    def _weight_bytes(self) -> int:
        """Bytes of an element of the classifier in memory; bfloat16 is read as float32."""
        weight = self.store.classifier_arrays(self.layer)[-1]
        return 4 if str(weight.dtype) == "bfloat16" else int(weight.dtype.itemsize)

    def _rows(self, split: Split) -> Rows:
        source = RowSource(split, self.layer)
        spec = split.spec(self.layer)
        return Rows(
            split.n_rows, len(source.items), spec.row_bytes, source.block_rows, source.read_bytes
        )

    # ------------------------------------------------------------------------------- its steps

    def job(self, mode: Mode, scratch: Path) -> Job:
        """Give its steps; class means that do not stay in memory go to files in `scratch`."""
        steps = list(self._moments_steps(mode, scratch))
        steps.append(Call("measured", self._measured, ("moments",)))
        steps += self._pair_steps(mode)
        steps += self._read_steps()
        names = tuple(s.name for s in steps if s.name in _RESULTS)
        steps.append(Call("cell", partial(self._cell, names), names))
        return Job(self.where, tuple(steps))

    def _moments_steps(self, mode: Mode, scratch: Path) -> Iterator[Step]:
        source = self._source(self.train, self.selected.index)
        label = f"moments of {self.train.name}/{self.layer}"
        holds = ["scatter"] if "scatter" in self._reads else []
        if self.options.null:
            holds.append(f"null {self.options.null_seed}")
        about = self._about("moments", self.train, holds=holds)
        if not mode.stored:
            yield _sweep("moments", label, self._moments_pass, source, about)
            return
        k, n = len(self.selected.classes), mode.class_blocks
        names = []
        for i, block in enumerate(cut(0, k, 1, most=-(-k // n), parts=n)):
            names.append(f"moments-{i}")
            about_block = {**about, "class_block": list(block)}
            make = partial(self._moments_pass, block=block, rows_at=scratch / f"block-{i}")
            part = f", classes {block[0]}..{block[1] - 1}" if n > 1 else ""
            yield _sweep(names[-1], label + part, make, source, about_block)
        yield Call("moments", partial(_gather, scratch), tuple(names))

    def _pair_steps(self, mode: Mode) -> Iterator[Step]:
        for name, quantities in (
            ("pairs", self._quantities),
            ("null_pairs", self._null_quantities),
        ):
            if not quantities:
                continue
            null = name == "null_pairs"
            about = self._about(
                name, self.train, holds=sorted(quantities), weighted=self.options.weighted,
                dist_exp=self.options.dist_exp, stored=mode.stored,
                null_seed=self.options.null_seed if null else None,
            )  # fmt: skip
            k = len(self.selected.classes)
            yield Sweep(
                name, f"{name.replace('_', ' ')} of {self.where}",
                partial(self._pair_pass, quantities, null), _tile_items(k, stored=mode.stored),
                needs=("measured",), unit="pairs", about=about,
            )  # fmt: skip

    def _read_steps(self) -> Iterator[Step]:
        reads = self._reads
        if "decisions" in reads:
            source = self._source(self.decided, self._decided_index)
            yield _sweep(
                "decisions", f"decisions of {self.decided.name}/{self.layer}",
                self._decisions_pass, source, self._about_decisions(), ("measured",),
            )  # fmt: skip
        if "ood" in reads and self.ood is not None:
            yield _sweep(
                "outside", f"moments of {self.ood.name}/{self.layer}", self._outside_pass,
                self._source(self.ood, None), self._about("moments", self.ood),
            )  # fmt: skip
        if "test" in reads:
            yield _sweep(
                "test", f"moments of {self.decided.name}/{self.layer} by train's classes",
                self._test_pass, self._source(self.decided, None),
                self._about("test", self.decided, train_fingerprint=self.fingerprint),
            )  # fmt: skip
        if "directional" in reads:
            yield _sweep(
                "directional", f"directional variance of {self.train.name}/{self.layer}",
                self._directional_pass, self._source(self.train, None),
                self._about("directional", self.train, weighted=self.options.weighted),
                ("measured",),
            )  # fmt: skip

    def _source(self, split: Split, index: npt.NDArray[np.int64] | None) -> RowSource:
        on_host = self.options.device == "cpu"
        return RowSource(split, self.layer, index, self.options.skip_nonfinite, on_host)

    # ---------------------------------------------------------------- what kept states depend on

    def _about(self, state: str, split: Split, **options: Any) -> About:
        mine = split.name == self.train.name
        return {
            "state": state,
            "place": f"{self.store.path}/{split.name}/{self.layer}",
            "fingerprint": self.fingerprint if mine else split.fingerprint(self.layer),
            "precision": self.options.precision,
            "skip_nonfinite": self.options.skip_nonfinite,
            "device": self.options.device,
            "version": _STATE_VERSION,
            **options,
        }

    def _about_decisions(self) -> About:
        deciding = (
            self.decided.prediction_fingerprint()
            if self._by_predictions
            else self.store.classifier_fingerprint(self.layer)
        )
        return self._about(
            "decisions", self.decided, train_fingerprint=self.fingerprint,
            classifier_fingerprint=deciding, filtered=self.selected.filtered,
        )  # fmt: skip

    # ------------------------------------------------------------------------------- its passes

    def _moments_pass(
        self, block: tuple[int, int] | None = None, rows_at: Path | None = None
    ) -> MomentsPass:
        selected = self.selected
        return MomentsPass(
            self._source(self.train, selected.index),
            len(selected.classes),
            scatter="scatter" in self._reads,
            precision=self.options.precision,
            device=self.options.device,
            null_counts=selected.counts[selected.classes] if self.options.null else None,
            null_seed=self.options.null_seed,
            block=block,
            rows_at=rows_at,
        )

    def _outside_pass(self) -> MomentsPass:
        assert self.ood is not None
        seen = select_classes(count_labels(self.ood))
        return self._plain_moments(self._source(self.ood, seen.index), len(seen.classes))

    def _test_pass(self) -> MomentsPass:
        source = self._source(self.decided, self.selected.index)
        return self._plain_moments(source, len(self.selected.classes))

    def _plain_moments(self, source: RowSource, n_classes: int) -> MomentsPass:
        return MomentsPass(source, n_classes, False, self.options.precision, self.options.device)

    def _pair_pass(self, quantities: frozenset[str], null: bool, measured: Measured) -> PairPass:
        statistics = measured.null if null else measured.statistics
        if statistics is None:
            return PairPass(None)
        moments = statistics.moments
        return PairPass(
            PairTiles(
                moments.means,
                statistics.global_mean,
                moments.variances,
                counts=moments.counts,
                within=moments.within_covariance if "cdnv_directional" in quantities else None,
                quantities=quantities,
                dist_exp=self.options.dist_exp,
            )
        )

    @property
    def _decided_index(self) -> npt.NDArray[np.int64] | None:
        """Which samples are decided: all, or with a filter those of the classes used."""
        if not self.selected.filtered:
            return None
        return np.where(self.selected.index >= 0, np.arange(self.store.n_classes), -1)

    def _decisions_pass(self, measured: Measured) -> DecisionsPass:
        statistics = measured.statistics
        means = statistics.moments.means
        put = _device_put(self.options.device, means)
        wide = self.train.spec(self.layer).dtype == "float64"
        dtype = np.float64 if wide else np.float32
        classifier = None
        if not self._by_predictions:
            weight, bias = self._classifier(stored=isinstance(means, StoredRows))
            classifier = linear_rule(
                put(weight),
                None if bias is None else put(bias),
                statistics.global_mean,
                dtype=dtype,
            )
        nearest = (
            faiss_nearest_rule(means, put(measured.classes), device=self.options.device)
            if self.options.ncc == "faiss"
            else nearest_mean_rule(means, put(measured.classes), dtype=dtype)
        )
        source = self._source(self.decided, self._decided_index)
        return DecisionsPass(source, nearest, classifier, self.options.device)

    def _directional_pass(self, measured: Measured) -> DirectionalPass:
        index = np.full(self.store.n_classes, -1, np.int64)
        index[measured.classes] = np.arange(len(measured.classes))
        means = measured.statistics.moments.means
        pairs = PairTiles(means, measured.statistics.global_mean, quantities=[])
        return DirectionalPass(self._source(self.train, index), pairs, self.options.device)

    # ------------------------------------------------------------------------------- its values

    def _measured(self, read: MomentsRead) -> Measured:
        """Make statistics of what was read, over the classes that have samples."""
        check_classes(
            len(read.seen.classes), self.train, "after rows that are not finite were left out"
        )
        put = _device_put(self.options.device, read.seen.moments.means)
        statistics = self._statistics(_moved(read.seen.moments, put))
        null = None
        if self.options.null and read.null is not None and len(read.null.classes) > 1:
            moments = _moved(read.null.moments, put)
            if "scatter" in self._reads:
                moments = null_scatter(statistics.moments, moments)
            null = self._statistics(moments)
        classes = self.selected.classes[read.seen.classes]
        return Measured(statistics, null, classes, read.skipped)

    def _statistics(self, moments: Moments) -> Statistics:
        return Statistics(moments, weighted=self.options.weighted, dist_exp=self.options.dist_exp)

    def _classifier(self, *, stored: bool) -> tuple[Array, Array | None]:
        """Read the classifier, or open it where it shall not be held in memory."""
        found = self.store.classifier(self.layer, lazily=stored)
        assert found is not None
        return found

    def _cell(self, names: tuple[str, ...], *given: Any) -> Cell:
        """Compute every value from the results of the steps."""
        results = dict(zip(names, given, strict=True))
        measured: Measured = results["measured"]
        statistics = self._completed(measured, results)
        cell = self._values(statistics)
        if measured.null is not None:
            null = replace(measured.null, pairs=results.get("null_pairs"))
            cell.yardsticks |= self._null_values(null)
        view = ClassView(statistics, measured.classes, self.store.n_classes)
        cell.deciles, cell.bins, cell.tops = view.deciles(), view.bins(), view.tops()
        if self.options.per_class:
            cell.classes = view.classes()
        cell.counts["n_rows_skipped"] = float(self._skipped(measured, results))
        return cell

    def _completed(self, measured: Measured, results: dict[str, Any]) -> Statistics:
        """Add to the first read's statistics what the other steps gave."""
        statistics = measured.statistics
        means = statistics.moments.means
        if self._has_classifier and self._reads & {"classifier", "decisions"}:
            put = _device_put(self.options.device, means)
            weight, bias = self._classifier(stored=isinstance(means, StoredRows))
            statistics = replace(
                statistics, weight=put(weight), bias=None if bias is None else put(bias),
                classes=put(measured.classes),
            )  # fmt: skip
        decisions: DecisionsRead | None = results.get("decisions")
        outside: MomentsRead | None = results.get("outside")
        test: MomentsRead | None = results.get("test")
        pairs: PairStats | None = results.get("pairs")
        directional: DirectionalVariance | None = results.get("directional")
        if outside is not None and len(outside.seen.classes):
            mean = _mean_of_means(outside.seen.moments.means)
            statistics = replace(statistics, ood_mean=_device_put(self.options.device, means)(mean))
        if test is not None:
            statistics = replace(statistics, test=self._aligned(test.seen, measured))
        return replace(
            statistics, pairs=pairs, directional=directional,
            decisions=None if decisions is None else decisions.decisions,
        )  # fmt: skip

    def _aligned(self, test: SeenMoments, measured: Measured) -> Moments:
        """Lay test moments out over the classes of train that have samples."""
        whole = test.expand(len(self.selected.classes))
        seen = self.selected.index[measured.classes]
        return whole if len(seen) == len(whole.counts) else whole.select(seen)

    def _skipped(self, measured: Measured, results: dict[str, Any]) -> int:
        """Count the rows left out, once per split."""
        found = {self.train.name: measured.skipped}
        for name, split in (
            ("test", self.decided),
            ("outside", self.ood),
            ("decisions", self.decided),
        ):
            if name in results and split is not None:
                found.setdefault(split.name, results[name].skipped)
        return sum(found.values())

    def _null_values(self, null: Statistics) -> dict[str, float]:
        """Compute the metrics that labels at random have a value for."""
        metrics = [metric for metric in self.metrics if metric.has_null]
        values = {f"{metric.name}_null": _computed(metric.compute, null) for metric in metrics}
        return {name: value for name, value in values.items() if value is not None}

    def _values(self, statistics: Statistics) -> Cell:
        cell = Cell(texts={"fingerprint": self.fingerprint})
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
        for reason_text, names in self.missing.items():
            cell.reasons |= dict.fromkeys(names, reason_text)
        cell.counts |= self._counts(statistics)
        if "rank" in cell.counts and self.options.precision == "fp32":
            error = _FLOAT32_ERROR / max(cell.counts["smallest_ratio"], _FLOAT32_ERROR)
            if error > _PROMISED_ERROR:
                cell.notes.append(
                    f"{self.where}: products in float32 leave nc1_pinv and nc1_svd an error of up to "
                    f"{error:.0e} here; --precision exact has none"
                )
        return cell

    def _counts(self, statistics: Statistics) -> dict[str, float]:
        k = statistics.n_classes
        counts = self.selected.counts
        found: dict[str, float] = {
            "n_samples": statistics.moments.n_samples,
            "n_classes": k,
            "n_classes_unseen": int(np.count_nonzero(counts == 0)),
            "n_classes_filtered": int(np.count_nonzero(counts)) - len(self.selected.classes),
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


# Steps whose results the values are computed from.
_RESULTS = ("measured", "pairs", "null_pairs", "decisions", "outside", "test", "directional")


def _sweep(
    name: str,
    label: str,
    make: Callable[..., Any],
    source: RowSource,
    about: About,
    needs: tuple[str, ...] = (),
) -> Sweep:
    """Make the step of a pass over rows."""
    return Sweep(name, label, make, source.items, source.chunk_rows, needs, about=about)


def _tile_items(n_classes: int, *, stored: bool) -> list[Item]:
    """Cut the tiles of a pair sweep over `n_classes` classes into items."""
    tiles = PairTiles.tile_list(n_classes, stored=stored)
    sizes = [(r.stop - r.start) * (c.stop - c.start) for r, c in tiles]
    ranges = cut(0, len(sizes), 1, _ITEM_TILES, _ITEMS)
    return [Item(start, stop, sum(sizes[start:stop])) for start, stop in ranges]


def _gather(scratch: Path, *reads: MomentsRead) -> MomentsRead:
    return gather(list(reads), scratch)


def _device_put(device: str, means: Array) -> Callable[[Any], Any]:
    """Give what brings arrays to where the class means are; means in a file stay on the host."""
    if isinstance(means, StoredRows):
        return lambda values: values
    return find_device(device).put


def _moved(moments: Moments, put: Callable[[Any], Any]) -> Moments:
    means = moments.means
    return Moments(
        put(moments.counts), means if isinstance(means, StoredRows) else put(means),
        put(moments.traces), None if moments.scatter is None else put(moments.scatter),
    )  # fmt: skip


def _mean_of_means(means: Array) -> npt.NDArray[np.float64]:
    mean: npt.NDArray[np.float64] = np.mean(means, axis=0)
    return mean
