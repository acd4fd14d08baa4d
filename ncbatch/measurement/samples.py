"""Rows of a store as passes read them: which classes are used, and their samples block by block."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import zarr

from ncbatch.arrays.atomic import replacing
from ncbatch.arrays.namespace import first_nonfinite_row
from ncbatch.arrays.rows import StackedRows, StoredRows, row_blocks
from ncbatch.arrays.threads import read_ahead
from ncbatch.engine.jobs import Item, cut
from ncbatch.errors import DataError
from ncbatch.states import decisions
from ncbatch.states.decisions import Decisions
from ncbatch.states.moments import Moments
from ncbatch.store.chunks import check_present, read_rows
from ncbatch.store.feature_store import FeatureStore
from ncbatch.store.format import LayerSpec, natural_key
from ncbatch.store.split import Split

# Reads: what a read of a layer gives, and how class blocks of one are joined.


@dataclass(frozen=True)
class MomentsRead:
    """What a read of a layer gives.

    Attributes
    ----------
    moments : Moments
        Of the samples under their labels, over classes with samples; counts rows left out because
        they are not finite.
    null : Moments or None
        Of the same samples under labels at random, without scatter.
    """

    moments: Moments
    null: Moments | None = None

    def merge(self, other: MomentsRead) -> MomentsRead:
        """Combine with what other rows gave."""
        null = None
        if self.null is not None and other.null is not None:
            null = self.null.merge(other.null)
        return MomentsRead(self.moments.merge(other.moments), null)


def to_file(moments: Moments, folder: Path, name: str) -> Moments:
    """Move class means to a file of a name of its own, complete when it takes that name.

    A task may run twice, and both runs' results may be in use: no file is ever written again.

    Parameters
    ----------
    moments : Moments
        With their means (P, D) in memory.
    folder : Path
        Where the file goes; made if it is not there.
    name : str
        What the file's name begins with.
    """
    means = moments.means
    blocks = (means[part] for part in row_blocks(len(means)))
    rows = rows_file(folder / f"{name}-{uuid.uuid4().hex[:12]}.rows", blocks, means.shape)
    return replace(moments, means=rows)


def rows_file(path: Path, blocks: Iterable[Any], shape: tuple[int, int]) -> StoredRows:
    """Write blocks of rows, one after another, to a file that is complete when it takes its name.

    Parameters
    ----------
    path : Path
        The file; its folder is made if it is not there.
    blocks : iterable of array (n, D)
        All rows in order.
    shape : (int, int)
        Rows in all, and D.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        rows = StoredRows.create(temporary, shape)
        first = 0
        for block in blocks:
            rows[first : first + len(block)] = block
            first += len(block)
    return StoredRows(path, shape)


def joined(a: MomentsRead, b: MomentsRead) -> MomentsRead:
    """Join the moments of two class blocks of the same rows, with their means in files."""
    null = None
    if a.null is not None and b.null is not None:
        null = _stacked(a.null, b.null)
    return MomentsRead(_stacked(a.moments, b.moments), null)


def _stacked(a: Moments, b: Moments) -> Moments:
    return Moments(
        np.concatenate([a.counts, b.counts]),
        StackedRows([a.means, b.means]),
        np.concatenate([a.traces, b.traces]),
        None if a.scatter is None or b.scatter is None else a.scatter + b.scatter,
        np.concatenate([a.classes, b.classes]),
        # Both reads met the same rows that are not finite.
        max(a.skipped, b.skipped),
    )


# Summed splits: layers of which a store holds finished states in the place of the samples.


MOMENTS, DECISIONS = "moments", "decisions"
Index = npt.NDArray[np.int64]


@dataclass(frozen=True)
class SummedSplit:
    """The layers of a split that are there as states; stands where a `Split` stands.

    Attributes
    ----------
    store : FeatureStore
        The store.
    name : str
        The split's name.
    """

    store: FeatureStore
    name: str
    head: ClassVar[str | None] = None  # no predictions of single samples
    _opened: dict[tuple[str, str], dict[str, zarr.Array[Any]] | None] = field(
        default_factory=dict, compare=False, repr=False
    )

    def __reduce__(self) -> tuple[Any, ...]:
        return SummedSplit, (self.store, self.name)

    @property
    def where(self) -> str:
        """The store's path, for messages."""
        return self.store.path

    @property
    def layers(self) -> list[str]:
        """Layers with moments, in the order of the model's depth where it is known, else of names."""
        notes = self.store.layer_notes
        return sorted(
            self.store.state_layers(self.name, MOMENTS),
            key=lambda layer: (notes.get(layer, {}).get("depth", 2.0), natural_key(layer)),
        )

    @property
    def unmerged(self) -> list[str]:
        """Layers of which there are only parts, of processes that have not all ended or merged."""
        return self.store.unmerged_layers(self.name)

    def has(self, layer: str, kind: str = MOMENTS) -> bool:
        """Whether a layer has a state of that kind."""
        return self._found(layer, kind) is not None

    def _found(self, layer: str, kind: str) -> dict[str, zarr.Array[Any]] | None:
        """Open the arrays of a state once; their metadata may be far away."""
        if (layer, kind) not in self._opened:
            self._opened[layer, kind] = self.store.state_arrays(self.name, layer, kind)
        return self._opened[layer, kind]

    def _arrays(self, layer: str, kind: str) -> dict[str, zarr.Array[Any]]:
        arrays = self._found(layer, kind) or {}
        names = _MOMENTS if kind == MOMENTS else _DECISIONS
        for name in names:
            if name not in arrays:
                raise self._bad(layer, kind, f"no array '{name}'", ", ".join(names))
        return arrays

    def spec(self, layer: str) -> LayerSpec:
        """Width D; the means are float64, whatever the features were."""
        return LayerSpec(int(self._arrays(layer, MOMENTS)["mean"].shape[1]), "float64")

    def n_seen(self, layer: str) -> int:
        """P, the classes with samples."""
        return int(self._arrays(layer, MOMENTS)["class"].shape[0])

    def has_scatter(self, layer: str) -> bool:
        """Whether the moments hold the pooled scatter."""
        return "scatter" in self._arrays(layer, MOMENTS)

    def chunk_bytes(self, layer: str) -> int:
        """Bytes of a chunk of the means, which are read chunk by chunk."""
        mean = self._arrays(layer, MOMENTS)["mean"]
        return int(np.prod(mean.chunks)) * 8

    def attributes(self, layer: str, kind: str = MOMENTS) -> dict[str, Any]:
        """Give what was recorded beside a state."""
        return self.store.state_attributes(self.name, layer, kind)

    def fingerprint(self, layer: str, class_filter: str = "", *, kind: str = MOMENTS) -> str:
        """Hash the stored checksums of a state, and the classes used."""
        own = self.store.state_fingerprint(self.name, layer, kind)
        return hashlib.sha256(f"{own} {class_filter}".encode()).hexdigest()[:32]

    def check_chunks(self, layer: str) -> None:
        """Refuse states of which a chunk is missing.

        Raises
        ------
        CorruptionError
            Names the first such chunk.
        """
        for kind in (MOMENTS, DECISIONS):
            for array in (self._found(layer, kind) or {}).values():
                check_present(array)

    def counts(self, layer: str) -> Index:
        """Read the samples of each class (K,).

        Raises
        ------
        DataError
            When the classes are not ascending ids below K with a sample each.
        """
        arrays = self._arrays(layer, MOMENTS)
        classes, found = _whole(arrays["class"]), _whole(arrays["count"])
        k = self.store.n_classes
        if classes.shape != found.shape or classes.ndim != 1:
            raise self._bad(
                layer, MOMENTS, f"{found.shape} counts of {classes.shape} classes", "one per class"
            )
        within = not len(classes) or (classes[0] >= 0 and classes[-1] < k)
        if not within or np.any(np.diff(classes) <= 0) or np.any(found < 1):
            raise self._bad(
                layer, MOMENTS, "classes and counts that do not fit",
                f"ascending classes in 0..{k - 1}, each with samples",
            )  # fmt: skip
        counts = np.zeros(k, np.int64)
        counts[classes] = found
        return counts

    def moments(
        self, layer: str, index: Index | None, *, scatter: bool, rows_at: Path | None = None
    ) -> MomentsRead:
        """Read the moments of the classes used, as a read of the samples would give them.

        Parameters
        ----------
        layer : str
            Which layer.
        index : array (K,) or None
            For each class its place among those used, ascending, or -1; None uses all seen.
        scatter : bool
            Whether the pooled scatter is wanted; then every class seen must be used.
        rows_at : Path, optional
            A folder for the class means, which then are not held in memory.

        Raises
        ------
        DataError
            When shapes do not fit, or a value is not finite.
        """
        arrays = self._arrays(layer, MOMENTS)
        self._check_shapes(layer, arrays)
        counts = self.counts(layer)
        ids = np.flatnonzero(counts)
        places = np.arange(len(ids)) if index is None else index[ids]
        used = places >= 0
        if scatter and not used.all():
            raise self._bad(
                layer, MOMENTS, "the scatter of some classes", "that of all classes seen"
            )
        traces = self._finite(layer, "trace", _whole(arrays["trace"]))[used]
        pooled = self._finite(layer, "scatter", _whole(arrays["scatter"])) if scatter else None
        means: Any = self._means(layer, arrays["mean"], used, rows_at)
        classes = places[used].astype(np.int64)
        skipped = int(self.attributes(layer).get("skipped", 0))
        return MomentsRead(Moments(counts[ids][used], means, traces, pooled, classes, skipped))

    def _means(
        self, layer: str, array: zarr.Array[Any], used: npt.NDArray[np.bool_], rows_at: Path | None
    ) -> npt.NDArray[np.float64] | StoredRows:
        shape = (int(np.count_nonzero(used)), int(array.shape[1]))
        blocks = (self._finite(layer, "mean", block) for block in _row_chunks(array, used))
        if rows_at is not None:  # a name that says what is in it: a run that goes on finds it
            content = self.fingerprint(layer, hashlib.sha256(used.tobytes()).hexdigest())
            file = StoredRows(rows_at / f"means-{content}.rows", shape)
            return file if file.complete else rows_file(Path(file.path), blocks, shape)
        means, first = np.empty(shape), 0
        for block in blocks:
            means[first : first + len(block)] = block
            first += len(block)
        return means

    def decisions(self, layer: str, used: Index | None) -> Decisions:
        """Read the decisions; with `used` only those on samples of these classes (K,), >= 0.

        Raises
        ------
        DataError
            When there is not a number per class.
        """
        arrays = self._arrays(layer, DECISIONS)
        counts = {name: _whole(arrays[name]) for name in _DECISIONS}
        for name, values in counts.items():
            if values.shape != (self.store.n_classes,) or (len(values) and values.min() < 0):
                raise self._bad(
                    layer, DECISIONS, f"array '{name}' of shape {values.shape}",
                    f"({self.store.n_classes},), no number below 0",
                )  # fmt: skip
        if used is not None:
            counts = {name: np.where(used >= 0, values, 0) for name, values in counts.items()}
        skipped = int(self.attributes(layer, DECISIONS).get("skipped", 0))
        return Decisions(**counts, skipped=skipped)

    def undecided(self, train: SummedSplit | None, layer: str, classifier: str | None) -> str:
        """Say why stored decisions are not those of the class means of `train`; empty if they are.

        Parameters
        ----------
        train : SummedSplit or None
            Whose stored moments give the means; None where the means come from features.
        layer : str
            Which layer.
        classifier : str or None
            Fingerprint of the classifier that is stored now.
        """
        if not self.has(layer, DECISIONS):
            return f"no samples and no decisions of split '{self.name}'"
        about = self.attributes(layer, DECISIONS)
        own = None
        if train is not None and about.get("means_split") == train.name:
            own = self.store.state_fingerprint(train.name, layer, MOMENTS)
        if own is None or about.get("means_fingerprint") != own:
            return f"decisions of split '{self.name}' are by other class means"
        recorded = about.get("classifier_fingerprint")
        if recorded is not None and classifier is not None and recorded != classifier:
            return f"decisions of split '{self.name}' are by another classifier"
        return ""

    def _check_shapes(self, layer: str, arrays: dict[str, zarr.Array[Any]]) -> None:
        p, d = arrays["class"].shape[0], arrays["mean"].shape[-1]
        wanted = {"mean": (p, d), "trace": (p,), "scatter": (d, d)}
        for name, shape in wanted.items():
            if name in arrays and arrays[name].shape != shape:
                raise self._bad(
                    layer, MOMENTS, f"array '{name}' of shape {arrays[name].shape}", str(shape)
                )

    def _finite(self, layer: str, name: str, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        if not np.isfinite(values).all():
            raise self._bad(layer, MOMENTS, f"array '{name}' is not finite", "finite values")
        return values

    def _bad(self, layer: str, kind: str, found: str, expected: str) -> DataError:
        return DataError(
            f"{kind} of split '{self.name}', layer '{layer}' of {self.where}: {found}", expected,
            "make that state anew; docs/store.md says what it holds",
        )  # fmt: skip


_MOMENTS = ("class", "count", "mean", "trace")
_DECISIONS = decisions.DECISIONS


def _whole(array: zarr.Array[Any]) -> npt.NDArray[Any]:
    return read_rows(array, 0, int(array.shape[0]))


def _row_chunks(
    array: zarr.Array[Any], used: npt.NDArray[np.bool_]
) -> Iterator[npt.NDArray[np.float64]]:
    """Read the rows used chunk by chunk, so that no more than one is held beside the result."""
    n, rows = int(array.shape[0]), int(array.chunks[0])
    for start in range(0, n, rows):
        kept = used[start : min(start + rows, n)]
        block = read_rows(array, start, start + len(kept)).astype(np.float64, copy=False)
        yield block if kept.all() else block[kept]
        del block


# Bytes of a block of rows in float64, the unit of arithmetic within a chunk.
BLOCK_BYTES = 64 * 2**20
# Items of a sweep over rows, and the most chunks of one: enough for resume and balance.
ITEMS, ITEM_CHUNKS = 16, 64


@dataclass(frozen=True)
class Selection:
    """The classes a measurement uses, found from the labels alone.

    Attributes
    ----------
    counts : array (K,) of int64
        Samples per class of the split.
    classes : array (C,) of int64
        Class ids used, ascending.
    filtered : bool
        Whether a filter was asked for, beyond the class being seen.
    """

    counts: npt.NDArray[np.int64]
    classes: npt.NDArray[np.int64]
    filtered: bool

    @cached_property
    def index(self) -> npt.NDArray[np.int64]:
        """For each class id its place among the classes used, or -1 (K,)."""
        index = np.full(self.counts.shape[0], -1, np.int64)
        index[self.classes] = np.arange(self.classes.shape[0])
        return index

    @property
    def n_samples(self) -> int:
        """Samples of the classes used."""
        return int(self.counts[self.classes].sum())

    @property
    def digest(self) -> str:
        """A hash of the classes used."""
        return hashlib.sha256(self.classes.tobytes()).hexdigest()[:32]


def count_labels(split: Split) -> npt.NDArray[np.int64]:
    """Count the samples of each class (K,), reading labels only.

    Raises
    ------
    DataError
        For a label that is not below K; names the row.
    """
    counts = np.zeros(split.n_classes, np.int64)
    for start, labels in split.label_blocks():
        if labels.size and labels.max() >= split.n_classes:
            row = int(labels.argmax())
            raise DataError(
                f"label {int(labels[row])} in row {start + row} of split '{split.name}' of {split.where}",
                f"labels below {split.n_classes}, the classes of the store",
            )
        counts += np.bincount(labels[labels >= 0], minlength=split.n_classes)
    return counts


def select_classes(
    counts: npt.NDArray[np.int64],
    *,
    min_count: int = 1,
    max_count: int | None = None,
    classes: Iterable[int] | None = None,
) -> Selection:
    """Choose the classes to use: seen, and within the filters.

    Parameters
    ----------
    counts : array (K,)
        Samples per class.
    min_count, max_count : int, optional
        Least and greatest number of samples.
    classes : iterable of int, optional
        Class ids to choose among.

    Raises
    ------
    DataError
        When a class id is not below K.
    """
    used = counts >= max(min_count, 1)
    if max_count is not None:
        used &= counts <= max_count
    if classes is not None:
        ids = np.asarray(list(classes), np.int64)
        bad = ids[(ids < 0) | (ids >= counts.shape[0])]
        if bad.size:
            raise DataError(f"class {int(bad[0])} in the list of classes", f"0..{len(counts) - 1}")
        listed = np.zeros(counts.shape[0], np.bool_)
        listed[ids] = True
        used &= listed
    filtered = min_count > 1 or max_count is not None or classes is not None
    return Selection(counts, np.flatnonzero(used).astype(np.int64), filtered)


@dataclass(frozen=True)
class Block:
    """Labelled samples in memory.

    Attributes
    ----------
    features : array (B, D)
        In the stored dtype.
    labels : array (B,) of int64
        Classes, as `RowSource.index` gives them out.
    numbers : array (B,) of int64
        Their rows in the split.
    n_skipped : int
        Rows left out because they are not finite.
    """

    features: npt.NDArray[Any]
    labels: npt.NDArray[np.int64]
    numbers: npt.NDArray[np.int64]
    n_skipped: int = 0


@dataclass(frozen=True)
class RowSource:
    """The rows of one layer of one split as labelled blocks of samples.

    Attributes
    ----------
    split : Split
        Where they are.
    layer : str
        Which layer.
    index : array (K,) of int, optional
        Maps stored labels to those given out; rows mapped below 0 are left out.
    skip_nonfinite : bool
        Leave out rows with NaN or infinities, and count them, instead of refusing them.
    widened : bool
        Give bfloat16 as float32, as the host's arithmetic takes it; a GPU takes the half.
    """

    split: Split
    layer: str
    index: npt.NDArray[np.int64] | None = None
    skip_nonfinite: bool = False
    widened: bool = True

    @property
    def chunk_rows(self) -> int:
        """Rows of a chunk, the grain of items."""
        return int(self.split.feature(self.layer).chunks[0])

    @property
    def items(self) -> list[Item]:
        """Ranges of whole chunks: about a sixteenth of the rows each, and at most 64 chunks."""
        width = self.split.spec(self.layer).row_bytes
        ranges = cut(0, self.split.n_rows, self.chunk_rows, ITEM_CHUNKS, ITEMS)
        return [Item(start, stop, (stop - start) * width) for start, stop in ranges]

    @property
    def n_features(self) -> int:
        """D."""
        return self.split.spec(self.layer).n_features

    @property
    def block_rows(self) -> int:
        """Rows of a block: a chunk's, or fewer where a chunk in float64 would be large."""
        return min(self.chunk_rows, max(256, BLOCK_BYTES // (8 * self.n_features)))

    @property
    def read_bytes(self) -> int:
        """Bytes held by reading: one chunk in use and those ahead, each its file, bytes and array."""
        spec = self.split.spec(self.layer)
        chunk = self.chunk_rows * spec.row_bytes
        wide = 2 if spec.dtype == "bfloat16" and self.widened else 0
        ahead = self.split.chunks_at_once
        return chunk * (1 + wide + ahead * (3 + wide)) + int(self.split.base_block) * 48

    def empty(self) -> npt.NDArray[Any]:
        """Give no rows, of the dtype that blocks have."""
        spec = self.split.spec(self.layer)
        wide = spec.dtype == "bfloat16" and self.widened
        return np.empty((0, spec.n_features), np.float32 if wide else spec.numpy_dtype)

    def blocks(self, item: Item) -> Iterator[Block]:
        """Give the samples of an item block by block; a thread reads one chunk ahead.

        Raises
        ------
        DataError
            For a NaN or infinite feature, unless those are skipped; names split, layer and row.
        CorruptionError
            For a chunk that cannot be read.
        """
        return read_ahead(self._blocks(item))

    def _blocks(self, item: Item) -> Iterator[Block]:
        for (first, y), rows in self.split.read_each(
            self.layer, self._chunks(item), widened=self.widened
        ):
            for start in range(0, len(rows), self.block_rows):
                part = slice(start, start + self.block_rows)
                kept = np.flatnonzero(y[part] >= 0)
                whole = kept.size == y[part].size
                block = rows[part] if whole else rows[part][kept]
                yield self._finite(block, y[part][kept], kept + (first + start))

    def _chunks(self, item: Item) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
        """Give (first row, labels given out) of every chunk of an item that holds samples.

        A chunk of labels, which may cover many of features, is read once.
        """
        base = self.split.base_block
        for block in range(item.start // base * base, item.stop, base):
            start, stop = max(block, item.start), min(block + base, item.stop)
            labels = self.split.labels(start, stop)
            for first in range(start, stop, self.chunk_rows):
                y = self._given_out(labels[first - start : first - start + self.chunk_rows])
                if (y >= 0).any():
                    yield first, y

    def _given_out(self, labels: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
        y = np.full(labels.shape, -1, np.int64)
        exists = labels >= 0
        y[exists] = labels[exists] if self.index is None else self.index[labels[exists]]
        return y

    def _finite(
        self,
        block: npt.NDArray[Any],
        labels: npt.NDArray[np.int64],
        numbers: npt.NDArray[np.int64],
    ) -> Block:
        row = first_nonfinite_row(block) if len(block) else None
        if row is None:
            return Block(block, labels, numbers)
        if not self.skip_nonfinite:
            raise DataError(
                f"a feature that is not finite: split '{self.split.name}', layer '{self.layer}', "
                f"row {int(numbers[row])} of {self.split.where}",
                "finite features",
                "--skip-nonfinite (skip_nonfinite=True) leaves such rows out and counts them",
            )
        good = np.isfinite(block).all(axis=1)
        return Block(block[good], labels[good], numbers[good], int(np.count_nonzero(~good)))
