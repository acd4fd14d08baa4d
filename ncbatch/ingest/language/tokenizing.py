"""From documents to tokens: many at a time, with whatever tokenizer there is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from ncbatch.errors import DataError, NcbatchError, UsageError
from ncbatch.ingest.language.documents import Document
from ncbatch.ingest.language.pieces import PIECE, pieces_of
from ncbatch.ingest.language.token_rows import TokenRow


class Encode(Protocol):
    """Turns texts into lists of token ids, with or without the special tokens at their ends."""

    def __call__(self, texts: list[str], special: bool = True) -> list[list[int]]:
        """Tokenize all `texts`."""
        ...


# A tokenizer keeps some hundred bytes per token while it works.
_CHARACTERS, _DOCUMENTS = 2**20, 1024
_PROBE = 1000


def encoder_of(tokenizer: Any) -> Encode:
    """Give the function that turns texts into lists of token ids.

    Parameters
    ----------
    tokenizer : transformers.PreTrainedTokenizerBase or tokenizers.Tokenizer or None
        It adds its special tokens to every text where they are asked for, and cuts and pads nothing whatever its own
        settings are. None stands for documents that are tokenized already.

    Raises
    ------
    UsageError
        When it is something else.
    """
    if tokenizer is None:
        return _no_tokenizer
    if hasattr(tokenizer, "encode_batch_fast"):
        return _of_tokenizers(tokenizer)
    if callable(tokenizer) and hasattr(tokenizer, "convert_ids_to_tokens"):
        return _of_transformers(tokenizer)
    raise UsageError(
        f"a tokenizer of type {type(tokenizer).__name__}",
        "a tokenizer of transformers or tokenizers",
        "transformers.AutoTokenizer.from_pretrained(...) makes one",
    )


def vocabulary_of(tokenizer: Any) -> int | None:
    """Give the largest token id plus one; None without a tokenizer."""
    if tokenizer is None:
        return None
    ids: dict[str, int] = tokenizer.get_vocab()
    size = len(tokenizer) if hasattr(tokenizer, "__len__") else tokenizer.get_vocab_size()
    return max([int(size), *(i + 1 for i in ids.values())])


def _no_tokenizer(texts: list[str], special: bool = True) -> list[list[int]]:
    raise UsageError("text, but no tokenizer", "a tokenizer", "documents with input_ids need none")


def _of_tokenizers(tokenizer: Any) -> Encode:
    if tokenizer.padding is not None or tokenizer.truncation is not None:
        tokenizer = type(tokenizer).from_str(tokenizer.to_str())  # the user's own stays as it is
        tokenizer.no_padding()
        tokenizer.no_truncation()

    def encode(texts: list[str], special: bool = True) -> list[list[int]]:
        found = tokenizer.encode_batch_fast(texts, add_special_tokens=special)
        return [one.ids for one in found]

    return encode


def _of_transformers(tokenizer: Any) -> Encode:
    def encode(texts: list[str], special: bool = True) -> list[list[int]]:
        found: list[list[int]] = tokenizer(
            texts, add_special_tokens=special, padding=False, truncation=False, return_attention_mask=False,
            return_token_type_ids=False, verbose=False,
        )["input_ids"]  # fmt: skip
        return found

    return encode


def tokenized(
    documents: Iterable[Document], encode: Encode
) -> Iterator[tuple[list[TokenRow], bool]]:
    """Tokenize documents, some at a time; a long text piece by piece.

    Parameters
    ----------
    documents : iterable of Document
        Texts, or tokens, which pass as they are.
    encode : callable
        From `encoder_of`.

    Yields
    ------
    list of TokenRow
        In the order of the documents; of length 0 for an empty text.
    bool
        Whether the last document goes on: with the first of the next list.

    Raises
    ------
    DataError
        When the tokenizer refuses a text.
    """
    rows = _Rows(encode)
    waiting: list[Document] = []
    characters = 0
    for document in _in_pieces(documents):
        waiting.append(document)
        characters += len(document.content)
        if characters >= _CHARACTERS or len(waiting) >= _DOCUMENTS:
            yield rows.of(waiting), rows.goes_on
            waiting, characters = [], 0
    if waiting:
        yield rows.of(waiting), rows.goes_on


def _in_pieces(documents: Iterable[Document]) -> Iterator[Document]:
    """Cut texts that came whole, though they are long."""
    for document in documents:
        if not isinstance(document.content, str) or len(document.content) <= PIECE:
            yield document
            continue
        for piece, more in pieces_of(document.content):
            yield replace(document, content=piece, goes_on=more or document.goes_on)


class _Rows:
    """Makes rows of documents and of their pieces; special tokens stand at a document's ends only."""

    def __init__(self, encode: Encode) -> None:
        self._encode = encode
        self._ends: tuple[list[int], list[int]] = [], []
        self.goes_on = False

    def of(self, documents: list[Document]) -> list[TokenRow]:
        """Tokenize some documents, of which the first may go on with the last of those before."""
        rows: list[TokenRow] = []
        parts: list[list[int]] = []  # of the text that goes on
        try:
            for document, ids in zip(documents, self._ids(documents), strict=True):
                content = document.content
                if not isinstance(content, str):
                    rows.append(content)
                    continue
                if document.goes_on and not self.goes_on:
                    self._ends = self._special(content)
                    parts.append(self._ends[0])
                parts.append(ids)
                if self.goes_on and not document.goes_on:
                    parts.append(self._ends[1])
                self.goes_on = document.goes_on
                if not self.goes_on:
                    rows.append(_joined(parts))
                    parts = []
        except NcbatchError:
            raise
        except Exception as error:  # tokenizers raises plain Exception
            reason = " ".join(str(error).split())
            raise DataError(
                f"the tokenizer fails between {documents[0].where} and {documents[-1].where}: {reason}",
                "a tokenizer that takes any text",
            ) from error
        return [*rows, _joined(parts)] if self.goes_on else rows

    def _ids(self, documents: list[Document]) -> list[list[int]]:
        """Tokenize texts, the whole ones with special tokens and the pieces without."""
        texts: dict[bool, list[str]] = {True: [], False: []}
        kinds: list[bool | None] = []
        begun = self.goes_on
        for document in documents:
            kind = None
            if isinstance(document.content, str) and document.content:
                kind = not (begun or document.goes_on)
                texts[kind].append(document.content)
            begun = document.goes_on
            kinds.append(kind)
        found = {
            kind: iter(self._encode(some, kind) if some else []) for kind, some in texts.items()
        }
        return [[] if kind is None else next(found[kind]) for kind in kinds]

    def _special(self, text: str) -> tuple[list[int], list[int]]:
        """Find the special tokens that begin and end a document."""
        for probe in (text[:_PROBE], "a", "."):
            (plain,), (whole,) = self._encode([probe], False), self._encode([probe], True)
            n = len(plain)
            for at in reversed(range(len(whole) - n + 1) if n else ()):
                if whole[at : at + n] == plain:
                    return whole[:at], whole[at + n :]
        if not whole:
            return [], []
        raise DataError(
            "a tokenizer whose special tokens do not stand at the ends of a text",
            f"texts of at most {PIECE:,} characters",
        )


def _joined(parts: list[list[int]]) -> TokenRow:
    return TokenRow(np.concatenate([np.array(part, np.int32) for part in parts]))
