"""Values: from the results of a layer's steps to the values of its metrics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ncbatch.arrays.rows import ChosenRows, StoredRows, mean_of_rows
from ncbatch.measurement.layers import Layer, check_classes, device_put
from ncbatch.measurement.samples import DECISIONS, MomentsRead, SummedSplit
from ncbatch.metrics.by_class import ClassView
from ncbatch.metrics.statistics import Statistics, Undefined
from ncbatch.results.dataset import Cell
from ncbatch.states.decisions import Decisions
from ncbatch.states.directional import DirectionalVariance
from ncbatch.states.moments import Moments
from ncbatch.states.null import null_scatter
from ncbatch.states.pairs.stats import PairStats

# The unit of rounding of the products, and the relative error that they promise traces.
_ROUNDING = {"fp32": 6e-8, "tf32": 5e-4}
_PROMISED_ERROR = 1e-6


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


def measured_of(layer: Layer, read: MomentsRead) -> Measured:
    """Make statistics of what was read, over the classes that have samples."""
    check_classes(
        len(read.moments.means), layer.train, "after rows that are not finite were left out"
    )
    put = device_put(layer.options.device, read.moments.means)
    statistics = _statistics(layer, _moved(read.moments, put))
    null = None
    if layer.null and read.null is not None and len(read.null.means) > 1:
        moments = _moved(read.null, put)
        if "scatter" in layer.reads:
            moments = null_scatter(statistics.moments, moments)
        null = _statistics(layer, moments)
    classes = layer.selected.classes[read.moments.classes]
    return Measured(statistics, null, classes, read.moments.skipped)


def _statistics(layer: Layer, moments: Moments) -> Statistics:
    options = layer.options
    return Statistics(
        moments, weighted=options.weighted, dist_exp=options.dist_exp, ddof=options.ddof,
        class_ddof=options.class_ddof, divide_by_k=options.divide_by_k,
    )  # fmt: skip


def cell_of(layer: Layer, names: tuple[str, ...], *given: Any) -> Cell:
    """Compute every value from the results of the steps."""
    results = dict(zip(names, given, strict=True))
    measured: Measured = results["measured"]
    statistics = _completed(layer, measured, results)
    cell = _values(layer, statistics)
    if measured.null is not None:
        null = replace(measured.null, pairs=results.get("null_pairs"))
        cell.yardsticks |= _null_values(layer, null)
    view = ClassView(statistics, measured.classes, layer.store.n_classes)
    cell.deciles, cell.bins, cell.tops = view.deciles(), view.bins(), view.tops()
    if layer.options.per_class:
        cell.classes = view.classes()
    if cell.notes:
        cell.texts["warnings"] = "\n".join(cell.notes)
    cell.counts["n_rows_skipped"] = float(_skipped(layer, measured, results))
    return cell


def _completed(layer: Layer, measured: Measured, results: dict[str, Any]) -> Statistics:
    """Add to the first read's statistics what the other steps gave."""
    statistics = measured.statistics
    means = statistics.moments.means
    if layer.has_classifier and layer.reads & {"classifier", "decisions"}:
        put = device_put(layer.options.device, means)
        weight, bias = layer.classifier(stored=isinstance(means, StoredRows))
        statistics = replace(
            statistics, weight=put(weight), bias=None if bias is None else put(bias),
            classes=put(measured.classes),
        )  # fmt: skip
    decisions: Decisions | None = results.get("decisions")
    outside: MomentsRead | None = results.get("outside")
    test: MomentsRead | None = results.get("test")
    pairs: PairStats | None = results.get("pairs")
    directional: DirectionalVariance | None = results.get("directional")
    if outside is not None and len(outside.moments.means):
        mean = mean_of_rows(outside.moments.means)
        statistics = replace(statistics, ood_mean=device_put(layer.options.device, means)(mean))
    if test is not None:
        statistics = replace(statistics, test=_aligned(layer, test.moments, measured))
    return replace(statistics, pairs=pairs, directional=directional, decisions=decisions)


def _aligned(layer: Layer, test: Moments, measured: Measured) -> Moments:
    """Lay test moments out over the classes of train that have samples; copies no means."""
    means = test.means
    put = device_put(layer.options.device, measured.statistics.moments.means)
    held = test.classes
    assert held is not None
    if not len(held):
        means = np.zeros((1, means.shape[1]))
    classes = layer.selected.index[measured.classes]
    numbers = np.clip(np.searchsorted(held, classes), 0, max(len(held) - 1, 0))
    there = np.zeros(len(classes), np.bool_)
    if len(held):
        there = held[numbers] == classes
    counts = np.zeros(len(classes), np.int64)
    traces = np.zeros(len(classes))
    counts[there] = test.counts[numbers[there]]
    traces[there] = test.traces[numbers[there]]
    on_disk = isinstance(means, StoredRows)
    rows = ChosenRows(means if on_disk else put(means), numbers)
    return Moments(put(counts), rows, put(traces))


def _skipped(layer: Layer, measured: Measured, results: dict[str, Any]) -> int:
    """Count the rows left out, once per split: the most that a read of it met."""
    found = {layer.train.name: measured.skipped}
    for name, split in (
        ("test", layer.decided),
        ("outside", layer.ood),
        ("decisions", layer.decided),
    ):
        if name in results and split is not None:
            read = results[name]
            state = read.moments if isinstance(read, MomentsRead) else read
            found[split.name] = max(found.get(split.name, 0), state.skipped)
    return sum(found.values())


def _null_values(layer: Layer, null: Statistics) -> dict[str, float]:
    """Compute the metrics that labels at random have a value for."""
    metrics = [metric for metric in layer.metrics if metric.has_null]
    values = {f"{metric.name}_null": _computed(metric.compute, null) for metric in metrics}
    return {name: value for name, value in values.items() if value is not None}


def _values(layer: Layer, statistics: Statistics) -> Cell:
    cell = Cell(texts={**layer.inputs, "source": layer.source})
    if layer.remarks:
        cell.texts["remarks"] = "\n".join(layer.remarks)
    if "decisions" in layer.reads:
        cell.texts["nc4_split"] = layer.decided.name
        cell.texts["nc4_classifier"] = _who_decides(layer)
        if statistics.decisions is not None:
            cell.counts["n_decided"] = float(statistics.decisions.samples.sum())
    for metric in layer.metrics:
        try:
            cell.values[metric.name] = metric.compute(statistics)
        except Undefined as reason:
            cell.reasons[metric.name] = str(reason)
            continue
        for kind, compute in (("floor", metric.floor), ("random", metric.random)):
            value = None if compute is None else _computed(compute, statistics)
            if value is not None:
                cell.yardsticks[f"{metric.name}_{kind}"] = value
    for reason_text, names in layer.missing.items():
        cell.reasons |= dict.fromkeys(names, reason_text)
    cell.counts |= _counts(layer, statistics)
    rounding = _ROUNDING.get(layer.options.precision)
    if "rank" in cell.counts and rounding is not None:
        error = rounding / max(cell.counts["smallest_ratio"], rounding)
        if error > _PROMISED_ERROR:
            cell.notes.append(
                f"{layer.where}: products in {layer.options.precision} leave nc1_pinv and nc1_svd an error of up to "
                f"{error:.0e} here; --precision exact has none"
            )
    return cell


def _who_decides(layer: Layer) -> str:
    """Name what the classifier's decisions are: those of stored weights, or the model's own."""
    if isinstance(layer.decided, SummedSplit):
        by_weights = "classifier_fingerprint" in layer.decided.attributes(layer.layer, DECISIONS)
        return f"stored decisions{' by weights' if by_weights else ''}"
    return "predictions" if layer.by_predictions else "weights"


def _counts(layer: Layer, statistics: Statistics) -> dict[str, float]:
    k = statistics.n_classes
    counts = layer.selected.counts
    found: dict[str, float] = {
        "n_samples": statistics.moments.n_samples,
        "n_classes": k,
        "n_classes_unseen": int(np.count_nonzero(counts == 0)),
        "n_classes_filtered": int(np.count_nonzero(counts)) - len(layer.selected.classes),
        "n_means_without_direction": k - statistics.n_directed,
        "n_classes_without_variance": statistics.n_without_variance,
    }
    if statistics.pairs is not None:
        found["n_coincident_pairs"] = statistics.pairs.coincident_means
        if layer.quantities & {"log", "riesz"}:
            found["n_coincident_directions"] = statistics.pairs.coincident_directions
    if "scatter" in layer.reads and statistics.n_directed:
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


def _moved(moments: Moments, put: Callable[[Any], Any]) -> Moments:
    means = moments.means
    return Moments(
        put(moments.counts), means if isinstance(means, StoredRows) else put(means),
        put(moments.traces), None if moments.scatter is None else put(moments.scatter),
    )  # fmt: skip
