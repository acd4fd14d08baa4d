"""The steps of measuring a layer: each statistic is one function of its steps with their prices.

`STATISTICS` is the one list of them. A plan makes the same steps as a run, but of metadata alone:
it knows neither the classes used nor what the data hash to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from ncbatch.engine.jobs import Call, Item, Job, Price, Step, Sweep, cut
from ncbatch.engine.kept import About
from ncbatch.errors import DataError
from ncbatch.measurement.finished import Finished, Source
from ncbatch.measurement.layers import Layer, device_put, find_layers
from ncbatch.measurement.options import Options
from ncbatch.measurement.passes import DecisionsPass, DirectionalPass, MomentsPass, PairPass
from ncbatch.measurement.samples import Index, Mode, MomentsRead, Reading, Samples, select_classes
from ncbatch.measurement.values import Measured, cell_of, mean_outside, measured_of
from ncbatch.metrics.catalogue import find_metrics
from ncbatch.metrics.metric import Metric
from ncbatch.metrics.statistics import Statistics
from ncbatch.states.directional import DirectionalVariance
from ncbatch.states.moments import MomentsAccumulator
from ncbatch.states.pairs.sweep import PairTiles
from ncbatch.states.rules import Rule, faiss_nearest_rule, linear_rule, nearest_mean_rule
from ncbatch.store.feature_store import FeatureStore

# Class blocks beyond this would read the data so often that a larger machine is cheaper.
MAX_CLASS_BLOCKS = 256
# Bytes per class of counts, traces, norms, selections and results by class.
_CLASS_BYTES = 256
# Tiles of an item of the pair sweep at most, for resume and balance.
_ITEM_TILES = 256
_ITEMS = 16


@dataclass(frozen=True)
class Work:
    """A layer, how it is measured, and where its work is kept.

    Attributes
    ----------
    layer : Layer
        What is measured.
    mode : Mode
        How it fits.
    folder_of : callable or None
        Tells the folder of what is kept of a state; None in a plan, which keeps nothing.
    """

    layer: Layer
    mode: Mode
    folder_of: Callable[[About], Path] | None = None

    def about(
        self, state: str, source: Source, hashed: Callable[[], About] = dict, **depends: Any
    ) -> About:
        """Say what a kept state depends on; a plan hashes no data, and so calls no `hashed`."""
        if self.folder_of is None:
            return {}
        return self.layer.about(state, source, **depends, **hashed())

    def rows_at(self, about: About) -> Path | None:
        """Tell the folder of class means that are not held in memory."""
        return self.folder_of(about) if self.mode.stored and self.folder_of else None

    @property
    def on_device(self) -> bool:
        """Whether arrays of blocks and states are on a GPU."""
        return self.layer.options.device != "cpu"

    @cached_property
    def held(self) -> int:
        """Bytes that stay while later steps run: means, moments and the classifier."""
        layer = self.layer
        k = layer.n_used
        d = layer.train.n_features
        states = 2 if layer.null else 1
        # The null has a scatter too: it is made of that of the samples.
        scatter = d * d * 8 if "scatter" in layer.reads else 0
        held = states * (k * _CLASS_BYTES + scatter) + layer.store.n_classes * 32
        held += layer.train.bytes_left
        if not self.mode.stored:
            held += states * k * d * 8
            if "test" in layer.reads:
                held += k * d * 8
        if self.mode.merged:  # as they were merged, and as they were sent
            held *= 2
        if layer.weighs and not self.mode.stored:
            held += layer.store.n_classes * d * layer.weight_bytes
        return held

    @cached_property
    def held_outside(self) -> int:
        """Bytes of class means of outside data, which may linger when only their mean is left."""
        ood = self.layer.ood
        if ood is None or "ood" not in self.layer.reads or self.mode.stored:
            return 0
        return _most_outside(self.layer, ood) * ood.n_features * 8


# Moments: of train by its classes, of outside data by theirs, of test by those of train.


def read_moments(work: Work) -> Iterator[Step]:
    """Read class means, traces and the pooled scatter of train, and those of the null."""
    layer = work.layer
    scatter = "scatter" in layer.reads
    holds = ["scatter"] if scatter else []
    if layer.null:
        holds.append(f"null {layer.options.null_seed}")
    reading = Reading(
        "moments",
        f"moments of {layer.train.name}/{layer.layer}",
        f"moments of {layer.where}",
        work.about("moments", layer.train, holds=holds),
        layer.n_used,
        layer.selection,
        scatter=scatter,
        null=layer.null,
    )
    yield from _moments(work, layer.train, reading)
    yield Call("measured", partial(measured_of, layer), ("moments",))


def read_outside(work: Work) -> Iterator[Step]:
    """Read the class means of outside data, of which only their mean stays."""
    layer = work.layer
    ood = layer.ood
    if ood is None or "ood" not in layer.reads:
        return
    reading = Reading(
        "outside",
        f"moments of {ood.name}/{layer.layer}",
        f"outside data of {layer.where}",
        work.about("moments", ood),
        _most_outside(layer, ood),
        None if work.folder_of is None else select_classes(ood.counts(), Options()),
        beside=work.held,
    )
    yield from _moments(work, ood, reading)
    yield Call("ood", mean_outside, ("outside",))


def _most_outside(layer: Layer, ood: Source) -> int:
    return min(layer.store.n_classes, max(ood.most_classes, 1))


def read_test(work: Work) -> Iterator[Step]:
    """Read the moments of test samples by the classes of train."""
    layer = work.layer
    if "test" not in layer.reads:
        return
    test = layer.decided
    reading = Reading(
        "test",
        f"moments of {test.name}/{layer.layer} by train's classes",
        f"test moments of {layer.where}",
        work.about("test", test, lambda: {"train_fingerprint": layer.fingerprint}),
        layer.n_used,
        layer.selection,
        beside=work.held + work.held_outside,
    )
    yield from _moments(work, test, reading)


def _moments(work: Work, source: Source, reading: Reading) -> Iterator[Step]:
    """Make the steps of a reading: the state that the store holds, or reads of samples.

    There is one read or, with class means in files, one per class block, joined one after another.
    """
    if isinstance(source, Finished):
        rows_at = work.rows_at(work.about("means", source))
        yield source.moments_call(reading, work.mode, work.on_device, rows_at)
        return
    options = work.layer.options
    selection = reading.selection
    k = reading.n_classes if selection is None else len(selection.classes)
    read = partial(
        MomentsPass,
        source.labelled(reading.index, options),
        k,
        reading.scatter,
        options.precision,
        options.device,
        selection.counts[selection.classes] if reading.null and selection is not None else None,
        options.null_seed,
    )
    price = _moments_price(work, source, reading)
    n = work.mode.class_blocks
    blocks = list(cut(0, k, 1, most=-(-k // n), parts=n)) if work.mode.stored else [None]
    so_far = ""
    for i, block in enumerate(blocks):
        name = reading.name
        label = reading.label
        about = reading.about
        if block is not None:
            about = {**about, "class_block": list(block)}
        # A single block has the name of the whole, which is what it is.
        if block is not None and len(blocks) > 1:
            name += f"-{i}"
            label += f", classes {block[0]}..{block[1] - 1}"
        make = partial(read, block=block, rows_at=work.rows_at(about))
        # All blocks together have one price, which the first of them carries.
        only_once = None if i else price
        yield Sweep(name, label, make, source.items, about=about, price=only_once)
        if so_far:
            joined = reading.name if block is blocks[-1] else f"{reading.name}-to-{i}"
            yield Call(joined, MomentsRead.join, (so_far, name))
            name = joined
        so_far = name


def _moments_price(work: Work, samples: Samples, reading: Reading) -> Price:
    mode = work.mode
    scatter = reading.scatter
    on_device = work.on_device
    n_rows = samples.split.n_rows
    n_items = len(samples.items)
    block_rows = samples.block_rows
    d = samples.n_features
    b = mode.class_blocks
    # Classes of the largest block.
    k = -(-reading.n_classes // b)
    states = 2 if reading.null else 1

    accumulated = partial(
        MomentsAccumulator.peak_bytes,
        k,
        d,
        block_rows,
        # Nothing is compiled for arrays of a device.
        n_rows=0 if on_device else n_rows,
        itemsize=8 if samples.wide else 4,
    )
    arrays = accumulated(scatter=scatter)
    if reading.null:
        arrays += accumulated(scatter=False)
    if b > 1:  # a block's rows of the classes at hand, and their residuals' mask and labels
        row_bytes = samples.split.spec(samples.layer).row_bytes
        arrays += 2 * block_rows * (row_bytes + 32)
    if b > 1 and scatter:  # of the blocks before, and of both when they are joined
        arrays += 2 * d * d * 8
    state = k * (d * 8 + 48) + (d * d * 8 if scatter else 0)
    merges = 0
    if mode.merged:  # states of items that wait to be merged, and a merge beside them
        merges = (n_items.bit_length() + 3) * state * states
    held = samples.split.n_classes * 32 + merges + (state if on_device else arrays)
    return Price(
        reading.planned,
        samples.read_bytes + held + reading.beside,
        device_bytes=arrays + 2 * block_rows * d * 8 if on_device else 0,
        bytes_read=samples.bytes_read * b,
        flops=n_rows * d * 4 + (n_rows + reading.n_classes) * d * d * scatter,
        n_items=n_items * b,
        block_rows=block_rows,
        n_reads=b,
        disk_bytes=reading.n_classes * d * 8 * states if mode.stored else 0,
    )


# Pairs of class means, under the labels and under labels at random.


def sweep_pairs(work: Work, *, null: bool = False) -> Iterator[Step]:
    """Sweep all pairs of class means, under the labels or under labels at random."""
    layer = work.layer
    name = "null_pairs" if null else "pairs"
    quantities = layer.quantities(null=null)
    if not quantities:
        return
    options = layer.options
    stored = work.mode.stored
    k = layer.n_used
    d = layer.train.n_features
    label = f"{name.replace('_', ' ')} of {layer.where}"
    side = PairTiles.side(k, stored=stored)
    items = _tile_items(k, stored)
    price = Price(
        label,
        work.held + PairTiles.peak_bytes(k, d, quantities, stored=stored),
        device_bytes=k * d * 12 + side * side * 64 if work.on_device else 0,
        flops=k * k * d * (2 if "cdnv_directional" in quantities else 1),
        n_items=len(items),
        tile_classes=side,
    )
    about = work.about(
        name,
        layer.train,
        holds=sorted(quantities),
        weighted=options.weighted,
        dist_exp=options.dist_exp,
        ddof=options.ddof,
        stored=stored,
        null_seed=options.null_seed if null else None,
    )
    yield Sweep(
        name,
        label,
        partial(_pair_pass, options, quantities, null),
        items,
        needs=("measured",),
        unit="pairs",
        about=about,
        price=price,
    )


@cache
def _tile_items(n_classes: int, stored: bool) -> list[Item]:
    """Cut the tiles of a pair sweep over `n_classes` classes into items."""
    tiles = PairTiles.tile_list(n_classes, stored=stored)
    sizes = [(r.stop - r.start) * (c.stop - c.start) for r, c in tiles]
    ranges = cut(0, len(sizes), 1, _ITEM_TILES, _ITEMS)
    return [Item(start, stop, sum(sizes[start:stop])) for start, stop in ranges]


def _pair_pass(
    options: Options, quantities: frozenset[str], null: bool, measured: Measured
) -> PairPass:
    statistics = measured.null if null else measured.statistics
    if statistics is None:
        return PairPass(None)
    moments = statistics.moments
    return PairPass(
        PairTiles(
            moments.means,
            statistics.global_mean,
            statistics.variances,
            counts=moments.counts,
            within=moments.within_covariance if "cdnv_directional" in quantities else None,
            quantities=quantities,
            dist_exp=options.dist_exp,
            ddof=options.ddof,
        )
    )


# Further reads of samples: their decisions, and their variance along the lines between means.


def _sweep(
    work: Work,
    samples: Samples,
    name: str,
    what: str,
    make: Callable[..., Any],
    about: About,
    *,
    held: int,
    flops: int,
    device_bytes: int = 0,
) -> Sweep:
    """Make the step that reads samples once more, when the class means are known."""
    layer = work.layer
    items = samples.items
    price = Price(
        f"{what} of {layer.where}",
        samples.read_bytes + work.held + held,
        device_bytes,
        samples.bytes_read,
        flops,
        len(items),
        samples.block_rows,
        n_reads=1,
    )
    label = f"{what} of {samples.name}/{layer.layer}"
    return Sweep(name, label, make, items, ("measured",), about=about, price=price)


def decide(work: Work) -> Iterator[Step]:
    """Decide samples by the nearest class mean and by the classifier."""
    layer = work.layer
    if "decisions" not in layer.reads:
        return
    samples = layer.decided
    index = _decided_index(layer)
    if isinstance(samples, Finished):
        yield samples.decisions_call(f"decisions of {layer.where}", index, work.held)
        return
    k = layer.n_used
    d = layer.train.n_features
    n_classes = layer.store.n_classes
    stored = work.mode.stored
    # Rules score in the dtype of the features, and decide near-ties in float64.
    itemsize = 8 if layer.train.wide else 4

    # One rule over the means of the classes used, one over all rows of the classifier.
    # FAISS holds a copy of the means, stored ones too.
    size = (d, samples.block_rows, itemsize)
    arrays = Rule.peak_bytes(k, *size, stored=stored and layer.options.ncc != "faiss")
    scores = k
    if not samples.by_predictions:
        arrays += Rule.peak_bytes(n_classes, *size, stored=stored)
        scores += n_classes

    def hashed() -> About:
        return {
            "train_fingerprint": layer.fingerprint,
            "classifier_fingerprint": layer.deciding_fingerprint,
            "filtered": layer.selected.filtered,
        }

    yield _sweep(
        work,
        samples,
        "decisions",
        "decisions",
        partial(_decisions_pass, layer, samples.labelled(index, layer.options)),
        work.about("decisions", samples, hashed),
        held=n_classes * 96 + arrays,
        flops=2 * samples.split.n_rows * scores * d,
        device_bytes=arrays + k * d * 8 if work.on_device else 0,
    )


def _decided_index(layer: Layer) -> Index | None:
    """Map labels to those of samples that are decided: all, or with a filter the classes used."""
    selection = layer.selection
    if selection is None or not selection.filtered:
        return None
    # Decisions are over all K ids, whatever is used: the classifier chooses among all.
    return np.where(selection.index >= 0, np.arange(layer.store.n_classes), -1)


def _decisions_pass(layer: Layer, samples: Samples, measured: Measured) -> DecisionsPass:
    statistics = measured.statistics
    means = statistics.moments.means
    device = layer.options.device
    classes = device_put(device, means)(measured.classes)
    dtype = np.float64 if layer.train.wide else np.float32
    classifier = None
    if not samples.by_predictions:
        weight, bias = layer.classifier(means)
        classifier = linear_rule(weight, bias, statistics.global_mean, dtype=dtype)
    nearest = (
        faiss_nearest_rule(means, classes, device=device)
        if layer.options.ncc == "faiss"
        else nearest_mean_rule(means, classes, dtype=dtype)
    )
    return DecisionsPass(samples, nearest, classifier, device)


def sweep_directions(work: Work) -> Iterator[Step]:
    """Read train a second time, for the variance of samples along the lines between means."""
    layer = work.layer
    if "directional" not in layer.reads:
        return
    samples = layer.train
    assert isinstance(samples, Samples)  # `Layer.absent` says where there are none
    k = layer.n_used
    d = layer.train.n_features
    yield _sweep(
        work,
        samples,
        "directional",
        "directional variance",
        partial(_directional_pass, layer, samples),
        work.about("directional", samples, weighted=layer.options.weighted),
        held=DirectionalVariance.peak_bytes(k, d, samples.block_rows),
        flops=2 * samples.split.n_rows * k * d,
    )


def _directional_pass(layer: Layer, samples: Samples, measured: Measured) -> DirectionalPass:
    # Not those selected: rows that are not finite may have left a class without samples.
    index = replace(layer.selected, classes=measured.classes).index
    statistics = measured.statistics
    pairs = PairTiles(statistics.moments.means, statistics.global_mean, quantities=[])
    return DirectionalPass(samples.labelled(index, layer.options), pairs, layer.options.device)


# All of them: jobs, and which metrics a layer allows.


# What metrics may read of a layer, by the functions that make the steps of it, nothing where no
# metric reads it; `Layer.absent` says why a layer has none. In the order in which they run and are
# planned: memory that one leaves behind is in the prices of those after it. The last step's result
# is the attribute of `Statistics` of its name or, where there is none, in its `others`.
STATISTICS: tuple[Callable[[Work], Iterable[Step]], ...] = (
    read_moments,
    read_outside,
    sweep_pairs,
    partial(sweep_pairs, null=True),
    decide,
    read_test,
    sweep_directions,
)


def job_of(layer: Layer, mode: Mode, folder_of: Callable[[About], Path] | None = None) -> Job:
    """Make the job that measures a layer; without `folder_of` only for its prices."""
    work = Work(layer, mode, folder_of)
    # The last step of each statistic has its result; those before only lead to it.
    chains = [steps for make in STATISTICS if (steps := list(make(work)))]
    names = tuple(steps[-1].name for steps in chains)
    scatter = "scatter" in layer.reads
    formulas = Statistics.peak_bytes(layer.n_used, layer.train.n_features, scatter=scatter)
    price = Price(f"formulas of {layer.where}", work.held + work.held_outside + formulas)
    cell = Call("cell", partial(cell_of, layer, names), names, price=price)
    return Job(layer.where, (*chain.from_iterable(chains), cell))


def choose_mode(
    layer: Layer, memory: int, device_memory: int | None = None, merged: bool = False
) -> Mode:
    """Choose the cheapest way that fits: all in memory, or means in a file and class blocks.

    Parameters
    ----------
    layer : Layer
        The layer.
    memory : int
        Bytes a worker may hold beside the interpreter.
    device_memory : int, optional
        Bytes of GPU memory it may hold.
    merged : bool, optional
        Whether items are merged on a cluster.

    Returns
    -------
    Mode
        When nothing fits, the way that needs least.
    """

    def fits(mode: Mode) -> bool:
        return all(
            price.peak_bytes <= memory
            and (device_memory is None or price.device_bytes <= device_memory)
            for price in job_of(layer, mode).prices
        )

    # 1, 2, 4, ... blocks, none of them empty: each way needs less memory than the one before it,
    # and reads the data more often.
    most = min(MAX_CLASS_BLOCKS, max(layer.n_used, 1))
    in_files = [Mode(2**i, stored=True, merged=merged) for i in range(most.bit_length())]
    modes = [Mode(merged=merged), *in_files]
    return next((mode for mode in modes if fits(mode)), modes[-1])


def choose_tasks(
    opened: Mapping[str, FeatureStore],
    layers: Iterable[str] | None,
    options: Options,
    *,
    scanned: bool,
) -> list[Layer]:
    """Find the layers of every store, and what is measured of each.

    Metrics that a layer does not allow are left out there; one that was named and that no layer
    allows is refused.

    Parameters
    ----------
    opened, layers, options, scanned
        As for `find_layers`.

    Raises
    ------
    UnknownNameError
        For a split or layer that does not exist.
    DataError
        When there is nothing to measure.
    """
    wanted = find_metrics(options.metrics)
    tasks = [
        _with_metrics(layer, wanted)
        for layer in find_layers(opened, layers, options, scanned=scanned)
    ]
    for metric in wanted if options.metrics is not None else ():
        if not any(metric.name in task.metric_names for task in tasks):
            why = next(why for why, names in tasks[0].missing.items() if metric.name in names)
            raise DataError(
                f"metric '{metric.name}' cannot be measured: {why}",
                "a store that has what it reads",
                "see 'ncbatch metrics' for what each metric reads, 'ncbatch info' for what is "
                "there",
            )
    return tasks


def _with_metrics(layer: Layer, wanted: list[Metric]) -> Layer:
    """Split metrics into those that a layer allows, and the rest by reason."""
    absent = layer.absent
    applied: list[str] = []
    missing: dict[str, tuple[str, ...]] = {}
    for metric in wanted:
        # One reason is enough, and always the same one.
        reasons = [why for name in sorted(metric.reads) if (why := absent.get(name))]
        if reasons:
            missing[reasons[0]] = (*missing.get(reasons[0], ()), metric.name)
        else:
            applied.append(metric.name)
    return replace(layer, metric_names=tuple(applied), missing=missing)
