"""Validation: read everything, name every bad chunk and impossible value."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import zarr

from ncbatch.errors import CorruptionError
from ncbatch.store import chunks
from ncbatch.store.chunks import Fault
from ncbatch.store.format import ARRAYS, ATTRIBUTE, read_attributes
from ncbatch.store.ranks import count_samples
from ncbatch.store.states import STATES

if TYPE_CHECKING:
    from ncbatch.store.feature_store import FeatureStore
    from ncbatch.store.split import Split


def find_faults(store: FeatureStore) -> Iterator[Fault]:
    """Check every chunk of every split, classifier and state of `store`, in order."""
    for name in store.splits:
        yield from _split_faults(store.split(name))
    for name, n in store.lost_splits.items():
        yield Fault(f"{name}/label", 0, n, "array is missing")
    for layer in store.classifiers:
        for array in store.classifier_arrays(layer):
            yield from _array_faults(array)
    for name in store.state_splits:
        for layer, kind in store.state_kinds(name):
            try:
                arrays = store.state_arrays(name, layer, kind) or {}
            except CorruptionError as error:
                yield Fault(f"{name}/{STATES}/{layer}/{kind}", 0, store.n_classes, error.found)
                continue
            for array in arrays.values():
                yield from _array_faults(array)


def _split_faults(split: Split) -> Iterator[Fault]:
    label = split.arrays["label"]
    bad = list(_array_faults(label, split.label_chunks_expected))
    yield from bad
    # Stores of earlier versions have no list of their arrays.
    for name in read_attributes(split.group).get(ARRAYS, ()):
        if name not in split.arrays:
            yield Fault(f"{split.name}/{name}", 0, split.n_rows, "array is missing")
    # Which rows exist is no longer known then: every chunk is expected.
    exists = np.ones(split.n_rows, np.bool_)
    if not bad:
        labels = split.labels()
        exists = labels >= 0
        yield from _range_faults(split, "label", labels)
        yield from _record_faults(split, int(np.count_nonzero(exists)))
    for name, array in split.arrays.items():
        if name == "label":
            continue
        # A chunk whose rows are all holes need not be there.
        holds = np.logical_or.reduceat(exists, np.arange(0, exists.size, array.chunks[0]))
        faults = list(_array_faults(array, holds))
        yield from faults
        if name == "prediction" and not faults and not bad:
            yield from _range_faults(split, name, split.predictions())


def _array_faults(
    array: zarr.Array[Any], expected: npt.NDArray[np.bool_] | None = None
) -> Iterator[Fault]:
    """Find chunks that cannot be read, or that are missing though all, or those marked, must be."""
    present = chunks.present_chunks(array)

    def fault(index: int) -> Fault | None:
        if present[index]:
            return chunks.read_fault(array, index)
        # By a slice: an array whose metadata was altered may be longer than the labels.
        if expected is None or expected[index : index + 1].any():
            return chunks.chunk_fault(array, index, "chunk is missing")
        return None

    faults = chunks.map_ahead(fault, range(present.size), chunks.chunks_at_once(array.store))
    yield from (bad for bad in faults if bad is not None)


def _range_faults(split: Split, name: str, values: npt.NDArray[Any]) -> Iterator[Fault]:
    array = split.arrays[name]
    for row in np.flatnonzero(values >= split.n_classes)[:1].tolist():
        what = f"{name} {int(values[row])} in row {row}, expected below {split.n_classes}"
        yield chunks.chunk_fault(array, row // array.chunks[0], what)


def _record_faults(split: Split, exist: int) -> Iterator[Fault]:
    """Compare the rows that exist with the record of the end, or with those of writers at work."""
    fault = partial(Fault, f"{split.name}/label", 0, split.n_rows)
    if split.finalized and split.n_samples != exist:
        yield fault(f"{exist} samples, expected {split.n_samples} as recorded in '{ATTRIBUTE}'")
    for record in () if split.finalized else split.records:
        n = count_samples(split.arrays["label"], map(record.block, range(record.blocks)))
        if n != record.rows:
            stored = f"{n} samples of writer {record.rank}"
            yield fault(f"{stored}, expected {record.rows} as it recorded")
