"""Labels of rows: given ones, next tokens, and what masks leave out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, groupby, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from ncbatch.errors import DataError, UsageError
from ncbatch.ingest.files import layers
from ncbatch.ingest.files.formats.shard import Blocks, Shard
from ncbatch.ingest.files.layers import Axes, Layers, RowStream

# Sequences in order: how many, how long; equal neighbours joined.
Runs = list[tuple[int, int]]
# A block of each of several streams, by name.
Parts = dict[str, npt.NDArray[Any]]
# Instead of a source of labels: the next token in the same sequence.
NEXT = "next"


@dataclass(frozen=True)
class Sources:
    """Where the parts of an import are, as the user wrote them; see `import_features`."""

    features: str
    labels: str | None = None
    predictions: str | None = None
    tokens: str | None = None
    documents: str | None = None
    mask: str | None = None
    loss_mask: str | None = None

    def open(self, layer: str | Sequence[str], axes: str | None, layer_index: int | None) -> Opened:
        """Open all of them, and check that they belong together.

        Raises
        ------
        DataError
            When one cannot be read, or has other rows.
        UsageError
            When options do not belong together.
        """
        if self.labels == NEXT and self.tokens is None:
            raise UsageError("--labels next without token ids", "--tokens")
        for option, value in (("--tokens", self.tokens), ("--documents", self.documents)):
            if value is not None and self.labels != NEXT:
                raise UsageError(
                    f"{option} without --labels next",
                    "token ids to make labels of",
                    "add --labels next, or leave it out",
                )
        # Labels, or the ids that make them, tell the axes of features where those are not said.
        by_next = self.labels == NEXT
        what = "token ids" if by_next else "labels"
        source = self.tokens if by_next else self.labels
        shards = () if source is None else self._open(source, what)
        if by_next:
            shards = without_columns(shards)
        rows = layers.open_layers(self.features, layer, axes, layer_index, shards)
        runs = None
        if "T" in rows.axes:
            runs = sequences(rows.shards, rows.axes)
        elif by_next and len(shards[0].shape) == 2:
            runs = sequences(shards, ("B", "T"))
        given = {"mask": self.mask, "loss mask": self.loss_mask, "documents": self.documents}
        marks = {
            name: view_beside(without_columns(self._open(mark, name)), name, rows, runs)
            for name, mark in given.items()
            if mark is not None
        }
        predictions = None
        if self.predictions is not None:
            decided = self._open(self.predictions, "predictions")
            predictions = view_beside(decided, "predictions", rows, runs)
            if len(rows.names) > 1:
                raise UsageError(
                    f"predictions with {len(rows.names)} layers",
                    "the one layer whose classifier made them",
                    "import that layer by itself, or add it later with --predictions",
                )
        labels = view_beside(shards, what, rows, runs) if shards else None
        if labels is not None and by_next:
            labels = next_labels(labels, check_order(shards, rows, runs), marks)
        elif marks:
            labels = masked_labels(labels, rows.n_rows, marks)
        return Opened(rows, labels, predictions)

    def _open(self, source: str, what: str) -> tuple[Shard, ...]:
        """Open arrays; ``:key`` means the files of the features."""
        if source.startswith(":"):
            _, key = layers.find_paths(self.features, "features")
            source = self.features.removesuffix(f":{key}") + source
        return layers.open_shards(source, what)


@dataclass(frozen=True)
class Opened:
    """What the sources of an import hold.

    Attributes
    ----------
    rows : Layers
        The features.
    labels, predictions : RowStream or None
        Integers (N,); what masks leave out has the label -1.
    """

    rows: Layers
    labels: RowStream | None
    predictions: RowStream | None


def sequences(shards: Sequence[Shard], axes: Axes) -> Runs:
    """List the sequences of arrays in order."""
    sizes = [dict(zip(axes, shard.shape, strict=True)) for shard in shards]
    runs = [(size.get("B", 1), size["T"]) for size in sizes]
    # Files are parted anyhow: 2 x 5 and 3 x 5 are the sequences of 5 x 5.
    joined = groupby((run for run in runs if run[0] * run[1]), key=lambda run: run[1])
    return [(sum(count for count, _ in group), length) for length, group in joined]


def without_columns(shards: Sequence[Shard]) -> tuple[Shard, ...]:
    """View arrays (N, 1), which are no sequences of length 1 but a column, as (N,)."""
    if all(len(shard.shape) == 2 and shard.shape[1] == 1 for shard in shards):
        return tuple(layers.as_rows(shard, ("B", "T")) for shard in shards)
    return tuple(shards)


def view_beside(
    shards: Sequence[Shard], what: str, features: Layers, runs: Runs | None
) -> RowStream:
    """View integers that belong to rows: (N,), or over the sequences of the features.

    Parameters
    ----------
    shards : sequence of Shard
        The integers.
    what : str
        What they are, for messages.
    features : Layers
        The rows.
    runs : list of (int, int) or None
        The sequences of the rows; None where nothing tells them.

    Raises
    ------
    DataError
        When they are no integers, not one per row, or in other sequences.
    """
    # Labels of shape (N, 1) beside flat features are one column of a table: to be looked at.
    flat = what in ("labels", "predictions") and "B" not in features.axes
    by_sequence = len(shards[0].shape) == 2 and not flat
    rows = [layers.as_rows(shard, ("B", "T")) for shard in shards] if by_sequence else shards
    stream = layers.join_shards(rows, what)
    is_mask = what.endswith("mask")
    if stream.row_shape != () or stream.dtype.kind not in ("iub" if is_mask else "iu"):
        also = " or (B, T)" if "B" in features.axes else ""
        raise DataError(
            f"{what} of shape {(stream.n_rows, *stream.row_shape)}, {stream.dtype}",
            f"integers {'or booleans ' if is_mask else ''}of shape (N,){also}",
        )
    _check_rows(stream, features)
    # Equally many rows are not enough: (T, B) in the place of (B, T) would scramble them.
    if by_sequence and runs is not None:
        _check_sequences(sequences(shards, ("B", "T")), runs, what)
    return stream


def _check_rows(stream: RowStream, features: Layers) -> None:
    """Compare rows file by file where there are as many files, else all of them."""
    what = stream.what
    if len(stream.shards) == len(features.shards) > 1:
        for shard, other in zip(stream.shards, features.shards, strict=True):
            n = layers.n_rows(features.axes, other.shape)
            if shard.shape[0] != n:
                raise DataError(
                    f"{shard.shape[0]} {what} in '{shard.path}' for {n} rows in '{other.path}'",
                    "one per row, file by file",
                )
    n = features.n_rows
    if stream.n_rows != n:
        raise DataError(f"{stream.n_rows} {what} for {n} rows of features", "one per row")


def _check_sequences(runs: Runs, expected: Runs, what: str) -> None:
    if runs != expected:
        raise DataError(
            f"{what} of sequences {_shown(runs)} for features of {_shown(expected)}",
            "the same sequences in both",
        )


def check_order(tokens: Sequence[Shard], features: Layers, runs: Runs | None) -> Runs:
    """Refuse token ids where nothing says which rows follow which; return the sequences.

    Raises
    ------
    DataError
        When nothing says that rows are in the order of the text, or sequences differ.
    """
    axes = features.axes
    if runs is None:
        ordered = ",".join("T" if a == "N" else a for a in axes)
        raise DataError(
            f"token ids of shape {tokens[0].shape} for features {','.join(axes)}, "
            "which need not be in the order of the text",
            f"--axes {ordered}, if every file is one sequence in order",
            "rows that were shuffled have lost their next token: import them with --labels",
        )
    if len(tokens[0].shape) == 1 and len(tokens) > 1 and "T" in axes and "B" not in axes:
        _check_sequences(sequences(tokens, ("T",)), runs, "token ids")
    return runs


def next_labels(ids: RowStream, runs: Runs, marks: Mapping[str, RowStream]) -> RowStream:
    """Label every position with the token after it.

    The last position of a sequence has none (-1), and so have those that a mask or a change of
    document leaves out.

    Parameters
    ----------
    ids : RowStream
        Token ids of the rows.
    runs : list of (int, int)
        The sequences of the rows.
    marks : mapping of str to RowStream
        ``mask``: 0 where a row is padding, which is no sample, and no row's next token. ``loss
        mask``: 0 where a token is not to be predicted. ``documents``: ids of documents; a next
        token of another document is none.

    Returns
    -------
    RowStream
        Labels (N,) of int64.
    """
    counts, lengths = np.array(runs, np.int64).reshape(-1, 2).T
    # First rows of the runs; within one the position follows by division, without a table of rows.
    starts = np.cumsum(counts * lengths) - counts * lengths

    def blocks(size: int) -> Blocks:
        start = 0
        for now, after in _with_next(_together({"ids": ids, **marks}, size)):
            rows = np.arange(start, start + len(now["ids"]))
            run = np.searchsorted(starts, rows, "right") - 1
            is_label = (rows - starts[run] + 1) % lengths[run] != 0
            if "mask" in marks:
                is_label &= (now["mask"] != 0) & (after["mask"] != 0)
            # It is about the token that is predicted, not about the one that predicts.
            if "loss mask" in marks:
                is_label &= after["loss mask"] != 0
            if "documents" in marks:
                is_label &= now["documents"] == after["documents"]
            # Signed first: ids may be of an unsigned type.
            yield np.where(is_label, after["ids"].astype(np.int64), -1)
            start += len(rows)

    return _labels(ids.shards[0].path, ids.n_rows, blocks)


def masked_labels(labels: RowStream | None, n: int, masks: Mapping[str, RowStream]) -> RowStream:
    """Take rows that a mask leaves out for no samples; without labels the others are class 0."""
    streams = dict(masks)
    if labels is not None:
        streams["labels"] = labels

    def blocks(size: int) -> Blocks:
        for parts in _together(streams, size):
            # Signed first: NumPy would make 255 of -1 beside labels of type uint8.
            values = np.asarray(parts.pop("labels", 0)).astype(np.int64)
            kept = np.logical_and.reduce([part != 0 for part in parts.values()])
            yield np.where(kept, values, -1)

    first = labels or next(iter(masks.values()))
    return _labels(first.shards[0].path, n, blocks)


def _labels(path: str, n: int, blocks: Callable[[int], Blocks]) -> RowStream:
    return RowStream("labels", (Shard(path, (n,), np.dtype(np.int64), blocks),))


def _together(streams: Mapping[str, RowStream], size: int) -> Iterator[Parts]:
    batches = (stream.batches(size) for stream in streams.values())
    return (dict(zip(streams, parts, strict=True)) for parts in zip(*batches, strict=True))


def _with_next(blocks: Iterator[Parts]) -> Iterator[tuple[Parts, Parts]]:
    """Pair each block with itself moved by one row; the last row follows itself."""
    for now, later in pairwise(chain(blocks, [None])):
        assert now is not None
        after = {
            name: np.append(part[1:], part[-1] if later is None else later[name][0])
            for name, part in now.items()
        }
        yield now, after


def _shown(runs: Runs) -> str:
    text = ", ".join(f"{count} x {length}" for count, length in runs[:4])
    return text + (", ..." if len(runs) > 4 else "")
