"""Reading: from sources of documents to columns of tokens and labels."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing

import numpy as np
import numpy.typing as npt

from ncbatch.engine import Progress
from ncbatch.errors import DataError
from ncbatch.ingest.language.documents import Document, Source
from ncbatch.ingest.language.labels import Kind, Tokens, check_labels, position_labels
from ncbatch.ingest.language.scratch import Column
from ncbatch.ingest.language.token_rows import TokenRow
from ncbatch.ingest.language.tokenizing import Encode, tokenized


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
        with closing(_checked(sources, self._kind, progress)) as documents:
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


def _checked(
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
