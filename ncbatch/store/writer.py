"""Writers: features first, labels last, so that a crash loses nothing that was committed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Self, TypeAlias

import numpy as np
import numpy.typing as npt
import zarr

from ncbatch.arrays.namespace import Array, to_numpy
from ncbatch.errors import DataError, StoreError, UsageError, unknown_name
from ncbatch.store import chunks, ranks
from ncbatch.store.format import STAGED, LayerSpec, chunk_rows
from ncbatch.store.place import rename
from ncbatch.store.split import Split
from ncbatch.store.states import STATES

# Of layers by name, or predictions and labels by those names.
Rows: TypeAlias = Mapping[str, npt.NDArray[Any]]

_STAGED_PREDICTION = f"{STAGED}prediction"


@dataclass
class RowBuffer:
    """Collects rows and writes them to an array, made with the first, a whole chunk at a time."""

    # Makes the array, of the rows that it has room for and those of a chunk.
    create: Callable[[int, int], zarr.Array[Any]]
    chunk: int
    # Rows to make room for, where known.
    capacity: int
    # Which rows of the split are this writer's.
    share: ranks.Share = field(default_factory=ranks.Share)
    base_block: int = 1
    # The array, once it is made, and the rows of this writer that are stored in it.
    array: zarr.Array[Any] | None = None
    written: int = 0
    # Rows that are held, in the room for a chunk.
    _fill: int = 0
    _rows: npt.NDArray[Any] = field(default_factory=partial(np.empty, 0))

    @property
    def position(self) -> int:
        """Rows taken so far."""
        return self.written + self._fill

    def add(self, rows: npt.NDArray[Any]) -> None:
        """Take rows, and write every chunk that becomes full."""
        start = 0
        while start < len(rows):
            # Made with the first rows, when the length of chunks is settled.
            if self._fill == 0 and len(self._rows) != self.chunk:
                self._rows = np.empty((self.chunk, *rows.shape[1:]), rows.dtype)
            take = min(self.chunk - self._fill, len(rows) - start)
            self._rows[self._fill : self._fill + take] = rows[start : start + take]
            self._fill += take
            start += take
            if self._fill == self.chunk:
                self.flush()

    def flush(self) -> None:
        """Write what is held, and make the array where it is not there yet."""
        start = self.share.row(self.written, self.base_block)
        stop = start + self._fill
        if self.array is None:
            self.array = self.create(max(stop, self.capacity), self.chunk)
        if self._fill:
            capacity, *row = self.array.shape
            # Doubling keeps the number of metadata writes small.
            if capacity < stop:
                self.array.resize((max(stop, 2 * capacity), *row))
            self.array[start:stop] = self._rows[: self._fill]
        self.written += self._fill
        self._fill = 0


def _cast(rows: npt.NDArray[Any], spec: LayerSpec, name: str, first: int) -> npt.NDArray[Any]:
    """Convert rows to the stored dtype; refuse values that overflow it."""
    if rows.dtype == spec.numpy_dtype:
        return rows
    with np.errstate(over="ignore"):
        cast = rows.astype(spec.numpy_dtype)
    # Asked of the values, for the sizes do not tell: bfloat16 overflows float16 too.
    infinite = np.isinf(cast)
    if infinite.any() and (overflow := infinite & np.isfinite(rows)).any():
        row = int(np.argwhere(overflow)[0][0])
        raise DataError(
            f"layer '{name}' row {first + row} overflows {spec.dtype}",
            remedy="store the layer as bfloat16 or float32",
        )
    return cast


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


class BlockWriter(ABC):
    """What both writers do: check rows, and hold them until a chunk is full."""

    def __init__(
        self, group: zarr.Group, n_classes: int, specs: Mapping[str, LayerSpec], head: str | None
    ) -> None:
        self._group = group
        self._n_classes = n_classes
        self._specs = specs
        self._head = head
        self._position = 0
        self._buffers: dict[str, RowBuffer] = {}
        # Predictions and labels, in this order: labels say that the rows exist, and come last.
        self._ids: dict[str, RowBuffer] = {}

    @property
    def position(self) -> int:
        """Rows appended so far; after a resume, the rows that need not be appended again."""
        return self._position

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

    def _add(self, part: slice, features: Rows, ids: Rows) -> None:
        for name, rows in features.items():
            self._buffers[name].add(rows[part])
        for name, buffer in self._ids.items():
            if name in ids:
                buffer.add(ids[name][part])
        self._position += part.stop - part.start

    def _flush(self) -> None:
        """Write what is held, in the order in which it is taken."""
        for buffer in (*self._buffers.values(), *self._ids.values()):
            buffer.flush()

    def _check_ids(
        self, what: str, values: Array, n: int | None = None, each: str = "row"
    ) -> npt.NDArray[np.int32]:
        """Check labels or predictions of the next rows, and that there are `n`."""
        ids = checked_labels(values, what, self._n_classes, self.position)
        if n is not None and len(ids) != n:
            raise DataError(f"{len(ids)} {what}s for {n} {each}s", f"one per {each}")
        return ids

    def _check_features(self, features: Mapping[str, Array], n: int, note: str = "") -> Rows:
        """Check the shapes of `n` rows of every layer, and convert them to their stored dtypes."""
        blocks = {}
        for name, spec in self._specs.items():
            rows = to_numpy(features[name])
            shape = (n, spec.n_features)
            if rows.shape != shape:
                raise DataError(
                    f"features of layer '{name}' of shape {rows.shape}", f"{shape}{note}"
                )
            blocks[name] = _cast(rows, spec, name, self.position)
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
        self, split: Split, specs: Mapping[str, LayerSpec], head: str | None, overwrite: bool
    ) -> None:
        super().__init__(split.group, split.n_classes, specs, head)
        self._split = split
        # Whether all is stored, and takes its names.
        self._complete = False
        self._check_new(specs, overwrite)
        # What an earlier writer that was killed has left.
        del split.group[_STAGED_PREDICTION]
        if head is not None:
            create = partial(chunks.create_ids, split.group, _STAGED_PREDICTION, head=head)
            self._ids["prediction"] = RowBuffer(create, split.base_block, split.n_rows)
        layers = chunks.require_group(split.group, "layers")
        self._homes = {name: STAGED + name if name in split.features else name for name in specs}
        for order, (name, home) in enumerate(self._homes.items(), start=len(split.features)):
            spec = specs[name]
            for leftover in {home, STAGED + name}:
                del layers[leftover]
            create = partial(chunks.create_feature, split.group, home, spec, order, complete=False)
            rows = min(chunk_rows(spec, split.n_rows), split.base_block)
            self._buffers[name] = RowBuffer(create, rows, split.n_rows)
        # Made before any rows come: what is begun can be seen.
        self._flush()

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
            self._check_labels(labels, n)
        self._check_head(predictions)
        ids = {}
        if predictions is not None:
            ids["prediction"] = self._check_ids("prediction", predictions, n)
        self._add(slice(0, n), self._check_features(features, n), ids)

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
        self._flush()
        # From here on nothing may be lost: what is interrupted, `FeatureStore.finalize` ends.
        self._complete = True
        for name, home in self._homes.items():
            self._group[f"layers/{home}"].update_attributes({"complete": True})
            if home != name:
                rename(self._group, f"layers/{home}", f"layers/{name}")
        if self._ids:
            rename(self._group, _STAGED_PREDICTION, "prediction")
        chunks.record_arrays(self._group)

    def discard(self) -> None:
        """Remove what was written, and keep what it was to replace."""
        # Nothing is removed once all is stored: where nothing can be renamed, what was to be
        # replaced may be gone, and `FeatureStore.finalize` goes on with it.
        if not self._complete:
            for home in self._homes.values():
                del self._group[f"layers/{home}"]
            del self._group[_STAGED_PREDICTION]

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

    def _check_labels(self, values: Array, n: int) -> None:
        stored = self._split.labels(self.position, self.position + n)
        labels = self._check_ids("label", values, n)
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
        share: ranks.Share,
        n_samples: int | None,
        head: str | None,
        resume: bool,
    ) -> None:
        self._named = f"split '{split}' of {where}"
        self._closed = False
        # What several writers have agreed on.
        self._layout: ranks.Layout | None = None
        rows: Mapping[str, int] = {
            name: chunk_rows(spec, n_samples) for name, spec in specs.items()
        }
        capacity = n_samples or 0
        if split in root:
            begun: Any = root[split]
            _check_continues(Split(split, begun, where, n_classes), share, resume)
        if share.several:
            group, self._layout = ranks.join_split(
                root, split, self._named, specs, share.world_size, n_samples, head
            )
            rows = self._layout.chunk_rows
            capacity = self._layout.capacity
        else:
            group = chunks.require_group(root, split)
        super().__init__(group, n_classes, specs, head)
        block = max(rows.values())
        for order, (name, chunk) in enumerate(rows.items()):
            create = partial(chunks.create_feature, group, name, specs[name], order)
            self._buffers[name] = RowBuffer(create, chunk, capacity, share, block)
        prediction = partial(chunks.create_ids, group, "prediction", head=head)
        label = partial(chunks.create_ids, group, "label")
        self._ids["prediction"] = RowBuffer(prediction, block, capacity, share, block)
        self._ids["label"] = RowBuffer(label, block, capacity, share, block)
        self._record = ranks.claim(group, share, self._named, resume=resume)
        if resume:
            self._resume(Split(split, group, where, n_classes))
        self._position = self._record.position
        self._samples = self._record.rows

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
        ids = {"label": self._check_ids("label", labels)}
        n = len(ids["label"])
        if predictions is not None:
            ids["prediction"] = self._check_ids("prediction", predictions, n, "label")
        self._check_predictions(predictions, n)
        self._check_room(n)
        for name in features:
            if name not in self._buffers:
                raise unknown_name("layer", name, self._buffers, "this writer")
        for name in self._buffers:
            if name not in features:
                raise DataError(f"no features for layer '{name}'", "features for every layer")
        rows = self._check_features(features, n, ": one row per label")
        start = 0
        while start < n:
            block = self._ids["label"].chunk
            part = slice(start, min(start + block - self.position % block, n))
            self._add(part, rows, ids)
            self._samples += int(np.count_nonzero(ids["label"][part] >= 0))
            start = part.stop
            if self.position % block == 0:
                self._commit()

    def close(self) -> None:
        """Commit the rest; complete the split, unless it has other writers.

        Its arrays end at the last row then. A split of several writers is completed by
        `FeatureStore.finalize`, once all are closed.
        """
        if self._closed:
            return
        if not self._record.final:
            self._store_rest()
            self._commit(final=True)
        if self._layout is None:
            ranks.finalize_split(self._group, self._named)
        self._closed = True

    def _store_rest(self) -> None:
        """Store the rows of a block that is not full."""
        label = self._ids["label"]
        if self._layout is not None and self.position % label.chunk == 0:
            return
        if self._layout is None and label.array is None:
            # Of what is not stored yet no chunk is longer than the split.
            for name, buffer in self._buffers.items():
                if buffer.array is None:
                    buffer.chunk = chunk_rows(self._specs[name], self.position)
            for buffer in self._ids.values():
                buffer.chunk = max(feature.chunk for feature in self._buffers.values())
        for buffer in self._buffers.values():
            buffer.flush()
        for name, buffer in self._ids.items():
            if name == "prediction" and not buffer.position:
                continue
            if self._layout is not None:
                # Blocks of other writers follow, and a writer killed while it wrote this one may
                # have left values beyond.
                buffer.add(np.full(-self.position % buffer.chunk, -1, np.int32))
            buffer.flush()

    def discard(self) -> None:
        """Take no more rows; what was committed stays."""
        self._closed = True

    def _commit(self, *, final: bool = False) -> None:
        """Record what is stored; it counts the labels, and so comes after them."""
        blocks = -(-self.position // self._ids["label"].chunk)
        self._record = replace(
            self._record, blocks=blocks, rows=self._samples, position=self.position, final=final
        )
        self._record.save(self._group)

    def _resume(self, split: Split) -> None:
        """Go on where the writer of this rank stopped."""
        # Interrupted before anything was committed: a single writer begins anew.
        if "label" not in self._group:
            if self._layout is None:
                del self._group["layers"]
                del self._group["prediction"]
            return
        self._check_layers(split)
        if split.head is not None and self._head not in (None, split.head):
            raise StoreError(
                f"{self._named} was begun with predictions of layer '{split.head}'",
                f"those of layer '{self._head}', as this writer was asked for",
                "resume with the same head, or overwrite the split",
            )
        if not self._record.final:
            self._record = ranks.to_resume(self._record, chunks.open_array(self._group, "label"))
            self._record.save(self._group)
        buffers = {f"layers/{name}/feature": buffer for name, buffer in self._buffers.items()}
        buffers |= self._ids
        arrays = chunks.open_arrays(self._group, list(buffers))
        for buffer, array in zip(buffers.values(), arrays, strict=True):
            if array is not None:
                buffer.array = array
                buffer.chunk = array.chunks[0]
                buffer.written = self._record.position

    def _check_layers(self, split: Split) -> None:
        """Refuse to go on with other layers than those begun."""
        if sorted(split.layers) != sorted(self._buffers):
            raise StoreError(
                f"{self._named} has layers {', '.join(split.layers)}",
                "the layers of this writer: " + ", ".join(self._buffers),
            )
        for name, spec in self._specs.items():
            if split.spec(name) != spec:
                raise StoreError(
                    f"layer '{name}' of {self._named} is {split.spec(name)}",
                    f"{spec}, as this writer was asked for",
                )

    def _check_room(self, n: int) -> None:
        if n and self._record.final:
            raise StoreError(
                f"writer {self._record.rank} of {self._named} ended with {self.position} rows",
                "no more rows",
                "finalize the split, and write others into another one",
            )
        if self._layout is not None and self.position + n > self._layout.n_samples:
            raise DataError(
                f"{self.position + n} rows of writer {self._record.rank} of {self._named}",
                f"n_samples={self._layout.n_samples} at most, of all writers together",
                "delete the split and write it with a larger n_samples, which costs nothing",
            )

    def _check_predictions(self, predictions: Array | None, n: int) -> None:
        if self._layout is not None:
            self._check_head(predictions)
            return
        begun = self._ids["prediction"].position > 0
        if self.position and n and begun != (predictions is not None):
            raise DataError(
                "predictions in some calls of append only", "predictions in all calls or in none"
            )


def _check_continues(split: Split, share: ranks.Share, resume: bool) -> None:
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
    layout = ranks.Layout.read(group)
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
