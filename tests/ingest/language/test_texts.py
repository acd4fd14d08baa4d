"""Texts: what becomes a document, in which order, and how bad ones are named."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import datasets
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ncbatch.errors import DataError, UnknownNameError
from ncbatch.ingest.language import texts as texts_module
from ncbatch.ingest.language.texts import Document, Texts, cut_into_pieces, find_texts


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(name: str, content: str | bytes) -> None:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def documents(texts: Texts, field: str = "text") -> list[Document]:
    return [document for source in find_texts(texts, field) for document in source.documents()]


def contents(texts: Texts, field: str = "text") -> list:
    return [document.content for document in documents(texts, field)]


# ------------------------------------------------------------------------------------- text files


def test_a_text_file_is_one_document():
    write("a.txt", "one\ntwo\r\n\nüñ \U0001f600")
    (document,) = documents("a.txt")
    assert document.content == "one\ntwo\r\n\nüñ \U0001f600"
    assert document.size == Path("a.txt").stat().st_size
    assert "a.txt" in document.where


@given(
    st.text(st.sampled_from("aé\U0001f600 \n\r\t\u3000"), max_size=200),
    st.sampled_from([2, 3, 8, 30]),
)
def test_pieces_make_the_text_and_are_no_longer_than_wanted(text: str, size: int):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(texts_module, "PIECE", size)
        found = list(cut_into_pieces([text]))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "a.txt"
            path.write_bytes(text.encode())
            read = documents(path)
    assert "".join(piece for piece, *_ in found) == text
    assert [begins for _, begins, _ in found] == [True] + [False] * (len(found) - 1)
    assert [ends for *_, ends in found] == [False] * (len(found) - 1) + [True]
    assert all(0 < len(piece) <= size for piece, *_ in found) or not text
    assert "".join(document.content for document in read) == text
    assert [document.ends for document in read] == [False] * (len(read) - 1) + [True]
    assert sum(document.size for document in read) == len(text.encode())


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("aaaaa\nbb\n\nccc", "aaaaa\n"),  # between two lines, not beside an empty one
        ("aaaaaa\n\nbbbbb", "aaaaaa\n\n"),
        ("aaaaa bbb ccc", "aaaaa bbb"),
        ("aaaaaaaaaaaaa", "aaaaaaaaaa"),
        ("a\nbbbbb ccccc", "a\nbbbbb"),  # a line end in the first half would make short pieces
    ],
)
def test_a_long_text_is_cut_where_tokens_end(monkeypatch, text: str, first: str):
    monkeypatch.setattr(texts_module, "PIECE", 10)
    assert next(cut_into_pieces([text])) == (first, True, False)


@pytest.mark.parametrize("piece", [4, 7, 64])
@pytest.mark.parametrize("tail", [b"\xe9 more", b"\xc3"])
def test_a_wrong_byte_is_named_wherever_it_is_read(monkeypatch, piece: int, tail: bytes):
    monkeypatch.setattr(texts_module, "PIECE", piece)
    good = "\ufeffüñ € \U0001f600 and so on".encode()
    write("a.txt", good + tail)
    with pytest.raises(DataError, match=rf"not UTF-8: byte {len(good)} is 0x{tail[0]:02x}"):
        contents("a.txt")
    write("a.txt", good)
    assert "".join(contents("a.txt")) == "üñ € \U0001f600 and so on"


def test_a_byte_order_mark_is_no_text():
    write("a.txt", b"\xef\xbb\xbfone")
    write("b.jsonl", b'\xef\xbb\xbf{"text": "two"}\n')
    assert contents(["a.txt", "b.jsonl"]) == ["one", "two"]


def test_folders_and_globs_come_in_natural_order_and_paths_as_given():
    for name in ("t/a10.txt", "t/a2.txt", "t/b/c.py", "t/.hidden", "t/.git/config", "z.txt"):
        write(name, name)
    assert contents(Path("t")) == ["t/a2.txt", "t/a10.txt", "t/b/c.py"]
    assert contents("t/*.txt") == ["t/a2.txt", "t/a10.txt"]
    assert contents("t/**/*.py") == ["t/b/c.py"]
    assert contents(["z.txt", "t/a*"]) == ["z.txt", "t/a2.txt", "t/a10.txt"]


def test_a_name_that_looks_like_a_glob_is_taken_as_it_is():
    write("a[1].txt", "one")
    assert contents("a[1].txt") == ["one"]


def test_a_link_to_the_folder_above_is_not_followed():
    write("t/a.txt", "one")
    Path("t/loop").symlink_to("..", target_is_directory=True)
    assert contents("t") == ["one"]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_the_first_byte_that_is_not_utf8_is_named(name: str):
    good = b'{"text": "\xc3\xbc"}\n'
    write(name, good + b'{"text": "caf\xe9"}\n')
    at = Path(name).read_bytes().index(b"\xe9")
    message = rf"'{name}' is not UTF-8: byte {at} is 0xe9.*UTF-8\n.*iconv"
    with pytest.raises(DataError, match=message):
        contents(name)


def test_nothing_there():
    Path("empty").mkdir()
    for place in ("no.txt", "empty", "empty/*.txt", "**/*.md"):
        with pytest.raises(DataError, match="no text at '"):
            find_texts(place)
    with pytest.raises(DataError, match="no text given"):
        find_texts([])


def test_a_json_file_says_not_how_many_documents_it_is():
    write("a.json", "{}")
    with pytest.raises(DataError, match=r"'a.json' may be one document or many.*\nname it .jsonl"):
        find_texts("a.json")


@pytest.mark.parametrize("name", ["gone.txt", "gone.jsonl"])
def test_a_file_that_is_gone_is_named(name: str):
    Path(name).symlink_to("nowhere")
    (source,) = find_texts("gone*")
    assert source.size == 0
    with pytest.raises(DataError, match=f"'{name}' cannot be read: No such file"):
        list(source.documents())


# ------------------------------------------------------------------------------------- JSON lines


def test_a_line_is_a_document_and_a_blank_one_is_none():
    write("a.jsonl", '{"text": "one", "id": 7}\n\n  \n{"text": "tw\\u00f6"}\r\n{"text": null}')
    found = documents("a.jsonl")
    assert [document.content for document in found] == ["one", "twö", ""]
    assert found[1].where == "line 4 of 'a.jsonl'"
    write("b.ndjson", '{"body": "one", "text": "no", "input_ids": [1]}')
    assert contents("b.ndjson", "body") == ["one"]


def test_ids_are_taken_where_there_are_some():
    write("a.jsonl", '{"text": "no", "input_ids": [3, 4], "loss_mask": [0, 1]}\n{"text": "yes"}')
    tokens, text = contents("a.jsonl")
    assert tokens.ids.tolist() == [3, 4]
    assert tokens.kept.tolist() == [False, True]
    assert tokens.labels is None
    assert tokens.attended.tolist() == [True, True]
    assert text == "yes"


BAD_LINES = {
    "{": "line 2 of 'a.jsonl' is not JSON: Expecting property name",
    '{"text": "a"} {"text": "b"}': "line 2 of 'a.jsonl' is not JSON: Extra data",
    '["a"]': "line 2 of 'a.jsonl' is no JSON object; expected one JSON object per line",
    '"a"': "line 2 of 'a.jsonl' is no JSON object",
    "[" * 100_000: "line 2 of 'a.jsonl' is not JSON: maximum recursion",
    '{"n": ' + "1" * 5000 + "}": "line 2 of 'a.jsonl' is not JSON: Exceeds the limit",
    '{"text": 3}': "field 'text' in line 2 of 'a.jsonl' holds int; expected text",
    '{"text": ["a"]}': "field 'text' in line 2 of 'a.jsonl' holds list; expected text",
    '{"text": "ab\\ud800"}': "character 2 of field 'text' in line 2 of 'a.jsonl' is half a",
    '{"input_ids": 3}': "input_ids in line 2 of 'a.jsonl' that are no list of integers",
    '{"input_ids": [[3]]}': "input_ids in line 2 of 'a.jsonl' that are no list of integers",
    '{"input_ids": [[3], [4, 5]]}': "input_ids in line 2 of 'a.jsonl' that are no list",
    '{"input_ids": [3.0]}': "input_ids in line 2 of 'a.jsonl' that are no list of integers",
    '{"input_ids": ["3"]}': "input_ids in line 2 of 'a.jsonl' that are no list of integers",
    '{"input_ids": null}': "input_ids in line 2 of 'a.jsonl' that are no list of integers",
    '{"input_ids": [3, -4]}': "token id -4 in line 2 of 'a.jsonl'; expected ids of the vocabulary",
    '{"input_ids": [3, 2147483648]}': "token id 2147483648 in line 2",
    '{"input_ids": [1' + "0" * 30 + "]}": "input_ids in line 2 of 'a.jsonl' that are no list",
    '{"input_ids": [3], "labels": [3, 4]}': "2 labels for 1 input_ids in line 2 of 'a.jsonl'",
    '{"input_ids": [3], "labels": [3.5]}': "labels in line 2 of 'a.jsonl' that are no list",
    '{"input_ids": [3], "labels": 3}': "labels in line 2 of 'a.jsonl' that are no list",
    '{"input_ids": [3], "labels": [2147483648]}': "label 2147483648 in line 2 of 'a.jsonl'",
    '{"input_ids": [3], "loss_mask": []}': "0 loss_mask for 1 input_ids in line 2",
    '{"input_ids": [3], "attention_mask": ["x"]}': "attention_mask in line 2 of 'a.jsonl' that",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=[line[:40] for line in BAD_LINES])
def test_a_bad_line_is_named(line: str):
    write("a.jsonl", '{"text": "fine"}\n' + line + "\n")
    with pytest.raises(DataError) as error:
        contents("a.jsonl")
    assert BAD_LINES[line] in str(error.value)


def test_an_unknown_field_is_named_with_those_there_are():
    write("a.jsonl", '{"content": "one", "id": 3}\n')
    with pytest.raises(UnknownNameError) as error:
        contents("a.jsonl")
    found = str(error.value)
    assert found.startswith("no field 'text' in line 1 of 'a.jsonl'; expected one of: content, id")
    write("a.jsonl", '{"text": "one", "input_ids": [1]}\n')
    with pytest.raises(UnknownNameError, match="no field 'content'"):
        contents("a.jsonl", "content")


# ---------------------------------------------------------------------------------- saved data sets


def saved(path: str, columns: dict, **options) -> None:
    datasets.Dataset.from_dict(columns, **options).save_to_disk(path)


def test_the_rows_of_a_saved_data_set_are_documents():
    saved("d", {"text": ["one", "twö", None], "id": [1, 2, 3]})
    found = documents("d")
    assert [document.content for document in found] == ["one", "twö", ""]
    assert found[2].where == "row 2 of 'd'"
    assert contents("d", "text") == contents(["d"])
    Path("folder").mkdir()
    Path("d").rename("folder/d")
    assert contents("folder") == contents("folder/*") == ["one", "twö", ""]


def test_rows_that_were_chosen_and_shards_come_in_order():
    rows = datasets.Dataset.from_dict({"text": [str(i) for i in range(1000)]})
    rows.select(range(999, 0, -2)).save_to_disk("d", num_shards=3)
    assert contents("d") == [str(i) for i in range(999, 0, -2)]


@pytest.mark.parametrize("kind", ["int64", "int32", "uint16"])
def test_rows_of_tokens_keep_their_masks_and_labels(kind: str):
    features = datasets.Features(
        {
            "input_ids": datasets.Sequence(datasets.Value(kind)),
            "attention_mask": datasets.Sequence(datasets.Value("int8")),
            "loss_mask": datasets.Sequence(datasets.Value("bool")),
            "labels": datasets.Sequence(datasets.Value("int64")),
            "text": datasets.Value("string"),
        }
    )
    columns = {
        "input_ids": [[0, 5, 6], [7], []],
        "attention_mask": [[0, 1, 1], [1], []],
        "loss_mask": [[True, True, False], [True], []],
        "labels": [[-100, 5, 6], [-100], []],
        "text": ["no", "no", "no"],
    }
    saved("d", columns, features=features)
    first, second, third = contents("d")
    assert first.ids.tolist() == [5, 6]
    assert first.attended.tolist() == [True, True]
    assert first.kept.tolist() == [True, False]
    assert first.labels.tolist() == [5, 6]
    assert (second.ids.tolist(), second.labels.tolist()) == ([7], [-1])
    assert len(third) == 0
    assert first.ids.dtype == np.int32
    assert contents("d", "input_ids")[0].ids.tolist() == [5, 6]


def test_rows_that_hold_no_tokens_are_named():
    saved("d", {"input_ids": [[1], None]})
    with pytest.raises(DataError, match="input_ids in row 1 of 'd' are null"):
        contents("d")
    saved("e", {"input_ids": [[1], [2, None]]})
    with pytest.raises(DataError, match="input_ids in row 1 of 'e' that are no list of integers"):
        contents("e")
    saved("f", {"text": ["a", "b"]})
    with pytest.raises(UnknownNameError, match="no field 'body' in 'f'; expected one of: text"):
        find_texts("f", "body")
    saved("g", {"text": [1, 2]})
    with pytest.raises(DataError, match="field 'text' in row 0 of 'g' holds int; expected text"):
        contents("g")


def test_a_data_set_of_several_splits_wants_one_to_be_named():
    rows = datasets.Dataset.from_dict({"text": ["one"]})
    datasets.DatasetDict(train=rows, test=rows).save_to_disk("d")
    with pytest.raises(DataError, match=r"'d' holds several splits; expected one.* 'd/train'"):
        find_texts("d")
    assert contents("d/train") == ["one"]


def test_a_damaged_data_set_is_named():
    saved("d", {"text": ["one"]})
    (arrow,) = Path("d").glob("*.arrow")
    arrow.write_bytes(b"nothing of the kind")
    with pytest.raises(DataError, match=r"data set 'd' cannot be read: .*; expected an intact"):
        contents("d")
    arrow.unlink()
    with pytest.raises(DataError, match="data set 'd' cannot be read"):
        contents("d")


def test_the_library_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch):
    saved("d", {"text": ["one"]})
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"(?s)datasets is not installed.*ncbatch\[hf\]"):
        find_texts("d")


def test_sizes_add_up_to_what_is_read():
    write("a.txt", "one")
    write("b.jsonl", "".join(json.dumps({"text": "x" * i}) + "\n" for i in range(9)))
    saved("d", {"text": ["one", "two"]})
    for source in find_texts(["a.txt", "b.jsonl", "d"]):
        assert source.size == sum(document.size for document in source.documents()) > 0
