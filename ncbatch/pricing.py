"""What measuring a layer costs: pure integers, from shapes and options alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ncbatch.engine import Price
from ncbatch.metrics import Statistics
from ncbatch.stats import DirectionalVariance, MomentsAccumulator, PairTiles, Rule

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
