"""Rows of a dump go to a new split, one that is resumed, or layers that are added to one."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from ncbatch.arrays.namespace import to_numpy
from ncbatch.errors import DataError, StoreError, UsageError
from ncbatch.ingest.model.head import Head
from ncbatch.ingest.model.places import Batch
from ncbatch.ingest.model.target import Request, Target, stored_dtype, wait_for
from ncbatch.store.format import LayerSpec
from ncbatch.store.ranks import Layout
from ncbatch.store.split import Split
from ncbatch.store.writer import LayerWriter, Writer

if TYPE_CHECKING:
    import torch


logger = logging.getLogger("ncbatch")


class Begun(NamedTuple):
    """With which layers, and predictions of which, a split was begun that is not complete."""

    layers: Mapping[str, LayerSpec]
    head: str | None


class RowTarget(Target):
    """Where rows go: a new split, one that is resumed, or new layers of a complete one."""

    kind = "rows"

    def __init__(self, request: Request) -> None:
        super().__init__(request)
        self._writer: Writer | LayerWriter | None = None
        self._widths: dict[str, int] = {}
        self._stored: Split | None = None
        if self.store is not None and request.split in self.store.splits:
            self._stored = self.store.split(request.split)
        # What several ranks have agreed on, if one has begun.
        layout = None if self.store is None else self.store.layout(request.split)
        self._begun: Begun | None = None
        if layout is not None and request.share.several:
            self._begun = Begun(layout.layers, layout.head)
        elif self._stored is not None:
            layers = {name: self._stored.spec(name) for name in self._stored.layers}
            self._begun = Begun(layers, self._stored.head)
        self._mode = self._choose_mode()
        self.done = self._mode == "done"
        self.begins = self._mode != "add"  # to a split that was begun, and ended, with what it says
        if self.done:
            return
        self._dtype = stored_dtype(
            self.store, request.split, request.places, request.dtype, overwrite=request.overwrite
        )
        if request.share.several and request.n_samples is None and layout is None:
            raise UsageError(
                f"no n_samples for {request.share.world_size} ranks",
                "the samples of all ranks together, at most",
                "give n_samples=; too large a number costs nothing",
            )

    @property
    def continues(self) -> bool:
        """Whether this goes on with, or joins, what some process has begun."""
        # Read anew: the layout may be that of this rank's writer, or of one that was quicker.
        joins = self.request.share.several and self._read_layout() is not None
        return self._mode == "resume" or joins

    def _read_layout(self) -> Layout | None:
        """Read what several ranks have agreed on, if one has begun meanwhile."""
        store = self.open_again()
        return None if store is None else store.layout(self.request.split)

    def _choose_mode(self) -> Literal["new", "resume", "add", "done"]:
        """Choose what to do with a split that exists."""
        request = self.request
        if self._stored is not None and self._stored.finalized:
            return self._mode_of_complete(self._stored)
        if request.overwrite or self._begun is None:
            return "new"
        if not request.resume:
            if request.share.several:
                return "new"  # a rank that has begun already is refused by its writer
            raise StoreError(
                f"{self.named} is not complete",
                remedy="go on with resume=True, or start again with overwrite=True",
            )
        if sorted(self._begun.layers) != sorted(request.places):
            raise StoreError(
                f"{self.named} was begun with layers {', '.join(self._begun.layers)}",
                "the same layers: " + ", ".join(request.places),
            )
        return "resume"

    def _mode_of_complete(self, stored: Split) -> Literal["new", "add", "done"]:
        known = [name for name in self.request.places if name in stored.layers]
        if not known:
            # A dump drops what is no sample, so its rows can stand beside no such row.
            if stored.n_rows != stored.n_samples:
                raise StoreError(
                    f"{self.named} has rows that are no samples: "
                    "rows of a dump cannot be matched with them",
                    remedy="dump these layers into another split",
                )
            if self.request.share.several:
                raise UsageError(
                    f"layers to be added to the complete {self.named} by several ranks",
                    "one process, with the batches in the order of the stored rows",
                )
            return "add"
        if self.request.overwrite:
            return "new"
        if self.request.resume and len(known) == len(self.request.places):
            return "done"
        raise StoreError(
            f"{self.named} has layers {', '.join(known)}",
            "new layers, or a new split",
            "leave them out, or replace the whole split with overwrite=True",
        )

    def resume(self, writing: ExitStack) -> int:
        """Go on with the layers as they were begun."""
        if self._mode != "resume" or self._begun is None:
            return 0
        # A writer that is resumed is opened before the head is known: it finds what is stored.
        self._head = self._begun.head if self.request.share.several else None
        self._widths = {name: self._begun.layers[name].n_features for name in self.request.places}
        for name, spec in self._begun.layers.items():
            if self.request.dtype not in (None, spec.dtype):
                raise StoreError(
                    f"layer '{name}' of {self.named} was begun as {spec.dtype}",
                    f"{self.request.dtype}, as this dump was asked for",
                    "leave --dtype (dtype=) out, or start again with --overwrite (overwrite=True)",
                )
        return self._open_writer(writing).position

    def settle(self, head: Head, features: Mapping[str, torch.Tensor], predictions: bool) -> None:
        """Find or make the store, find the layer that the head reads, store the classifier."""
        first = 0 if self._writer is None else self._writer.position
        for name, rows in features.items():  # before a store is made that would remain
            _check_overflow(rows, self._dtype, name, first)
        super().settle(head, features, predictions and self._mode != "add")
        if self._mode == "resume" and self._begun and self._head != self._begun.head:
            raise DataError(
                f"predictions of layer {self._head or 'none'}",
                f"{self._begun.head or 'none'}, as split '{self.request.split}' was begun",
                "resume with the same model and options",
            )

    def start(self, features: Mapping[str, torch.Tensor], writing: ExitStack) -> None:
        """Open the split, or the layers that are added to it."""
        if self._writer is not None:
            return
        self._widths = {name: int(rows.shape[1]) for name, rows in features.items()}
        if self._mode == "add":
            adding = self.opened.add_layers(self.request.split, self._widths, self._dtype)
            self._writer = writing.enter_context(adding)
        else:
            self._open_writer(writing)

    def _open_writer(self, writing: ExitStack) -> Writer:
        # What is declared alike is asked for by name: then its widths must be those declared.
        declared = {name: spec.dtype for name, spec in self.opened.declared_layers.items()}
        all_declared = dict.fromkeys(self._widths, self._dtype).items() <= declared.items()
        writer = self.opened.writer(
            self.request.split,
            rank=self.request.share.rank,
            world_size=self.request.share.world_size,
            n_samples=self.request.n_samples,
            layers=list(self._widths) if all_declared else self._widths,
            dtype=self._dtype,
            head=self._head,
            resume=self.request.resume,
            overwrite=self.request.overwrite,
        )
        self._writer = writing.enter_context(writer)
        return writer

    def receive(self, name: str, rows: torch.Tensor) -> npt.NDArray[Any]:
        """Convert rows to the stored dtype and copy them to the host."""
        assert self._writer is not None
        return to_numpy(_cast(rows, self._dtype, name, self._writer.position))

    def append(
        self, features: Mapping[str, Any], labels: npt.NDArray[Any], decisions: torch.Tensor | None
    ) -> None:
        """Write the rows of a batch."""
        assert self._writer is not None
        # Rows of the first batch were not received: they were needed as they are.
        rows = {
            name: values if isinstance(values, np.ndarray) else self.receive(name, values)
            for name, values in features.items()
        }
        self._writer.append(rows, labels, decisions if self._head is not None else None)

    def expect(self, batch: Batch) -> None:
        """Refuse to skip rows that are not the ones stored: other batches would be mixed in."""
        start = self._skipped
        self._skipped += len(batch.skipped)
        # The head's decisions would take the forward pass that skipping saves.
        if self._skipped == start or not self.request.labels_given:
            return
        stored = np.concatenate(list(self._stored_labels(start, self._skipped)))
        differ = np.flatnonzero(stored != batch.skipped)
        if differ.size:
            row = int(differ[0])
            raise DataError(
                f"label {int(batch.skipped[row])} for row {start + row}",
                f"{int(stored[row])}, as stored in split '{self.request.split}'",
                "resume with the same batches in the same order",
            )

    def _stored_labels(self, start: int, stop: int) -> Iterator[npt.NDArray[np.int32]]:
        """Read labels of this rank's own rows, base block by base block."""
        assert self._stored is not None
        block = self._stored.base_block
        while start < stop:
            end = min((start // block + 1) * block, stop)
            row = self.request.share.row(start, block)
            yield self._stored.labels(row, row + end - start)
            start = end

    def end(self, missing: int, writing: ExitStack) -> None:
        """Refuse to end a split that got less than it should."""
        super().end(missing, writing)
        if self._writer is not None:
            return
        self._check_several()
        # It takes its place among the writers; the others alone know widths and head.
        rank = self.request.share.rank
        layout = wait_for(self._read_layout, rank)
        if rank == 0 and layout.head is not None:
            logger.warning("no classifier stored: rank 0, which stores it, had no sample")
        specs = layout.layers
        self._widths = {name: spec.n_features for name, spec in specs.items()}
        self._dtype = next(spec.dtype for spec in specs.values())
        self._head = layout.head
        self._open_writer(writing)


def _cast(rows: torch.Tensor, dtype: str, name: str, first: int) -> torch.Tensor:
    """Convert rows to the stored dtype on their device where that makes the transfer no larger."""
    import torch

    source = str(rows.dtype).removeprefix("torch.")
    target = getattr(torch, dtype)
    # float64 is left to the writer: torch rounds it twice on the way to 16 bits.
    if source in (dtype, "float64") or rows.dtype.itemsize < target.itemsize:
        return rows
    # The writer refuses what overflows only when it converts itself.
    _check_overflow(rows, dtype, name, first)
    return rows.to(target)


def _check_overflow(rows: torch.Tensor, dtype: str, name: str, first: int) -> None:
    """Refuse finite values that are infinite in `dtype`."""
    import torch

    target = getattr(torch, dtype)
    largest = torch.finfo(target).max
    if not rows.numel() or torch.finfo(rows.dtype).max <= largest:
        return
    least, most = rows.aminmax()  # one pass and one wait for the device, unless it is bad
    if bool((least >= -largest) & (most <= largest)):
        return  # NaN does not get here: then it takes a closer look
    overflow = (torch.isinf(rows.to(target)) & torch.isfinite(rows)).any(1)
    if overflow.any():
        row = int(torch.nonzero(overflow)[0])
        raise DataError(
            f"layer '{name}' row {first + row} overflows {dtype}",
            remedy="store it with --dtype bfloat16 or float32 (dtype=)",
        )
