"""Windows: how documents are cut or packed, and which windows hold samples."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ncbatch.ingest.language.scratch import Column

Bounds = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]
_DOCUMENTS, _TOKENS = 4096, 2**18


@dataclass(frozen=True)
class Windows:
    """The windows that hold samples.

    Attributes
    ----------
    starts, stops : Column of int64
        Their first positions, and those behind their last.
    n_samples : int
        Samples in them.
    fingerprint : str
        Hash of their lengths, tokens and labels.
    """

    starts: Column
    stops: Column
    n_samples: int
    fingerprint: str


def settle_windows(
    ids: Column,
    labels: Column,
    bounds: Iterator[Bounds],
    chosen: npt.NDArray[np.int64] | None,
    most: int | None,
) -> Windows:
    """Find the windows that hold samples, and make the labels of all others' positions -1.

    Parameters
    ----------
    ids, labels : Column of int32
        Token and label of every position. Labels are changed: those of samples that are not
        taken become -1.
    bounds : iterator
        All windows in order, without gaps: from `cut_windows` or `packed_windows`.
    chosen : array of int64, optional
        The only positions that are taken, in order.
    most : int, optional
        Only the first so many samples are taken.
    """
    starts, stops = Column(np.int64), Column(np.int64)
    n_samples, shapes, contents = 0, hashlib.sha256(), hashlib.sha256()
    for first, behind in _few_tokens(bounds):
        begin, end = int(first[0]), int(behind[-1])
        block = labels.read(begin, end)
        taken = _taken(block, begin, chosen, None if most is None else most - n_samples)
        if not np.array_equal(taken, block):
            labels.write(begin, taken)
        inside = taken >= 0
        n_samples += int(np.count_nonzero(inside))
        held = np.logical_or.reduceat(inside, first - begin)
        starts.append(first[held])
        stops.append(behind[held])
        lengths = behind - first
        rows = np.repeat(held, lengths)
        shapes.update(lengths[held].tobytes())
        contents.update(np.stack([ids.read(begin, end), taken], 1)[rows].tobytes())
        if most is not None and n_samples >= most:
            labels.cut(end)
            break
    shapes.update(contents.digest())
    return Windows(starts, stops, n_samples, shapes.hexdigest())


def _taken(
    labels: npt.NDArray[np.int32],
    start: int,
    chosen: npt.NDArray[np.int64] | None,
    most: int | None,
) -> npt.NDArray[np.int32]:
    """Give the labels of positions from `start` on with only the samples that are taken."""
    taken = labels
    if chosen is not None:
        part = slice(*np.searchsorted(chosen, [start, start + len(labels)]))
        places = chosen[part] - start
        taken = np.full_like(labels, -1)
        taken[places] = labels[places]
    if most is not None:
        behind = np.flatnonzero(taken >= 0)[most:]
        if len(behind):
            taken = taken.copy()
            taken[behind] = -1
    return taken


def _few_tokens(bounds: Iterator[Bounds]) -> Iterator[Bounds]:
    """Cut lists of windows into lists of about a quarter of a million tokens; none is empty."""
    for first, behind in bounds:
        place = 0
        while place < len(first):
            end = int(np.searchsorted(behind, first[place] + _TOKENS, side="right"))
            end = max(end, place + 1)
            yield first[place:end], behind[place:end]
            place = end


def packed_windows(n_tokens: int, context: int) -> Iterator[Bounds]:
    """Cut all documents, one behind the other, into windows; only the last may be short."""
    step = context * max(_TOKENS // context, 1)
    for start in range(0, n_tokens, step):
        first = np.arange(start, min(start + step, n_tokens), context)
        yield first, np.minimum(first + context, n_tokens)


def cut_windows(ends: Column, context: int) -> Iterator[Bounds]:
    """Cut each document into windows; the last one of a document may be short.

    Parameters
    ----------
    ends : Column of int64
        The position behind the last of each document.
    context : int
        Tokens of a full window.
    """
    start = 0
    for document in range(0, len(ends), _DOCUMENTS):
        stop = ends.read(document, document + _DOCUMENTS)
        lengths = np.diff(stop, prepend=start)
        start = int(stop[-1])
        n_windows = -(-lengths // context)
        # The number of each window within its document.
        number = np.arange(n_windows.sum()) - np.repeat(np.cumsum(n_windows) - n_windows, n_windows)
        first = np.repeat(stop - lengths, n_windows) + number * context
        yield first, np.minimum(first + context, np.repeat(stop, n_windows))
