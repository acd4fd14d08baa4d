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
        How many samples are wanted; all by default.
    multiple : int, optional
        The tokens of a window, where windows are filled across documents: those of the last
        wanted sample's window are read too.

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
        multiple: int = 1,
    ) -> None:
        self.ids, self.labels, self.ends = Column(np.int32), Column(np.int32), Column(np.int64)
        self.n_empty = self.n_samples = self.n_token_ids = 0
        self._kind, self._excluded = kind, excluded
        self._enough, self._multiple = enough, multiple
        self._needed: int | None = None  # tokens up to the end of the last sample's window

    def read(self, sources: Sequence[Source], encode: Encode, progress: Progress | None) -> None:
        """Read the documents of all sources, or as many as hold enough samples.

        Raises
        ------
        DataError
            When a document cannot be read, lacks labels, or there is no sample in any.
        """
        with closing(_checked(sources, self._kind, progress)) as documents:
            for rows in tokenized(documents, encode):
                self._add(Tokens.of(rows), len(rows))
                if self._needed is not None and len(self.ids) >= self._needed:
                    break
        if not self.n_samples:
            raise _no_sample(self, self._kind)

    def _add(self, tokens: Tokens, n_documents: int) -> None:
        """Add documents, of which `tokens` leaves the empty ones out."""
        start = len(self.ids)
        labels = position_labels(tokens, self._kind, self._excluded)
        samples = np.flatnonzero(labels >= 0)
        if self._enough is not None and self._needed is None:
            left = self._enough - self.n_samples
            if len(samples) >= left:
                last = start + int(samples[left - 1])
                self._needed = -(-(last + 1) // self._multiple) * self._multiple
        self.n_samples += len(samples)
        self.n_empty += n_documents - len(tokens.lengths)
        self.n_token_ids = max(self.n_token_ids, int(tokens.ids.max(initial=-1)) + 1)
        self.ids.append(np.where(tokens.attended, tokens.ids, -1 - tokens.ids))
        self.labels.append(labels)
        self.ends.append(start + np.cumsum(tokens.lengths))


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
