"""What a document is, wherever it comes from."""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from ncbatch.errors import DataError
from ncbatch.ingest.language.token_rows import TokenRow


@dataclass(frozen=True)
class Document:
    """A text, or what a tokenizer made of one.

    Attributes
    ----------
    where : str
        Where it stands, for messages: ``line 3 of 'a.jsonl'``.
    content : str or TokenRow
        The text; empty when there is none.
    size : int
        Bytes read for it, for progress.
    goes_on : bool, optional
        Whether this is only a part of a text, which the next one goes on with.
    """

    where: str
    content: str | TokenRow
    size: int
    goes_on: bool = False


class Source(Protocol):
    """Something that documents are read from."""

    @property
    def size(self) -> int:
        """Bytes to read, for progress."""
        ...

    def documents(self) -> Iterator[Document]:
        """Read the documents in order, holding few of them."""
        ...


def takes_tokens(field: str, names: Container[str]) -> bool:
    """Say whether a document with fields of these names is taken as tokens.

    It is when it has ``input_ids``, whatever text stands beside them, unless `field` names
    another field than ``text``.
    """
    return field in ("text", "input_ids") and "input_ids" in names


def text_of(value: Any, field: str, where: str) -> str:
    """Check the text of a field; null is an empty text.

    Raises
    ------
    DataError
        When it is no text, or holds half a surrogate pair, which no tokenizer takes.
    """
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"field '{field}' in {where} holds {type(value).__name__}", "text")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"character {error.start} of field '{field}' in {where} is half a surrogate pair",
                "text that UTF-8 can hold",
            ) from error
    return value
