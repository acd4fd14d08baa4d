"""Labels of rows: given ones, next tokens, and what masks leave out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import numpy.typing as npt

from ncbatch.errors import DataError, UsageError
from ncbatch.ingest.files.formats.shard import Blocks, Shard
from ncbatch.ingest.files.layers import (
    Axes,
    Layers,
    RowStream,
    as_rows,
    find_paths,
    join_shards,
    n_rows,
    open_layers,
    open_shards,
)

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


# Sources of an import: which files hold features, labels and what belongs to them.


NEXT = "next"


@dataclass(frozen=True)
class Opened:
    """What the sources of an import hold; labels as they are, before masks.

    Attributes
    ----------
    rows : Layers
        The features.
    labels, predictions : RowStream or None
        Integers (N,).
    marks : Marks
        Masks that labels have still to be given.
    """

    rows: Layers
    labels: RowStream | None
    predictions: RowStream | None
    marks: Marks


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
        self._check()
        following = self.labels == NEXT
        named = self.tokens if following else self.labels
        what = "token ids" if following else "labels"
        given: tuple[Shard, ...] = () if named is None else open_shards(self._whole(named), what)
        if following:
            given = without_columns(given)
        rows = open_layers(self.features, layer, axes, layer_index, given)
        order = Order.of(rows.shards, rows.axes, given if following else ())
        marks = Marks(
            self._beside(self.mask, "mask", order),
            self._beside(self.loss_mask, "loss mask", order),
            self._beside(self.documents, "documents", order),
        )
        chosen = self._beside(self.predictions, "predictions", order)
        if chosen is not None and len(rows.names) > 1:
            raise UsageError(
                f"predictions with {len(rows.names)} layers",
                "the one layer whose classifier made them",
                "import that layer by itself, or add it later with --predictions",
            )
        labels = None
        if given and following:
            labels = next_labels(given, order, marks)
        elif given:
            labels = beside(given, "labels", order)
        return Opened(rows, labels, chosen, Marks() if following else marks)

    def _beside(self, source: str | None, what: str, order: Order) -> RowStream | None:
        return None if source is None else open_beside(self._whole(source), what, order)

    def _whole(self, source: str) -> str:
        """Put the path of the features before ``:key``."""
        if not source.startswith(":"):
            return source
        _, key = find_paths(self.features, "features")
        return self.features.removesuffix(f":{key}") + source

    def _check(self) -> None:
        if self.labels == NEXT and self.tokens is None:
            raise UsageError("--labels next without token ids", "--tokens")
        for option, value in (("--tokens", self.tokens), ("--documents", self.documents)):
            if value is not None and self.labels != NEXT:
                raise UsageError(
                    f"{option} without --labels next", "token ids to make labels of",
                    "add --labels next, or leave it out",
                )  # fmt: skip
