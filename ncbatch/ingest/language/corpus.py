"""The corpus: texts as windows of tokens with labels, kept in files that have no name."""

from __future__ import annotations

import hashlib
import tempfile
import weakref
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from operator import index
from threading import Lock
from typing import Any, Literal, overload

import numpy as np
import numpy.typing as npt

from ncbatch.engine.jobs import Progress
from ncbatch.errors import DataError, OutputError, UsageError, unknown_name
from ncbatch.ingest.language.texts import (
    LARGEST_ID,
    Document,
    Encode,
    Source,
    Texts,
    TokenRow,
    encoder_of,
    find_texts,
    tokenized,
    vocabulary_of,
)

# Columns of numbers in temporary files that have no name: gone when the process is.


class Column:
    """Numbers of one type in a file in the system's folder for temporary files.

    Reading maps nothing, so that only what is read counts as memory of this process; several
    threads may read.

    Parameters
    ----------
    dtype : type
        The type of the numbers.
    """

    def __init__(self, dtype: type[np.generic]) -> None:
        self.dtype = np.dtype(dtype)
        try:
            self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 (as long as the column)
        except OSError as error:
            raise _no_room(error) from error
        self._lock = Lock()
        self._length = 0
        weakref.finalize(self, self._file.close)

    def __len__(self) -> int:
        return self._length

    def append(self, values: npt.NDArray[Any]) -> None:
        """Write numbers behind the last."""
        self.write(self._length, values)

    def write(self, start: int, values: npt.NDArray[Any]) -> None:
        """Write numbers from place `start` on.

        Raises
        ------
        OutputError
            When the disk is full.
        """
        left: Any = np.ascontiguousarray(values, self.dtype).reshape(-1).view(np.uint8)
        with self._lock:
            self._file.seek(start * self.dtype.itemsize)
            try:
                while len(left):  # one call writes at most 2 GiB
                    left = left[self._file.write(left) :]
            except OSError as error:
                raise _no_room(error) from error
        self._length = max(self._length, start + len(values))

    def read(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Read the numbers from place `start` to `stop`."""
        found = np.empty(max(min(stop, self._length) - start, 0), self.dtype)
        left: Any = found.view(np.uint8)
        with self._lock:
            self._file.seek(start * self.dtype.itemsize)
            while len(left):
                n = self._file.readinto(left)
                if not n:
                    raise OutputError("a temporary file of tokens is cut short")
                left = left[n:]
        return found

    def cut(self, length: int) -> None:
        """Forget what is behind the first `length` numbers."""
        self._length = min(self._length, length)


def _no_room(error: OSError) -> OutputError:
    return OutputError(
        f"tokens cannot be kept in a temporary file: {error.strerror}",
        "room for 8 bytes per token of the texts",
        "set TMPDIR to a folder with more room",
    )


# Windows: how documents are cut or packed, and which windows hold samples.


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


# Which samples are taken when every class may give only so many.


_COUNT_BLOCK = 2**18
_Part = tuple[npt.NDArray[np.int32], npt.NDArray[np.uint64], npt.NDArray[np.int64]]


def random_draws(start: int, stop: int, seed: int) -> npt.NDArray[np.uint64]:
    """Draw a number for every position from `start` to `stop`; it depends on position and seed only.

    Notes
    -----
    The generator is Philox-4x64 (Salmon et al. 2011): position p has the word p of its stream,
    which comes in counters of four words.
    """
    first = start // 4
    words = np.random.Philox(key=seed % 2**64).advance(first).random_raw(stop - 4 * first)
    return words[start - 4 * first :]


def lowest_per_class(labels: Column, cap: int, seed: int) -> npt.NDArray[np.int64]:
    """Choose of every class the samples with the lowest random draws.

    Parameters
    ----------
    labels : Column
        The label of every position; those below 0 are no samples.
    cap : int
        How many of a class are chosen at most.
    seed : int
        Which draws.

    Returns
    -------
    array of int64
        The chosen positions, in order.

    Notes
    -----
    Memory is that of the chosen and of one block: labels are read block by block, and a class that
    has its `cap` samples takes only lower draws than its highest from then on.
    """
    lowest = _Lowest(cap)
    for start in range(0, len(labels), _COUNT_BLOCK):
        block = labels.read(start, start + _COUNT_BLOCK)
        places = np.flatnonzero(block >= 0)
        draws = random_draws(start, start + len(block), seed)
        lowest.add(block[places], draws[places], places + start)
    return lowest.positions()


class _Lowest:
    """The lowest draws of each class so far."""

    def __init__(self, cap: int) -> None:
        self._cap = cap
        # Labels, draws and positions: what the last merge left, then what came since.
        self._parts: list[_Part] = []
        self._n_merged, self._n_since = 0, 0
        # Classes that have all their samples, and the highest draw among them.
        self._full = np.empty(0, np.int32)
        self._highest = np.empty(0, np.uint64)

    def add(
        self,
        labels: npt.NDArray[np.int32],
        draws: npt.NDArray[np.uint64],
        positions: npt.NDArray[np.int64],
    ) -> None:
        if len(self._full):
            at = np.minimum(np.searchsorted(self._full, labels), len(self._full) - 1)
            lower = (self._full[at] != labels) | (draws < self._highest[at])
            labels, draws, positions = labels[lower], draws[lower], positions[lower]
        self._parts.append((labels, draws, positions))
        self._n_since += len(labels)
        # Merging sorts everything: it waits until there is as much new as old.
        if self._n_since >= max(self._n_merged, _COUNT_BLOCK):
            self._merge()

    def positions(self) -> npt.NDArray[np.int64]:
        self._merge()
        return np.sort(self._parts[0][2])

    def _merge(self) -> None:
        labels, draws, positions = (np.concatenate(part) for part in zip(*self._parts, strict=True))
        order = np.lexsort((draws, labels))
        ordered = labels[order]
        rank = np.arange(len(order)) - np.searchsorted(ordered, ordered)  # within the class
        last = rank == self._cap - 1
        self._full, self._highest = ordered[last], draws[order[last]]
        order = order[rank < self._cap]
        self._parts = [(labels[order], draws[order], positions[order])]
        self._n_merged, self._n_since = len(order), 0


# Labels: which class each position of a text carries, and which positions are samples.


Kind = Literal["next", "given", "argmax"]
KINDS: tuple[Kind, ...] = ("next", "given", "argmax")


@dataclass(frozen=True)
class Tokens:
    """The tokens of some documents, one document after another.

    Attributes
    ----------
    ids : array (n,) of int32
        Token ids.
    attended : array (n,) of bool
        Which tokens the model attends to.
    kept : array (n,) of bool
        False where a loss mask leaves a token out.
    given : array (n,) of int32
        The labels as given, -1 for none; a document without labels has its own ids.
    lengths : array (documents,) of int64
        Tokens per document, all positive.
    """

    ids: npt.NDArray[np.int32]
    attended: npt.NDArray[np.bool_]
    kept: npt.NDArray[np.bool_]
    given: npt.NDArray[np.int32]
    lengths: npt.NDArray[np.int64]

    @classmethod
    def of(cls, rows: Sequence[TokenRow]) -> Tokens:
        """Join documents; empty ones leave no trace."""
        rows = [row for row in rows if len(row)]
        lengths = np.array([len(row) for row in rows], np.int64)
        if not rows:
            none, never = np.empty(0, np.int32), np.empty(0, np.bool_)
            return cls(none, never, never, none, lengths)
        every = [np.ones(len(row), np.bool_) for row in rows]
        return cls(
            np.concatenate([row.ids for row in rows]),
            np.concatenate(
                [_or(row.attended, ones) for row, ones in zip(rows, every, strict=True)]
            ),
            np.concatenate([_or(row.kept, ones) for row, ones in zip(rows, every, strict=True)]),
            np.concatenate([row.ids if row.labels is None else row.labels for row in rows]),
            lengths,
        )


def _or(
    mask: npt.NDArray[np.bool_] | None, default: npt.NDArray[np.bool_]
) -> npt.NDArray[np.bool_]:
    return default if mask is None else mask


def position_labels(
    tokens: Tokens, kind: Kind, excluded: npt.NDArray[np.int32], masked: bool = False
) -> npt.NDArray[np.int32]:
    """Give each position its label.

    Parameters
    ----------
    tokens : Tokens
        Of whole documents.
    kind : {"next", "given", "argmax"}
        ``next``: the token that follows in the same document. ``given``: the label that is given
        for the position. ``argmax``: 0, which stands for what the model will decide.
    excluded : array of int32
        Ids that are no labels.
    masked : bool, optional
        Whether the model is a masked one, which speaks about a position itself.

    Returns
    -------
    array (n,) of int32
        -1 where the position is no sample: no attention; with ``given`` a negative label or a
        loss mask of 0 there; with ``next`` the end of a document; with ``next`` and ``argmax`` a
        next token that is masked (no attention, a negative label, a loss mask of 0), for it is
        the next token that a position of a causal model speaks about; with ``argmax`` of a masked
        model a position that is masked so itself.
    """
    if kind == "given":
        labels = np.where(tokens.attended & tokens.kept, tokens.given, -1)
    else:
        last = np.zeros(len(tokens.ids), np.bool_)
        last[np.cumsum(tokens.lengths) - 1] = True
        target = tokens.attended & tokens.kept & (tokens.given >= 0)
        follows = np.roll(target, -1) & ~last
        if kind == "argmax" and masked:
            labels = np.where(target, 0, -1)
        elif kind == "argmax":
            labels = np.where(tokens.attended & (follows | last), 0, -1)
        else:
            labels = np.where(tokens.attended & follows, np.roll(tokens.ids, -1), -1)
    if len(excluded):
        labels[np.isin(labels, excluded)] = -1
    return labels.astype(np.int32)


def check_labels(document: Document, kind: Kind) -> None:
    """Check that a document has what its labels are made from.

    Raises
    ------
    DataError
        With ``given`` when there are no labels; with ``next`` when labels are neither the token
        ids nor negative, for then they are no mask of the next token.
    """
    row, where = document.content, document.where
    if kind == "given":
        if isinstance(row, str):
            raise DataError(
                f"labels 'given', but {where} is text", "documents with input_ids and labels"
            )
        if row.labels is None:
            raise DataError(f"labels 'given', but none in {where}", "labels beside input_ids")
    elif kind == "next" and isinstance(row, TokenRow) and row.labels is not None:
        differ = np.flatnonzero((row.labels >= 0) & (row.labels != row.ids))
        if differ.size:
            at = int(differ[0])
            raise DataError(
                f"label {row.labels[at]} for token {row.ids[at]} in {where}",
                "labels that repeat input_ids, or are negative",
                "labels 'given' takes them as they stand, position by position",
            )


# Reading: from sources of documents to columns of tokens and labels.


class Reading:
    """Tokens and labels of the documents read so far.

    Parameters
    ----------
    kind : {"next", "given", "argmax"}
        What the labels are.
    excluded : array of int32
        Ids that are no labels.
    enough : int, optional
        How many samples are wanted; all by default. The window of the last one is read too.
    context : int, optional
        Tokens of a window.
    pack : bool, optional
        Whether windows are filled across documents, or every document begins one.
    masked : bool, optional
        Whether the model is a masked one; see `position_labels`.

    Attributes
    ----------
    ids : Column of int32
        The tokens; one without attention is stored as -1 - id.
    labels : Column of int32
        The label of each token's position, -1 where it is no sample.
    ends : Column of int64
        The position behind the last token of each document.
    n_empty, n_samples, n_token_ids : int
        Documents without tokens; samples; the largest token id plus one.
    """

    def __init__(
        self,
        kind: Kind,
        excluded: npt.NDArray[np.int32],
        enough: int | None = None,
        context: int = 1,
        pack: bool = False,
        masked: bool = False,
    ) -> None:
        self.ids, self.labels, self.ends = Column(np.int32), Column(np.int32), Column(np.int64)
        self.n_empty = self.n_samples = self.n_token_ids = 0
        self._kind, self._excluded = kind, excluded
        self._enough, self._context, self._pack, self._masked = enough, context, pack, masked
        self._needed: int | None = None  # tokens up to the end of the last sample's window
        self._last = -1  # that sample's position
        # Of a document that goes on: its last token, whose label the next one decides, and its start.
        self._held = np.empty(0, np.int32)
        self._begun = 0

    def read(self, sources: Sequence[Source], encode: Encode, progress: Progress | None) -> None:
        """Read the documents of all sources, or as many as hold enough samples.

        Raises
        ------
        DataError
            When a document cannot be read, lacks labels, or there is no sample in any.
        """
        with closing(_check_documents(sources, self._kind, progress)) as documents:
            for rows, goes_on in tokenized(documents, encode):
                self._add(rows, goes_on)
                if self._needed is not None and len(self.ids) >= self._needed:
                    break
        if len(self._held) and len(self.ids) > self._begun:  # its rest was not needed
            self.ends.append(np.array([len(self.ids)]))
        if not self.n_samples:
            raise _no_sample(self, self._kind)

    def _add(self, rows: list[TokenRow], goes_on: bool) -> None:
        """Add documents; the first may go on with the last of those before, and the last go on."""
        start = len(self.ids)
        begun = self._begun if len(self._held) else start
        if len(self._held):
            rows = [TokenRow(np.concatenate([self._held, rows[0].ids])), *rows[1:]]
        tokens = Tokens.of(rows)
        labels = position_labels(tokens, self._kind, self._excluded, self._masked)
        ends = start + np.cumsum(tokens.lengths)
        starts = np.concatenate([[begun], ends])[: len(ends)]
        open_end = goes_on and len(rows[-1]) > 0
        known = len(tokens.ids) - open_end
        self._held = tokens.ids[known:]
        self._begun = int(starts[-1]) if open_end else start
        self._find_needed(np.flatnonzero(labels[:known] >= 0) + start, starts, ends, open_end)
        self.n_empty += len(rows) - goes_on - (len(tokens.lengths) - open_end)
        self.n_token_ids = max(self.n_token_ids, int(tokens.ids[:known].max(initial=-1)) + 1)
        self.ids.append(np.where(tokens.attended, tokens.ids, -1 - tokens.ids)[:known])
        self.labels.append(labels[:known])
        self.ends.append(ends[: len(ends) - open_end])

    def _find_needed(
        self,
        samples: npt.NDArray[np.int64],
        starts: npt.NDArray[np.int64],
        ends: npt.NDArray[np.int64],
        open_end: bool,
    ) -> None:
        """Find how many tokens are needed, when the last wanted sample is among these."""
        left = -1 if self._enough is None else self._enough - self.n_samples
        self.n_samples += len(samples)
        if self._needed is None and 0 < left <= len(samples):
            last = self._last = int(samples[left - 1])
            document = int(np.searchsorted(ends, last, side="right"))
            start = 0 if self._pack else int(starts[document])
            n_windows = -(-(last + 1 - start) // self._context)
            self._needed = start + n_windows * self._context
        if self._needed is not None and not self._pack:
            finished = ends[: len(ends) - open_end]
            behind = finished[finished > self._last]  # the document may end before its window
            self._needed = min([self._needed, *behind[:1].tolist()])


def _check_documents(
    sources: Sequence[Source], kind: Kind, progress: Progress | None
) -> Generator[Document]:
    """Read the documents of all sources, check that each has its labels, tell how far it is."""
    if progress:
        progress.begin("reading texts", sum(source.size for source in sources), "B")
    try:
        for source in sources:
            for document in source.documents():
                check_labels(document, kind)
                yield document
                if progress:
                    progress.advance(document.size)
    finally:
        if progress:
            progress.end()


def _no_sample(reading: Reading, kind: Kind) -> DataError:
    found = (
        f"no sample in the texts (documents: {len(reading.ends)}, tokens: {len(reading.ids)}, "
        f"empty documents: {reading.n_empty})"
    )
    expected = {
        "next": "a document of two tokens or more whose next tokens are not all masked or excluded",
        "given": "labels that are not all negative, masked or excluded",
        "argmax": "tokens with attention",
    }
    return DataError(found, expected[kind])


__all__ = ["Corpus", "Kind", "Texts", "TokenBatch", "TokenBatches", "open_corpus"]

_BLOCK = 2**20


@dataclass(frozen=True)
class TokenBatch:
    """Some windows of tokens, padded on the right to the longest of them.

    Attributes
    ----------
    input_ids : array (B, T) of int64
        Token ids; 0 in padding.
    attention_mask : array (B, T) of int64
        1 where there is a token to attend to, 0 in padding.
    labels : array (B, T) of int64
        The class of each position, -1 where it is no sample.
    """

    input_ids: npt.NDArray[np.int64]
    attention_mask: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Corpus:
    """Windows of tokens with labels; `open_corpus` makes one.

    Attributes
    ----------
    n_tokens : int
        Tokens that were read, special ones included, padding not.
    n_documents : int
        Documents that were read and had tokens.
    n_empty : int
        Documents that were read and had none; they are skipped.
    n_token_ids : int
        The largest token id plus one.
    kind : {"next", "given", "argmax"}
        What the labels are.
    """

    n_tokens: int
    n_documents: int
    n_empty: int
    n_token_ids: int
    kind: Kind
    _windows: Windows
    _ids: Column  # a token without attention is stored as -1 - id
    _labels: Column

    @property
    def n_windows(self) -> int:
        """Windows that hold a sample; the others are left out."""
        return len(self._windows.starts)

    @property
    def n_samples(self) -> int:
        """Positions that are samples."""
        return self._windows.n_samples

    @property
    def fingerprint(self) -> str:
        """Hash of the windows with their tokens and labels: equal ones give equal rows."""
        return self._windows.fingerprint

    def label_counts(self, n_classes: int) -> npt.NDArray[np.int64]:
        """Count the samples of each class.

        Parameters
        ----------
        n_classes : int
            K.

        Returns
        -------
        array (K,) of int64
            Samples per class.

        Raises
        ------
        DataError
            When a label is K or more.
        UsageError
            With ``argmax``, whose labels are known after the forward pass only.
        """
        if self.kind == "argmax":
            raise UsageError("counts of labels that the model has yet to decide")
        counts = np.zeros(n_classes, np.int64)
        for start in range(0, len(self._labels), _BLOCK):
            labels = self._labels.read(start, start + _BLOCK)
            labels = labels[labels >= 0]
            if len(labels) and int(labels.max()) >= n_classes:
                raise DataError(
                    f"label {int(labels.max())} in the texts", f"labels below {n_classes} classes"
                )
            counts += np.bincount(labels, minlength=n_classes)
        return counts

    def batches(self, batch_size: int) -> TokenBatches:
        """Take the windows in order, `batch_size` at a time.

        Parameters
        ----------
        batch_size : int
            Windows per batch; the last may have fewer.

        Returns
        -------
        sequence of TokenBatch
            Each is read when it is asked for. The samples and their order are the same for any
            size.

        Raises
        ------
        UsageError
            When `batch_size` is below 1.
        """
        if batch_size < 1:
            raise UsageError(f"batches of {batch_size} windows", "at least 1")
        return TokenBatches(self, batch_size)

    def _window(self, start: int, stop: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        return self._ids.read(start, stop), self._labels.read(start, stop)


class TokenBatches(Sequence[TokenBatch]):
    """The windows of a corpus, some at a time, read when asked for."""

    def __init__(self, corpus: Corpus, batch_size: int) -> None:
        self._corpus, self._size = corpus, batch_size

    def __len__(self) -> int:
        return -(-self._corpus.n_windows // self._size)

    @overload
    def __getitem__(self, number: int) -> TokenBatch: ...
    @overload
    def __getitem__(self, number: slice) -> Sequence[TokenBatch]: ...
    def __getitem__(self, number: int | slice) -> TokenBatch | Sequence[TokenBatch]:
        """Read one batch; a slice reads all of its batches at once."""
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        place = index(number)
        place += len(self) if place < 0 else 0
        if not 0 <= place < len(self):
            raise IndexError(f"batch {number} of {len(self)}")
        return self._read(place * self._size, (place + 1) * self._size)

    def _read(self, first: int, behind: int) -> TokenBatch:
        windows = self._corpus._windows
        starts = windows.starts.read(first, behind)
        stops = windows.stops.read(first, behind)
        shape = len(starts), int((stops - starts).max())
        ids, mask = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        labels = np.full(shape, -1, np.int64)
        for row, (start, stop) in enumerate(zip(starts.tolist(), stops.tolist(), strict=True)):
            found, classes = self._corpus._window(start, stop)
            mask[row, : stop - start] = found >= 0
            ids[row, : stop - start] = np.where(found < 0, -1 - found, found)
            labels[row, : stop - start] = classes
        return TokenBatch(ids, mask, labels)


def open_corpus(
    texts: Texts,
    tokenizer: Any,
    *,
    context: int,
    labels: Kind = "next",
    pack: bool = False,
    field: str = "text",
    exclude: Iterable[int] = (),
    max_tokens: int | None = None,
    per_class_cap: int | None = None,
    seed: int = 0,
    masked: bool = False,
    progress: Progress | None = None,
) -> Corpus:
    """Read texts into windows of tokens, and decide which positions are samples of which class.

    Parameters
    ----------
    texts : path, or sequence of paths
        Text files (UTF-8, each one document; a long one is read and tokenized in pieces), ``.jsonl`` files (a document per line), folders that
        ``datasets.save_to_disk`` wrote, other folders of such files, or globs. A document of
        JSON lines or a data set may hold ``input_ids``, with ``attention_mask``, ``loss_mask`` and
        ``labels`` where there are such, in place of text.
    tokenizer : transformers.PreTrainedTokenizerBase or tokenizers.Tokenizer or None
        Makes tokens of text, and adds its special tokens to every document. None when all
        documents hold ``input_ids``.
    context : int
        Tokens of a full window, at least 2. Windows do not overlap.
    labels : {"next", "given", "argmax"}, optional
        ``next``: the next token of the same document, also where it begins the next window; never
        a token of another document, of padding, without attention, with a negative label or with
        a loss mask of 0. ``given``: the documents' own ``labels``, position by position; where
        they are negative, or the loss mask is 0, there is no sample. ``argmax``: what the model will
        decide; every position is a sample (of class 0 for now) but for those whose next token is
        masked; for a masked model, those that are masked themselves.
    pack : bool, optional
        Lay all documents one behind the other into full windows, as in pretraining: attention
        then crosses from a document into those before it in the window. By default every document
        begins a window of its own.
    field : str, optional
        Which field of JSON lines and data sets holds the text. With ``"text"`` and
        ``"input_ids"``, documents that have ``input_ids`` are taken as tokens.
    exclude : iterable of int, optional
        Ids that are no labels. Not with ``argmax``.
    max_tokens : int, optional
        Only the first so many samples. Without `per_class_cap` texts are read no further than that.
    per_class_cap : int, optional
        Of every class only so many samples: those with the lowest random draws, so that every
        sample of a class is as likely. All texts are read first. Of these, `max_tokens` takes
        the first. Not with ``argmax``.
    seed : int, optional
        Which random draws; a draw depends on the seed and on the position among all tokens only.
    masked : bool, optional
        Whether a masked model reads the corpus, whose ``labels`` of -100 and loss masks speak about
        the position that they stand at.
    progress : Progress, optional
        Told how much of the texts is read.

    Returns
    -------
    Corpus
        Tokens and labels are in temporary files (8 bytes per token), not in memory. The same
        for every rank and batch size.

    Raises
    ------
    UsageError
        When an option makes no sense, an excluded id is not in the vocabulary, or a tokenizer is
        needed.
    DataError
        When there is no text, a document cannot be read, or there is no sample at all.
    UnknownNameError
        When a document lacks the field.
    OutputError
        When there is no room for the temporary files.
    """
    excluded = _check_options(context, labels, exclude, max_tokens, per_class_cap)
    sources = find_texts(texts, field)
    encode = encoder_of(tokenizer)
    enough = max_tokens if per_class_cap is None else None
    _check_known(excluded, tokenizer)
    reading = Reading(labels, excluded, enough, context, pack, masked)
    reading.read(sources, encode, progress)
    chosen = None
    if per_class_cap is not None:
        chosen = lowest_per_class(reading.labels, per_class_cap, seed)
    bounds = (
        packed_windows(len(reading.ids), context) if pack else cut_windows(reading.ends, context)
    )
    windows = settle_windows(reading.ids, reading.labels, bounds, chosen, max_tokens)
    return Corpus(
        len(reading.ids), len(reading.ends), reading.n_empty, reading.n_token_ids,
        labels, windows, reading.ids, reading.labels,
    )  # fmt: skip


def _check_known(excluded: npt.NDArray[np.int32], tokenizer: Any) -> None:
    """Refuse excluded ids that the tokenizer does not have."""
    size = vocabulary_of(tokenizer) if len(excluded) else None
    if size is not None and int(excluded[-1]) >= size:
        raise UsageError(
            f"excluded id {int(excluded[-1])}", f"ids of the vocabulary, below {size:,}"
        )


def _check_options(
    context: int,
    labels: str,
    exclude: Iterable[int],
    max_tokens: int | None,
    per_class_cap: int | None,
) -> npt.NDArray[np.int32]:
    """Check the options; give the excluded ids."""
    if labels not in KINDS:
        raise unknown_name("kind of labels", labels, KINDS)
    if context < 2:
        raise UsageError(f"windows of {context} tokens", "at least 2")
    for name, value in (("max_tokens", max_tokens), ("per_class_cap", per_class_cap)):
        if value is not None and value < 1:
            raise UsageError(f"{name} {value}", "at least 1")
    try:
        ids = [index(token) for token in exclude]
    except TypeError as error:
        raise UsageError(f"excluded ids {exclude!r}", "a list of token ids") from error
    for wrong in (token for token in ids if not 0 <= token <= LARGEST_ID):
        raise UsageError(f"excluded id {wrong}", "ids of the vocabulary, from 0")
    if labels == "argmax" and (ids or per_class_cap is not None):
        raise UsageError(
            f"labels 'argmax' with {'exclude' if ids else 'per_class_cap'}",
            "labels that are known before the forward pass",
            "take labels 'next' or 'given', or leave it out",
        )
    return np.array(sorted(set(ids)), np.int32)
