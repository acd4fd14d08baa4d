"""Pieces of long texts: cut where a tokenizer would most likely cut as well."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

#: Characters of a piece at most. A tokenizer keeps some hundred bytes per token while it works.
PIECE = 2**18


def pieces(parts: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """Cut a text into pieces of `PIECE` characters at most.

    Parameters
    ----------
    parts : iterable of str
        The text, a part after another, wherever they end.

    Yields
    ------
    str
        A piece; only that of an empty text is empty.
    bool
        Whether another follows.
    """
    held = ""
    for part in parts:
        held += part
        start = 0
        while len(held) - start > PIECE:
            end = _place(held, start)
            yield held[start:end], True
            start = end
        held = held[start:]
    yield held, False


def pieces_of(text: str) -> Iterator[tuple[str, bool]]:
    """Cut a text that is in memory."""
    return pieces(text[start : start + PIECE] for start in range(0, len(text), PIECE))


def _place(text: str, start: int) -> int:
    """Find where the piece from `start` on ends; `text` goes on for more than a piece.

    In its second half: behind the last line end between two lines that have no blank at it, else
    behind the last line end, else before the last blank, for tokens begin with theirs, else
    anywhere.
    """
    first, last = start + PIECE // 2, start + PIECE
    at = text.rfind("\n", first, last)
    any_end = at
    while at > 0:
        if not text[at - 1].isspace() and not text[at + 1].isspace():
            return at + 1
        at = text.rfind("\n", first, at)
    if any_end >= 0:
        return any_end + 1
    blank = max(text.rfind(mark, first, last) for mark in " \t\r\u3000")
    return blank if blank > start else last
