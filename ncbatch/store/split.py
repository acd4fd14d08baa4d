"""A split as it is read: its labels, predictions and the layers that are complete."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import zarr

from ncbatch.errors import StoreError, unknown_name
from ncbatch.store import chunks
from ncbatch.store.format import STAGED, LayerSpec, read_attributes
from ncbatch.store.ranks import CommitRecord, Layout, claimed_blocks, read_records

# The first row of a range, and something for each row from there on.
Part: TypeAlias = tuple[int, npt.NDArray[Any]]


@dataclass(frozen=True)
class Split:
    """A named set of samples in a store, for reading.

    While a split is not complete this is a snapshot: its arrays end with the last base block that
    was committed when it was opened.

    Parameters
    ----------
    name : str
        The split's name.
    group : zarr.Group
        Its group.
    where : str
        The store's path, for messages.
    n_classes : int
        K of the store.
    """

    name: str
    group: zarr.Group
    where: str
    n_classes: int

    @cached_property
    def _label(self) -> zarr.Array[Any]:
        label = chunks.open_array(self.group, "label")
        if self.finalized:
            return label
        # Records first: what they claim is stored already, whatever is written meanwhile.
        claimed = len(claimed_blocks(self.records))
        blocks = max([claimed, *(index + 1 for index in chunks.stored_chunks(label))])
        return chunks.open_array(
            self.group, "label", min(int(label.shape[0]), blocks * label.chunks[0])
        )

    def _arrays(self, names: Sequence[str]) -> list[zarr.Array[Any] | None]:
        """Open arrays; room that is reserved beyond the committed rows is left out."""
        return chunks.open_arrays(self.group, names, None if self.finalized else self.n_rows)

    @property
    def n_rows(self) -> int:
        """Rows of the arrays, holes included."""
        return int(self._label.shape[0])

    @cached_property
    def records(self) -> list[CommitRecord]:
        """What each writer has committed, by rank; of complete splits those of one writer only."""
        layout = Layout.read(self.group)
        return read_records(self.group, 1 if layout is None else layout.world_size)

    @property
    def label_chunks_expected(self) -> npt.NDArray[np.bool_]:
        """Which label chunks must be there: all once writing has ended, else those recorded."""
        n_blocks = -(-self.n_rows // self.base_block)
        if self.finalized:
            return np.ones(n_blocks, np.bool_)
        return claimed_blocks(self.records, n_blocks)[:n_blocks]

    @property
    def base_block(self) -> int:
        """Rows that one label chunk commits."""
        return int(self._label.chunks[0])

    @property
    def finalized(self) -> bool:
        """Whether writing has ended; otherwise a writer runs or was interrupted."""
        return "n_samples" in read_attributes(self.group)

    @property
    def n_samples(self) -> int:
        """Rows that are samples (label >= 0)."""
        if self.finalized:
            return int(read_attributes(self.group)["n_samples"])
        return sum(int(np.count_nonzero(y >= 0)) for _, y in self.label_blocks())

    @cached_property
    def features(self) -> dict[str, zarr.Array[Any]]:
        """The stored feature arrays of the complete layers, by name, in the order written."""
        complete = chunks.complete_layers(self.group)
        orders = {name: layer.attrs.get("order", 0) for name, layer in complete}
        # Layers are listed as they were written, not by name.
        names = sorted(orders, key=lambda name: (orders[name], name))
        arrays = self._arrays([f"layers/{name}/feature" for name in names])
        return {name: array for name, array in zip(names, arrays, strict=True) if array is not None}

    @property
    def arrays(self) -> dict[str, zarr.Array[Any]]:
        """Every array of the split: ``label``, ``prediction`` if stored, and the features."""
        ids = {"label": self._label, "prediction": self._prediction}
        layers = {f"layers/{name}": array for name, array in self.features.items()}
        return {name: array for name, array in ids.items() if array is not None} | layers

    @property
    def layers(self) -> list[str]:
        """Names of the complete layers."""
        return list(self.features)

    @property
    def incomplete_layers(self) -> list[str]:
        """Layers whose writing has not ended, invisible until it has."""
        layers = chunks.subgroups(self.group, "layers")
        return sorted(name.removeprefix(STAGED) for name, _ in layers if name not in self.features)

    def spec(self, layer: str) -> LayerSpec:
        """Width and dtype of a layer."""
        array = self.feature(layer)
        return LayerSpec(int(array.shape[1]), str(array.dtype))

    def feature(self, layer: str) -> zarr.Array[Any]:
        """Return a layer's feature array (sample, unit).

        Raises
        ------
        UnknownNameError
            When there is no complete layer of that name.
        """
        if layer not in self.features:
            raise unknown_name(
                "layer", layer, self.features, f"split '{self.name}' of {self.where}"
            )
        return self.features[layer]

    @cached_property
    def _prediction(self) -> zarr.Array[Any] | None:
        return self._arrays(["prediction"])[0]

    @property
    def head(self) -> str | None:
        """The layer whose classifier made the stored predictions; None without predictions."""
        head = None if self._prediction is None else self._prediction.attrs.get("head")
        return None if head is None else str(head)

    def labels(self, start: int = 0, stop: int | None = None) -> npt.NDArray[np.int32]:
        """Read labels of rows [start, stop); -1 marks rows that are no samples."""
        return chunks.read_rows(self._label, start, self.n_rows if stop is None else stop)

    def predictions(self, start: int = 0, stop: int | None = None) -> npt.NDArray[np.int32]:
        """Read the model's own decisions for rows [start, stop).

        Raises
        ------
        StoreError
            When the split has none.
        """
        if self._prediction is None:
            raise StoreError(f"split '{self.name}' of {self.where} has no predictions")
        return chunks.read_rows(self._prediction, start, self.n_rows if stop is None else stop)

    def label_blocks(self) -> Iterator[tuple[int, npt.NDArray[np.int32]]]:
        """Yield (first row, labels) of every base block, in order.

        Raises
        ------
        CorruptionError
            When a label chunk is missing whose rows were committed once.
        """
        chunks.check_present(self._label, self.label_chunks_expected)

        def block(index: int) -> tuple[int, npt.NDArray[np.int32]]:
            start, stop = chunks.chunk_range(self._label, index)
            return start, self.labels(start, stop)

        yield from chunks.map_ahead(
            block, range(self.label_chunks_expected.size), self.chunks_at_once
        )

    def read(self, layer: str, start: int, stop: int, *, widened: bool = True) -> npt.NDArray[Any]:
        """Read features of rows [start, stop) as stored; bfloat16 as float32 if `widened`."""
        return chunks.read_rows(self.feature(layer), start, stop, widened=widened)

    @property
    def chunks_at_once(self) -> int:
        """How many chunks `read_each` reads or holds at once."""
        return chunks.chunks_at_once(self.group.store)

    def read_each(
        self, layer: str, parts: Iterable[Part], *, widened: bool = True
    ) -> Iterator[tuple[Part, npt.NDArray[Any]]]:
        """Read features of ranges of rows in turn, ahead of the caller in an object store.

        Parameters
        ----------
        layer : str
            Which layer.
        parts : iterable of (int, array (n, ...))
            First row, and something for each row from there on.
        widened : bool, optional
            As for `read`.

        Yields
        ------
        tuple of (int, array) and array (n, D)
            The part, and its features.
        """

        def read(part: Part) -> tuple[Part, npt.NDArray[Any]]:
            first, values = part
            return part, self.read(layer, first, first + len(values), widened=widened)

        # Opened once, before threads look for it.
        self.feature(layer)
        return chunks.map_ahead(read, parts, self.chunks_at_once)

    def check_chunks(self, layer: str) -> None:
        """Refuse a layer of which a chunk of rows, their labels or predictions is missing.

        Raises
        ------
        CorruptionError
            Names the first such chunk.
        """
        chunks.check_present(self._label, self.label_chunks_expected)
        arrays = [self.feature(layer)]
        if self._prediction is not None and self.head == layer:
            arrays.append(self._prediction)
        for array in arrays:
            # A chunk whose rows are all holes need not be there.
            for index in np.flatnonzero(~chunks.present_chunks(array)).tolist():
                if np.any(self.labels(*chunks.chunk_range(array, index)) >= 0):
                    raise chunks.chunk_fault(array, index, "chunk is missing").error()

    def fingerprint(self, layer: str, class_filter: str = "") -> str:
        """Hash what the layer's values depend on: shapes and the stored checksums of all chunks.

        Parameters
        ----------
        layer : str
            Which layer.
        class_filter : str, optional
            Names the classes that are used.

        Returns
        -------
        str
            32 hexadecimal digits; equal for equal content.
        """
        digest = hashlib.sha256(repr((self.name, layer, self.n_classes, class_filter)).encode())
        digest.update(chunks.checksums(self._label))
        digest.update(chunks.checksums(self.feature(layer)))
        return digest.hexdigest()[:32]

    def prediction_fingerprint(self) -> str:
        """Hash the stored checksums of the predictions; 32 hexadecimal digits."""
        assert self._prediction is not None
        return chunks.checksums(self._prediction).hex()[:32]
