"""Data sets in a folder that ``datasets.save_to_disk`` wrote."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ncbatch.errors import DataError, unknown_name
from ncbatch.ingest.language.documents import Document, takes_tokens, text_of
from ncbatch.ingest.language.token_rows import TOKEN_FIELDS, TokenRow, read_token_row

_ROWS_AT_A_TIME = 256


@dataclass(frozen=True)
class SavedDataset:
    """The rows of a saved data set, each of them a document.

    Attributes
    ----------
    path : Path
        The folder of one split.
    field : str
        Which column holds the text; see `takes_tokens` for data sets of tokens.

    Raises
    ------
    DataError
        When the library ``datasets`` is not installed, or cannot read the folder.
    UnknownNameError
        When there is no such column.
    """

    path: Path
    field: str

    def __post_init__(self) -> None:
        names = self._dataset.column_names
        if not takes_tokens(self.field, names) and self.field not in names:
            raise unknown_name("field", self.field, names, f"'{self.path}'")

    @property
    def size(self) -> int:
        """Bytes of the rows."""
        return self._row_bytes * len(self._dataset)

    def documents(self) -> Iterator[Document]:
        """Read the rows in order, some at a time.

        Raises
        ------
        DataError
            When a row holds no text or tokens, or cannot be read; named by its number.
        """
        names = self._dataset.column_names
        tokens = takes_tokens(self.field, names)
        wanted = [name for name in TOKEN_FIELDS if name in names] if tokens else [self.field]
        chosen = self._dataset.select_columns(wanted).with_format("arrow")
        row = 0
        try:
            for table in chosen.iter(_ROWS_AT_A_TIME):
                for values in zip(*(table.column(name) for name in wanted), strict=True):
                    where = f"row {row} of '{self.path}'"
                    found = {
                        name: _plain(value) for name, value in zip(wanted, values, strict=True)
                    }
                    yield Document(where, self._content(found, tokens, where), self._row_bytes)
                    row += 1
        except OSError as error:
            raise _unreadable(self.path, error) from error

    def _content(self, row: dict[str, Any], tokens: bool, where: str) -> str | TokenRow:
        if not tokens:
            return text_of(row[self.field], self.field, where)
        if row["input_ids"] is None:
            raise DataError(f"input_ids in {where} are null", "a list of integers")
        return read_token_row(row, where)

    @cached_property
    def _dataset(self) -> Any:
        try:
            import datasets
        except ImportError as error:
            raise DataError(
                f"'{self.path}' is a saved data set, and the library datasets is not installed",
                remedy='pip install "ncbatch[hf]"',
            ) from error
        try:
            return datasets.load_from_disk(str(self.path))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise _unreadable(self.path, error) from error

    @cached_property
    def _row_bytes(self) -> int:
        """Bytes per row, for progress."""
        total = sum(file.stat().st_size for file in self.path.glob("*.arrow"))
        return total // max(len(self._dataset), 1)


def _plain(value: Any) -> Any:
    """Give lists as arrays, which skips a Python number per token; anything else as it is."""
    values = getattr(value, "values", None)
    if values is None or values.null_count:
        return value.as_py()
    return values.to_numpy(zero_copy_only=False)


def _unreadable(path: Path, error: Exception) -> DataError:
    reason = " ".join(str(error).split())
    return DataError(f"data set '{path}' cannot be read: {reason}", "an intact data set")
