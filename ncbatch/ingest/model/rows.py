"""RowTarget: rows of a dump go to a new split, one that is resumed, or layers that are added."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from ncbatch.arrays.namespace import to_numpy
from ncbatch.errors import DataError, StoreError, UsageError
from ncbatch.ingest.model.head import Head
from ncbatch.ingest.model.places import Batch
from ncbatch.ingest.model.target import Target, one_dtype, stored_dtypes, wait_for
from ncbatch.store.format import LayerSpec
from ncbatch.store.ranks import Layout
from ncbatch.store.split import Split
from ncbatch.store.writer import LayerWriter, Writer

if TYPE_CHECKING:
    import torch


logger = logging.getLogger("ncbatch")


class RowTarget(Target):
    """Where rows go: a new split, one that is resumed, or new layers of a complete one.

    Parameters
    ----------
    *args, **kwargs
        As for `Target`.
    n_samples : int or None
        Rows at most, of all ranks together.
    """

    kind = "rows"

    def __init__(self, *args: Any, n_samples: int | None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._n_samples = n_samples
        self._writer: Writer | LayerWriter | None = None
        self._specs: dict[str, LayerSpec] = {}
        self._stored = self._stored_split()
        self._layout = self._stored_layout()
        self.mode = self._mode()
        self.done = self.mode == "done"
        self._dtypes = stored_dtypes(
            self.store, self._split, self._places, self._dtype, overwrite=self._overwrite
        )
        if self._share.several and n_samples is None and self._layout is None and not self.done:
            raise UsageError(
                f"no n_samples for {self._share.world_size} ranks",
                "the samples of all ranks together, at most",
                "give n_samples=; too large a number costs nothing",
            )

    @property
    def continues(self) -> bool:
        """Whether this goes on with, or joins, what some process has begun."""
        layout = self._layout if self._writer is None else self._stored_layout()
        return self.mode == "resume" or (self._share.several and layout is not None)

    @property
    def begun(self) -> bool:
        """Whether there is a writer."""
        return self._writer is not None

    def _stored_split(self) -> Split | None:
        if self.store is None or self._split not in self.store.splits:
            return None
        return self.store.split(self._split)

    def _stored_layout(self) -> Layout | None:
        """Read what other ranks began, if they did."""
        return None if self.store is None else self.store.layout(self._split)

    def _mode(self) -> Literal["new", "resume", "add", "done"]:
        """Say what to do with a split that exists."""
        if self._stored is not None and self._stored.finalized:
            return self._mode_of_complete(self._stored)
        if self._overwrite:
            return "new"
        begun = self._begun_layers()
        if begun is None or (self._share.several and not self._resume):
            return "new"  # a rank that has begun already is refused by its writer
        if not self._resume:
            raise StoreError(
                f"{self._found} is not complete",
                remedy="go on with resume=True, or start again with overwrite=True",
            )
        if sorted(begun) != sorted(self._places):
            raise StoreError(
                f"{self._found} was begun with layers {', '.join(begun)}",
                "the same layers: " + ", ".join(self._places),
            )
        return "resume"

    def _mode_of_complete(self, stored: Split) -> Literal["new", "add", "done"]:
        known = [name for name in self._places if name in stored.layers]
        if not known:
            if stored.n_rows != stored.n_samples:
                raise StoreError(
                    f"{self._found} has rows that are no samples: rows of a dump cannot be matched with them",
                    remedy="dump these layers into another split",
                )
            if self._share.several:
                raise UsageError(
                    f"layers to be added to the complete {self._found} by several ranks",
                    "one process, with the batches in the order of the stored rows",
                )
            return "add"
        if self._overwrite:
            return "new"
        if self._resume and len(known) == len(self._places):
            logger.info("%s is complete: nothing to resume", self._found)
            return "done"
        raise StoreError(
            f"{self._found} has layers {', '.join(known)}",
            "new layers, or a new split",
            "leave them out, or replace the whole split with overwrite=True",
        )

    @property
    def _found(self) -> str:
        return f"split '{self._split}' of {self.opened.path}"

    def _begun_layers(self) -> dict[str, LayerSpec] | None:
        """Give the layers of the incomplete split; None when nothing was begun."""
        if self._layout is not None and self._share.several:
            return dict(self._layout.layers)
        if self._stored is None:
            return None
        return {name: self._stored.spec(name) for name in self._stored.layers}

    def record_identity(self) -> None:
        """Record with what the split is begun; layers that are added leave that as it is."""
        if self.mode != "add":
            super().record_identity()

    def resume(self, writing: ExitStack) -> int:
        """Go on with the layers as they were begun."""
        if self.mode != "resume":
            return 0
        begun = self._begun_layers()
        assert begun is not None
        self._specs = {name: begun[name] for name in self._places}
        for name, spec in self._specs.items():
            if self._dtype not in (None, spec.dtype):
                raise StoreError(
                    f"layer '{name}' of {self._found} was begun as {spec.dtype}",
                    f"{self._dtype}, as this dump was asked for",
                    "leave --dtype (dtype=) out, or start again with --overwrite (overwrite=True)",
                )
        return writing.enter_context(self._open_writer()).position

    def settle(self, head: Head, features: Mapping[str, torch.Tensor], predictions: bool) -> None:
        """After the first forward pass: find or make the store, find the head's layer, store it."""
        first = 0 if self._writer is None else self._writer.position
        for name, rows in features.items():  # before a store is made that would remain
            _check_overflow(rows, self._dtypes[name], name, first)
        super().settle(head, features, predictions and self.mode != "add")
        if self.mode == "resume" and self._head != self._begun_head:
            raise DataError(
                f"predictions of layer {self._head or 'none'}",
                f"{self._begun_head or 'none'}, as split '{self._split}' was begun",
                "resume with the same model and options",
            )

    @property
    def _begun_head(self) -> str | None:
        if self._layout is not None:
            return self._layout.head
        return None if self._stored is None else self._stored.head

    def start(self, features: Mapping[str, torch.Tensor], writing: ExitStack) -> None:
        """Open the split, or the layers that are added to it."""
        self._specs = {
            name: LayerSpec(int(rows.shape[1]), self._dtypes[name])
            for name, rows in features.items()
        }
        if self.mode != "add":
            writing.enter_context(self._open_writer())
            return
        adding = self.opened.add_layers(self._split, self._widths, self._one_dtype())
        self._writer = writing.enter_context(adding)

    @property
    def _widths(self) -> dict[str, int]:
        return {name: spec.n_features for name, spec in self._specs.items()}

    def _open_writer(self) -> Writer:
        declared = self.opened.declared_layers
        all_declared = all(
            name in declared and declared[name].dtype == spec.dtype
            for name, spec in self._specs.items()
        )
        self._writer = writer = self.opened.writer(
            self._split,
            rank=self._share.rank,
            world_size=self._share.world_size,
            n_samples=self._n_samples,
            layers=list(self._specs) if all_declared else self._widths,
            dtype=None if all_declared else self._one_dtype(),
            # A writer that is resumed is opened before the head is known: it finds what is stored.
            head=self._begun_head if self.mode == "resume" and self._share.several else self._head,
            resume=self._resume,
            overwrite=self._overwrite,
        )
        return writer

    def _one_dtype(self) -> str:
        return one_dtype({name: spec.dtype for name, spec in self._specs.items()})

    def receive(self, name: str, rows: torch.Tensor) -> npt.NDArray[Any]:
        """Convert rows to the stored dtype and copy them to the host."""
        assert self._writer is not None
        return to_numpy(_cast(rows, self._specs[name].dtype, name, self._writer.position))

    def append(
        self,
        features: Mapping[str, Any],
        labels: npt.NDArray[Any],
        decisions: torch.Tensor | None,
    ) -> None:
        """Write the rows of a batch."""
        writer = self._writer
        assert writer is not None
        rows = {
            name: values if isinstance(values, np.ndarray) else self.receive(name, values)
            for name, values in features.items()
        }
        if isinstance(writer, LayerWriter):
            writer.append(rows, labels)
        else:
            writer.append(rows, labels, decisions if self._head is not None else None)

    def check_skipped(self, batch: Batch) -> None:
        """Refuse to skip rows that are not the ones stored: other batches would be mixed in."""
        start, n = self._skipped, len(batch.skipped)
        self._skipped += n
        if not n or not self._labels_given:
            return
        stored = np.concatenate(list(self._own_labels(start, start + n)))
        differ = np.flatnonzero(stored != batch.skipped)
        if differ.size:
            at = int(differ[0])
            raise DataError(
                f"label {int(batch.skipped[at])} for row {start + at}",
                f"{int(stored[at])}, as stored in split '{self._split}'",
                "resume with the same batches in the same order",
            )

    def _own_labels(self, start: int, stop: int) -> Iterator[npt.NDArray[np.int32]]:
        """Read the labels of this rank's own rows, base block by base block."""
        assert self._stored is not None
        block = self._stored.base_block
        while start < stop:
            end = min((start // block + 1) * block, stop)
            row = self._share.row(start, block)
            yield self._stored.labels(row, row + end - start)
            start = end

    def end(self, missing: int, writing: ExitStack) -> None:
        """Refuse to end a split that got less than it should."""
        super().end(missing, writing)
        if self._writer is None and not self._share.several:
            raise DataError("no sample in any batch", "at least one label that is not negative")
        if self._writer is None:
            self._join_without_rows(writing)

    def _join_without_rows(self, writing: ExitStack) -> None:
        """Take this rank's place among the writers; the others alone know widths and head."""
        self._layout = layout = wait_for(self._look_for_layout, self._share.rank)
        if self._share.rank == 0 and layout.head is not None:
            logger.warning("no classifier stored: rank 0, which stores it, had no sample")
        self._specs, self._head = dict(layout.layers), layout.head
        writing.enter_context(self._open_writer())

    def _look_for_layout(self) -> Layout | None:
        self.store = self._open_again()
        return self._stored_layout()


def _cast(rows: torch.Tensor, dtype: str, name: str, first: int) -> torch.Tensor:
    """Convert rows to the stored dtype on their device where that makes the transfer no larger.

    The writer refuses what overflows only when it converts itself, so this does it too. float64 is
    left to the writer: torch rounds it twice on the way to 16 bits.
    """
    import torch

    source = str(rows.dtype).removeprefix("torch.")
    target = getattr(torch, dtype)
    if source in (dtype, "float64") or rows.dtype.itemsize < target.itemsize:
        return rows
    _check_overflow(rows, dtype, name, first)
    return rows.to(target)


def _check_overflow(rows: torch.Tensor, dtype: str, name: str, first: int) -> None:
    """Refuse finite values that are infinite in `dtype`."""
    import torch

    target = getattr(torch, dtype)
    if not rows.numel() or torch.finfo(rows.dtype).max <= torch.finfo(target).max:
        return
    least, most = rows.aminmax()
    largest = torch.finfo(target).max
    if bool((least >= -largest) & (most <= largest)):
        return  # NaN does not get here: then it takes a closer look
    overflow = (torch.isinf(rows.to(target)) & torch.isfinite(rows)).any(1)
    if overflow.any():
        row = int(torch.nonzero(overflow)[0])
        raise DataError(
            f"layer '{name}' row {first + row} overflows {dtype}",
            remedy="store it with --dtype bfloat16 or float32 (dtype=)",
        )
