"""Labels: which class each position of a text carries, and which positions are samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from ncbatch.errors import DataError
from ncbatch.ingest.language.documents import Document
from ncbatch.ingest.language.token_rows import TokenRow

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
