"""Validation: read everything, name every bad chunk and impossible value."""

from __future__ import annotations

from collections.abc import Iterator
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


def find_faults(store: FeatureStore) -> list[Fault]:
    """Check every chunk of every split and classifier of `store`, in order."""
    faults: list[Fault] = []
    for name in store.splits:
        faults.extend(_split_faults(store.split(name), store.n_classes))
    for name, n in store.lost_splits.items():
        faults.append(Fault(f"{name}/label", 0, n, "array is missing"))
    for layer in store.classifiers:
        for array in store.classifier_arrays(layer):
            faults.extend(_array_faults(array, None))
    for name in store.state_splits:
        faults.extend(_state_faults(store, name))
    return faults


def _state_faults(store: FeatureStore, split: str) -> Iterator[Fault]:
    for layer, kind in store.state_kinds(split):
        try:
            arrays = store.state_arrays(split, layer, kind) or {}
        except CorruptionError as error:
            yield Fault(f"{split}/{STATES}/{layer}/{kind}", 0, store.n_classes, error.found)
            continue
        for array in arrays.values():
            yield from _array_faults(array, None)


def _split_faults(split: Split, n_classes: int) -> Iterator[Fault]:
    label = split.arrays["label"]
    bad = list(_array_faults(label, None, split.label_chunks_expected))
    yield from bad
    # Stores of earlier versions have no list of their arrays.
    for name in read_attributes(split.group).get(ARRAYS, ()):
        if name not in split.arrays:
            yield Fault(f"{split.name}/{name}", 0, split.n_rows, "array is missing")
    # Which rows exist is no longer known then: every chunk is expected.
    if bad:
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
    array: zarr.Array[Any],
    exists: npt.NDArray[np.bool_] | None,
    expected: npt.NDArray[np.bool_] | None = None,
) -> Iterator[Fault]:
    """Find chunks that cannot be read, or that are missing although they hold rows."""
    present = chunks.present_chunks(array)

    def fault(index: int) -> Fault | None:
        if present[index]:
            return chunks.read_fault(array, index)
        if expected is not None and not expected[index]:
            return None
        if exists is None or exists[slice(*chunks.chunk_range(array, index))].any():
            return chunks.chunk_fault(array, index, "chunk is missing")
        return None

    faults = chunks.map_ahead(fault, range(present.size), chunks.chunks_at_once(array.store))
    yield from (bad for bad in faults if bad is not None)


def _range_faults(
    array: zarr.Array[Any], values: npt.NDArray[Any], n_classes: int, what: str
) -> Iterator[Fault]:
    for row in np.flatnonzero(values >= n_classes)[:1].tolist():
        index = row // array.chunks[0]
        yield chunks.chunk_fault(
            array, index, f"{what} {int(values[row])} in row {row}, expected below {n_classes}"
        )


def _record_faults(split: Split, exist: int) -> Iterator[Fault]:
    """Compare the rows that exist with the record of the end, or with those of writers at work."""
    wrong = []
    if split.finalized and split.n_samples != exist:
        wrong.append(f"{exist} samples, expected {split.n_samples} as recorded in '{ATTRIBUTE}'")
    for record in () if split.finalized else split.records:
        n = count_samples(split.arrays["label"], map(record.share.block, range(record.blocks)))
        if n != record.rows:
            writer = f"{n} samples of writer {record.share.rank}"
            wrong.append(f"{writer}, expected {record.rows} as it recorded")
    for what in wrong:
        yield Fault(f"{split.name}/label", 0, split.n_rows, what)
