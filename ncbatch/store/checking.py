"""Validation: read everything, name every bad chunk and impossible value."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import zarr

from ncbatch.store.chunks import Fault, chunk_fault, present_chunks, read_fault
from ncbatch.store.format import ATTRIBUTE

if TYPE_CHECKING:
    from ncbatch.store.feature_store import FeatureStore
    from ncbatch.store.split import Split


def find_faults(store: FeatureStore) -> list[Fault]:
    """Check every chunk of every split and classifier of `store`, in order."""
    faults: list[Fault] = []
    for name in store.splits:
        faults.extend(_split_faults(store.split(name), store.n_classes))
    for layer in store.classifiers:
        for array in store.classifier_arrays(layer):
            faults.extend(_array_faults(array, None))
    return faults


def _split_faults(split: Split, n_classes: int) -> Iterator[Fault]:
    label = split.arrays["label"]
    bad = list(_array_faults(label, None, finalized=split.finalized))
    yield from bad
    if bad:  # which rows exist is no longer known: every chunk is expected
        exists = np.ones(split.n_rows, np.bool_)
    else:
        labels = split.labels()
        exists = labels >= 0
        yield from _range_faults(label, labels, n_classes, "label")
        yield from _record_faults(split, int(np.count_nonzero(exists)))
    for name, array in split.arrays.items():
        if name != "label":
            yield from _array_faults(array, exists)
    if "prediction" in split.arrays and not bad:
        array = split.arrays["prediction"]
        if not list(_array_faults(array, exists)):
            yield from _range_faults(array, split.predictions(), n_classes, "prediction")


def _array_faults(
    array: zarr.Array[Any], exists: npt.NDArray[np.bool_] | None, *, finalized: bool = True
) -> Iterator[Fault]:
    """Find chunks that cannot be read, or that are missing although they hold rows."""
    rows = array.chunks[0]
    for index, present in enumerate(present_chunks(array).tolist()):
        if present:
            if fault := read_fault(array, index):
                yield fault
        elif finalized and (exists is None or exists[index * rows : (index + 1) * rows].any()):
            yield chunk_fault(array, index, "chunk is missing")


def _range_faults(
    array: zarr.Array[Any], values: npt.NDArray[Any], n_classes: int, what: str
) -> Iterator[Fault]:
    for row in np.flatnonzero(values >= n_classes)[:1].tolist():
        index = row // array.chunks[0]
        yield chunk_fault(
            array, index, f"{what} {int(values[row])} in row {row}, expected below {n_classes}"
        )


def _record_faults(split: Split, n_samples: int) -> Iterator[Fault]:
    """Compare the rows that exist with the record made when writing ended."""
    if split.finalized and split.n_samples != n_samples:
        yield Fault(
            f"{split.name}/label", 0, split.n_rows,
            f"{n_samples} samples, expected {split.n_samples} as recorded in '{ATTRIBUTE}'",
        )  # fmt: skip
