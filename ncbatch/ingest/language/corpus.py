"""The corpus: texts as windows of tokens with labels, kept in files that have no name."""

from __future__ import annotations

import hashlib
import tempfile
import weakref
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from operator import index
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ncbatch.engine.jobs import Progress, counted
from ncbatch.errors import DataError, OutputError, UsageError
from ncbatch.ingest.language.texts import (
    LARGEST_ID,
    Document,
    Source,
    Texts,
    TokenRow,
    find_texts,
    tokenize,
    vocabulary_of,
)

Kind = Literal["next", "given", "argmax"]

# What is held at a time of columns, so that memory does not grow with the corpus.
_TOKENS = 2**18
_DOCUMENTS = 4096

# What there must be for a sample, by the kind of labels.
_SAMPLES = {
    "next": "a document of two tokens or more whose next tokens are not all masked or excluded",
    "given": "labels that are not all negative, masked or excluded",
    "argmax": "tokens with attention",
}

Bounds = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]
"""First positions of windows, and those behind their last."""


class Column:
    """Numbers of one type in a file in the system's folder for temporary files.

    Reading maps nothing, so that only what is read counts as memory of this process. The file has
    no name: it is gone when the process is.
    """

    def __init__(self, dtype: type[np.generic]) -> None:
        self.dtype = np.dtype(dtype)
        self._length = 0
        try:
            self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 (as long as the column)
        except OSError as error:
            raise _no_room(error) from error
        # A column may be dropped anywhere: a file that nobody closes would warn of itself.
        weakref.finalize(self, self._file.close)

    def __len__(self) -> int:
        return self._length

    def write(self, values: npt.NDArray[Any], start: int | None = None) -> None:
        """Write numbers from place `start` on, else behind the last.

        Raises
        ------
        OutputError
            When the disk is full.
        """
        start = self._length if start is None else start
        rest: Any = np.ascontiguousarray(values, self.dtype).view(np.uint8)
        self._file.seek(start * self.dtype.itemsize)
        try:
            while len(rest):  # a disk that is nearly full takes a part
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            raise _no_room(error) from error
        self._length = max(self._length, start + len(values))

    def read(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Read the numbers from place `start` to `stop`, less than 2 GiB."""
        values = np.empty(max(min(stop, self._length) - start, 0), self.dtype)
        self._file.seek(start * self.dtype.itemsize)
        into: Any = values.view(np.uint8)
        if self._file.readinto(into) != values.nbytes:
            raise OutputError("a temporary file of tokens is cut short")
        return values


def _no_room(error: OSError) -> OutputError:
    return OutputError(
        f"tokens cannot be kept in a temporary file: {error.strerror}",
        "room for 8 bytes per token of the texts",
        "set TMPDIR to a folder with more room",
    )


# Labels: which class each position of a text carries, and which positions are samples.


def position_labels(
    tokens: TokenRow,
    last: npt.NDArray[np.intp],
    kind: Kind,
    excluded: npt.NDArray[np.int32],
    masked: bool,
) -> npt.NDArray[np.int32]:
    """Label each position.

    Parameters
    ----------
    tokens : TokenRow
        Of some documents, one behind the other; those without labels have their own ids.
    last : array of int
        Where the documents end.
    kind : {"next", "given", "argmax"}
        ``next``: the token that follows in the same document. ``given``: the label that is given
        for the position. ``argmax``: 0, which stands for what the model will decide.
    excluded : array of int32
        Ids that are no labels.
    masked : bool
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
    given = tokens.ids if tokens.labels is None else tokens.labels
    target = tokens.attended & tokens.kept & (given >= 0)
    ends = np.zeros(len(tokens), np.bool_)
    ends[last] = True
    # The roll brings the first to the last place, which always ends a document.
    follows = np.roll(target, -1) & ~ends
    if kind == "given":
        labels = np.where(target, given, -1)
    elif kind == "next":
        labels = np.where(tokens.attended & follows, np.roll(tokens.ids, -1), -1)
    else:
        decided = target if masked else tokens.attended & (follows | ends)
        labels = np.where(decided, 0, -1)
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
    row = document.content
    where = document.where
    if kind == "given":
        if isinstance(row, str):
            raise DataError(
                f"labels 'given', but {where} is text", "documents with input_ids and labels"
            )
        if row.labels is None:
            raise DataError(f"labels 'given', but none in {where}", "labels beside input_ids")
    elif kind == "next" and isinstance(row, TokenRow) and row.labels is not None:
        for wrong in np.flatnonzero((row.labels >= 0) & (row.labels != row.ids))[:1]:
            raise DataError(
                f"label {row.labels[wrong]} for token {row.ids[wrong]} in {where}",
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
    masked : bool
        Whether the model is a masked one; see `position_labels`.

    Attributes
    ----------
    ids : Column of int32
        The tokens; one without attention is stored as -1 - id.
    labels : Column of int32
        The label of each token's position, -1 where it is no sample.
    ends : Column of int64
        The position behind the last token of each document.
    n_samples, n_token_ids : int
        Samples; the largest token id plus one.
    """

    def __init__(self, kind: Kind, excluded: npt.NDArray[np.int32], masked: bool) -> None:
        self.ids = Column(np.int32)
        self.labels = Column(np.int32)
        self.ends = Column(np.int64)
        self.n_samples = self.n_token_ids = 0
        self._kind = kind
        self._excluded = excluded
        self._masked = masked
        self._end = 0  # of the last document that is complete
        self._n_empty = 0
        # The last token of a document that goes on: it has yet to learn what is next.
        self._carried: list[TokenRow] = []

    def read(
        self,
        sources: Sequence[Source],
        tokenizer: Any,
        progress: Progress | None,
        enough: int | None,
        context: int,
        pack: bool,
    ) -> None:
        """Read the documents of all sources, or no more than hold `enough` samples.

        Raises
        ------
        DataError
            When a document cannot be read, lacks labels, or there is no sample in any.
        """
        last = None  # the last sample that is wanted
        with closing(_checked_documents(sources, self._kind, progress)) as documents:
            for rows in tokenize(documents, tokenizer):
                missing = -1 if enough is None else enough - self.n_samples
                samples = self._add(rows)
                if 0 < missing <= len(samples):
                    last = int(samples[missing - 1])
                # Its window is read to its end, for a model may look both ways.
                if last is not None and (
                    len(self.ids) >= last + context or (self._end > last and not pack)
                ):
                    break
        if self._end < len(self.ids):  # the rest of the last document was not needed
            self.ends.write(np.array([len(self.ids)]))
        if not self.n_samples:
            raise DataError(
                f"no sample in the texts (documents: {len(self.ends)}, tokens: {len(self.ids)}, "
                f"empty documents: {self._n_empty})",
                _SAMPLES[self._kind],
            )

    def _add(self, rows: list[TokenRow]) -> npt.NDArray[np.int64]:
        """Add documents; return the positions of their samples."""
        start = len(self.ids)
        rows = [*self._carried, *rows]
        tokens = TokenRow.join(rows)
        ends = np.cumsum([len(row) for row in rows])[[row.ends for row in rows]]
        last = np.append(ends, len(tokens)) - 1
        labels = position_labels(tokens, last[last >= 0], self._kind, self._excluded, self._masked)
        # What goes on is text, of which no token is masked.
        known = len(tokens) if rows[-1].ends else max(len(tokens) - 1, 0)
        self._carried = [TokenRow.of_text(tokens.ids[known:], ends=False)]
        labels = labels[:known]
        # One number holds token and attention: a corpus is 8 bytes per token on the disk.
        self.ids.write(np.where(tokens.attended, tokens.ids, -1 - tokens.ids)[:known])
        self.labels.write(labels)
        lengths = np.diff(ends + start, prepend=self._end)
        self._n_empty += int(np.count_nonzero(lengths == 0))
        self.ends.write((ends + start)[lengths > 0])
        self._end += int(lengths.sum())
        self.n_token_ids = max(self.n_token_ids, int(tokens.ids.max(initial=-1)) + 1)
        samples = np.flatnonzero(labels >= 0) + start
        self.n_samples += len(samples)
        return samples


def _checked_documents(
    sources: Sequence[Source], kind: Kind, progress: Progress | None
) -> Generator[Document]:
    """Read the documents of all sources, check that each has its labels, tell how far it is."""
    total = sum(source.size for source in sources)
    with counted(progress, "reading texts", total, "B") as advance:
        for source in sources:
            for document in source.documents():
                check_labels(document, kind)  # here, where an error can still name the document
                yield document
                advance(document.size)


# Which samples are taken when every class may give only so many.


def random_draws(start: int, stop: int, seed: int) -> npt.NDArray[np.uint64]:
    """Draw a number for every position from `start` to `stop`, by position and seed only.

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
    Memory is that of the chosen and of as many more, or of one block.
    """
    # Labels, draws and positions: the lowest so far, then those that came since.
    parts: list[tuple[npt.NDArray[Any], ...]] = []
    n_lowest = n_since = 0
    # Classes that have all their samples take only lower draws than the highest of those.
    full = np.empty(0, np.int32)
    highest = np.empty(0, np.uint64)
    for start in range(0, len(labels), _TOKENS):
        block = labels.read(start, start + _TOKENS)
        candidate = block >= 0
        draws = random_draws(start, start + len(block), seed)
        if len(full):
            nearest = np.minimum(np.searchsorted(full, block), len(full) - 1)
            candidate &= (full[nearest] != block) | (draws < highest[nearest])
        places = np.flatnonzero(candidate)
        parts.append((block[places], draws[places], places + start))
        n_since += len(places)
        # All are sorted: that waits until there are as many new as old.
        if n_since >= max(n_lowest, _TOKENS):
            classes, draws, positions, rank = _lowest(parts, cap)
            parts = [(classes, draws, positions)]
            n_lowest = len(classes)
            n_since = 0
            full = classes[rank == cap - 1]
            highest = draws[rank == cap - 1]
    return np.sort(_lowest(parts, cap)[2])


def _lowest(parts: list[tuple[npt.NDArray[Any], ...]], cap: int) -> tuple[npt.NDArray[Any], ...]:
    """Choose the lowest draws of each class, in order; also returns their ranks in the class."""
    labels, draws, positions = (np.concatenate(part) for part in zip(*parts, strict=True))
    # By class, and of each the lowest draws first.
    order = np.lexsort((draws, labels))
    ordered = labels[order]
    rank = np.arange(len(order)) - np.searchsorted(ordered, ordered)
    order = order[rank < cap]
    return labels[order], draws[order], positions[order], rank[rank < cap]


# Windows: how documents are cut or packed.


def cut_windows(ends: Column, context: int) -> Iterator[Bounds]:
    """Cut each document, of which `ends` are the ends, into windows; its last one may be short."""
    start = 0
    for document in range(0, len(ends), _DOCUMENTS):
        stop = ends.read(document, document + _DOCUMENTS)
        lengths = np.diff(stop, prepend=start)
        start = int(stop[-1])
        n_windows = -(-lengths // context)
        # The number of each window within its document.
        number = np.arange(n_windows.sum()) - np.repeat(np.cumsum(n_windows) - n_windows, n_windows)
        first = np.repeat(stop - lengths, n_windows) + number * context
        behind = np.minimum(first + context, np.repeat(stop, n_windows))
        # So many documents may be many tokens: windows that end in one stretch go together.
        cuts = np.flatnonzero(np.diff(behind // _TOKENS)) + 1
        yield from zip(np.split(first, cuts), np.split(behind, cuts), strict=True)


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
    kind : {"next", "given", "argmax"}
        What the labels are.
    n_token_ids : int
        The largest token id plus one.
    n_samples : int
        Positions that are samples.
    fingerprint : str
        Hash of the windows with their tokens and labels: equal ones give equal rows.
    """

    kind: Kind
    n_token_ids: int
    n_samples: int
    fingerprint: str
    _ids: Column  # a token without attention is stored as -1 - id
    _labels: Column
    _starts: Column  # of the windows that hold samples
    _stops: Column

    def label_counts(self, n_classes: int) -> npt.NDArray[np.int64]:
        """Count the samples of each of `n_classes` classes.

        Raises
        ------
        DataError
            When a label is K or more.
        """
        counts = np.zeros(n_classes, np.int64)
        # Behind the last window are labels of samples that are not taken.
        (end,) = self._stops.read(len(self._stops) - 1, len(self._stops))
        for start in range(0, int(end), _TOKENS):
            labels = self._labels.read(start, min(start + _TOKENS, int(end)))
            largest = int(labels.max())
            if largest >= n_classes:
                raise DataError(
                    f"label {largest} in the texts", f"labels below {n_classes} classes"
                )
            counts += np.bincount(labels[labels >= 0], minlength=n_classes)
        return counts

    def batches(self, batch_size: int, first: int = 0, step: int = 1) -> Iterator[TokenBatch]:
        """Read the windows in order, `batch_size` at a time; the last batch may have fewer.

        The samples and their order are the same for any size. Of the batches only number `first`,
        `first + step`, ... are read.
        """
        for start in range(first * batch_size, len(self._starts), step * batch_size):
            starts = self._starts.read(start, start + batch_size)
            stops = self._stops.read(start, start + batch_size)
            # Padding stands on the right: positions are those of the unpadded window.
            shape = len(starts), int((stops - starts).max())
            ids = np.zeros(shape, np.int64)
            mask = np.zeros(shape, np.int64)
            labels = np.full(shape, -1, np.int64)
            for row, (begin, stop) in enumerate(zip(starts, stops, strict=True)):
                tokens = self._ids.read(begin, stop)
                mask[row, : len(tokens)] = tokens >= 0
                ids[row, : len(tokens)] = np.where(tokens < 0, -1 - tokens, tokens)
                labels[row, : len(tokens)] = self._labels.read(begin, stop)
            yield TokenBatch(ids, mask, labels)


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
        As `find_texts` has them. A document of JSON lines or a data set may hold ``input_ids``,
        with ``attention_mask``, ``loss_mask`` and ``labels`` where there are such, in place of
        text.
    tokenizer : transformers.PreTrainedTokenizerBase or None
        Makes tokens of text, and adds its special tokens to every document. None when all
        documents hold ``input_ids``.
    context : int
        Tokens of a full window, at least 2. Windows do not overlap.
    labels : {"next", "given", "argmax"}, optional
        ``next``: the next token of the same document, also where it begins the next window; never
        a token of another document, of padding, without attention, with a negative label or with
        a loss mask of 0. ``given``: the documents' own ``labels``, position by position; where
        they are negative, or the loss mask is 0, there is no sample. ``argmax``: what the model
        will decide; every position is a sample (of class 0 for now) but for those whose next token
        is masked; for a masked model, those that are masked themselves.
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
    excluded = _check_excluded(exclude, tokenizer, labels, per_class_cap)
    sources = find_texts(texts, field)
    # None stands for documents that are tokenized already.
    if tokenizer is not None and not hasattr(tokenizer, "convert_ids_to_tokens"):
        raise UsageError(
            f"a tokenizer of type {type(tokenizer).__name__}",
            "a tokenizer of transformers",
            "transformers.AutoTokenizer.from_pretrained(...) makes one",
        )
    reading = Reading(labels, excluded, masked)
    enough = max_tokens if per_class_cap is None else None
    reading.read(sources, tokenizer, progress, enough, context, pack)
    chosen = None
    if per_class_cap is not None:
        chosen = lowest_per_class(reading.labels, per_class_cap, seed)
    ends = reading.ends
    if pack:  # as if all were one document
        ends = Column(np.int64)
        ends.write(np.array([len(reading.ids)]))
    return _settle(reading, labels, cut_windows(ends, context), chosen, max_tokens)


def _settle(
    reading: Reading,
    kind: Kind,
    bounds: Iterator[Bounds],
    chosen: npt.NDArray[np.int64] | None,
    most: int | None,
) -> Corpus:
    """Find the windows that hold samples, and make the labels of all others' positions -1.

    `bounds` are all windows in order, without gaps. Only the positions `chosen`, which are in
    order, and of them only the first `most` are taken.
    """
    ids = reading.ids
    labels = reading.labels
    starts = Column(np.int64)
    stops = Column(np.int64)
    n_samples = 0
    # Dumps record this hash: what it is made of, and in which order, must not change.
    shapes = hashlib.sha256()
    contents = hashlib.sha256()
    for first, behind in bounds:
        begin = int(first[0])
        end = int(behind[-1])
        taken = labels.read(begin, end)
        out = taken >= 0
        if chosen is not None:
            out[chosen[slice(*np.searchsorted(chosen, [begin, end]))] - begin] = False
            taken[out] = -1
        if most is not None:
            taken[np.flatnonzero(taken >= 0)[most - n_samples :]] = -1
        labels.write(taken, begin)
        inside = taken >= 0
        n_samples += int(np.count_nonzero(inside))
        # Windows have no gaps between them, so that each goes on to where the next begins.
        held = np.logical_or.reduceat(inside, first - begin)
        starts.write(first[held])
        stops.write(behind[held])
        lengths = behind - first
        rows = np.repeat(held, lengths)
        shapes.update(lengths[held].tobytes())
        contents.update(np.stack([ids.read(begin, end), taken], 1)[rows].tobytes())
        if most is not None and n_samples >= most:
            break
    shapes.update(contents.digest())
    return Corpus(
        kind,
        reading.n_token_ids,
        n_samples,
        shapes.hexdigest(),
        ids,
        labels,
        starts,
        stops,
    )


def _check_excluded(
    exclude: Iterable[int], tokenizer: Any, labels: Kind, per_class_cap: int | None
) -> npt.NDArray[np.int32]:
    """Check what leaves samples out, before texts are read; return the excluded ids in order."""
    try:
        ids = sorted({index(token) for token in exclude})
    except TypeError as error:
        raise UsageError(f"excluded ids {exclude!r}", "a list of token ids") from error
    if ids and ids[0] < 0:
        raise UsageError(f"excluded id {ids[0]}", "ids of the vocabulary, from 0")
    if labels == "argmax" and (ids or per_class_cap is not None):
        raise UsageError(
            f"labels 'argmax' with {'exclude' if ids else 'per_class_cap'}",
            "labels that are known before the forward pass",
            "take labels 'next' or 'given', or leave it out",
        )
    size = vocabulary_of(tokenizer) if ids and tokenizer is not None else LARGEST_ID + 1
    if ids and ids[-1] >= size:
        raise UsageError(f"excluded id {ids[-1]}", f"ids of the vocabulary, below {size:,}")
    return np.array(ids, np.int32)
