"""LayerTask: the steps of measuring one layer of one store."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ncbatch.arrays.rows import StoredRows
from ncbatch.engine.jobs import Call, Item, Job, Price, Step, Sweep, cut
from ncbatch.engine.kept import About
from ncbatch.measurement.layers import AnySplit, Layer, device_put
from ncbatch.measurement.passes import DecisionsPass, DirectionalPass, MomentsPass, PairPass
from ncbatch.measurement.samples import RowSource, SummedSplit, count_labels, joined, select_classes
from ncbatch.measurement.values import Measured, cell_of, measured_of
from ncbatch.metrics.statistics import Statistics
from ncbatch.states.directional import DirectionalVariance
from ncbatch.states.moments import MomentsAccumulator
from ncbatch.states.pairs.sweep import PairTiles
from ncbatch.states.rules import Rule, faiss_nearest_rule, linear_rule, nearest_mean_rule
from ncbatch.store.split import Split

# What measuring a layer costs: pure integers, from shapes and options alone.


# Class blocks beyond this would read the data so often that a larger machine is cheaper.
MAX_CLASS_BLOCKS = 256
# Bytes per class of counts, traces, norms, selections and results by class.
_CLASS_BYTES = 256


@dataclass(frozen=True)
class Rows:
    """The rows of a layer of a split, as they are read.

    Attributes
    ----------
    n_rows, n_items : int
        Rows, and items of whole chunks.
    row_bytes : int
        Stored bytes of a row.
    block_rows : int
        Rows of a block.
    read_bytes : int
        Bytes held by reading.
    summed : bool
        Whether a finished state is read instead: `n_rows` classes with samples, `row_bytes` of
        their means.
    """

    n_rows: int
    n_items: int
    row_bytes: int
    block_rows: int
    read_bytes: int
    summed: bool = False

    @property
    def bytes_read(self) -> int:
        """Bytes of features and labels; of a state, of means, counts, traces and classes."""
        if self.summed:
            return self.n_rows * (self.row_bytes + 24)
        return self.n_rows * (self.row_bytes + 4)


@dataclass(frozen=True)
class Shape:
    """All numbers that the cost of a layer depends on.

    Attributes
    ----------
    where : str
        Store and layer, for a person.
    n_classes, n_used, n_features : int
        K of the store, the classes used (or the most there can be), D.
    wide : bool
        Whether features are float64.
    train, decided, outside : Rows
        What is read; `decided` and `outside` are None where they are not.
    reads : frozenset of str
        Statistics that the metrics need.
    quantities, null_quantities : frozenset of str
        Pair quantities, of the sweep and of its null.
    null : bool
        Whether there is a null.
    weight_bytes : int
        Bytes of an element of the classifier's rows; 0 without a classifier.
    classifier_decides : bool
        Whether the classifier's own products are needed for decisions.
    decisions_stored : bool
        Whether the store holds the decisions in the place of the samples.
    faiss : bool
        Whether FAISS seeks the nearest mean: it holds a copy of the means, stored ones too.
    on_device : bool
        Whether arrays of blocks and states are on a GPU.
    merged : bool
        Whether items are merged on a cluster.
    """

    where: str
    n_classes: int
    n_used: int
    n_features: int
    wide: bool
    train: Rows
    decided: Rows | None
    outside: Rows | None
    reads: frozenset[str]
    quantities: frozenset[str]
    null_quantities: frozenset[str]
    null: bool
    weight_bytes: int
    classifier_decides: bool
    decisions_stored: bool = False
    faiss: bool = False
    on_device: bool = False
    merged: bool = False

    @property
    def scatter(self) -> bool:
        """Whether the D x D scatter is kept."""
        return "scatter" in self.reads


@dataclass(frozen=True)
class Mode:
    """How a layer is measured so that it fits.

    Attributes
    ----------
    class_blocks : int
        The data is read once per block of classes.
    stored : bool
        Whether class means are kept in a file instead of memory.
    """

    class_blocks: int = 1
    stored: bool = False


def choose_mode(shape: Shape, memory: int, device_memory: int | None = None) -> Mode:
    """Choose the cheapest way that fits: all in memory, or means in a file and class blocks.

    Parameters
    ----------
    shape : Shape
        The layer.
    memory : int
        Bytes a worker may hold beside the interpreter.
    device_memory : int, optional
        Bytes of GPU memory it may hold.

    Returns
    -------
    Mode
        When nothing fits, the way that needs least.
    """

    def fits(mode: Mode) -> bool:
        return all(
            price.peak_bytes <= memory
            and (device_memory is None or price.device_bytes <= device_memory)
            for price in prices(shape, mode)
        )

    blocks = 1
    modes = [Mode()]
    while blocks <= min(MAX_CLASS_BLOCKS, max(shape.n_used, 1)):
        modes.append(Mode(blocks, stored=True))
        blocks *= 2
    return next((mode for mode in modes if fits(mode)), modes[-1])


def prices(shape: Shape, mode: Mode) -> list[Price]:
    """Give the cost of every step of measuring a layer."""
    return list(_prices(shape, mode))


def _prices(s: Shape, mode: Mode) -> Iterator[Price]:
    yield _moments(
        s, mode, s.train, f"moments of {s.where}", s.n_used, scatter=s.scatter, null=s.null
    )
    held, after = _held(s, mode), 0
    if "ood" in s.reads and s.outside is not None:
        n_outside = min(s.n_classes, max(s.outside.n_rows, 1))
        found = _moments(s, mode, s.outside, f"outside data of {s.where}", n_outside)
        yield replace(found, peak_bytes=found.peak_bytes + held)
        after = 0 if mode.stored else n_outside * s.n_features * 8
    for quantities, what in ((s.quantities, "pairs"), (s.null_quantities, "null pairs")):
        if quantities:
            yield _pairs(s, mode, quantities, f"{what} of {s.where}", held)
    if "decisions" in s.reads and s.decided is not None:
        yield _decisions(s, mode, s.decided, held)
    if "test" in s.reads and s.decided is not None:
        found = _moments(s, mode, s.decided, f"test moments of {s.where}", s.n_used)
        yield replace(found, peak_bytes=found.peak_bytes + held + after)
    if "directional" in s.reads:
        peak = DirectionalVariance.peak_bytes(s.n_used, s.n_features, s.train.block_rows)
        yield Price(
            f"directional variance of {s.where}", s.train.read_bytes + held + peak,
            bytes_read=s.train.bytes_read, flops=2 * s.train.n_rows * s.n_used * s.n_features,
            n_items=s.train.n_items, block_rows=s.train.block_rows, n_reads=1,
        )  # fmt: skip
    yield Price(
        f"formulas of {s.where}",
        held + after + Statistics.peak_bytes(s.n_used, s.n_features, scatter=s.scatter),
    )


def _moments(
    s: Shape,
    mode: Mode,
    rows: Rows,
    step: str,
    n_used: int,
    scatter: bool = False,
    null: bool = False,
) -> Price:
    if rows.summed:
        return _state(s, mode, rows, step, n_used, scatter)
    d, b = s.n_features, mode.class_blocks
    k = -(-n_used // b)

    def accumulated(scatter: bool) -> int:
        return MomentsAccumulator.peak_bytes(
            k, d, rows.block_rows, scatter=scatter,
            n_rows=0 if s.on_device else rows.n_rows, itemsize=8 if s.wide else 4,
        )  # fmt: skip

    arrays = accumulated(scatter)
    if null:
        arrays += accumulated(False)
    if b > 1:  # a block's rows of the classes at hand, and their residuals' mask and labels
        arrays += 2 * rows.block_rows * (rows.row_bytes + 32)
    if b > 1 and scatter:  # of the blocks before, and of both when they are joined
        arrays += 2 * d * d * 8
    state = k * (d * 8 + 48) + (d * d * 8 if scatter else 0)
    merges = 0
    if s.merged:  # states of items that wait to be merged, and a merge beside them
        merges = (rows.n_items.bit_length() + 3) * state * (2 if null else 1)
    host = merges + (state if s.on_device else arrays)
    flops = rows.n_rows * d * 4 + (rows.n_rows + n_used) * d * d * scatter
    return Price(
        step, rows.read_bytes + s.n_classes * 32 + host,
        device_bytes=arrays + 2 * rows.block_rows * d * 8 if s.on_device else 0,
        bytes_read=rows.bytes_read * b, flops=flops, n_items=rows.n_items * b,
        block_rows=rows.block_rows, n_reads=b,
        disk_bytes=n_used * d * 8 * (2 if null else 1) if mode.stored else 0,
    )  # fmt: skip


def _state(s: Shape, mode: Mode, rows: Rows, step: str, n_used: int, scatter: bool) -> Price:
    """Price a state that is read instead of samples: its means once, and chunks on their way."""
    k, square = min(n_used, rows.n_rows), s.n_features**2 * 8 * scatter
    means = k * s.n_features * 8
    host = 3 * square + (0 if mode.stored else means * (2 if s.merged else 1))
    return Price(
        step, rows.read_bytes + s.n_classes * 64 + host,
        device_bytes=means + square if s.on_device else 0, bytes_read=rows.bytes_read + square,
        n_reads=1, disk_bytes=means if mode.stored else 0,
    )  # fmt: skip


def _held(s: Shape, mode: Mode) -> int:
    """Give what stays while later steps run: means, moments and the classifier."""
    k, d = s.n_used, s.n_features
    states = 2 if s.null else 1
    held = states * (k * _CLASS_BYTES + (d * d * 8 if s.scatter else 0)) + s.n_classes * 32
    if s.train.summed:  # what reading it left with the allocator
        held += s.train.read_bytes
    if not mode.stored:
        held += states * k * d * 8
        if "test" in s.reads:
            held += k * d * 8
    if s.merged:  # as they were merged, and as they were sent
        held *= 2
    if s.weight_bytes and not mode.stored:
        held += s.n_classes * d * s.weight_bytes
    return held


def _pairs(s: Shape, mode: Mode, quantities: frozenset[str], step: str, held: int) -> Price:
    k, d = s.n_used, s.n_features
    peak = PairTiles.peak_bytes(k, d, quantities, stored=mode.stored)
    side = PairTiles.side(k, stored=mode.stored)
    tiles = -(-k // side) * (-(-k // side) + 1) // 2
    products = 2 if "cdnv_directional" in quantities else 1
    return Price(
        step, held + peak, device_bytes=k * d * 12 + side * side * 64 if s.on_device else 0,
        flops=k * k * d * products, n_items=min(tiles, 16), tile_classes=side,
    )  # fmt: skip


def _decisions(s: Shape, mode: Mode, rows: Rows, held: int) -> Price:
    if s.decisions_stored:
        found = s.n_classes * 32
        return Price(f"decisions of {s.where}", held + 3 * found, bytes_read=found, n_reads=1)
    k, d, itemsize = s.n_used, s.n_features, 8 if s.wide else 4

    def rule(n: int, stored: bool) -> int:
        return Rule.peak_bytes(n, d, rows.block_rows, itemsize, stored=stored)

    arrays = rule(k, mode.stored and not s.faiss)
    if s.classifier_decides:
        arrays += rule(s.n_classes, mode.stored)
    scores = k + (s.n_classes if s.classifier_decides else 0)
    return Price(
        f"decisions of {s.where}", rows.read_bytes + held + s.n_classes * 96 + arrays,
        device_bytes=arrays + k * d * 8 if s.on_device else 0, bytes_read=rows.bytes_read,
        flops=2 * rows.n_rows * scores * d, n_items=rows.n_items, block_rows=rows.block_rows,
        n_reads=1,
    )  # fmt: skip


# The shape of a layer: the numbers that the cost of measuring it depends on, from metadata.


# The allocator keeps a freed chunk for each thread that read one.
_CHUNKS_KEPT = 12


def shape_of(layer: Layer, *, merged: bool = False) -> Shape:
    """Give the numbers that a layer's cost depends on.

    Parameters
    ----------
    layer : Layer
        Which, and how it is measured.
    merged : bool, optional
        Whether items are merged on a cluster.
    """
    spec = layer.train.spec(layer.layer)
    reads, decided, outside = layer.reads, layer.decided, layer.ood
    weighs = layer.has_classifier and reads & {"classifier", "decisions"}
    return Shape(
        where=layer.where,
        n_classes=layer.store.n_classes,
        n_used=_n_used(layer),
        n_features=spec.n_features,
        wide=spec.dtype == "float64",
        train=_rows(layer.train, layer.layer),
        decided=_rows(decided, layer.layer) if reads & {"decisions", "test"} else None,
        outside=None if outside is None or "ood" not in reads else _rows(outside, layer.layer),
        reads=reads,
        quantities=layer.quantities,
        null_quantities=layer.null_quantities,
        null=layer.null,
        weight_bytes=_weight_bytes(layer) if weighs else 0,
        classifier_decides=not layer.by_predictions,
        decisions_stored=isinstance(decided, SummedSplit),
        faiss=layer.options.ncc == "faiss",
        on_device=layer.options.device != "cpu",
        merged=merged,
    )


def _n_used(layer: Layer) -> int:
    """How many classes are used, or can be as far as metadata says."""
    if layer.selection is not None:
        return len(layer.selection.classes)
    train = layer.train
    most = train.n_seen(layer.layer) if isinstance(train, SummedSplit) else train.n_rows
    n_used = min(layer.store.n_classes, max(most, 1))
    listed = layer.options.classes
    return n_used if listed is None else min(n_used, len(set(listed)))


def _weight_bytes(layer: Layer) -> int:
    """Bytes of an element of the classifier in memory; bfloat16 is read as float32."""
    weight = layer.store.classifier_arrays(layer.layer)[-1]
    return 4 if str(weight.dtype) == "bfloat16" else int(weight.dtype.itemsize)


def _rows(split: AnySplit, layer: str) -> Rows:
    if isinstance(split, SummedSplit):
        if not split.has(layer):  # decisions only
            return Rows(0, 0, 0, 0, 0, summed=True)
        width, chunks = split.spec(layer).n_features * 8, _CHUNKS_KEPT * split.chunk_bytes(layer)
        return Rows(split.n_seen(layer), 0, width, 0, chunks, summed=True)
    source, spec = RowSource(split, layer), split.spec(layer)
    return Rows(
        split.n_rows, len(source.items), spec.row_bytes, source.block_rows, source.read_bytes
    )


# Steps whose results the values are computed from.
_RESULTS = ("measured", "pairs", "null_pairs", "decisions", "outside", "test", "directional")
# Tiles of an item of the pair sweep at most, for resume and balance.
_ITEM_TILES, _ITEMS = 256, 16


@dataclass(frozen=True)
class _Read:
    """A read that gives moments: of what, over how many classes, and its pass by class block."""

    label: str
    source: RowSource
    n_classes: int
    about: About
    work: Callable[..., MomentsPass]


def job_of(layer: Layer, mode: Mode, folder_of: Callable[[About], Path]) -> Job:
    """Make the steps of a layer; `folder_of` a state is where class means in files go."""
    facts = {each.name: getattr(layer, each.name) for each in fields(layer)}
    return _LayerSteps(**facts).job(mode, folder_of)


@dataclass(frozen=True)
class _LayerSteps(Layer):
    # ------------------------------------------------------------------------------- its steps

    def job(self, mode: Mode, folder_of: Callable[[About], Path]) -> Job:
        """Give its steps.

        Parameters
        ----------
        mode : Mode
            How it is measured.
        folder_of : callable
            Gives the folder for class means that do not stay in memory, of a state.
        """
        reads = self.reads
        steps = list(self._moments_steps("moments", self.train, mode, folder_of))
        steps.append(Call("measured", partial(measured_of, self), ("moments",)))
        steps += self._pair_steps(mode)
        steps += self._read_steps()
        if "ood" in reads and self.ood is not None:
            steps += self._moments_steps("outside", self.ood, mode, folder_of)
        if "test" in reads:
            steps += self._moments_steps("test", self.decided, mode, folder_of)
        names = tuple(s.name for s in steps if s.name in _RESULTS)
        steps.append(Call("cell", partial(cell_of, self, names), names))
        return Job(self.where, tuple(steps))

    def _moments_steps(
        self, name: str, split: AnySplit, mode: Mode, folder_of: Callable[[About], Path]
    ) -> Iterator[Step]:
        """Give the steps of moments: the state that the store holds, or reads of samples."""
        if isinstance(split, SummedSplit):
            read = partial(
                split.moments, self.layer, None if name == "outside" else self.selected.index,
                scatter=name == "moments" and "scatter" in self.reads,
                rows_at=folder_of(self.about("means", split)) if mode.stored else None,
            )  # fmt: skip
            yield Call(name, read)
            return
        reads = {
            "moments": self._train_moments, "outside": self._outside_moments,
            "test": self._test_moments,
        }  # fmt: skip
        yield from self._blocks(name, reads[name](split), mode, folder_of)

    def _blocks(
        self, name: str, read: _Read, mode: Mode, folder_of: Callable[[About], Path]
    ) -> Iterator[Step]:
        """Give the steps of moments: one read, or one per class block, joined one after another."""
        source, label, about = read.source, read.label, read.about
        if not mode.stored:
            yield _sweep(name, label, read.work, source, about)
            return
        k, n = read.n_classes, mode.class_blocks
        blocks = list(cut(0, k, 1, most=-(-k // n), parts=n))
        so_far = ""
        for i, block in enumerate(blocks):
            own = f"{name}-{i}" if len(blocks) > 1 else name
            about_block = {**about, "class_block": list(block)}
            part = f", classes {block[0]}..{block[1] - 1}" if len(blocks) > 1 else ""
            make = partial(read.work, block=block, rows_at=folder_of(about_block))
            yield _sweep(own, label + part, make, source, about_block)
            if so_far:
                last = i == len(blocks) - 1
                own, earlier = name if last else f"{name}-to-{i}", (so_far, own)
                yield Call(own, joined, earlier)
            so_far = own

    def _train_moments(self, split: Split) -> _Read:
        holds = ["scatter"] if "scatter" in self.reads else []
        if self.null:
            holds.append(f"null {self.options.null_seed}")
        source = self._source(split, self.selected.index)
        return _Read(
            f"moments of {split.name}/{self.layer}", source, len(self.selected.classes),
            self.about("moments", split, holds=holds), partial(self._moments_pass, source),
        )  # fmt: skip

    def _outside_moments(self, split: Split) -> _Read:
        seen = select_classes(count_labels(split))
        source = self._source(split, seen.index)
        return _Read(
            f"moments of {split.name}/{self.layer}", source, len(seen.classes),
            self.about("moments", split), partial(self._plain_moments, source, len(seen.classes)),
        )  # fmt: skip

    def _test_moments(self, split: Split) -> _Read:
        source, k = self._source(split, self.selected.index), len(self.selected.classes)
        return _Read(
            f"moments of {split.name}/{self.layer} by train's classes", source, k,
            self.about("test", split, train_fingerprint=self.fingerprint),
            partial(self._plain_moments, source, k),
        )  # fmt: skip

    def _pair_steps(self, mode: Mode) -> Iterator[Step]:
        for name, quantities in (
            ("pairs", self.quantities),
            ("null_pairs", self.null_quantities),
        ):
            if not quantities:
                continue
            null = name == "null_pairs"
            about = self.about(
                name, self.train, holds=sorted(quantities), weighted=self.options.weighted,
                dist_exp=self.options.dist_exp, ddof=self.options.ddof, stored=mode.stored,
                null_seed=self.options.null_seed if null else None,
            )  # fmt: skip
            k = len(self.selected.classes)
            yield Sweep(
                name, f"{name.replace('_', ' ')} of {self.where}",
                partial(self._pair_pass, quantities, null), _tile_items(k, stored=mode.stored),
                needs=("measured",), unit="pairs", about=about,
            )  # fmt: skip

    def _read_steps(self) -> Iterator[Step]:
        reads = self.reads
        if "decisions" in reads and isinstance(self.decided, SummedSplit):
            yield Call(
                "decisions", partial(self.decided.decisions, self.layer, self._decided_index)
            )
        elif "decisions" in reads and isinstance(self.decided, Split):
            source = self._source(self.decided, self._decided_index)
            about = self.about(
                "decisions", self.decided, train_fingerprint=self.fingerprint,
                classifier_fingerprint=self.deciding, filtered=self.selected.filtered,
            )  # fmt: skip
            yield _sweep(
                "decisions", f"decisions of {self.decided.name}/{self.layer}",
                partial(self._decisions_pass, source), source, about, ("measured",),
            )  # fmt: skip
        if "directional" in reads and isinstance(self.train, Split):
            yield _sweep(
                "directional", f"directional variance of {self.train.name}/{self.layer}",
                partial(self._directional_pass, self.train), self._source(self.train, None),
                self.about("directional", self.train, weighted=self.options.weighted),
                ("measured",),
            )  # fmt: skip

    def _source(self, split: Split, index: npt.NDArray[np.int64] | None) -> RowSource:
        on_host = self.options.device == "cpu"
        return RowSource(split, self.layer, index, self.options.skip_nonfinite, on_host)

    # ------------------------------------------------------------------------------- its passes

    def _moments_pass(
        self,
        source: RowSource,
        block: tuple[int, int] | None = None,
        rows_at: Path | None = None,
    ) -> MomentsPass:
        selected = self.selected
        return MomentsPass(
            source,
            len(selected.classes),
            scatter="scatter" in self.reads,
            precision=self.options.precision,
            device=self.options.device,
            null_counts=selected.counts[selected.classes] if self.null else None,
            null_seed=self.options.null_seed,
            block=block,
            rows_at=rows_at,
        )

    def _plain_moments(
        self,
        source: RowSource,
        n_classes: int,
        block: tuple[int, int] | None = None,
        rows_at: Path | None = None,
    ) -> MomentsPass:
        return MomentsPass(
            source, n_classes, False, self.options.precision, self.options.device,
            block=block, rows_at=rows_at,
        )  # fmt: skip

    def _pair_pass(self, quantities: frozenset[str], null: bool, measured: Measured) -> PairPass:
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
                dist_exp=self.options.dist_exp,
                ddof=self.options.ddof,
            )
        )

    @property
    def _decided_index(self) -> npt.NDArray[np.int64] | None:
        """Which samples are decided: all, or with a filter those of the classes used."""
        if not self.selected.filtered:
            return None
        return np.where(self.selected.index >= 0, np.arange(self.store.n_classes), -1)

    def _decisions_pass(self, source: RowSource, measured: Measured) -> DecisionsPass:
        statistics = measured.statistics
        means = statistics.moments.means
        put = device_put(self.options.device, means)
        wide = self.train.spec(self.layer).dtype == "float64"
        dtype = np.float64 if wide else np.float32
        classifier = None
        if not self.by_predictions:
            weight, bias = self.classifier(stored=isinstance(means, StoredRows))
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
        return DecisionsPass(source, nearest, classifier, self.options.device)

    def _directional_pass(self, split: Split, measured: Measured) -> DirectionalPass:
        index = np.full(self.store.n_classes, -1, np.int64)
        index[measured.classes] = np.arange(len(measured.classes))
        means = measured.statistics.moments.means
        pairs = PairTiles(means, measured.statistics.global_mean, quantities=[])
        return DirectionalPass(self._source(split, index), pairs, self.options.device)


def _sweep(
    name: str,
    label: str,
    make: Callable[..., Any],
    source: RowSource,
    about: About,
    needs: tuple[str, ...] = (),
) -> Sweep:
    """Make the step of a pass over rows."""
    return Sweep(name, label, make, source.items, needs, about=about)


def _tile_items(n_classes: int, *, stored: bool) -> list[Item]:
    """Cut the tiles of a pair sweep over `n_classes` classes into items."""
    tiles = PairTiles.tile_list(n_classes, stored=stored)
    sizes = [(r.stop - r.start) * (c.stop - c.start) for r, c in tiles]
    ranges = cut(0, len(sizes), 1, _ITEM_TILES, _ITEMS)
    return [Item(start, stop, sum(sizes[start:stop])) for start, stop in ranges]
