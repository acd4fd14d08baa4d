"""Texts: documents from text files, JSON lines and saved data sets, one at a time."""

from __future__ import annotations

import codecs
import glob
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ncbatch.errors import DataError, unknown_name
from ncbatch.ingest.language.documents import Document, Source, takes_tokens, text_of
from ncbatch.ingest.language.pieces import PIECE, pieces
from ncbatch.ingest.language.saved import SavedDataset
from ncbatch.ingest.language.token_rows import read_token_row
from ncbatch.store.names import natural_key

Texts = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
_LINES = (".jsonl", ".ndjson")
_KINDS = "text files, .jsonl files or a folder written by datasets.save_to_disk"


@dataclass(frozen=True)
class TextFile:
    """A text file in UTF-8: one document, a long one in pieces."""

    path: Path

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return _size(self.path)

    def documents(self) -> Iterator[Document]:
        """Read the only document, holding a piece of it.

        Raises
        ------
        DataError
            When the file cannot be read, or is not UTF-8: names the first byte that is not.
        """
        n_read = told = 0

        def parts() -> Iterator[str]:
            nonlocal n_read
            left = b""  # the beginning of a character
            with self.path.open("rb") as file:
                while True:
                    data = file.read(PIECE)
                    text, used = _decode(left + data, self.path, n_read - len(left), not data)
                    left, n_read = (left + data)[used:], n_read + len(data)
                    yield text
                    if not data:
                        return

        try:
            for piece, goes_on in pieces(parts()):
                yield Document(f"'{self.path}'", piece, n_read - told, goes_on)
                told = n_read
        except OSError as error:
            raise _unreadable(self.path, error) from error


@dataclass(frozen=True)
class JsonLines:
    """A file with a JSON object per line, each of them a document; blank lines are none.

    Attributes
    ----------
    path : Path
        The file.
    field : str
        Which field holds the text; see `takes_tokens` for lines of tokens.
    """

    path: Path
    field: str

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return _size(self.path)

    def documents(self) -> Iterator[Document]:
        """Read line by line, holding one.

        Raises
        ------
        DataError
            When the file cannot be read, or a line is not UTF-8, no JSON object, or has no text
            in the field; named by its number.
        UnknownNameError
            When a line lacks the field.
        """
        try:
            start = 0
            with self.path.open("rb") as file:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield self._document(line, number, start)
                    start += len(line)
        except OSError as error:
            raise _unreadable(self.path, error) from error

    def _document(self, line: bytes, number: int, start: int) -> Document:
        where = f"line {number} of '{self.path}'"
        text, _ = _decode(line, self.path, start)
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            raise DataError(f"{where} is not JSON: {reason}", "one JSON object per line") from error
        if not isinstance(row, dict):
            raise DataError(f"{where} is no JSON object", "one JSON object per line")
        if takes_tokens(self.field, row):
            return Document(where, read_token_row(row, where), len(line))
        if self.field not in row:
            raise unknown_name("field", self.field, row, where)
        return Document(where, text_of(row[self.field], self.field, where), len(line))


def find_texts(texts: Texts, field: str = "text") -> list[Source]:
    """Find what documents can be read from; reads nothing yet.

    Parameters
    ----------
    texts : path, or sequence of paths
        Each a text file, a ``.jsonl`` (``.ndjson``) file, a folder that
        ``datasets.save_to_disk`` wrote, any other folder (all that is in it and in folders below,
        but for hidden names), or a glob (``**`` for folders at any depth).
    field : str, optional
        Which field of JSON lines and data sets holds the text.

    Returns
    -------
    list of Source
        In the order given; within a folder or glob in natural order (``a2`` before ``a10``).

    Raises
    ------
    DataError
        When nothing is there, or a file is of a kind that is not read.
    UnknownNameError
        When a data set has no such field.
    """
    paths = [texts] if isinstance(texts, str | os.PathLike) else list(texts)
    if not paths:
        raise DataError("no text given", _KINDS)
    return [source for path in paths for source in _sources_of(os.fspath(path), field)]


def _sources_of(given: str, field: str) -> list[Source]:
    path = Path(given)
    if path.exists():
        found = _inside(path, field) if path.is_dir() else [_file(path, field)]
    else:
        matches = sorted(map(Path, glob.glob(given, recursive=True)), key=_natural)
        found = [
            source
            for match in matches
            if not match.is_dir() or _is_dataset(match)
            for source in (_inside(match, field) if match.is_dir() else [_file(match, field)])
        ]
    if not found:
        raise DataError(f"no text at '{given}'", _KINDS)
    return found


def _inside(folder: Path, field: str) -> list[Source]:
    """Give a data set, or all files of a folder and of those below."""
    if _is_dataset(folder):
        return [SavedDataset(folder, field)]
    if (folder / "dataset_dict.json").is_file():
        raise DataError(
            f"'{folder}' holds several splits",
            "one of them: " + ", ".join(f"'{folder / name}'" for name in _splits(folder)),
        )
    found: list[Source] = []
    for path in sorted(folder.iterdir(), key=_natural):
        if path.name.startswith("."):
            continue
        if not path.is_dir():
            found.append(_file(path, field))
        elif not path.is_symlink():  # a link to a folder above would never end
            found += _inside(path, field)
    return found


def _is_dataset(folder: Path) -> bool:
    return (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()


def _splits(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if _is_dataset(path))


def _file(path: Path, field: str) -> Source:
    ending = path.suffix.lower()
    if ending in _LINES:
        return JsonLines(path, field)
    if ending == ".json":
        raise DataError(
            f"'{path}' may be one document or many",
            _KINDS,
            "name it .jsonl when every line is a JSON object, .txt when it is one text",
        )
    return TextFile(path)


def _natural(path: Path) -> list[list[tuple[int, int | str]]]:
    return [natural_key(name) for name in path.parts]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # reading it will say why
        return 0


def _decode(data: bytes, path: Path, start: int, final: bool = True) -> tuple[str, int]:
    """Decode bytes that stand at `start` of a file; a byte order mark is left out.

    Give how many bytes were used, too: a character may be cut short at the end of what is not `final`.
    """
    try:
        text, used = codecs.utf_8_decode(data, "strict", final)
    except UnicodeDecodeError as error:
        at = error.start
        raise DataError(
            f"'{path}' is not UTF-8: byte {start + at} is 0x{data[at]:02x}",
            "text in UTF-8",
            "convert it (iconv -f latin1 -t utf-8), or leave it out with a glob",
        ) from error
    return text.removeprefix("\ufeff") if start == 0 else text, used


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f"'{path}' cannot be read: {error.strerror}", "a readable file")
