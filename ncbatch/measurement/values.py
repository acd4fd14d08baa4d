"""Values: from the results of a layer's steps to the values of its metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import numpy as np

from ncbatch.arrays.namespace import Array
from ncbatch.arrays.rows import ChosenRows, StoredRows, mean_of_rows
from ncbatch.measurement.layers import Layer, check_classes, device_put
from ncbatch.measurement.samples import Index, MomentsRead
from ncbatch.metrics.by_class import ClassView
from ncbatch.metrics.statistics import Statistics, Undefined
from ncbatch.results.dataset import Cell
from ncbatch.states.moments import Moments
from ncbatch.states.null import null_scatter

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
    classes: Index
    skipped: int


class Outside(NamedTuple):
    """The mean of outside data's class means, if there is a class, and the rows left out."""

    mean: Array | None
    skipped: int


def measured_of(layer: Layer, read: MomentsRead) -> Measured:
    """Make statistics of what was read, over the classes that have samples."""
    moments = read.moments
    check_classes(len(moments.means), layer.train, "after rows that are not finite were left out")
    put = device_put(layer.options.device, moments.means)
    statistics = _statistics(layer, _moved(moments, put))
    null = None
    # Drawn labels may fall into one class only, of few samples; then there is no null to tell.
    if layer.null and read.null is not None and len(read.null.means) > 1:
        drawn = _moved(read.null, put)
        if "scatter" in layer.reads:
            drawn = null_scatter(statistics.moments, drawn)
        null = _statistics(layer, drawn)
    classes = layer.selected.classes[moments.classes]
    return Measured(statistics, null, classes, moments.skipped)


def _statistics(layer: Layer, moments: Moments) -> Statistics:
    conventions = ("weighted", "dist_exp", "ddof", "class_ddof", "divide_by_k")
    return Statistics(moments, **{name: getattr(layer.options, name) for name in conventions})


def _moved(moments: Moments, put: Callable[[Any], Any]) -> Moments:
    means = moments.means
    return Moments(
        put(moments.counts),
        # Means in a file are read block by block, wherever the products are.
        means if isinstance(means, StoredRows) else put(means),
        put(moments.traces),
        None if moments.scatter is None else put(moments.scatter),
    )


def mean_outside(read: MomentsRead) -> Outside:
    """Reduce outside data to what metrics read, so that its class means can be let go."""
    means = read.moments.means
    return Outside(mean_of_rows(means) if len(means) else None, read.moments.skipped)


def cell_of(layer: Layer, names: tuple[str, ...], *states: Any) -> Cell:
    """Compute every value from the results of the steps, given in the order of their names."""
    results = dict(zip(names, states, strict=True))
    measured: Measured = results.pop("measured")
    null_pairs = results.pop("null_pairs", None)
    skipped = _skipped(layer, measured, results)
    statistics = _complete(layer, measured, results)
    cell = _values(layer, statistics)
    if measured.null is not None:
        null = {f"{m.name}_null": m.compute for m in layer.metrics if m.has_null}
        cell.values |= _yardsticks(null, replace(measured.null, pairs=null_pairs))
    view = ClassView(statistics, measured.classes, layer.store.n_classes)
    cell.vectors = view.deciles() | view.bins() | view.tops()
    if layer.options.per_class:
        cell.vectors |= view.classes()
    cell.values["n_rows_skipped"] = float(skipped)
    return cell


def _complete(layer: Layer, measured: Measured, results: dict[str, Any]) -> Statistics:
    """Add to the first read's statistics what the other steps gave."""
    statistics = measured.statistics
    means = statistics.moments.means
    put = device_put(layer.options.device, means)
    if layer.weighs:
        weight, bias = layer.classifier(means)
        classes = put(measured.classes)
        statistics = replace(statistics, weight=weight, bias=bias, classes=classes)
    outside: Outside | None = results.pop("ood", None)
    if outside is not None and outside.mean is not None:
        statistics = replace(statistics, ood_mean=put(outside.mean))
    test: MomentsRead | None = results.pop("test", None)
    if test is not None:
        statistics = replace(statistics, test=_aligned(layer, test.moments, measured))
    known = {each.name for each in fields(Statistics)}
    attributes = {name: state for name, state in results.items() if name in known}
    others = {name: state for name, state in results.items() if name not in known}
    return replace(statistics, others=others, **attributes)


def _aligned(layer: Layer, test: Moments, measured: Measured) -> Moments:
    """Lay test moments out over the classes of train that have samples; copies no means."""
    means = test.means
    put = device_put(layer.options.device, measured.statistics.moments.means)
    held = test.classes
    assert held is not None
    # Views choose among rows: of no class at all there must be one, which counts call empty.
    if not len(held):
        means = np.zeros((1, means.shape[1]))
    classes = layer.selected.index[measured.classes]
    rows = np.clip(np.searchsorted(held, classes), 0, max(len(held) - 1, 0))
    exists = held[rows] == classes if len(held) else np.zeros(len(classes), np.bool_)
    counts = np.zeros(len(classes), np.int64)
    counts[exists] = test.counts[rows[exists]]
    traces = np.zeros(len(classes))
    traces[exists] = test.traces[rows[exists]]
    chosen = ChosenRows(means if isinstance(means, StoredRows) else put(means), rows)
    return Moments(put(counts), chosen, put(traces))


def _skipped(layer: Layer, measured: Measured, results: dict[str, Any]) -> int:
    """Count the rows left out, once per split: the most that a read of it met."""
    skipped = {layer.train.name: measured.skipped}
    for name, source in (("test", layer.decided), ("ood", layer.ood), ("decisions", layer.decided)):
        if name in results and source is not None:
            state = results[name]
            met = state.moments.skipped if isinstance(state, MomentsRead) else state.skipped
            skipped[source.name] = max(skipped.get(source.name, 0), met)
    return sum(skipped.values())


def _values(layer: Layer, statistics: Statistics) -> Cell:
    cell = Cell(texts={**layer.inputs, "source": layer.source})
    if layer.incomplete:
        cell.texts["incomplete"] = "; ".join(f"{p}: {what}" for p, what in layer.incomplete.items())
    if layer.remarks:
        cell.texts["remarks"] = "\n".join(layer.remarks)
    if "decisions" in layer.reads:
        cell.texts["nc4_split"] = layer.decided.name
        cell.texts["nc4_classifier"] = layer.decided.decider
        if statistics.decisions is not None:
            cell.values["n_decided"] = float(statistics.decisions.samples.sum())
    for metric in layer.metrics:
        try:
            cell.values[metric.name] = metric.compute(statistics)
        # A metric without a value is NaN with its reason, and never the end of a run.
        except Undefined as reason:
            cell.reasons[metric.name] = str(reason)
            continue
        yardsticks = {f"{metric.name}_floor": metric.floor, f"{metric.name}_random": metric.random}
        cell.values |= _yardsticks(yardsticks, statistics)
    for reason_text, names in layer.missing.items():
        cell.reasons |= dict.fromkeys(names, reason_text)
    cell.values |= _counts(layer, statistics)
    rounding = _ROUNDING.get(layer.options.precision)
    if "rank" in cell.values and rounding is not None:
        # The pseudo-inverse divides by the smallest eigenvalue that counts.
        error = rounding / max(cell.values["smallest_ratio"], rounding)
        if error > _PROMISED_ERROR:
            cell.texts["warnings"] = (
                f"{layer.where}: products in {layer.options.precision} leave nc1_pinv and nc1_svd "
                f"an error of up to {error:.0e} here; --precision exact has none"
            )
    return cell


def _counts(layer: Layer, statistics: Statistics) -> dict[str, float]:
    k = statistics.n_classes
    samples = layer.selected.counts
    counts: dict[str, float] = {
        # What was used, and all that was left out: no row and no class goes silently.
        "n_samples": statistics.moments.n_samples,
        "n_classes": k,
        "n_classes_unseen": int(np.count_nonzero(samples == 0)),
        "n_classes_filtered": int(np.count_nonzero(samples)) - len(layer.selected.classes),
        "n_means_without_direction": k - statistics.n_directed,
        "n_classes_without_variance": statistics.n_without_variance,
    }
    if statistics.pairs is not None:
        counts["n_coincident_pairs"] = statistics.pairs.coincident_means
        if layer.quantities(null=False) & {"log", "riesz"}:
            counts["n_coincident_directions"] = statistics.pairs.coincident_directions
    if "scatter" in layer.reads and statistics.n_directed:
        counts["rank"] = statistics.spectrum.rank
        counts["smallest_ratio"] = statistics.spectrum.smallest_ratio
    return {name: float(value) for name, value in counts.items()}


def _yardsticks(
    formulas: Mapping[str, Callable[[Statistics], float] | None], statistics: Statistics
) -> dict[str, float]:
    """Compute the yardsticks that there are and that have a value."""
    values = {}
    for name, compute in formulas.items():
        with suppress(Undefined):
            if compute is not None and np.isfinite(value := compute(statistics)):
                values[name] = value
    return values
