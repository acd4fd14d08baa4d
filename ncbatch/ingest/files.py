"""Import: files of features, labels and predictions into a store."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ncbatch.engine import Progress
from ncbatch.errors import DataError, StoreError, unknown_name
from ncbatch.ingest.rows import RowStream, open_rows, read_rows_of
from ncbatch.store import FeatureStore, LayerWriter, Split, Writer
from ncbatch.store.format import DTYPES, check_name


@dataclass(frozen=True)
class Imported:
    """What an import wrote.

    Attributes
    ----------
    store : FeatureStore
        Where it went.
    features : RowStream
        Where it came from, shard by shard.
    n_classes : int
        K of the store.
    created : bool
        Whether the store is new.
    """

    store: FeatureStore
    features: RowStream
    n_classes: int
    created: bool


def import_features(
    path: str,
    split: str,
    layer: str,
    features: str,
    labels: str | None = None,
    predictions: str | None = None,
    *,
    n_classes: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Imported:
    """Import a layer of a split from files, never holding more than a block of rows.

    Parameters
    ----------
    path : str
        The store; created when nothing is there.
    split, layer : str
        Where the rows go. Into a split that exists the layer is added row by row.
    features : str
        Rows (N, D): a ``.npy``, ``.npz:key`` or Zarr array, or a glob of shards.
    labels : str, optional
        Class ids (N,), likewise; negative ones mark rows that are no samples. They may be left
        out for a split that exists, and for a new one whose name holds ``ood``.
    predictions : str, optional
        The model's own decisions (N,), made by the classifier that reads this layer.
    n_classes : int, optional
        K of a new store; the largest label plus one by default.
    overwrite : bool, optional
        Replace the layer if it exists, or a split whose writing was interrupted.
    progress : Progress, optional
        Told how far the import is.

    Returns
    -------
    Imported
        What was written.

    Raises
    ------
    DataError
        When files do not fit together or do not fit the store; named by input row. Nothing is
        left half-written then.
    StoreError
        When the layer exists and `overwrite` is not given.
    """
    check_name("split", split)
    check_name("layer", layer)
    rows = open_rows(features, "features")
    y = None if labels is None else _integers(labels, "labels", rows)
    p = None if predictions is None else _integers(predictions, "predictions", rows)
    if len(rows.row_shape) != 1:
        raise DataError(f"features of shape {rows.shape}", "(N, D): one row per sample")
    if not rows.n_rows:
        raise DataError(f"no rows in '{features}'", "at least one row of features")
    exists = Path(path).exists()
    store = FeatureStore.open(path) if exists else None
    target = _existing_split(store, split, overwrite) if store is not None else None
    if target is None and y is None and "ood" not in split:
        raise DataError(
            f"no labels for the new split '{split}'", "--labels", "only 'ood' splits may go without"
        )
    if store is None and y is None and n_classes is None:
        raise DataError(
            f"neither labels nor a number of classes for the new store '{path}'",
            "--classes",
            "or import the labelled splits first",
        )
    k = _check_classes(store, y, p, n_classes)
    if target is not None:
        _check_against(target, rows, y)
    if store is not None:
        store.check_width(layer, rows.row_shape[0], but=None if target is None else split)
    dtype = _stored_dtype(rows)
    with _undone_on_failure(path, None if target is not None else split):
        if store is None:
            store = FeatureStore.create(path, k, {layer: rows.row_shape[0]}, dtype)
        if target is None:
            writer: Writer | LayerWriter = store.writer(
                split, layers={layer: rows.row_shape[0]}, dtype=dtype, n_samples=rows.n_rows,
                head=None if p is None else layer, overwrite=overwrite,
            )  # fmt: skip
        else:
            writer = store.add_layers(
                split, {layer: rows.row_shape[0]}, dtype,
                head=None if p is None else layer, overwrite=overwrite,
            )  # fmt: skip
        with writer:
            _copy(writer, layer, rows, y, p, progress)
    return Imported(store, rows, k, not exists)


def import_classifier(
    path: str, layer: str, weight: str, bias: str | None = None, rows: int | None = None
) -> tuple[int, int]:
    """Store the classifier of a layer from files.

    Parameters
    ----------
    path : str
        An existing store.
    layer : str
        The layer whose features the classifier reads.
    weight, bias : str
        Files of (K, D) and (K,) floats, as for `import_features`.
    rows : int, optional
        Keep only so many first rows, of a padded vocabulary.

    Returns
    -------
    tuple of int
        (K, D) as stored.

    Raises
    ------
    DataError
        When shapes do not fit the store.
    UnknownNameError
        When no split has such a layer.
    """
    store = FeatureStore.open(path)
    if layer not in store.layers():
        raise unknown_name("layer", layer, store.layers(), store.path)
    w = _whole(open_rows(weight, "weight"))[:rows]
    b = None if bias is None else _whole(open_rows(bias, "bias"))[:rows]
    store.set_classifier(layer, w, b)
    return w.shape[0], w.shape[1]


def read_classes(path: str) -> list[int]:
    """Read class ids from a file: ``.npy``, or text with one id per line or separated by commas.

    Raises
    ------
    DataError
        When the file cannot be read or holds something else.
    """
    if path.endswith(".npy"):
        ids = _whole(open_rows(path, "classes"))
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise DataError(f"classes of shape {ids.shape}, {ids.dtype}", "integers of shape (C,)")
        return [int(i) for i in ids]
    try:
        words = Path(path).read_text(encoding="utf-8").replace(",", " ").split()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"classes '{path}' cannot be read: {error}", "a text file or .npy"
        ) from error
    for word in words:
        if not word.isdecimal():
            raise DataError(f"class '{word}' in '{path}'", "class ids: integers from 0")
    return [int(word) for word in words]


def _whole(stream: RowStream) -> npt.NDArray[Any]:
    blocks = list(stream.batches(max(stream.n_rows, 1)))
    return blocks[0] if blocks else np.empty((0, *stream.row_shape), stream.dtype)


def _copy(
    writer: Writer | LayerWriter,
    layer: str,
    rows: RowStream,
    y: RowStream | None,
    p: RowStream | None,
    progress: Progress | None,
) -> None:
    n = read_rows_of(rows.row_shape[0] * rows.dtype.itemsize)
    labels = y.batches(n) if y is not None else None
    chosen = p.batches(n) if p is not None else None
    if progress:
        progress.begin(f"import of {layer}", rows.n_rows, "rows")
    try:
        for block in rows.batches(n):
            given = None if labels is None else next(labels)
            if given is None and isinstance(writer, Writer):
                given = np.zeros(len(block), np.int64)
            wide = block.astype(rows.dtype, copy=False)
            if wide.dtype.kind in "iu":
                wide = wide.astype(_stored_dtype(rows))
            writer.append({layer: wide}, given, None if chosen is None else next(chosen))
            if progress:
                progress.advance(len(block))
    finally:
        if progress:
            progress.end()


def _integers(source: str, what: str, rows: RowStream) -> RowStream:
    stream = open_rows(source, what)
    if stream.row_shape != () or stream.dtype.kind not in "iu":
        raise DataError(f"{what} of shape {stream.shape}, {stream.dtype}", "integers of shape (N,)")
    if stream.n_rows != rows.n_rows:
        raise DataError(f"{stream.n_rows} {what} for {rows.n_rows} rows of features", "one per row")
    return stream


def _existing_split(store: FeatureStore, split: str, overwrite: bool) -> Split | None:
    if split not in store.splits:
        return None
    target = store.split(split)
    if target.finalized:
        return target
    if not overwrite:
        raise StoreError(
            f"split '{split}' of {store.path} is not complete: {target.n_samples} samples of an "
            "interrupted writer",
            "a complete split or a new one",
            "finish that writer with resume, or start anew with --overwrite",
        )
    return None


def _check_classes(
    store: FeatureStore | None, y: RowStream | None, p: RowStream | None, n_classes: int | None
) -> int:
    """Check every label and prediction against K before anything is written; give K."""
    if store is not None:
        k: int | None = store.n_classes
        if n_classes is not None and n_classes != k:
            raise DataError(f"--classes {n_classes}", f"{k}, as recorded in {store.path}")
    else:
        k = n_classes
    for stream in (y, p):
        if stream is None:
            continue
        row, top = _largest(stream)
        if k is None:
            k = max(top + 1, 1)
        if top >= k:
            raise DataError(
                f"{stream.what.removesuffix('s')} {top} in {stream.row_of(row)}",
                f"{stream.what} below {k}, the number of classes",
                "give a larger --classes" if store is None else "",
            )
    assert k is not None
    return k


def _largest(stream: RowStream) -> tuple[int, int]:
    """Find the first row of the largest value."""
    at, top, start = 0, -1, 0
    for block in stream.batches(read_rows_of(stream.dtype.itemsize)):
        if len(block) and int(block.max()) > top:
            top = int(block.max())
            at = start + int(block.argmax())
        start += len(block)
    return at, top


def _check_against(target: Split, rows: RowStream, y: RowStream | None) -> None:
    """Compare the rows with the split they are added to."""
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


def _stored_dtype(rows: RowStream) -> str:
    """Keep float dtypes; integers go to the smallest float that holds them."""
    name = rows.dtype.newbyteorder("=").name if rows.dtype.name != "bfloat16" else "bfloat16"
    if name in DTYPES:
        return name
    if rows.dtype.kind in "iu":
        return "float32" if rows.dtype.itemsize <= 2 else "float64"
    raise DataError(f"features of type {rows.dtype}", "one of: " + ", ".join(DTYPES))


@contextmanager
def _undone_on_failure(path: str, split: str | None) -> Iterator[None]:
    """Delete what the import made when it fails: the new store with its folders, or the new split."""
    store = Path(path).absolute()
    created = [place for place in (store, *store.parents) if not place.exists()]
    try:
        yield
    except BaseException:
        if created:
            shutil.rmtree(store, ignore_errors=True)
            with suppress(OSError):  # a folder that is not there, or that another process uses
                for folder in created[1:]:
                    folder.rmdir()
        elif split is not None:
            FeatureStore.open(path).delete_split(split)
        raise
