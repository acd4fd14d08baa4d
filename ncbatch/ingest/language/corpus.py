"""The corpus: texts as windows of tokens with labels, kept in files that have no name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import index
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from ncbatch.engine import Progress
from ncbatch.errors import DataError, UsageError, unknown_name
from ncbatch.ingest.language.chosen import lowest_per_class
from ncbatch.ingest.language.labels import KINDS, Kind
from ncbatch.ingest.language.reading import Reading
from ncbatch.ingest.language.scratch import Column
from ncbatch.ingest.language.texts import Texts, find_texts
from ncbatch.ingest.language.token_rows import LARGEST_ID
from ncbatch.ingest.language.tokenizing import encoder_of, vocabulary_of
from ncbatch.ingest.language.windows import (
    Windows,
    cut_windows,
    packed_windows,
    settle_windows,
)

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
    excluded = _checked(context, labels, exclude, max_tokens, per_class_cap)
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


def _checked(
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
