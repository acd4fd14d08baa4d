"""Labels of rows: given ones, next tokens, and what masks leave out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import numpy.typing as npt

from ncbatch.errors import DataError
from ncbatch.ingest.axes import Axes, as_rows, n_rows
from ncbatch.ingest.formats import Blocks, Shard
from ncbatch.ingest.rows import RowStream, join_shards, open_shards

Runs = list[tuple[int, int]]


@dataclass(frozen=True)
class Marks:
    """What is known of the rows beside their labels.

    Attributes
    ----------
    mask : RowStream or None
        0 where a row is padding: it is no sample, and no row's next token.
    loss_mask : RowStream or None
        0 where a token is not to be predicted.
    documents : RowStream or None
        Ids of documents; a next token of another document is none.
    """

    mask: RowStream | None = None
    loss_mask: RowStream | None = None
    documents: RowStream | None = None


def sequences(shards: Sequence[Shard], axes: Axes) -> Runs:
    """List the sequences of arrays in order: (how many, how long), equal neighbours joined."""
    found = []
    for shard in shards:
        sizes = dict(zip(axes, shard.shape, strict=True))
        found.append((sizes.get("B", 1), sizes["T"]))
    joined = groupby((run for run in found if run[0] * run[1]), key=lambda run: run[1])
    return [(sum(count for count, _ in group), length) for length, group in joined]


@dataclass(frozen=True)
class Order:
    """What arrays beside the features must fit.

    Attributes
    ----------
    features : tuple of Shard
        The features, with `axes`.
    axes : tuple of str
        Theirs.
    runs : list of (int, int) or None
        The sequences of their rows; None where nothing tells them.
    """

    features: tuple[Shard, ...]
    axes: Axes
    runs: Runs | None

    @classmethod
    def of(cls, features: Sequence[Shard], axes: Axes, tokens: Sequence[Shard] = ()) -> Order:
        """Find the sequences from the axes of the features, or from token ids (B, T) beside rows."""
        runs = None
        if "T" in axes:
            runs = sequences(features, axes)
        elif tokens and len(tokens[0].shape) == 2:
            runs = sequences(tokens, ("B", "T"))
        return cls(tuple(features), axes, runs)

    @property
    def counts(self) -> list[int]:
        """Rows of each file."""
        return [n_rows(self.axes, shard.shape) for shard in self.features]


def open_beside(source: str, what: str, order: Order) -> RowStream:
    """Open integers that belong to rows: (N,), or over the sequences of the features.

    Parameters
    ----------
    source : str
        Where they are.
    what : str
        What they are, for messages.
    order : Order
        The rows.

    Raises
    ------
    DataError
        When they are no integers, not one per row, or in other sequences.
    """
    shards = open_shards(source, what)
    return beside(shards if what == "predictions" else without_columns(shards), what, order)


def without_columns(shards: Sequence[Shard]) -> tuple[Shard, ...]:
    """View arrays (N, 1), which are no sequences of length 1 but a column, as (N,)."""
    if all(len(shard.shape) == 2 and shard.shape[1] == 1 for shard in shards):
        return tuple(as_rows(shard, ("B", "T")) for shard in shards)
    return tuple(shards)


def beside(shards: Sequence[Shard], what: str, order: Order) -> RowStream:
    """View opened arrays as `open_beside` does."""
    # Labels of shape (N, 1) beside flat features are one column of a table: to be looked at.
    flat = what in ("labels", "predictions") and "B" not in order.axes
    own = None
    if len(shards[0].shape) == 2 and not flat:
        rows = [as_rows(shard, ("B", "T")) for shard in shards]
        own = sequences(shards, ("B", "T"))
    else:
        rows = list(shards)
    stream = join_shards(rows, what)
    mask = what.endswith("mask")
    if stream.row_shape != () or stream.dtype.kind not in ("iub" if mask else "iu"):
        also = " or (B, T)" if "B" in order.axes else ""
        raise DataError(
            f"{what} of shape {stream.shape}, {stream.dtype}",
            f"integers {'or booleans ' if mask else ''}of shape (N,){also}",
        )
    _check_rows(stream, order)
    if own is not None and order.runs is not None:
        _check_sequences(own, order.runs, what)
    return stream


def _check_rows(stream: RowStream, order: Order) -> None:
    """Compare rows file by file where there are as many files, else all of them."""
    what, counts = stream.what, order.counts
    if len(stream.shards) == len(counts) > 1:
        for shard, features, n in zip(stream.shards, order.features, counts, strict=True):
            if shard.shape[0] != n:
                raise DataError(
                    f"{shard.shape[0]} {what} in '{shard.path}' for {n} rows in '{features.path}'",
                    "one per row, file by file",
                )
    if stream.n_rows != sum(counts):
        raise DataError(f"{stream.n_rows} {what} for {sum(counts)} rows of features", "one per row")


def _check_sequences(own: Runs, runs: Runs, what: str) -> None:
    if own != runs:
        raise DataError(
            f"{what} of sequences {_shown(own)} for features of {_shown(runs)}",
            "the same sequences in both",
        )


def next_labels(tokens: Sequence[Shard], order: Order, marks: Marks) -> RowStream:
    """Label every position with the token after it.

    The last position of a sequence has none (-1), and so have those that a mask or a change of
    document leaves out.

    Parameters
    ----------
    tokens : sequence of Shard
        Token ids of the rows.
    order : Order
        The rows.
    marks : Marks
        Masks and documents.

    Returns
    -------
    RowStream
        Labels (N,) of int64.

    Raises
    ------
    DataError
        When nothing says that rows are in the order of the text, or sequences differ.
    """
    ids = beside(tokens, "token ids", order)
    runs = _token_sequences(tokens, order)
    counts = np.array([count * length for count, length in runs], np.int64)
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]]) if runs else np.zeros(0, np.int64)
    lengths = np.array([length for _, length in runs], np.int64)

    def blocks(size: int) -> Blocks:
        start = 0
        for now, after in _with_next(_together([ids, *_given(marks)], size)):
            width = len(now[0])
            rows = np.arange(start, start + width)
            run = np.searchsorted(starts, rows, "right") - 1
            last = (rows - starts[run] + 1) % lengths[run] == 0
            yield _labels(now, after, last, marks)
            start += width

    shard = Shard(ids.shards[0].path, (ids.n_rows,), np.dtype(np.int64), blocks)
    return RowStream("labels", (shard,))


def masked_labels(labels: RowStream | None, n: int, marks: Marks) -> RowStream | None:
    """Take rows that a mask leaves out for no samples; without labels the others are class 0."""
    masks = [m for m in (marks.mask, marks.loss_mask) if m is not None]
    if not masks:
        return labels

    def blocks(size: int) -> Blocks:
        streams = [*masks, *([] if labels is None else [labels])]
        for parts in _together(streams, size):
            kept = np.logical_and.reduce([part != 0 for part in parts[: len(masks)]])
            given = 0 if labels is None else parts[-1]
            yield np.where(kept, given, -1).astype(np.int64)

    path = masks[0].shards[0].path if labels is None else labels.shards[0].path
    return RowStream("labels", (Shard(path, (n,), np.dtype(np.int64), blocks),))


def _token_sequences(tokens: Sequence[Shard], order: Order) -> Runs:
    """Find which rows follow which, from the axes of the features or of the token ids."""
    axes = order.axes
    if order.runs is None:
        said = ",".join("T" if a == "N" else a for a in axes)
        raise DataError(
            f"token ids of shape {tokens[0].shape} for features {','.join(axes)}, which need not be "
            "in the order of the text",
            f"--axes {said}, if every file is one sequence in order",
            "rows that were shuffled have lost their next token: import them with --labels",
        )
    if len(tokens[0].shape) == 1 and len(tokens) > 1 and "T" in axes and "B" not in axes:
        _check_sequences(sequences(tokens, ("T",)), order.runs, "token ids")
    return order.runs


def _shown(runs: Runs) -> str:
    text = ", ".join(f"{count} x {length}" for count, length in runs[:4])
    return text + (", ..." if len(runs) > 4 else "")


def _given(marks: Marks) -> list[RowStream]:
    return [m for m in (marks.mask, marks.loss_mask, marks.documents) if m is not None]


def _together(streams: Sequence[RowStream], size: int) -> Iterator[tuple[npt.NDArray[Any], ...]]:
    return zip(*(stream.batches(size) for stream in streams), strict=True)


def _with_next(
    blocks: Iterator[tuple[npt.NDArray[Any], ...]],
) -> Iterator[tuple[tuple[npt.NDArray[Any], ...], tuple[npt.NDArray[Any], ...]]]:
    """Give each block beside itself moved by one row; the last row follows itself."""
    held = next(blocks, None)
    while held is not None:
        later = next(blocks, None)
        following = held if later is None else later
        edge = -1 if later is None else 0
        yield (
            held,
            tuple(
                np.append(part[1:], more[edge]) for part, more in zip(held, following, strict=True)
            ),
        )
        held = later


def _labels(
    now: Sequence[npt.NDArray[Any]],
    after: Sequence[npt.NDArray[Any]],
    last: npt.NDArray[np.bool_],
    marks: Marks,
) -> npt.NDArray[np.int64]:
    kept = ~last
    at = 1
    if marks.mask is not None:
        kept &= (now[at] != 0) & (after[at] != 0)
        at += 1
    if marks.loss_mask is not None:
        kept &= after[at] != 0
        at += 1
    if marks.documents is not None:
        kept &= now[at] == after[at]
    return np.where(kept, after[0].astype(np.int64), -1)
