"""Writers: features first, labels last, so that a crash loses nothing that was committed."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import zarr

from ncbatch.arrays import Array, to_numpy
from ncbatch.errors import DataError, StoreError, UsageError, unknown_name
from ncbatch.store.chunks import present_chunks
from ncbatch.store.format import ATTRIBUTE, LayerSpec, chunk_rows, create_array
from ncbatch.store.row_buffer import RowBuffer, checked_labels, reserve
from ncbatch.store.split import Split


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
        n_samples: int | None,
        head: str | None,
        resume: bool,
        overwrite: bool,
    ) -> None:
        self._n_classes, self._split, self._head = n_classes, split, head
        self._capacity = n_samples or 0
        if split in root:
            if overwrite:
                del root[split]
            elif not resume:
                raise _split_exists(root, split, where, n_classes)
        self._group = root.require_group(split)
        self._buffers = {
            name: RowBuffer(name, spec, chunk_rows(spec, n_samples), order)
            for order, (name, spec) in enumerate(specs.items())
        }
        self._label: zarr.Array[Any] | None = None
        self._prediction: zarr.Array[Any] | None = None
        self._labels: list[npt.NDArray[np.int32]] = []
        self._predictions: list[npt.NDArray[np.int32]] = []
        self._committed = 0
        self._pending = 0
        self._n_samples = 0
        self._closed = False
        if resume:
            self._resume(where)

    @property
    def position(self) -> int:
        """Rows of the split so far; after a resume, the rows that need not be appended again."""
        return self._committed + self._pending

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
        """Commit the rest and complete the split: its arrays end at the last row."""
        if self._closed:
            return
        self._shrink_unwritten()
        for buffer in self._buffers.values():
            buffer.flush(self._group, 0)
        if self._pending or self._label is None:
            self._commit()
        self._finalize()
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
            if buffer.array is None and self._label is None:
                buffer.chunk = chunk_rows(buffer.spec, self.position)

    def _commit(self) -> None:
        stop = self.position
        if self._label is None:
            for buffer in self._buffers.values():
                if buffer.array is None:
                    buffer.create(self._group, stop)
            self._create_labels(max(stop, self._capacity))
        assert self._label is not None
        labels = np.concatenate([np.empty(0, np.int32), *self._labels])
        if self._prediction is not None:
            reserve(self._prediction, stop)
            self._prediction[self._committed : stop] = np.concatenate(self._predictions)
        reserve(self._label, stop)
        self._label[self._committed : stop] = labels
        self._n_samples += int(np.count_nonzero(labels >= 0))
        self._labels, self._predictions = [], []
        self._committed, self._pending = stop, 0
        self._record(final=False)

    def _create_labels(self, capacity: int) -> None:
        block = self._base_block
        if self._predictions:
            self._prediction = create_array(
                self._group, "prediction", shape=(capacity,), chunks=(block,), dtype="int32",
                dimensions=("sample",), attributes={"head": self._head},
            )  # fmt: skip
        self._label = create_array(
            self._group, "label", shape=(capacity,), chunks=(block,), dtype="int32",
            dimensions=("sample",),
        )  # fmt: skip

    def _record(self, *, final: bool) -> None:
        """Keep the writer's commit record."""
        record = {
            "rank": 0,
            "world_size": 1,
            "blocks": -(-self._committed // self._base_block),
            "rows": self._n_samples,
            "position": self._committed,
            "final": final,
        }
        self._group.require_group("writers").require_group("0").update_attributes(
            {ATTRIBUTE: record}
        )

    def _finalize(self) -> None:
        stop = self._committed
        arrays = [self._label, self._prediction, *(b.array for b in self._buffers.values())]
        for array in arrays:
            if array is not None and array.shape[0] != stop:
                array.resize((stop, *array.shape[1:]))
        self._record(final=True)
        self._group.update_attributes({ATTRIBUTE: {"n_samples": self._n_samples}})

    def _resume(self, where: str) -> None:
        if "label" not in self._group:  # interrupted before anything was committed
            for name in list(self._group.group_keys()):
                del self._group[name]
            if "prediction" in self._group:
                del self._group["prediction"]
            return
        split = Split(self._split, self._group, where, self._n_classes)
        if split.finalized:
            raise StoreError(
                f"split '{self._split}' of {where} is complete: {split.n_samples} samples",
                remedy="nothing is left to resume; write another split, or overwrite this one",
            )
        if sorted(split.layers) != sorted(self._buffers):
            raise StoreError(
                f"split '{self._split}' of {where} has layers {', '.join(split.layers)}",
                "the layers of this writer: " + ", ".join(self._buffers),
            )
        for name, buffer in self._buffers.items():
            if split.spec(name) != buffer.spec:
                raise StoreError(
                    f"layer '{name}' of split '{self._split}' of {where} is {split.spec(name)}",
                    f"{buffer.spec}, as this writer was asked for",
                )
        self._label = self._group["label"]  # type: ignore[assignment]
        if "prediction" in self._group:
            self._prediction = self._group["prediction"]  # type: ignore[assignment]
        assert self._label is not None
        present = present_chunks(self._label)
        blocks = int(np.argmin(present)) if not present.all() else len(present)
        if blocks and self._is_partial(split, blocks):
            blocks -= 1  # killed while it completed the split: the last block is written again
        self._committed = blocks * split.base_block
        for name, buffer in self._buffers.items():
            buffer.array = split.feature(name)
            buffer.chunk, buffer.written = buffer.array.chunks[0], self._committed
        if blocks:
            self._n_samples = int(np.count_nonzero(split.labels(0, self._committed) >= 0))

    def _is_partial(self, split: Split, blocks: int) -> bool:
        """Whether the last of the committed blocks is not known to be full."""
        stop = blocks * split.base_block
        writers = self._group.require_group("writers")
        record = writers["0"].attrs.get(ATTRIBUTE, {}) if "0" in writers else {}
        if isinstance(record, dict) and record.get("position", 0) >= stop:
            return False
        return split.n_rows < stop or bool(split.labels(stop - 1, stop)[0] < 0)

    def _check_predictions(self, predictions: npt.NDArray[Any] | None, n: int) -> None:
        if predictions is not None and len(predictions) != n:
            raise DataError(f"{len(predictions)} predictions for {n} labels", "one per label")
        if self.position:
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


def _split_exists(root: zarr.Group, split: str, where: str, n_classes: int) -> StoreError:
    group = root[split]
    assert isinstance(group, zarr.Group)
    found = f"split '{split}' of {where} exists"
    if "label" not in group:
        return StoreError(f"{found}, begun but without rows", "", "resume it or overwrite it")
    if Split(split, group, where, n_classes).finalized:
        return StoreError(found, "a new split", "overwrite it, or add layers to it")
    return StoreError(f"{found} and is not complete", "", "resume its writer, or overwrite it")
