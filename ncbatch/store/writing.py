"""Writers: features first, labels last, so that a crash loses nothing that was committed."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import zarr
from zarr.storage import LocalStore

from ncbatch.arrays import Array, to_numpy
from ncbatch.errors import DataError, StoreError, UsageError, unknown_name
from ncbatch.store.chunks import present_chunks
from ncbatch.store.format import ATTRIBUTE, STAGED, LayerSpec, chunk_rows, create_array
from ncbatch.store.split import Split


class _RowBuffer:
    """Collects rows and writes them to an array one whole chunk at a time."""

    def __init__(
        self, name: str, spec: LayerSpec, rows: int, order: int, home: str | None = None
    ) -> None:
        self.name, self.spec, self.chunk, self.order = name, spec, rows, order
        self.home = name if home is None else home  # the layer's group
        self.array: zarr.Array[Any] | None = None
        self.written = 0  # rows stored
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
        stop = self.written + self._fill
        array = self.array or self.create(group, max(stop, capacity))
        _reserve(array, stop)
        array[self.written : stop] = self._rows[: self._fill]
        self.written, self._fill = stop, 0

    def create(self, group: zarr.Group, capacity: int, *, complete: bool = True) -> zarr.Array[Any]:
        """Make the layer's array in the split's `group`, with room for `capacity` rows."""
        home = group.require_group("layers").require_group(self.home)
        home.update_attributes({"complete": complete, "order": self.order})
        width = self.spec.n_features
        self.array = create_array(
            home, "feature", shape=(capacity, width), chunks=(self.chunk, width),
            dtype=self.spec.dtype, dimensions=("sample", "unit"),
        )  # fmt: skip
        return self.array


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
            name: _RowBuffer(name, spec, chunk_rows(spec, n_samples), order)
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
        y = _checked_labels(labels, "label", k, first)
        p = None if predictions is None else _checked_labels(predictions, "prediction", k, first)
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
            _reserve(self._prediction, stop)
            self._prediction[self._committed : stop] = np.concatenate(self._predictions)
        _reserve(self._label, stop)
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
        self._prediction = None if head is None else self._create_prediction(split)
        self._predictions = np.empty(0, np.int32)
        layers = split.group.require_group("layers")
        self._buffers = {}
        for order, (name, spec) in enumerate(specs.items(), start=len(split.features)):
            home = STAGED + name if name in split.features else name
            if home in layers:
                del layers[home]
            rows = min(chunk_rows(spec, split.n_rows), split.base_block)
            self._buffers[name] = _RowBuffer(name, spec, rows, order, home)
            self._buffers[name].create(split.group, split.n_rows, complete=False)
        self.position = 0

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
        for name, buffer in self._buffers.items():
            group[f"layers/{buffer.home}"].update_attributes({"complete": True})
            if buffer.home != name:
                _rename(group, f"layers/{buffer.home}", f"layers/{name}")
        if self._prediction is not None:
            _rename(group, STAGED + "prediction", "prediction")

    def discard(self) -> None:
        """Remove what was written, and keep what it was to replace."""
        group = self._split.group
        for buffer in self._buffers.values():
            if f"layers/{buffer.home}" in group:
                del group[f"layers/{buffer.home}"]
        if self._prediction is not None and STAGED + "prediction" in group:
            del group[STAGED + "prediction"]

    def _create_prediction(self, split: Split) -> zarr.Array[Any]:
        """Make the array of predictions under a name that `close` changes."""
        name = STAGED + "prediction"
        if name in split.group:
            del split.group[name]
        return create_array(
            split.group, name, shape=(split.n_rows,), chunks=(split.base_block,), dtype="int32",
            dimensions=("sample",), attributes={"head": self._head},
        )  # fmt: skip

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
        p = _checked_labels(predictions, "prediction", self._split.n_classes, self.position)
        if len(p) != n:
            raise DataError(f"{len(p)} predictions for {n} rows", "one per row")
        return p

    def _check_labels(self, labels: Array, stop: int) -> None:
        stored = self._split.labels(self.position, stop)
        given = _checked_labels(labels, "label", self._split.n_classes, self.position)
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


def _checked_labels(values: Array, what: str, n_classes: int, first: int) -> npt.NDArray[np.int32]:
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


def _rename(group: zarr.Group, staged: str, name: str) -> None:
    """Let what is complete take its name, and the place of what it replaces."""
    if not isinstance(group.store, LocalStore):
        raise StoreError(f"{group.store_path} is no local store", "a folder to replace a layer in")
    root = Path(group.store.root) / group.path
    replaced = root / f"{staged}{STAGED}replaced"
    if (root / name).exists():
        (root / name).rename(replaced)
    (root / staged).rename(root / name)
    shutil.rmtree(replaced, ignore_errors=True)


def _reserve(array: zarr.Array[Any], rows: int) -> None:
    """Let an array hold `rows`; doubling keeps the number of metadata writes small."""
    if array.shape[0] < rows:
        array.resize((max(rows, 2 * array.shape[0]), *array.shape[1:]))


def _split_exists(root: zarr.Group, split: str, where: str, n_classes: int) -> StoreError:
    group = root[split]
    assert isinstance(group, zarr.Group)
    found = f"split '{split}' of {where} exists"
    if "label" not in group:
        return StoreError(f"{found}, begun but without rows", "", "resume it or overwrite it")
    if Split(split, group, where, n_classes).finalized:
        return StoreError(found, "a new split", "overwrite it, or add layers to it")
    return StoreError(f"{found} and is not complete", "", "resume its writer, or overwrite it")
