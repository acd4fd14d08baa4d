"""Where the rows of a dump go: a new split, one that is resumed, or layers that are added."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from ncbatch.arrays import to_numpy
from ncbatch.errors import DataError, StoreError, UsageError
from ncbatch.ingest.head import Head
from ncbatch.ingest.places import Batch, Place
from ncbatch.store import FeatureStore, LayerWriter, Split, Writer
from ncbatch.store.format import DTYPES, check_name

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("ncbatch")


class Target:
    """Where rows go: a new split, one that is resumed, or new layers of a complete one."""

    def __init__(
        self,
        store: FeatureStore | str | os.PathLike[str],
        split: str,
        places: Mapping[str, Place],
        dtype: str,
        n_classes: int | None,
        *,
        resume: bool,
        overwrite: bool,
    ) -> None:
        check_name("split", split)
        if dtype not in DTYPES:
            raise UsageError(f"dtype '{dtype}'", "one of: " + ", ".join(DTYPES))
        if resume and overwrite:
            raise UsageError("both resume and overwrite", "one of them")
        self.store = _open_if_there(store)
        self._path = store
        self._split, self._places, self._dtype = split, places, dtype
        self._resume, self._overwrite = resume, overwrite
        if self.store is not None and n_classes not in (None, self.store.n_classes):
            raise UsageError(
                f"n_classes={n_classes}", f"{self.store.n_classes}, as in {self.store.path}"
            )
        self.n_classes = n_classes if self.store is None else self.store.n_classes
        self.writer: Writer | LayerWriter | None = None
        self.settled = False
        self._dtypes: dict[str, str] = {}
        self._head: str | None = None  # the layer whose predictions are stored
        self._skipped = 0
        self._stored = self._stored_split()
        self.mode = "new" if self._stored is None else self._mode(self._stored)

    @property
    def opened(self) -> FeatureStore:
        """The store, once there is one."""
        assert self.store is not None
        return self.store

    def _stored_split(self) -> Split | None:
        if self.store is None or self._split not in self.store.splits:
            return None
        return self.store.split(self._split)

    def _mode(self, stored: Split) -> Literal["new", "resume", "add", "done"]:
        """Say what to do with a split that exists."""
        found = f"split '{self._split}' of {stored.where}"
        known = [name for name in self._places if name in stored.layers]
        if stored.finalized and not known:
            if stored.n_rows != stored.n_samples:
                raise StoreError(
                    f"{found} has rows that are no samples: rows of a dump cannot be matched with them",
                    remedy="dump these layers into another split",
                )
            return "add"
        if self._overwrite:
            return "new"
        if stored.finalized and self._resume and len(known) == len(self._places):
            logger.info("%s is complete: nothing to resume", found)
            return "done"
        if stored.finalized:
            raise StoreError(
                f"{found} has layers {', '.join(known)}",
                "new layers, or a new split",
                "leave them out, or replace the whole split with overwrite=True",
            )
        if not self._resume:
            raise StoreError(
                f"{found} is not complete",
                remedy="go on with resume=True, or start again with overwrite=True",
            )
        if sorted(known) != sorted(self._places) or len(known) != len(stored.layers):
            raise StoreError(
                f"{found} was begun with layers {', '.join(stored.layers)}",
                "the same layers: " + ", ".join(self._places),
            )
        return "resume"

    def settle(self, head: Head, features: Mapping[str, torch.Tensor], predictions: bool) -> None:
        """After the first forward pass: create the store, find the head's layer, store it."""
        self.settled = True
        head.settle(features, self._places)
        if self.store is None:
            self.store = self._create(head, features)
        if head.layer is not None:
            self._set_classifier(head, head.layer)
        elif head.candidates and not self.store.classifiers:
            _warn_unmatched(head)
        if self.mode != "add" and predictions:
            self._head = head.layer
        if self.mode == "resume" and self._stored is not None and self._head != self._stored.head:
            raise DataError(
                f"predictions of layer {self._head or 'none'}",
                f"{self._stored.head or 'none'}, as split '{self._split}' was begun",
                "resume with the same model and options",
            )

    def _create(self, head: Head, features: Mapping[str, torch.Tensor]) -> FeatureStore:
        if self.n_classes is None:
            if head.module is None:
                raise DataError(
                    "no number of classes: no torch.nn.Linear ran", remedy="give n_classes="
                )
            self.n_classes = int(head.module.out_features)
        widths = {name: int(rows.shape[1]) for name, rows in features.items()}
        assert not isinstance(self._path, FeatureStore)
        return FeatureStore.create(self._path, self.n_classes, layers=widths, dtype=self._dtype)

    def _set_classifier(self, head: Head, layer: str) -> None:
        """Store weight and bias, unless they are stored; never mix two models unasked."""
        k = self.opened.n_classes
        head.check_outputs(k)
        module = head.module
        assert module is not None
        if module.out_features > k:
            logger.warning(
                "the first %d of %d rows of '%s' are its classifier",
                k,
                module.out_features,
                head.path,
            )
        weight = to_numpy(module.weight[:k])
        bias = None if module.bias is None else to_numpy(module.bias[:k])
        stored = self.opened.classifier(layer)
        if stored is not None:
            if _same(stored[0], weight) and _same(stored[1], bias):
                return
            if not self._overwrite:
                raise DataError(
                    f"'{head.path}' differs from the classifier stored for layer '{layer}'",
                    "one model per store",
                    "use a store per checkpoint, or overwrite=True, or head=False to keep the stored one",
                )
        self.opened.set_classifier(layer, weight, bias)

    def resume_writer(self) -> Writer:
        """Go on with the layers as they were begun."""
        assert self._stored is not None
        widths = {name: self._stored.spec(name).n_features for name in self._places}
        self._dtypes = {name: self._stored.spec(name).dtype for name in self._places}
        return self._writer(widths)

    def open_writer(self, features: Mapping[str, torch.Tensor]) -> Writer | LayerWriter:
        """Open the split, or the layers that are added to it."""
        widths = {name: int(rows.shape[1]) for name, rows in features.items()}
        declared = self.opened.declared_layers
        self._dtypes = {
            name: declared[name].dtype if name in declared else self._dtype for name in widths
        }
        if self.mode != "add":
            return self._writer(widths)
        self.writer = self.opened.add_layers(self._split, widths, self._one_dtype())
        return self.writer

    def _writer(self, widths: Mapping[str, int]) -> Writer:
        declared = self.opened.declared_layers
        all_declared = all(
            name in declared and declared[name].dtype == dtype
            for name, dtype in self._dtypes.items()
        )
        self.writer = writer = self.opened.writer(
            self._split,
            layers=list(widths) if all_declared else widths,
            dtype=None if all_declared else self._one_dtype(),
            head=self._head,
            resume=self._resume,
            overwrite=self._overwrite,
        )
        return writer

    def _one_dtype(self) -> str:
        if len(set(self._dtypes.values())) > 1:
            raise UsageError(
                "layers of several dtypes: "
                + ", ".join(f"{name} {dtype}" for name, dtype in self._dtypes.items()),
                "one dtype for layers that are written together",
                "set dtype= to the one declared, or dump the others afterwards",
            )
        return next(iter(self._dtypes.values()))

    def append(
        self,
        features: Mapping[str, torch.Tensor],
        labels: npt.NDArray[Any],
        decisions: torch.Tensor | None,
    ) -> None:
        """Write the rows of a batch."""
        writer = self.writer
        assert writer is not None
        rows = {
            name: to_numpy(_cast(values, self._dtypes[name], name, writer.position))
            for name, values in features.items()
        }
        if isinstance(writer, LayerWriter):
            writer.append(rows, labels)
        else:
            writer.append(rows, labels, decisions if self._head is not None else None)

    def check_skipped(self, batch: Batch) -> None:
        """Refuse to skip rows that are not the ones stored: other batches would be mixed in."""
        start, n = self._skipped, len(batch.skipped)
        if not n:
            return
        assert self._stored is not None
        stored = self._stored.labels(start, start + n)
        differ = np.flatnonzero(stored != batch.skipped)
        if differ.size:
            at = int(differ[0])
            raise DataError(
                f"label {int(batch.skipped[at])} for row {start + at}",
                f"{int(stored[at])}, as stored in split '{self._split}'",
                "resume with the same batches in the same order",
            )
        self._skipped += n

    def check_complete(self, missing: int) -> None:
        """Refuse to end a split that got less than it should."""
        if self.writer is None:
            raise DataError("no sample in any batch", "at least one label that is not negative")
        if missing:
            raise DataError(
                f"batches of {self._skipped} samples",
                f"the {self._skipped + missing} already stored, and those to come",
                "resume with the same batches in the same order",
            )


def _open_if_there(store: FeatureStore | str | os.PathLike[str]) -> FeatureStore | None:
    if isinstance(store, FeatureStore):
        return store
    where = os.fspath(store)
    return FeatureStore.open(where) if "://" in where or Path(where).exists() else None


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
    cast = rows.to(target)
    infinite = torch.isinf(cast)
    if infinite.any():
        overflow = (infinite & torch.isfinite(rows)).any(1)
        if overflow.any():
            row = int(torch.nonzero(overflow)[0])
            raise DataError(
                f"layer '{name}' row {first + row} overflows {dtype}",
                remedy="store the layer as bfloat16 or float32",
            )
    return cast


def _same(stored: npt.NDArray[Any] | None, values: npt.NDArray[Any] | None) -> bool:
    if stored is None or values is None:
        return stored is values
    return np.array_equal(stored, values.astype(stored.dtype))


def _warn_unmatched(head: Head) -> None:
    if head.path is None:
        logger.warning("no classifier stored: no torch.nn.Linear ran; head= names the one to store")
    else:
        logger.warning(
            "no classifier and no predictions stored: no captured layer is the input of '%s', row "
            "by row; add '%s:input' to the layers, or set head=",
            head.path,
            head.path,
        )
