"""Writers: features first, labels last, so that a crash loses nothing that was committed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import zarr

from ncbatch.arrays import Array, to_numpy
from ncbatch.errors import DataError, StoreError, UsageError, unknown_name
from ncbatch.store.commit_records import CommitRecord, Share, claim, to_resume
from ncbatch.store.finalizing import finalize_split
from ncbatch.store.format import LayerSpec, chunk_rows
from ncbatch.store.layout import Layout, join_split
from ncbatch.store.nodes import create_label, create_prediction, found_group, open_array
from ncbatch.store.row_buffer import RowBuffer, checked_labels, reserve
from ncbatch.store.split import Split
from ncbatch.store.states import STATES


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
