"""Documents that are tokenized already: ids with the masks and labels that stand beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ncbatch.errors import DataError

TOKEN_FIELDS = ("input_ids", "attention_mask", "loss_mask", "labels")
LARGEST_ID = 2**31 - 1


@dataclass(frozen=True)
class TokenRow:
    """The T tokens of a document, without the padding at its ends.

    Attributes
    ----------
    ids : array (T,) of int32
        Token ids.
    attended : array (T,) of bool, optional
        Which tokens the model attends to; all of them by default.
    kept : array (T,) of bool, optional
        False where a loss mask of 0 leaves a token out; all are kept by default.
    labels : array (T,) of int32, optional
        The labels as given, -1 for every negative one.
    """

    ids: npt.NDArray[np.int32]
    attended: npt.NDArray[np.bool_] | None = None
    kept: npt.NDArray[np.bool_] | None = None
    labels: npt.NDArray[np.int32] | None = None

    def __len__(self) -> int:
        return len(self.ids)


def read_token_row(columns: Mapping[str, Any], where: str) -> TokenRow:
    """Check ``input_ids`` and what stands beside them; padding at either end is cut off.

    Parameters
    ----------
    columns : mapping
        Lists or arrays by name; those of `TOKEN_FIELDS` are read, ``input_ids`` must be there.
    where : str
        The document, for messages.

    Returns
    -------
    TokenRow
        From the first to the last token with attention. So the tokens have the same places
        (and position ids) whether padding stood on the left, on the right or nowhere.

    Raises
    ------
    DataError
        When a column is no list of integers, is longer or shorter than ``input_ids``, or holds a
        token id that cannot be one.
    """
    ids = _numbers(columns["input_ids"], "input_ids", where, "iu")
    for wrong in ids[(ids < 0) | (ids > LARGEST_ID)][:1].tolist():
        raise DataError(f"token id {wrong} in {where}", "ids of the vocabulary, from 0")
    found = {
        name: _beside(columns[name], name, where, len(ids))
        for name in TOKEN_FIELDS[1:]
        if columns.get(name) is not None
    }
    attended = found.get("attention_mask")
    places = np.arange(len(ids)) if attended is None else np.flatnonzero(attended)
    part = slice(int(places[0]), int(places[-1]) + 1) if len(places) else slice(0, 0)
    return TokenRow(
        ids[part].astype(np.int32),
        None if attended is None else attended[part] != 0,
        None if "loss_mask" not in found else found["loss_mask"][part] != 0,
        None if "labels" not in found else np.maximum(found["labels"], -1)[part].astype(np.int32),
    )


def _beside(values: Any, name: str, where: str, length: int) -> npt.NDArray[Any]:
    array = _numbers(values, name, where, "iu" if name == "labels" else "biuf")
    if len(array) != length:
        raise DataError(f"{len(array)} {name} for {length} input_ids in {where}", "one per token")
    if name == "labels" and length and int(array.max()) > LARGEST_ID:
        raise DataError(f"label {int(array.max())} in {where}", "class ids, or negative ones")
    return array


def _numbers(values: Any, name: str, where: str, kinds: str) -> npt.NDArray[Any]:
    try:
        array = np.asarray(values)
    except (ValueError, OverflowError):  # lists of several lengths, numbers beyond 64 bits
        array = np.asarray(None)
    if array.ndim == 1 and not array.size:
        return array.astype(np.int64)
    if array.ndim != 1 or array.dtype.kind not in kinds:
        raise DataError(f"{name} in {where} that are no list of integers", "one integer per token")
    return array
