"""Import: files of features, labels and predictions into a store."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt

from ncbatch.engine.jobs import Progress, Silent
from ncbatch.engine.options import Limits
from ncbatch.errors import DataError, StoreError, UsageError, unknown_name
from ncbatch.ingest.files.labels import Opened, Sources
from ncbatch.ingest.files.layers import Layers, RowStream, open_rows, read_rows_of
from ncbatch.store.feature_store import FeatureStore
from ncbatch.store.format import DTYPES, check_name
from ncbatch.store.place import delete_store, is_remote, is_there
from ncbatch.store.split import Split
from ncbatch.store.writer import LayerWriter, Writer


@dataclass(frozen=True)
class Imported:
    """What an import wrote.

    Attributes
    ----------
    store : FeatureStore
        Where it went.
    layers : tuple of str
        The layers that were written.
    features : RowStream
        Where it came from, shard by shard; of several layers in arrays of their own, the first.
    axes : tuple of str
        What the axes of the files were taken for.
    n_classes : int
        K of the store.
    n_samples : int
        Rows that are samples: those whose label is not negative.
    created : bool
        Whether the store is new.
    """

    store: FeatureStore
    layers: tuple[str, ...]
    features: RowStream
    axes: tuple[str, ...]
    n_classes: int
    n_samples: int
    created: bool


def import_features(
    path: str,
    split: str,
    layer: str | Sequence[str],
    features: str,
    labels: str | None = None,
    predictions: str | None = None,
    *,
    axes: str | None = None,
    layer_index: Annotated[int | None, Limits(0)] = None,
    tokens: str | None = None,
    documents: str | None = None,
    mask: str | None = None,
    loss_mask: str | None = None,
    n_classes: Annotated[int | None, Limits(1)] = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Imported:
    """Import layers of a split from files, never holding more than a block of rows.

    Parameters
    ----------
    path : str
        The store; created when nothing is there.
    split : str
        Where the rows go. Into a split that exists layers are added row by row.
    layer : str or sequence of str
        The layer's name. For several: a pattern such as ``h.{}``, or a name per layer.
    features : str
        Rows (N, D): .npy, .npz:key, .safetensors:key, .pt:key, .parquet:column, .arrow:column, a
        datasets folder:column, .h5:dataset, a Zarr path, .bin:dtype:width, .fbin, .fvecs, or a
        (quoted) glob of shards of them. ``{}`` in the name of an array stands for the number of a
        layer. ``:key`` in any of the sources below means the same files.
    labels : str, optional
        Class ids (N,) or (B, T), likewise; negative ones mark rows that are no samples. They may be
        left out for a split that exists, and for a new one whose name holds ``ood``. ``next``: the
        next of `tokens` in the same sequence.
    predictions : str, optional
        The model's own decisions (N,), made by the classifier that reads this layer.
    axes : str, optional
        What the axes of the features count, such as ``B,T,D``: N samples in any order, B sequences,
        T positions in order, L layers, D features. (N, D) by default; more axes may be left
        out where only one reading fits the labels.
    layer_index : int, optional
        The one along L to import; all by default.
    tokens : str, optional
        Token ids of the rows, for `labels` ``next``.
    documents : str, optional
        Document ids of the rows; the next token of another document is no label.
    mask : str, optional
        0 where a row is padding.
    loss_mask : str, optional
        0 where a token (a label) does not count.
    n_classes : int, optional
        K of a new store; the largest label plus one by default.
    overwrite : bool, optional
        Replace layers that exist, or a split whose writing was interrupted.
    progress : Progress, optional
        Told how far the import is.

    Returns
    -------
    Imported
        What was written.

    Raises
    ------
    DataError
        When files do not fit together or do not fit the store, named by input row, or no row is a
        sample. Nothing is left half-written then.
    UsageError
        For layer names or axes that do not fit the files.
    StoreError
        When a layer exists and `overwrite` is not given.
    """
    check_name("split", split)
    for name in (layer,) if isinstance(layer, str) else layer:
        check_name("layer", name)
    sources = Sources(features, labels, predictions, tokens, documents, mask, loss_mask)
    opened = sources.open(layer, axes, layer_index)
    rows = opened.rows
    if not rows.n_rows:
        raise DataError(f"no rows in '{features}'", "at least one row of features")
    store = FeatureStore.open(path) if is_there(path) else None
    target = None if store is None else _find_split(store, split, overwrite)
    if labels is None:
        has_mask = mask is not None or loss_mask is not None
        _check_unlabelled(path, split, target, has_mask, store is not None or n_classes is not None)
    k, n_samples = check_classes(store, opened.labels, opened.predictions, n_classes)
    if target is not None:
        check_against(target, rows, opened.labels)
    dtype = _stored_dtype(rows)
    head = None if opened.predictions is None else rows.names[0]
    # Only what passed all checks above creates or deletes anything.
    with undone_on_failure(path, None if target is not None else split, overwrite):
        into = store or FeatureStore.create(path, k, rows.widths, dtype)
        if target is None:
            writer: Writer | LayerWriter = into.writer(
                split,
                layers=rows.widths,
                dtype=dtype,
                n_samples=rows.n_rows,
                head=head,
                overwrite=overwrite,
            )
        else:
            writer = into.add_layers(split, rows.widths, dtype, head=head, overwrite=overwrite)
        with writer:
            _copy(writer, opened, dtype, progress or Silent())
    if opened.labels is None:
        n_samples = rows.n_rows if target is None else target.n_samples
    return Imported(into, rows.names, rows.streams[0], rows.axes, k, n_samples, store is None)


def import_classifier(
    path: str,
    layer: str,
    weight: str,
    bias: str | None = None,
    rows: Annotated[int | None, Limits(1)] = None,
) -> tuple[int, int]:
    """Store the classifier of a layer from files.

    Parameters
    ----------
    path : str
        An existing store.
    layer : str
        The layer whose features the classifier reads.
    weight : str
        (K, D) floats in any of the forms of features, such as ``model.safetensors:lm_head.weight``.
    bias : str, optional
        (K,) floats, likewise.
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
    weights = _whole(open_rows(weight, "weight"))[:rows]
    biases = None if bias is None else _whole(open_rows(bias, "bias"))[:rows]
    store.set_classifier(layer, weights, biases)
    return weights.shape[0], weights.shape[1]


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


# -------------------------------------------------------------- what is checked before any writing


def _find_split(store: FeatureStore, split: str, overwrite: bool) -> Split | None:
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


def _check_unlabelled(
    path: str, split: str, target: Split | None, has_mask: bool, knows_classes: bool
) -> None:
    """Refuse an import without labels where they, or the number of classes, must be said."""
    if target is None and "ood" not in split:
        raise DataError(
            f"no labels for the new split '{split}'", "--labels", "only 'ood' splits may go without"
        )
    if not knows_classes:
        raise DataError(
            f"neither labels nor a number of classes for the new store '{path}'",
            "--classes",
            "or import the labelled splits first",
        )
    if target is not None and has_mask:
        raise UsageError(
            f"a mask without labels for split '{split}', whose labels are stored",
            "labels to compare with them, or neither",
        )


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
    k = n_classes
    if store is not None:
        k = store.n_classes
        if n_classes not in (None, k):
            raise DataError(f"--classes {n_classes}", f"{k}, as recorded in {store.path}")
    # Labels first: they may say what K is, and then predictions must be below it.
    n_samples = 0
    for stream in filter(None, (y, p)):
        largest, row, n = _find_largest(stream)
        if stream is y:
            n_samples = n
            if not n:
                raise DataError(
                    f"none of the {stream.n_rows} rows is a sample",
                    "a label from 0 on that no mask leaves out",
                    "the last token of a sequence has no next one, "
                    "and negative labels mark no samples",
                )
        if k is None:
            k = max(largest + 1, 1)
        if largest >= k:
            raise DataError(
                f"{stream.what.removesuffix('s')} {largest} in {stream.row_of(row)}",
                f"{stream.what} below {k}, the number of classes",
                "give a larger --classes" if store is None else "",
            )
    assert k is not None
    return k, n_samples


def _find_largest(stream: RowStream) -> tuple[int, int, int]:
    """Return the largest value, the first row that has it, and how many are not negative."""
    largest = -1
    row = 0
    start = 0
    n_samples = 0
    for block in stream.batches(read_rows_of(stream.dtype.itemsize)):
        if int(block.max()) > largest:
            largest = int(block.max())
            row = start + int(block.argmax())
        n_samples += int(np.count_nonzero(block >= 0))
        start += len(block)
    return largest, row, n_samples


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
    if y is None:
        return
    start = 0
    for block in y.batches(read_rows_of(8)):
        stored = target.labels(start, start + len(block))
        # All negative labels are stored as -1.
        differ = np.flatnonzero(np.where(block < 0, -1, block) != stored)
        for row in differ[:1].tolist():
            raise DataError(
                f"label {int(block[row])} in {y.row_of(start + row)}",
                f"{int(stored[row])}, as stored in split '{target.name}'",
                "give rows in the stored order, or import into another split",
            )
        start += len(block)


def _stored_dtype(rows: Layers) -> str:
    """Keep float dtypes; integers go to the smallest float that holds them."""
    if rows.dtype.name in DTYPES:
        return rows.dtype.name
    if rows.dtype.kind in "iu":
        return "float32" if rows.dtype.itemsize <= 2 else "float64"
    raise DataError(f"features of type {rows.dtype}", "one of: " + ", ".join(DTYPES))


# ------------------------------------------------------------- writing, and the store as it was


def _copy(writer: Writer | LayerWriter, opened: Opened, dtype: str, progress: Progress) -> None:
    rows = opened.rows
    n = rows.rows_at_once
    labels = repeat(None) if opened.labels is None else opened.labels.batches(n)
    predictions = repeat(None) if opened.predictions is None else opened.predictions.batches(n)
    progress.begin(f"import of {', '.join(rows.names[:3])}", rows.n_rows, "rows")
    try:
        for blocks, y, p in zip(rows.batches(n), labels, predictions, strict=False):
            size = len(blocks[rows.names[0]])
            # Outside data has no classes; a layer that is added has its labels in the store.
            if y is None and isinstance(writer, Writer):
                y = np.zeros(size, np.int64)
            features = {
                name: block.astype(DTYPES[dtype], copy=False) for name, block in blocks.items()
            }
            writer.append(features, y, p)
            progress.advance(size)
    finally:
        progress.end()


@contextmanager
def undone_on_failure(path: str, split: str | None, overwrite: bool) -> Iterator[None]:
    """Delete what the import made when it fails: the new store with its folders, or the new split.

    An interrupted split that is to be replaced is moved beside the store until the new one is in,
    where the store is a folder; it comes back when the import fails.

    Parameters
    ----------
    path : str
        The store, which need not exist.
    split : str or None
        The split that is written anew; None where layers are added to a complete one.
    overwrite : bool
        Whether the split may be there.
    """
    is_new = not is_there(path)
    if is_remote(path):
        folders = []
        home = None
        began = not is_new and split in FeatureStore.open(path).splits
    else:
        folders = [folder for folder in Path(path).absolute().parents if not folder.exists()]
        home = Path(path).absolute() / (split or "")
        began = not is_new and home.exists()
    with _set_aside(home) if home and split and began and overwrite else nullcontext():
        try:
            yield
        except BaseException:
            if is_new and is_there(path):
                if home is None:
                    FeatureStore.open(path)  # never delete what is no store
                delete_store(path)
                with suppress(OSError):  # a folder that another process uses
                    for folder in folders:
                        folder.rmdir()
            elif split is not None and not is_new and not began:
                FeatureStore.open(path).delete_split(split)
            raise


@contextmanager
def _set_aside(folder: Path) -> Iterator[None]:
    """Rename a folder within the store until it is replaced; it comes back when that fails."""
    store = folder.parent
    aside = store.with_name(f".{store.name}.{folder.name}.{os.getpid()}")
    folder.rename(aside)
    try:
        yield
    except BaseException:  # Ctrl-C too
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)
        raise
    shutil.rmtree(aside, ignore_errors=True)
