"""From documents to tokens: many at a time, with whatever tokenizer there is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from ncbatch.errors import DataError, UsageError
from ncbatch.ingest.language.documents import Document
from ncbatch.ingest.language.token_rows import TokenRow

Encode = Callable[[list[str]], list[list[int]]]
# A tokenizer keeps some hundred bytes per token while it works.
_CHARACTERS, _DOCUMENTS = 2**20, 1024


def encoder_of(tokenizer: Any) -> Encode:
    """Give the function that turns texts into lists of token ids.

    Parameters
    ----------
    tokenizer : transformers.PreTrainedTokenizerBase or tokenizers.Tokenizer or None
        It adds its special tokens to every text, and cuts and pads nothing whatever its own
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


def _no_tokenizer(texts: list[str]) -> list[list[int]]:
    raise UsageError("text, but no tokenizer", "a tokenizer", "documents with input_ids need none")


def _of_tokenizers(tokenizer: Any) -> Encode:
    if tokenizer.padding is not None or tokenizer.truncation is not None:
        tokenizer = type(tokenizer).from_str(tokenizer.to_str())  # the user's own stays as it is
        tokenizer.no_padding()
        tokenizer.no_truncation()
    return lambda texts: [found.ids for found in tokenizer.encode_batch_fast(texts)]


def _of_transformers(tokenizer: Any) -> Encode:
    def encode(texts: list[str]) -> list[list[int]]:
        found: list[list[int]] = tokenizer(
            texts, padding=False, truncation=False, return_attention_mask=False,
            return_token_type_ids=False, verbose=False,
        )["input_ids"]  # fmt: skip
        return found

    return encode


def tokenized(documents: Iterable[Document], encode: Encode) -> Iterator[list[TokenRow]]:
    """Tokenize documents, some at a time.

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

    Raises
    ------
    DataError
        When the tokenizer refuses a text.
    """
    waiting: list[Document] = []
    characters = 0
    for document in documents:
        waiting.append(document)
        characters += len(document.content)
        if characters >= _CHARACTERS or len(waiting) >= _DOCUMENTS:
            yield _rows_of(waiting, encode)
            waiting, characters = [], 0
    if waiting:
        yield _rows_of(waiting, encode)


def _rows_of(documents: list[Document], encode: Encode) -> list[TokenRow]:
    texts = [found for d in documents if isinstance(found := d.content, str) and found]
    try:
        encoded = iter(encode(texts) if texts else [])
    except UsageError:
        raise
    except Exception as error:  # tokenizers raises plain Exception
        reason = " ".join(str(error).split())
        raise DataError(
            f"the tokenizer fails between {documents[0].where} and {documents[-1].where}: {reason}",
            "a tokenizer that takes any text",
        ) from error
    rows = []
    for document in documents:
        content = document.content
        if isinstance(content, str):
            content = TokenRow(np.array(next(encoded) if content else [], np.int32))
        rows.append(content)
    return rows
