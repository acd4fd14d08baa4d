"""What is checked of labels and predictions before an import writes anything."""

from __future__ import annotations

import numpy as np

from ncbatch.errors import DataError
from ncbatch.ingest.layers import Layers
from ncbatch.ingest.rows import RowStream, read_rows_of
from ncbatch.store import FeatureStore, Split


def check_classes(
    store: FeatureStore | None, y: RowStream | None, p: RowStream | None, n_classes: int | None
) -> tuple[int, int]:
    """Check every label and prediction against K.

    Parameters
    ----------
    store : FeatureStore or None
        Where rows go; None for a new one.
    y, p : RowStream or None
        Labels and predictions (N,).
    n_classes : int or None
        K as the user gives it.

    Returns
    -------
    tuple of int
        K, and how many labels are not negative.

    Raises
    ------
    DataError
        When one is K or more, named by row, or no label is a class.
    """
    if store is not None:
        k: int | None = store.n_classes
        if n_classes is not None and n_classes != k:
            raise DataError(f"--classes {n_classes}", f"{k}, as recorded in {store.path}")
    else:
        k = n_classes
    n_samples = 0
    for stream in (y, p):
        if stream is None:
            continue
        row, top, count = _largest(stream)
        if stream is y:
            n_samples = count
            _check_samples(stream, count)
        if k is None:
            k = max(top + 1, 1)
        if top >= k:
            raise DataError(
                f"{stream.what.removesuffix('s')} {top} in {stream.row_of(row)}",
                f"{stream.what} below {k}, the number of classes",
                "give a larger --classes" if store is None else "",
            )
    assert k is not None
    return k, n_samples


def _check_samples(labels: RowStream, n_samples: int) -> None:
    if not n_samples:
        raise DataError(
            f"none of the {labels.n_rows} rows is a sample",
            "a label from 0 on that no mask leaves out",
            "the last token of a sequence has no next one, and negative labels mark no samples",
        )


def _largest(stream: RowStream) -> tuple[int, int, int]:
    """Find the first row of the largest value, the value, and how many are not negative."""
    at, top, start, count = 0, -1, 0, 0
    for block in stream.batches(read_rows_of(stream.dtype.itemsize)):
        if len(block) and int(block.max()) > top:
            top = int(block.max())
            at = start + int(block.argmax())
        count += int(np.count_nonzero(block >= 0))
        start += len(block)
    return at, top, count


def check_against(target: Split, rows: Layers, y: RowStream | None) -> None:
    """Compare rows and their labels with the split that they are added to.

    Raises
    ------
    DataError
        When there are more or fewer, or a label differs; named by row.
    """
    if rows.n_rows != target.n_rows:
        raise DataError(
            f"{rows.n_rows} rows of features", f"{target.n_rows}, the rows of split '{target.name}'"
        )
    start = 0
    for block in y.batches(read_rows_of(8)) if y is not None else ():
        stored = target.labels(start, start + len(block))
        differ = np.flatnonzero(np.where(block < 0, -1, block) != stored)
        if differ.size:
            row = int(differ[0])
            assert y is not None
            raise DataError(
                f"label {int(block[row])} in {y.row_of(start + row)}",
                f"{int(stored[row])}, as stored in split '{target.name}'",
                "give rows in the stored order, or import into another split",
            )
        start += len(block)
