"""Writers: features first, labels last, so that a crash loses nothing that was committed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import zarr

from ncbatch.arrays.namespace import Array, to_numpy
from ncbatch.errors import DataError, StoreError, UsageError, unknown_name
from ncbatch.store.chunks import (
    create_feature,
    create_label,
    create_prediction,
    found_group,
    open_array,
)
from ncbatch.store.format import STAGED, LayerSpec, chunk_rows
from ncbatch.store.place import rename
from ncbatch.store.ranks import (
    CommitRecord,
    Layout,
    Share,
    claim,
    delete_node,
    finalize_split,
    join_split,
    record_arrays,
    to_resume,
)
from ncbatch.store.split import Split
from ncbatch.store.states import STATES

# What writers share: rows collected into whole chunks, and labels that are checked.


class RowBuffer:
    """Collects rows and writes them to an array one whole chunk at a time."""

    def __init__(
        self,
        name: str,
        spec: LayerSpec,
        rows: int,
        order: int,
        home: str | None = None,
        *,
        share: Share | None = None,
        base_block: int = 1,
    ) -> None:
        self.name, self.spec, self.chunk, self.order = name, spec, rows, order
        self.home = name if home is None else home  # the layer's group
        self.array: zarr.Array[Any] | None = None
        self.written = 0  # rows of this writer that are stored
        self._share, self._base_block = share or Share(), base_block
        self._rows = np.empty((0, spec.n_features), spec.numpy_dtype)
        self._fill = 0

    def cast(self, rows: npt.NDArray[Any], first: int) -> npt.NDArray[Any]:
        """Convert rows to the stored dtype; refuse values that overflow it."""
        if rows.dtype == self.spec.numpy_dtype:
            return rows
        with np.errstate(over="ignore"):
            cast = rows.astype(self.spec.numpy_dtype)
        infinite = np.isinf(cast)
        if infinite.any():  # bfloat16 overflows float16 too, which is no smaller
            overflow = infinite & np.isfinite(rows)
            if overflow.any():
                row = int(np.argwhere(overflow)[0][0])
                raise DataError(
                    f"layer '{self.name}' row {first + row} overflows {self.spec.dtype}",
                    remedy="store the layer as bfloat16 or float32",
                )
        return cast

    def add(self, rows: npt.NDArray[Any], group: zarr.Group, capacity: int) -> None:
        """Take rows, and write every chunk that becomes full."""
        start = 0
        while start < len(rows):
            if self._fill == 0 and len(self._rows) != self.chunk:
                self._rows = np.empty((self.chunk, self.spec.n_features), self.spec.numpy_dtype)
            take = min(self.chunk - self._fill, len(rows) - start)
            self._rows[self._fill : self._fill + take] = rows[start : start + take]
            self._fill += take
            start += take
            if self._fill == self.chunk:
                self.flush(group, capacity)

    def flush(self, group: zarr.Group, capacity: int) -> None:
        """Write what is held."""
        if not self._fill:
            return
        start = self._share.row(self.written, self._base_block)
        stop = start + self._fill
        array = self.array
        if array is None:  # an empty one is false
            array = self.create(group, max(stop, capacity))
        reserve(array, stop)
        array[start:stop] = self._rows[: self._fill]
        self.written, self._fill = self.written + self._fill, 0

    def create(self, group: zarr.Group, capacity: int, *, complete: bool = True) -> zarr.Array[Any]:
        """Make the layer's array in the split's `group`, with room for `capacity` rows."""
        self.array = create_feature(
            group, self.home, self.spec, capacity, self.chunk, self.order, complete=complete
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


def reserve(array: zarr.Array[Any], rows: int) -> None:
    """Let an array hold `rows`; doubling keeps the number of metadata writes small."""
    if array.shape[0] < rows:
        array.resize((max(rows, 2 * array.shape[0]), *array.shape[1:]))


# LayerWriter: layers added to a complete split, invisible until they are complete.


class LayerWriter:
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
        if not split.finalized:
            raise StoreError(
                f"split '{split.name}' of {split.where} is not complete",
                remedy="resume its writer first, or overwrite the split",
            )
        for name in specs:
            if name in split.features and not overwrite:
                raise StoreError(
                    f"layer '{name}' exists in split '{split.name}' of {split.where}",
                    "a new layer",
                    "overwrite it with --overwrite (overwrite=True)",
                )
        self._split = split
        if head is not None and split.head is not None and not overwrite:
            raise StoreError(
                f"split '{split.name}' of {split.where} has predictions, of layer '{split.head}'",
                "none yet",
                "overwrite them with --overwrite (overwrite=True)",
            )
        self._head = head
        delete_node(split.group, STAGED + "prediction")
        self._prediction = None if head is None else self._create_prediction(split)
        self._predictions = np.empty(0, np.int32)
        layers = found_group(split.group, "layers")
        self._buffers = {}
        for order, (name, spec) in enumerate(specs.items(), start=len(split.features)):
            home = STAGED + name if name in split.features else name
            for left in {home, STAGED + name}:
                delete_node(layers, left)
            rows = min(chunk_rows(spec, split.n_rows), split.base_block)
            self._buffers[name] = RowBuffer(name, spec, rows, order, home)
            self._buffers[name].create(split.group, split.n_rows, complete=False)
        self.position = 0
        self._complete = False  # all is stored, and takes its names

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
        blocks = {name: to_numpy(rows) for name, rows in features.items()}
        if blocks.keys() != self._buffers.keys():
            raise DataError(
                f"features of layers {', '.join(blocks)}", "layers " + ", ".join(self._buffers)
            )
        n = len(next(iter(blocks.values())))
        stop = self.position + n
        if stop > self._split.n_rows:
            raise DataError(
                f"{stop} rows for split '{self._split.name}'", f"{self._split.n_rows}, as stored"
            )
        if labels is not None:
            self._check_labels(labels, stop)
        p = self._checked_predictions(predictions, n)
        for name, buffer in self._buffers.items():
            if blocks[name].shape != (n, buffer.spec.n_features):
                raise DataError(
                    f"features of layer '{name}' of shape {blocks[name].shape}",
                    f"({n}, {buffer.spec.n_features})",
                )
            blocks[name] = buffer.cast(blocks[name], self.position)
        for name, buffer in self._buffers.items():
            buffer.add(blocks[name], self._split.group, stop)
        self._predictions = np.concatenate([self._predictions, p])
        self.position = stop
        self._write_predictions(self._split.base_block)

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
        group = self._split.group
        for buffer in self._buffers.values():
            buffer.flush(group, self.position)
        self._write_predictions(1)
        self._complete = True
        for name, buffer in self._buffers.items():
            group[f"layers/{buffer.home}"].update_attributes({"complete": True})
            if buffer.home != name:
                rename(group, f"layers/{buffer.home}", f"layers/{name}")
        if self._prediction is not None:
            rename(group, STAGED + "prediction", "prediction")
        record_arrays(group)

    def discard(self) -> None:
        """Remove what was written, and keep what it was to replace.

        Nothing is removed once all is stored: where nothing can be renamed, what was to be replaced
        may be gone, and `FeatureStore.finalize` goes on with it.
        """
        if self._complete:
            return
        group = self._split.group
        for buffer in self._buffers.values():
            if f"layers/{buffer.home}" in group:
                del group[f"layers/{buffer.home}"]
        if self._prediction is not None and STAGED + "prediction" in group:
            del group[STAGED + "prediction"]

    def _create_prediction(self, split: Split) -> zarr.Array[Any]:
        """Make the array of predictions under a name that `close` changes."""
        name = STAGED + "prediction"
        return create_prediction(split.group, split.n_rows, split.base_block, self._head, name)

    def _write_predictions(self, unit: int) -> None:
        """Write those held, in whole multiples of `unit` rows."""
        start = self.position - len(self._predictions)
        n = len(self._predictions) // unit * unit
        if self._prediction is not None and n:
            self._prediction[start : start + n] = self._predictions[:n]
            self._predictions = self._predictions[n:]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self.close()
        except BaseException:
            self.discard()
            raise
        if kind is not None:
            self.discard()

    def _checked_predictions(self, predictions: Array | None, n: int) -> npt.NDArray[np.int32]:
        if (predictions is None) != (self._head is None):
            raise DataError(
                "no predictions" if predictions is None else "predictions without a head layer",
                "predictions in all calls where head is given, in none otherwise",
            )
        if predictions is None:
            return np.empty(0, np.int32)
        p = checked_labels(predictions, "prediction", self._split.n_classes, self.position)
        if len(p) != n:
            raise DataError(f"{len(p)} predictions for {n} rows", "one per row")
        return p

    def _check_labels(self, labels: Array, stop: int) -> None:
        stored = self._split.labels(self.position, stop)
        given = checked_labels(labels, "label", self._split.n_classes, self.position)
        if len(given) != len(stored):
            raise DataError(f"{len(given)} labels for {len(stored)} rows", "one per row")
        differ = np.flatnonzero(given != stored)
        if differ.size:
            row = int(differ[0])
            raise DataError(
                f"label {int(given[row])} in row {self.position + row}",
                f"{int(stored[row])}, as stored in split '{self._split.name}'",
                "give the features in the order of the stored rows",
            )


class Writer:
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
        self._n_classes, self._split, self._head, self._share = n_classes, split, head, share
        self._named = f"split '{split}' of {where}"
        self._capacity = n_samples or 0
        if split in root:
            if overwrite:
                del root[split]
            else:
                found: Any = root[split]
                _check_continues(Split(split, found, where, n_classes), share, resume)
        rows = {name: chunk_rows(spec, n_samples) for name, spec in specs.items()}
        self._layout: Layout | None = None
        if share.several:
            self._group, self._layout = join_split(
                root, split, self._named, specs,
                world_size=share.world_size, n_samples=n_samples, head=head,
            )  # fmt: skip
            rows, self._capacity = dict(self._layout.chunk_rows), self._layout.capacity
        else:
            self._group = found_group(root, split)
        self._buffers = {
            name: RowBuffer(
                name, specs[name], rows[name], order, share=share, base_block=max(rows.values())
            )
            for order, name in enumerate(rows)
        }
        self._label: zarr.Array[Any] | None = None
        self._prediction: zarr.Array[Any] | None = None
        self._labels: list[npt.NDArray[np.int32]] = []
        self._predictions: list[npt.NDArray[np.int32]] = []
        self._pending = 0
        self._closed = False
        self._record = claim(self._group, share, self._named, resume=resume)
        if resume:
            self._resume(where)

    @property
    def position(self) -> int:
        """Rows appended so far; after a resume, the rows that need not be appended again."""
        return self._record.position + self._pending

    def append(
        self,
        features: Mapping[str, Array],
        labels: Array,
        predictions: Array | None = None,
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
        k, first = self._n_classes, self.position
        y = checked_labels(labels, "label", k, first)
        p = None if predictions is None else checked_labels(predictions, "prediction", k, first)
        self._check_predictions(p, len(y))
        self._check_room(len(y))
        blocks = self._checked_features(features, len(y))
        start = 0
        while start < len(y):
            part = slice(start, min(start + self._base_block - self._pending, len(y)))
            for name, rows in blocks.items():
                self._buffers[name].add(rows[part], self._group, self._capacity)
            self._labels.append(y[part])
            if p is not None:
                self._predictions.append(p[part])
            self._pending += part.stop - part.start
            start = part.stop
            if self._pending == self._base_block:
                self._commit()

    def close(self) -> None:
        """Commit the rest; complete the split, unless it has other writers: its arrays end at the last row.

        A split of several writers is completed by `FeatureStore.finalize`, once all are closed.
        """
        if self._closed:
            return
        if not self._record.final:
            self._shrink_unwritten()
            for buffer in self._buffers.values():
                buffer.flush(self._group, self._capacity if self._share.several else 0)
            if self._pending or (self._label is None and not self._share.several):
                self._commit()
            self._record = replace(self._record, final=True)
            self._record.save(self._group)
        if not self._share.several:
            finalize_split(self._group, self._named)
        self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        self._closed = True

    @property
    def _base_block(self) -> int:
        return max(buffer.chunk for buffer in self._buffers.values())

    def _shrink_unwritten(self) -> None:
        """Give layers of which nothing is stored yet chunks no longer than the split."""
        for buffer in self._buffers.values():
            if self._layout is None and buffer.array is None and self._label is None:
                buffer.chunk = chunk_rows(buffer.spec, self.position)

    def _commit(self) -> None:
        block, done = self._base_block, self._record.position
        start = self._share.row(done, block)
        stop = start + self._pending
        if self._label is None:
            for buffer in self._buffers.values():
                if buffer.array is None:
                    buffer.create(self._group, max(stop, self._capacity))
            capacity = max(stop, self._capacity)
            if self._predictions:
                self._prediction = create_prediction(self._group, capacity, block, self._head)
            self._label = create_label(self._group, capacity, block)
        labels = np.concatenate([np.empty(0, np.int32), *self._labels])
        if self._prediction is not None:
            self._store(self._prediction, start, np.concatenate(self._predictions))
        self._store(self._label, start, labels)
        self._labels, self._predictions, self._pending = [], [], 0
        self._record = CommitRecord(
            self._share,
            blocks=-(-(done + len(labels)) // block),
            rows=self._record.rows + int(np.count_nonzero(labels >= 0)),
            position=done + len(labels),
        )
        self._record.save(self._group)

    def _store(self, array: zarr.Array[Any], start: int, values: npt.NDArray[np.int32]) -> None:
        """Write labels or predictions of a block; other writers' blocks follow one that is not full."""
        if self._layout is not None:
            # A writer killed while it wrote the block may have left values beyond.
            rest = np.full(self._base_block - len(values), -1, np.int32)
            values = np.concatenate([values, rest])
        reserve(array, start + len(values))
        array[start : start + len(values)] = values

    def _resume(self, where: str) -> None:
        """Go on where the writer of this rank stopped."""
        if "label" not in self._group:  # interrupted before anything was committed
            if self._layout is None:
                for name in ("layers", "prediction"):
                    if name in self._group:
                        del self._group[name]
            return
        split = Split(self._split, self._group, where, self._n_classes)
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
            buffer.chunk, buffer.written = buffer.array.chunks[0], self._record.position

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
        if predictions is not None and len(predictions) != n:
            raise DataError(f"{len(predictions)} predictions for {n} labels", "one per label")
        if self._layout is not None:
            if (predictions is None) != (self._head is None):
                raise DataError(
                    "no predictions" if predictions is None else "predictions without a head layer",
                    "predictions in all calls where head is given, in none otherwise",
                )
        elif self.position:
            had = self._prediction is not None or bool(self._predictions)
            if had != (predictions is not None) and n:
                raise DataError(
                    "predictions in some calls of append only",
                    "predictions in all calls or in none",
                )

    def _checked_features(
        self, features: Mapping[str, Array], n: int
    ) -> dict[str, npt.NDArray[Any]]:
        for name in features:
            if name not in self._buffers:
                raise unknown_name("layer", name, self._buffers, "this writer")
        blocks = {}
        for name, buffer in self._buffers.items():
            if name not in features:
                raise DataError(f"no features for layer '{name}'", "features for every layer")
            rows = to_numpy(features[name])
            if rows.shape != (n, buffer.spec.n_features):
                raise DataError(
                    f"features of layer '{name}' of shape {rows.shape}",
                    f"({n}, {buffer.spec.n_features}): one row per label",
                )
            blocks[name] = buffer.cast(rows, self.position)
        return blocks


def _check_continues(split: Split, share: Share, resume: bool) -> None:
    """Refuse to write to a split that exists, unless a writer goes on or joins others."""
    group, found = split.group, f"split '{split.name}' of {split.where}"
    begun = "label" in group
    if begun and split.finalized and resume:
        raise StoreError(
            f"{found} is complete: {split.n_samples} samples",
            remedy="nothing is left to resume; write another split, or overwrite this one",
        )
    if begun and split.finalized:
        raise StoreError(f"{found} exists", "a new split", "overwrite it, or add layers to it")
    if share.several:
        return
    layout = Layout.read(group)
    if layout is not None:
        raise StoreError(
            f"{found} was begun by {layout.world_size} writers",
            "a single one, as this is",
            "give rank= and world_size= as it was begun, or overwrite the split",
        )
    if STATES in group and not begun and not split.records:
        raise StoreError(
            f"{found} holds states of samples that are not in the store", "a new split",
            "write features to another split, or overwrite this one and lose its states",
        )  # fmt: skip
    if not resume and not begun:
        raise StoreError(f"{found} exists, begun but without rows", "", "resume it or overwrite it")
    if not resume:
        raise StoreError(
            f"{found} exists and is not complete", "", "resume its writer, or overwrite it"
        )
