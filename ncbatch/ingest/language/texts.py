"""Texts: documents from text files, JSON lines and saved data sets, one at a time."""

from __future__ import annotations

import codecs
import glob
import json
import os
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ncbatch.errors import DataError, NcbatchError, UsageError, unknown_name
from ncbatch.store.format import natural_key

# Pieces of long texts: cut where a tokenizer would most likely cut as well.


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


# Documents that are tokenized already: ids with the masks and labels that stand beside them.


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


# What a document is, wherever it comes from.


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


# Data sets in a folder that ``datasets.save_to_disk`` wrote.


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
            raise _unreadable_dataset(self.path, error) from error

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
            raise _unreadable_dataset(self.path, error) from error

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


def _unreadable_dataset(path: Path, error: Exception) -> DataError:
    reason = " ".join(str(error).split())
    return DataError(f"data set '{path}' cannot be read: {reason}", "an intact data set")


# From documents to tokens: many at a time, with whatever tokenizer there is.


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
