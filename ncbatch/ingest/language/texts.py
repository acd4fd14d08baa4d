"""Texts: documents from text files, JSON lines and saved data sets, and their tokens."""

from __future__ import annotations

import codecs
import glob
import json
import os
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
import numpy.typing as npt

from ncbatch.errors import DataError, NcbatchError, UsageError, unknown_name
from ncbatch.store.format import natural_key

Texts = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

# A tokenizer keeps some hundred bytes per token while it works. So a text is cut into pieces of at
# most so many characters, and so many characters and documents are tokenized together.
PIECE = 2**18
_CHARACTERS = 2**20
_DOCUMENTS = 1024

TOKEN_FIELDS = ("input_ids", "attention_mask", "loss_mask", "labels")
LARGEST_ID = 2**31 - 1
_KINDS = "text files, .jsonl files or a folder written by datasets.save_to_disk"
_ROWS_AT_A_TIME = 256  # of a saved data set
_PROBE = 1000  # characters that show which special tokens there are


@dataclass(frozen=True)
class TokenRow:
    """The T tokens of a document, or of a piece of one, without the padding at its ends.

    Attributes
    ----------
    ids : array (T,) of int32
        Token ids.
    attended : array (T,) of bool
        Which tokens the model attends to.
    kept : array (T,) of bool
        False where a loss mask of 0 leaves a token out.
    labels : array (T,) of int32, optional
        The labels as given, -1 for every negative one.
    ends : bool, optional
        Whether the document ends with it; else the next one goes on.
    """

    ids: npt.NDArray[np.int32]
    attended: npt.NDArray[np.bool_]
    kept: npt.NDArray[np.bool_]
    labels: npt.NDArray[np.int32] | None = None
    ends: bool = True

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def of_text(cls, ids: npt.ArrayLike, ends: bool = True) -> Self:
        """Take tokens of which none is masked."""
        row = np.asarray(ids, np.int32)
        every = np.ones(len(row), np.bool_)
        return cls(row, every, every, None, ends)

    @classmethod
    def join(cls, rows: Sequence[Self]) -> Self:
        """Lay rows one behind the other; one without labels has its own ids."""
        return cls(
            np.concatenate([row.ids for row in rows]),
            np.concatenate([row.attended for row in rows]),
            np.concatenate([row.kept for row in rows]),
            np.concatenate([row.ids if row.labels is None else row.labels for row in rows]),
        )


@dataclass(frozen=True)
class Document:
    """A text, a piece of a long one, or what a tokenizer made of one.

    Attributes
    ----------
    where : str
        Where it stands, for messages: ``line 3 of 'a.jsonl'``.
    content : str or TokenRow
        The text; empty when there is none.
    size : int
        Bytes read for it, for progress.
    begins, ends : bool, optional
        Whether it is the first and the last piece of its text.
    """

    where: str
    content: str | TokenRow
    size: int
    begins: bool = True
    ends: bool = True

    @property
    def is_whole(self) -> bool:
        """Whether its text is one piece."""
        return self.begins and self.ends


@dataclass(frozen=True)
class Source:
    """A file or a data set that documents are read from.

    Attributes
    ----------
    size : int
        Bytes to read, for progress.
    documents : callable
        Reads the documents in order, holding few of them; DataError names what cannot be read,
        UnknownNameError a field that is missing.
    """

    size: int
    documents: Callable[[], Iterator[Document]]


def find_texts(texts: Texts, field: str = "text") -> list[Source]:
    """Find what documents can be read from; of files nothing is read yet.

    Parameters
    ----------
    texts : path, or sequence of paths
        Each a text file, a ``.jsonl`` (``.ndjson``) file, a folder that
        ``datasets.save_to_disk`` wrote, any other folder (all that is in it and in folders below,
        but for hidden names), or a glob (``**`` for folders at any depth).
    field : str, optional
        Which field of JSON lines and data sets holds the text; see `takes_tokens`.

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
    sources: list[Source] = []
    for path in paths:
        here = list(_sources_at(os.fspath(path), field))
        if not here:
            raise DataError(f"no text at '{os.fspath(path)}'", _KINDS)
        sources += here
    return sources


def _sources_at(path: str, field: str) -> Iterator[Source]:
    if os.path.exists(path):  # also where its name looks like a glob
        yield from _sources_in(Path(path), field)
        return
    for match in sorted(map(Path, glob.glob(path, recursive=True)), key=_natural):
        # A glob gives files and data sets: what else is in a folder it must name itself.
        if not match.is_dir() or _is_dataset(match):
            yield from _sources_in(match, field)


def _sources_in(path: Path, field: str) -> Iterator[Source]:
    if not path.is_dir():
        yield _file_source(path, field)
    elif _is_dataset(path):
        yield _dataset_source(path, field)
    elif (path / "dataset_dict.json").is_file():
        splits = sorted(str(part) for part in path.iterdir() if _is_dataset(part))
        raise DataError(
            f"'{path}' holds several splits",
            "one of them: " + ", ".join(f"'{part}'" for part in splits),
        )
    else:
        for inside in sorted(path.iterdir(), key=_natural):
            # A link to a folder above would never end.
            linked = inside.is_dir() and inside.is_symlink()
            if not linked and not inside.name.startswith("."):
                yield from _sources_in(inside, field)


def _is_dataset(folder: Path) -> bool:
    return (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()


def _natural(path: Path) -> list[list[tuple[int, int | str]]]:
    return [natural_key(name) for name in path.parts]


# Files of text, and of JSON lines.


def _file_source(path: Path, field: str) -> Source:
    ending = path.suffix.lower()
    if ending == ".json":
        raise DataError(
            f"'{path}' may be one document or many",
            _KINDS,
            "name it .jsonl when every line is a JSON object, .txt when it is one text",
        )
    is_lines = ending in (".jsonl", ".ndjson")

    def documents() -> Iterator[Document]:
        try:
            with path.open("rb") as file, _naming_bad_bytes(file, path):
                yield from _lines_of(file, path, field) if is_lines else _text_of(file, path)
        except OSError as error:
            raise DataError(
                f"'{path}' cannot be read: {error.strerror}", "a readable file"
            ) from error

    # Of a file that is gone reading it will say so.
    return Source(os.path.getsize(path) if path.exists() else 0, documents)


@contextmanager
def _naming_bad_bytes(file: BinaryIO, path: Path) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        # What was being decoded ends where the file is read to.
        place = file.tell() - len(error.object) + error.start
        raise DataError(
            f"'{path}' is not UTF-8: byte {place} is 0x{error.object[error.start]:02x}",
            "text in UTF-8",
            "convert it (iconv -f latin1 -t utf-8), or leave it out with a glob",
        ) from error


def _text_of(file: BinaryIO, path: Path) -> Iterator[Document]:
    """Read the only document of a file, holding a piece of it."""
    parts = codecs.iterdecode(iter(partial(file.read, PIECE), b""), "utf-8-sig")
    told = 0
    for piece, begins, ends in cut_into_pieces(parts):
        yield Document(f"'{path}'", piece, file.tell() - told, begins, ends)
        told = file.tell()


def _lines_of(file: BinaryIO, path: Path, field: str) -> Iterator[Document]:
    """Read a document per line, holding one; blank lines are none."""
    for number, line in enumerate(file, 1):
        if line.strip():
            where = f"line {number} of '{path}'"
            row = _json_object(line.decode("utf-8-sig"), where)
            yield from _documents_of(row, field, where, len(line))


def _json_object(text: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise DataError(f"{where} is not JSON: {reason}", "one JSON object per line") from error
    if not isinstance(row, dict):
        raise DataError(f"{where} is no JSON object", "one JSON object per line")
    return row


# Folders that `datasets.save_to_disk` wrote.


def _dataset_source(path: Path, field: str) -> Source:
    try:
        import datasets  # takes seconds: only where there is such a folder

        rows = datasets.load_from_disk(str(path))
    except ImportError as error:
        raise DataError(
            f"'{path}' is a saved data set, and the library datasets is not installed",
            remedy='pip install "ncbatch[hf]"',
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _unreadable_dataset(path, error) from error
    names = rows.column_names
    columns = [field]
    if takes_tokens(field, names):
        columns = [name for name in TOKEN_FIELDS if name in names]
    elif field not in names:
        raise unknown_name("field", field, names, f"'{path}'")
    # Rows are not weighed one by one: progress needs no more than their mean.
    row_bytes = sum(file.stat().st_size for file in path.glob("*.arrow")) // max(len(rows), 1)

    def documents() -> Iterator[Document]:
        tables = rows.select_columns(columns).with_format("arrow").iter(_ROWS_AT_A_TIME)
        cells = (zip(*map(table.column, columns), strict=True) for table in tables)
        try:
            for number, values in enumerate(chain.from_iterable(cells)):
                row = dict(zip(columns, map(_plain, values), strict=True))
                where = f"row {number} of '{path}'"
                if "input_ids" in row and row["input_ids"] is None:
                    raise DataError(f"input_ids in {where} are null", "a list of integers")
                yield from _documents_of(row, field, where, row_bytes)
        except OSError as error:
            raise _unreadable_dataset(path, error) from error

    return Source(row_bytes * len(rows), documents)


def _plain(cell: Any) -> Any:
    """Take a list as an array, which skips a Python number per token; anything else as it is."""
    values = getattr(cell, "values", None)
    if values is None or values.null_count:
        return cell.as_py()
    return values.to_numpy(zero_copy_only=False)


def _unreadable_dataset(path: Path, error: Exception) -> DataError:
    reason = " ".join(str(error).split())
    return DataError(f"data set '{path}' cannot be read: {reason}", "an intact data set")


# What a row of either holds: a text, which may be long, or ids with what stands beside them.


def takes_tokens(field: str, names: Container[str]) -> bool:
    """Whether a row with fields of these names is taken as tokens.

    It is when it has ``input_ids``, whatever text stands beside them, unless `field` names
    another field than ``text``.
    """
    return field in ("text", "input_ids") and "input_ids" in names


def _documents_of(row: Mapping[str, Any], field: str, where: str, size: int) -> Iterator[Document]:
    if takes_tokens(field, row):
        yield Document(where, read_token_row(row, where), size)
        return
    if field not in row:
        raise unknown_name("field", field, row, where)
    text = "" if row[field] is None else row[field]
    if not isinstance(text, str):
        raise DataError(f"field '{field}' in {where} holds {type(text).__name__}", "text")
    # JSON may escape half a pair, which Python takes and the tokenizer does not.
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"character {error.start} of field '{field}' in {where} is half a surrogate pair",
            "text that UTF-8 can hold",
        ) from error
    for piece, begins, ends in cut_into_pieces([text]):
        yield Document(where, piece, size * begins, begins, ends)


def cut_into_pieces(parts: Iterable[str]) -> Iterator[tuple[str, bool, bool]]:
    """Cut a text, given in any parts, into pieces of `PIECE` characters at most.

    Yields
    ------
    str
        A piece; only that of an empty text is empty.
    bool, bool
        Whether it is the first, and whether it is the last.
    """
    rest = ""
    begins = True
    for part in parts:
        rest += part
        start = 0
        while len(rest) - start > PIECE:
            end = _end_of_piece(rest, start)
            yield rest[start:end], begins, False
            start = end
            begins = False
        rest = rest[start:]
    yield rest, begins, True


def _end_of_piece(text: str, start: int) -> int:
    """Find where a tokenizer would most likely cut as well; `text` goes on for more than a piece.

    In the piece's second half: behind the last line end between two lines that have no blank at
    it, else behind the last line end, else before the last blank, for tokens begin with theirs,
    else anywhere.
    """
    first = start + PIECE // 2
    last = start + PIECE
    line_end = text.rfind("\n", first, last)
    last_line_end = line_end
    while line_end > 0:
        if not text[line_end - 1].isspace() and not text[line_end + 1].isspace():
            return line_end + 1
        line_end = text.rfind("\n", first, line_end)
    if last_line_end >= 0:
        return last_line_end + 1
    blank = max(text.rfind(mark, first, last) for mark in " \t\r\u3000")
    return blank if blank > start else last


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
    # The kinds of NumPy: integers for ids and labels, also booleans and weights for masks.
    ids = _numbers(columns["input_ids"], "input_ids", where, "iu")
    for wrong in ids[(ids < 0) | (ids > LARGEST_ID)][:1].tolist():
        raise DataError(f"token id {wrong} in {where}", "ids of the vocabulary, from 0")
    beside: dict[str, npt.NDArray[Any]] = {}
    for name in TOKEN_FIELDS[1:]:
        if columns.get(name) is not None:
            kinds = "iu" if name == "labels" else "biuf"
            array = beside[name] = _numbers(columns[name], name, where, kinds)
            if len(array) != len(ids):
                raise DataError(
                    f"{len(array)} {name} for {len(ids)} input_ids in {where}", "one per token"
                )
    every = np.ones(len(ids), np.bool_)
    attended = beside.get("attention_mask", every) != 0
    kept = beside.get("loss_mask", every) != 0
    labels = beside.get("labels")
    if labels is not None and (largest := int(labels.max(initial=-1))) > LARGEST_ID:
        raise DataError(f"label {largest} in {where}", "class ids, or negative ones")
    places = np.flatnonzero(attended)
    part = slice(places[0], places[-1] + 1) if len(places) else slice(0)
    return TokenRow(
        ids[part].astype(np.int32),
        attended[part],
        kept[part],
        None if labels is None else np.maximum(labels, -1)[part].astype(np.int32),
    )


def _numbers(values: Any, name: str, where: str, kinds: str) -> npt.NDArray[Any]:
    try:
        array = np.asarray(values)
    except (ValueError, OverflowError):  # lists of several lengths, numbers beyond 64 bits
        array = np.asarray(None)
    if array.ndim == 1 and not array.size:  # an empty list has no type of its own
        return array.astype(np.int64)
    if array.ndim != 1 or array.dtype.kind not in kinds:
        raise DataError(f"{name} in {where} that are no list of integers", "one integer per token")
    return array


# From documents to tokens: many at a time.


def _encode(tokenizer: Any, texts: list[str], special: bool) -> list[list[int]]:
    """Turn texts into token ids, with or without the special tokens at their ends.

    Nothing is cut or padded, whatever the tokenizer's own settings are.
    """
    if tokenizer is None:
        raise UsageError(
            "text, but no tokenizer", "a tokenizer", "documents with input_ids need none"
        )
    encoded: list[list[int]] = tokenizer(
        texts,
        add_special_tokens=special,
        padding=False,
        truncation=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # it would warn of texts longer than the model takes
    )["input_ids"]
    return encoded


def vocabulary_of(tokenizer: Any) -> int:
    """Count token ids from 0 to the largest, which may be more than there are tokens."""
    ids: dict[str, int] = tokenizer.get_vocab()
    return max([len(tokenizer), *(i + 1 for i in ids.values())])


def tokenize(documents: Iterable[Document], tokenizer: Any) -> Iterator[list[TokenRow]]:
    """Tokenize documents and pieces of them, some at a time.

    Parameters
    ----------
    documents : iterable of Document
        Texts, or tokens, which pass as they are.
    tokenizer : transformers.PreTrainedTokenizerBase or None
        It adds its special tokens to every text.

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
            yield _rows_of(waiting, tokenizer)
            waiting = []
            characters = 0
    if waiting:
        yield _rows_of(waiting, tokenizer)


def _rows_of(documents: list[Document], tokenizer: Any) -> list[TokenRow]:
    # Texts that are whole go through with their special tokens, pieces without.
    texts: dict[bool, list[str]] = {True: [], False: []}
    for document in documents:
        if isinstance(document.content, str) and document.content:
            texts[document.is_whole].append(document.content)
    try:
        ids = {
            whole: iter(_encode(tokenizer, alike, whole) if alike else [])
            for whole, alike in texts.items()
        }
        return [_row_of(document, ids[document.is_whole], tokenizer) for document in documents]
    except NcbatchError:
        raise
    except Exception as error:  # tokenizers raises plain Exception
        reason = " ".join(str(error).split())
        raise DataError(
            f"the tokenizer fails between {documents[0].where} and {documents[-1].where}: {reason}",
            "a tokenizer that takes any text",
        ) from error


def _row_of(document: Document, ids: Iterator[list[int]], tokenizer: Any) -> TokenRow:
    text = document.content
    if isinstance(text, TokenRow):
        return text
    tokens = next(ids) if text else []
    if document.begins != document.ends:  # special tokens stand at a document's ends only
        before, after = _special_tokens(text, tokenizer)
        tokens = [*before, *tokens] if document.begins else [*tokens, *after]
    return TokenRow.of_text(tokens, document.ends)


def _special_tokens(text: str, tokenizer: Any) -> tuple[list[int], list[int]]:
    """Find the special tokens that begin and end a document."""
    for probe in (text[:_PROBE], "a", "."):
        (plain,) = _encode(tokenizer, [probe], False)
        (whole,) = _encode(tokenizer, [probe], True)
        n = len(plain)
        # From behind: a special token at the beginning may be the text's own first one.
        for start in reversed(range(len(whole) - n + 1) if n else ()):
            if whole[start : start + n] == plain:
                return whole[:start], whole[start + n :]
    if not whole:
        return [], []
    raise DataError(
        "a tokenizer whose special tokens do not stand at the ends of a text",
        f"texts of at most {PIECE:,} characters",
    )
