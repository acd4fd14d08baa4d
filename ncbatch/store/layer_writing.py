"""LayerWriter: layers added to a complete split, invisible until they are complete."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import zarr

from ncbatch.arrays import Array, to_numpy
from ncbatch.errors import DataError, StoreError
from ncbatch.store.finalizing import record_arrays
from ncbatch.store.format import STAGED, LayerSpec, chunk_rows
from ncbatch.store.nodes import create_prediction, found_group
from ncbatch.store.renaming import delete_node, rename
from ncbatch.store.row_buffer import RowBuffer, checked_labels
from ncbatch.store.split import Split


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
