"""Writers: features first, labels last, so that a crash loses nothing that was committed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self, TypeAlias

import numpy as np
import numpy.typing as npt
import zarr
from zarr.core.sync import sync

from ncbatch.arrays.namespace import Array, to_numpy
from ncbatch.errors import DataError, StoreError, UsageError, unknown_name
from ncbatch.store.chunks import (
    create_feature,
    create_ids,
    open_array,
    record_arrays,
    require_group,
)
from ncbatch.store.format import STAGED, LayerSpec, chunk_rows
from ncbatch.store.place import rename
from ncbatch.store.ranks import (
    CommitRecord,
    Layout,
    Share,
    claim,
    finalize_split,
    join_split,
    to_resume,
)
from ncbatch.store.split import Split
from ncbatch.store.states import STATES

# Labels and predictions, by those names.
Ids: TypeAlias = Mapping[str, npt.NDArray[np.int32]]

_STAGED_PREDICTION = f"{STAGED}prediction"


@dataclass
class RowBuffer:
    """Collects rows of a layer and writes them to its array one whole chunk at a time."""

    # The split's group.
    group: zarr.Group
    # The layer, the rows of its chunks, and its place among those written.
    name: str
    spec: LayerSpec
    chunk: int
    order: int
    # Rows to make room for, where known.
    capacity: int
    # Which rows of the split are this writer's.
    share: Share = field(default_factory=Share)
    base_block: int = 1
    # Name of the layer's group, where it is a staged one.
    home: str = ""
    # Whether the layer is seen at once.
    complete: bool = True
    # The array, once it is made, and the rows of this writer that are stored in it.
    array: zarr.Array[Any] | None = None
    written: int = 0

    def __post_init__(self) -> None:
        self.home = self.home or self.name
        self._rows = np.empty((0, self.spec.n_features), self.spec.numpy_dtype)
        self._fill = 0

    def cast(self, rows: npt.NDArray[Any], first: int) -> npt.NDArray[Any]:
        """Convert rows to the stored dtype; refuse values that overflow it."""
        if rows.dtype == self.spec.numpy_dtype:
            return rows
        with np.errstate(over="ignore"):
            cast = rows.astype(self.spec.numpy_dtype)
        # Asked of the values, for the sizes do not tell: bfloat16 overflows float16 too.
        infinite = np.isinf(cast)
        if infinite.any():
            overflow = infinite & np.isfinite(rows)
            if overflow.any():
                row = int(np.argwhere(overflow)[0][0])
                raise DataError(
                    f"layer '{self.name}' row {first + row} overflows {self.spec.dtype}",
                    remedy="store the layer as bfloat16 or float32",
                )
        return cast

    def add(self, rows: npt.NDArray[Any]) -> None:
        """Take rows, and write every chunk that becomes full."""
        start = 0
        while start < len(rows):
            # Made with the first rows, when the length of chunks is settled.
            if self._fill == 0 and len(self._rows) != self.chunk:
                self._rows = np.empty((self.chunk, self.spec.n_features), self.spec.numpy_dtype)
            take = min(self.chunk - self._fill, len(rows) - start)
            self._rows[self._fill : self._fill + take] = rows[start : start + take]
            self._fill += take
            start += take
            if self._fill == self.chunk:
                self.flush()

    def flush(self) -> None:
        """Write what is held."""
        if not self._fill:
            return
        start = self.share.row(self.written, self.base_block)
        stop = start + self._fill
        # Asked for None: an array without rows is false.
        array = self.create(stop) if self.array is None else self.array
        _reserve(array, stop)
        array[start:stop] = self._rows[: self._fill]
        self.written += self._fill
        self._fill = 0

    def create(self, rows: int) -> zarr.Array[Any]:
        """Make the layer's array, with room for `rows` at least."""
        room = max(rows, self.capacity)
        self.array = create_feature(
            self.group, self.home, self.spec, room, self.chunk, self.order, complete=self.complete
        )
        return self.array


def checked_labels(values: Array, what: str, n_classes: int, first: int) -> npt.NDArray[np.int32]:
    """Check class ids below K for rows from `first` on; negative ones become -1."""
    array = to_numpy(values) if hasattr(values, "shape") else np.asarray(values)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise DataError(f"{what}s of shape {array.shape}, {array.dtype}", "integers, shape (n,)")
    if array.size and int(array.max()) >= n_classes:
        row = int(array.argmax())
        raise DataError(
            f"{what} {int(array[row])} in row {first + row}",
            f"{what}s below {n_classes}, the classes of the store",
        )
    return np.where(array < 0, -1, array).astype(np.int32)


def _check_length(values: npt.NDArray[Any], what: str, n: int, each: str) -> None:
    if len(values) != n:
        raise DataError(f"{len(values)} {what}s for {n} {each}s", f"one per {each}")


def _reserve(array: zarr.Array[Any], rows: int) -> None:
    if array.shape[0] < rows:
        # Doubling keeps the number of metadata writes small.
        array.resize((max(rows, 2 * array.shape[0]), *array.shape[1:]))


class BlockWriter(ABC):
    """What both writers do: hold rows that fit, and commit them a base block at a time."""

    def __init__(self, group: zarr.Group, n_classes: int, head: str | None) -> None:
        self._group = group
        self._n_classes = n_classes
        self._head = head
        self._buffers: dict[str, RowBuffer] = {}
        self._prediction: zarr.Array[Any] | None = None
        self._ids: defaultdict[str, list[npt.NDArray[np.int32]]] = defaultdict(list)
        # Rows that are held, and those that are stored with their labels.
        self._pending = 0
        self._committed = 0

    @property
    def position(self) -> int:
        """Rows appended so far; after a resume, the rows that need not be appended again."""
        return self._committed + self._pending

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.close()
        finally:
            self.discard()

    @abstractmethod
    def close(self) -> None:
        """Store the rest, and complete what was written."""

    @abstractmethod
    def discard(self) -> None:
        """Give up what is not complete; nothing to do once it is."""

    @property
    @abstractmethod
    def _base_block(self) -> int: ...

    @abstractmethod
    def _commit(self) -> None:
        """Store the ids that are held, once the rows of their block are stored."""

    def _add(self, n: int, features: Mapping[str, npt.NDArray[Any]], ids: Ids) -> None:
        """Take `n` rows, and commit every base block that becomes full."""
        start = 0
        while start < n:
            part = slice(start, min(start + self._base_block - self._pending, n))
            for name, rows in features.items():
                self._buffers[name].add(rows[part])
            for name, values in ids.items():
                self._ids[name].append(values[part])
            self._pending += part.stop - start
            start = part.stop
            if self._pending == self._base_block:
                self._commit()

    def _take(self, name: str) -> npt.NDArray[np.int32]:
        """Return the labels or predictions that are held, and hold them no longer."""
        return np.concatenate([np.empty(0, np.int32), *self._ids.pop(name, ())])

    def _check_ids(self, name: str, values: Array | None) -> dict[str, npt.NDArray[np.int32]]:
        """Check labels or predictions of the next rows; empty where there are none."""
        if values is None:
            return {}
        return {name: checked_labels(values, name, self._n_classes, self.position)}

    def _check_features(
        self, features: Mapping[str, Array], n: int, note: str = ""
    ) -> dict[str, npt.NDArray[Any]]:
        """Check the shapes of `n` rows of every layer, and convert them to their stored dtypes."""
        blocks = {}
        for name, buffer in self._buffers.items():
            rows = to_numpy(features[name])
            shape = (n, buffer.spec.n_features)
            if rows.shape != shape:
                raise DataError(
                    f"features of layer '{name}' of shape {rows.shape}", f"{shape}{note}"
                )
            blocks[name] = buffer.cast(rows, self.position)
        return blocks

    def _check_head(self, predictions: Array | None) -> None:
        if (predictions is None) != (self._head is None):
            raise DataError(
                "no predictions" if predictions is None else "predictions without a head layer",
                "predictions in all calls where head is given, in none otherwise",
            )


class LayerWriter(BlockWriter):
    """Adds layers to a complete split; made by `FeatureStore.add_layers`.

    The layers stay invisible until the ``with`` block is left with all rows written. What they
    replace stays until then; leaving the block by an exception removes them.
    """

    def __init__(
        self,
        split: Split,
        specs: Mapping[str, LayerSpec],
        *,
        head: str | None = None,
        overwrite: bool = False,
    ) -> None:
        super().__init__(split.group, split.n_classes, head)
        self._split = split
        # Whether all is stored, and takes its names.
        self._complete = False
        self._check_new(specs, overwrite)
        # What an earlier writer that was killed has left.
        _delete_node(split.group, _STAGED_PREDICTION)
        if head is not None:
            self._prediction = create_ids(
                split.group, _STAGED_PREDICTION, split.n_rows, split.base_block, head=head
            )
        layers = require_group(split.group, "layers")
        for order, (name, spec) in enumerate(specs.items(), start=len(split.features)):
            home = STAGED + name if name in split.features else name
            for leftover in {home, STAGED + name}:
                _delete_node(layers, leftover)
            rows = min(chunk_rows(spec, split.n_rows), split.base_block)
            buffer = RowBuffer(
                split.group, name, spec, rows, order, split.n_rows, home=home, complete=False
            )
            buffer.create(split.n_rows)
            self._buffers[name] = buffer

    def append(
        self,
        features: Mapping[str, Array],
        labels: Array | None = None,
        predictions: Array | None = None,
    ) -> None:
        """Add rows, in the order of the split's own.

        Parameters
        ----------
        features : mapping of str to array (n, D)
            Rows of every layer of this writer.
        labels : array (n,) of int, optional
            If given they must equal the stored ones.
        predictions : array (n,) of int, optional
            The model's own decisions; needed where `head` was given, and only there.

        Raises
        ------
        DataError
            When shapes do not fit, labels differ, or there are more rows than the split has.
        """
        if features.keys() != self._buffers.keys():
            raise DataError(
                f"features of layers {', '.join(features)}", "layers " + ", ".join(self._buffers)
            )
        n = len(next(iter(features.values())))
        stop = self.position + n
        if stop > self._split.n_rows:
            raise DataError(
                f"{stop} rows for split '{self._split.name}'", f"{self._split.n_rows}, as stored"
            )
        if labels is not None:
            self._check_labels(labels, stop)
        self._check_head(predictions)
        ids = self._check_ids("prediction", predictions)
        if ids:
            _check_length(ids["prediction"], "prediction", n, "row")
        self._add(n, self._check_features(features, n), ids)

    def close(self) -> None:
        """Make the layers visible.

        Raises
        ------
        DataError
            When rows are missing.
        """
        if self.position != self._split.n_rows:
            raise DataError(
                f"{self.position} rows for split '{self._split.name}'",
                f"{self._split.n_rows}, as many as its labels",
            )
        for buffer in self._buffers.values():
            buffer.flush()
        self._commit()
        # From here on nothing may be lost: what is interrupted, `FeatureStore.finalize` ends.
        self._complete = True
        for name, buffer in self._buffers.items():
            self._group[f"layers/{buffer.home}"].update_attributes({"complete": True})
            if buffer.home != name:
                rename(self._group, f"layers/{buffer.home}", f"layers/{name}")
        if self._prediction is not None:
            rename(self._group, _STAGED_PREDICTION, "prediction")
        record_arrays(self._group)

    def discard(self) -> None:
        """Remove what was written, and keep what it was to replace."""
        # Nothing is removed once all is stored: where nothing can be renamed, what was to be
        # replaced may be gone, and `FeatureStore.finalize` goes on with it.
        if self._complete:
            return
        homes = [f"layers/{buffer.home}" for buffer in self._buffers.values()]
        for name in (*homes, _STAGED_PREDICTION):
            if name in self._group:
                del self._group[name]

    @property
    def _base_block(self) -> int:
        return self._split.base_block

    def _commit(self) -> None:
        stop = self.position
        if self._prediction is not None and self._pending:
            self._prediction[self._committed : stop] = self._take("prediction")
        self._committed = stop
        self._pending = 0

    def _check_new(self, specs: Mapping[str, LayerSpec], overwrite: bool) -> None:
        """Refuse a split that is not complete, and to replace what is there unasked."""
        split = self._split
        if not split.finalized:
            raise StoreError(
                f"split '{split.name}' of {split.where} is not complete",
                remedy="resume its writer first, or overwrite the split",
            )
        for name in () if overwrite else specs:
            if name in split.features:
                raise StoreError(
                    f"layer '{name}' exists in split '{split.name}' of {split.where}",
                    "a new layer",
                    "overwrite it with --overwrite (overwrite=True)",
                )
        if self._head is not None and split.head is not None and not overwrite:
            raise StoreError(
                f"split '{split.name}' of {split.where} has predictions, of layer '{split.head}'",
                "none yet",
                "overwrite them with --overwrite (overwrite=True)",
            )

    def _check_labels(self, values: Array, stop: int) -> None:
        stored = self._split.labels(self.position, stop)
        labels = checked_labels(values, "label", self._n_classes, self.position)
        _check_length(labels, "label", len(stored), "row")
        for row in np.flatnonzero(labels != stored)[:1].tolist():
            raise DataError(
                f"label {int(labels[row])} in row {self.position + row}",
                f"{int(stored[row])}, as stored in split '{self._split.name}'",
                "give the features in the order of the stored rows",
            )


class Writer(BlockWriter):
    """Writes the rows of a new split; made by `FeatureStore.writer`.

    A base block of rows is committed by its label chunk, after all its features. Leaving the
    ``with`` block commits the rest and completes the split; leaving it by an exception keeps what
    was committed, and ``resume=True`` goes on from there.
    """

    def __init__(
        self,
        root: zarr.Group,
        split: str,
        where: str,
        n_classes: int,
        specs: Mapping[str, LayerSpec],
        *,
        share: Share,
        n_samples: int | None,
        head: str | None,
        resume: bool,
        overwrite: bool,
    ) -> None:
        self._named = f"split '{split}' of {where}"
        self._share = share
        self._closed = False
        self._label: zarr.Array[Any] | None = None
        self._layout: Layout | None = None
        if split in root:
            if overwrite:
                del root[split]
            else:
                group: Any = root[split]
                _check_continues(Split(split, group, where, n_classes), share, resume)
        rows: Mapping[str, int]
        if share.several:
            group, self._layout = join_split(
                root, split, self._named, specs, share.world_size, n_samples, head
            )
            rows = self._layout.chunk_rows
            self._capacity = self._layout.capacity
        else:
            group = require_group(root, split)
            rows = {name: chunk_rows(spec, n_samples) for name, spec in specs.items()}
            self._capacity = n_samples or 0
        super().__init__(group, n_classes, head)
        block = max(rows.values())
        for order, (name, chunk) in enumerate(rows.items()):
            self._buffers[name] = RowBuffer(
                group, name, specs[name], chunk, order, self._capacity, share, block
            )
        self._record = claim(group, share, self._named, resume=resume)
        if resume:
            self._resume(Split(split, group, where, n_classes))
        self._committed = self._record.position

    def append(
        self, features: Mapping[str, Array], labels: Array, predictions: Array | None = None
    ) -> None:
        """Add rows.

        Parameters
        ----------
        features : mapping of str to array (n, D)
            Rows of every layer of this writer, from NumPy, torch or CuPy.
        labels : array (n,) of int
            Class ids; a negative label stores the row as a hole, which is no sample.
        predictions : array (n,) of int, optional
            The model's own decisions; in every call or in none.

        Raises
        ------
        DataError
            When shapes, labels or layers do not fit; nothing of the call is stored then.
        """
        if self._closed:
            raise UsageError("append to a writer that is closed")
        ids = self._check_ids("label", labels) | self._check_ids("prediction", predictions)
        n = len(ids["label"])
        self._check_predictions(ids.get("prediction"), n)
        self._check_room(n)
        for name in features:
            if name not in self._buffers:
                raise unknown_name("layer", name, self._buffers, "this writer")
        for name in self._buffers:
            if name not in features:
                raise DataError(f"no features for layer '{name}'", "features for every layer")
        self._add(n, self._check_features(features, n, ": one row per label"), ids)

    def close(self) -> None:
        """Commit the rest; complete the split, unless it has other writers.

        Its arrays end at the last row then. A split of several writers is completed by
        `FeatureStore.finalize`, once all are closed.
        """
        if self._closed:
            return
        if not self._record.final:
            if self._layout is None and self._label is None:
                for buffer in self._buffers.values():
                    # Of what is not stored yet no chunk is longer than the split.
                    if buffer.array is None:
                        buffer.chunk = chunk_rows(buffer.spec, self.position)
            for buffer in self._buffers.values():
                buffer.flush()
            if self._pending or (self._label is None and not self._share.several):
                self._commit()
            self._record = replace(self._record, final=True)
            self._record.save(self._group)
        if not self._share.several:
            finalize_split(self._group, self._named)
        self._closed = True

    def discard(self) -> None:
        """Take no more rows; what was committed stays."""
        self._closed = True

    @property
    def _base_block(self) -> int:
        return max(buffer.chunk for buffer in self._buffers.values())

    def _commit(self) -> None:
        block = self._base_block
        start = self._share.row(self._committed, block)
        # Arrays are made with the first rows, when the lengths of chunks are known.
        if self._label is None:
            capacity = max(start + self._pending, self._capacity)
            for buffer in self._buffers.values():
                if buffer.array is None:
                    buffer.create(capacity)
            if self._ids["prediction"]:
                self._prediction = create_ids(
                    self._group, "prediction", capacity, block, head=self._head
                )
            self._label = create_ids(self._group, "label", capacity, block)
        # Labels after all else: they say that the rows exist. The record counts them: it is last.
        if self._prediction is not None:
            self._store(self._prediction, start, self._take("prediction"))
        labels = self._take("label")
        self._store(self._label, start, labels)
        self._committed += self._pending
        self._pending = 0
        self._record = CommitRecord(
            self._share,
            blocks=-(-self._committed // block),
            rows=self._record.rows + int(np.count_nonzero(labels >= 0)),
            position=self._committed,
        )
        self._record.save(self._group)

    def _store(self, array: zarr.Array[Any], start: int, values: npt.NDArray[np.int32]) -> None:
        if self._layout is not None:
            # Blocks of other writers follow, and a writer killed while it wrote this one may have
            # left values beyond.
            rest = np.full(self._base_block - len(values), -1, np.int32)
            values = np.concatenate([values, rest])
        _reserve(array, start + len(values))
        array[start : start + len(values)] = values

    def _resume(self, split: Split) -> None:
        """Go on where the writer of this rank stopped."""
        # Interrupted before anything was committed: a single writer begins anew.
        if "label" not in self._group:
            for name in ("layers", "prediction"):
                if self._layout is None and name in self._group:
                    del self._group[name]
            return
        self._check_layers(split)
        if split.head is not None and self._head not in (None, split.head):
            raise StoreError(
                f"{self._named} was begun with predictions of layer '{split.head}'",
                f"those of layer '{self._head}', as this writer was asked for",
                "resume with the same head, or overwrite the split",
            )
        self._label = open_array(self._group, "label")
        if "prediction" in self._group:
            self._prediction = open_array(self._group, "prediction")
        if not self._record.final:
            self._record = to_resume(self._record, self._label)
            self._record.save(self._group)
        for name, buffer in self._buffers.items():
            buffer.array = open_array(self._group, f"layers/{name}/feature")
            buffer.chunk = buffer.array.chunks[0]
            buffer.written = self._record.position

    def _check_layers(self, split: Split) -> None:
        """Refuse to go on with other layers than those begun."""
        if sorted(split.layers) != sorted(self._buffers):
            raise StoreError(
                f"{self._named} has layers {', '.join(split.layers)}",
                "the layers of this writer: " + ", ".join(self._buffers),
            )
        for name, buffer in self._buffers.items():
            if split.spec(name) != buffer.spec:
                raise StoreError(
                    f"layer '{name}' of {self._named} is {split.spec(name)}",
                    f"{buffer.spec}, as this writer was asked for",
                )

    def _check_room(self, n: int) -> None:
        if n and self._record.final:
            raise StoreError(
                f"writer {self._share.rank} of {self._named} ended with {self.position} rows",
                "no more rows",
                "finalize the split, and write others into another one",
            )
        if self._layout is not None and self.position + n > self._layout.n_samples:
            raise DataError(
                f"{self.position + n} rows of writer {self._share.rank} of {self._named}",
                f"n_samples={self._layout.n_samples} at most, of all writers together",
                "delete the split and write it with a larger n_samples, which costs nothing",
            )

    def _check_predictions(self, predictions: npt.NDArray[Any] | None, n: int) -> None:
        if predictions is not None:
            _check_length(predictions, "prediction", n, "label")
        if self._layout is not None:
            self._check_head(predictions)
        elif self.position and n:
            begun = self._prediction is not None or bool(self._ids["prediction"])
            if begun != (predictions is not None):
                raise DataError(
                    "predictions in some calls of append only",
                    "predictions in all calls or in none",
                )


def _check_continues(split: Split, share: Share, resume: bool) -> None:
    """Refuse to write to a split that exists, unless a writer goes on or joins others."""
    group = split.group
    named = f"split '{split.name}' of {split.where}"
    begun = "label" in group
    if begun and split.finalized and resume:
        raise StoreError(
            f"{named} is complete: {split.n_samples} samples",
            remedy="nothing is left to resume; write another split, or overwrite this one",
        )
    if begun and split.finalized:
        raise StoreError(f"{named} exists", "a new split", "overwrite it, or add layers to it")
    if share.several:
        return
    layout = Layout.read(group)
    if layout is not None:
        raise StoreError(
            f"{named} was begun by {layout.world_size} writers",
            "a single one, as this is",
            "give rank= and world_size= as it was begun, or overwrite the split",
        )
    if STATES in group and not begun and not split.records:
        raise StoreError(
            f"{named} holds states of samples that are not in the store",
            "a new split",
            "write features to another split, or overwrite this one and lose its states",
        )
    if not resume and not begun:
        raise StoreError(f"{named} exists, begun but without rows", "", "resume it or overwrite it")
    if not resume:
        raise StoreError(
            f"{named} exists and is not complete", "", "resume its writer, or overwrite it"
        )


def _delete_node(group: zarr.Group, name: str) -> None:
    """Delete a node of `group` with all below, even where its own metadata is gone already."""
    sync(group.store.delete_dir(f"{group.path}/{name}"))
