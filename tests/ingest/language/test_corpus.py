"""The corpus as a whole: tokenizers, caps, limits, batches, and what it holds in memory."""

from __future__ import annotations

import json
import subprocess
import sys
import tracemalloc
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

import ncbatch.ingest.language.corpus as corpus_module
import ncbatch.ingest.language.texts as texts_module
from ncbatch.errors import DataError, NcbatchError, OutputError, UsageError
from ncbatch.ingest.language.corpus import Column, Corpus, open_corpus
from tests.ingest.language.corpora import RECORDS, record_of, write_sources
from tests.ingest.language.tokenizers import raw_tokenizer, transformers_tokenizer


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_rows(rows: list[list[int]], name: str = "rows.jsonl") -> None:
    Path(name).write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))


def random_rows(n: int = 60, n_ids: int = 7, longest: int = 20, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, n_ids, rng.integers(0, longest)).tolist() for _ in range(n)]


def next_labels(rows: list[list[int]]) -> np.ndarray:
    """Label every position of all documents, one behind the other."""
    return np.array([label for row in rows if row for label in [*row[1:], -1]])


def n_tokens(corpus: Corpus) -> int:
    """Count the tokens that were read, special ones included, padding not."""
    return len(corpus._ids)


def samples_of(corpus: Corpus, batch_size: int = 3) -> list[tuple[list[int], int]]:
    """Give every sample as the tokens of its window up to it, and its label, in order."""
    found = []
    for batch in corpus.batches(batch_size):
        for ids, mask, labels in zip(*vars(batch).values(), strict=True):
            assert mask.tolist() == sorted(mask.tolist(), reverse=True)
            assert (labels[mask == 0] == -1).all()
            for place in np.flatnonzero(labels >= 0):
                found.append((ids[: place + 1].tolist(), int(labels[place])))
    return found


@pytest.mark.parametrize("long", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_corpora_are_what_the_version_before_made_of_them(folder: Path, long: bool):
    """So that a dump that it began is resumed."""
    write_sources(folder)
    expected = json.loads(RECORDS.read_text())
    names = [name for name in expected if name.startswith("long") == long]
    assert names
    assert {name: record_of(name, open_corpus) for name in names} == {
        name: expected[name] for name in names
    }


# ------------------------------------------------------------------------------------- tokenizers


def test_text_goes_through_the_tokenizer_once_per_document():
    Path("a.txt").write_text("a b c")
    Path("b.txt").write_text("d zebra e")
    (batch,) = open_corpus(["a.txt", "b.txt"], transformers_tokenizer(), context=4).batches(8)
    assert batch.input_ids.tolist() == [[3, 4, 5], [6, 0, 7]]
    assert batch.labels.tolist() == [[4, 5, -1], [0, 7, -1]]
    assert {array.dtype for array in vars(batch).values()} == {np.dtype(np.int64)}


def test_special_tokens_come_once_per_document():
    Path("a.jsonl").write_text('{"text": "a b c"}\n{"text": ""}\n{"text": "d"}\n')
    corpus = open_corpus("a.jsonl", transformers_tokenizer(special=True), context=3, pack=True)
    (batch,) = corpus.batches(8)
    assert batch.input_ids.tolist() == [[1, 3, 4], [5, 2, 1], [6, 2, 0]]
    assert batch.labels.tolist() == [[3, 4, 5], [2, -1, 6], [2, -1, -1]]
    assert n_tokens(corpus) == 8


def test_the_tokenizer_cuts_and_pads_nothing_and_stays_as_it_was():
    Path("a.txt").write_text("a b c d e f")
    Path("b.txt").write_text("g")
    tokenizer = raw_tokenizer()
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=9)
    ready = transformers_tokenizer(model_max_length=2, padding_side="left", pad_token="[SEP]")
    for each in (PreTrainedTokenizerFast(tokenizer_object=tokenizer), ready):
        (batch,) = open_corpus("*.txt", each, context=99).batches(8)
        assert batch.input_ids.tolist() == [[3, 4, 5, 6, 7, 8]]
    assert tokenizer.truncation["max_length"] == 2
    assert tokenizer.padding["length"] == 9


def test_many_batches_of_documents_stay_in_order(monkeypatch: pytest.MonkeyPatch):
    rng = np.random.default_rng(1)
    lines = [" ".join(rng.choice(list("abcdefghij"), rng.integers(0, 9))) for _ in range(200)]
    Path("a.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    expected = samples_of(open_corpus("a.jsonl", transformers_tokenizer(), context=5))
    for name, value in (("_DOCUMENTS", 7), ("_CHARACTERS", 20)):
        monkeypatch.setattr(texts_module, name, value)
        assert samples_of(open_corpus("a.jsonl", transformers_tokenizer(), context=5)) == expected
    words = [line.split() for line in lines if line]
    assert len(expected) == sum(len(found) - 1 for found in words)


def test_what_is_no_tokenizer_is_refused():
    Path("a.txt").write_text("a b c")
    with pytest.raises(UsageError, match="tokenizer of type str; expected a tokenizer of"):
        open_corpus("a.txt", "gpt2", context=4)
    with pytest.raises(UsageError, match="text, but no tokenizer"):
        open_corpus("a.txt", None, context=4)


def test_a_tokenizer_that_fails_names_the_documents():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    words = Tokenizer(WordLevel({"b": 0}, unk_token="[UNK]"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    Path("a.txt").write_text("a b c")
    with pytest.raises(DataError, match=r"tokenizer fails between 'a.txt' and 'a.txt': .*UNK"):
        open_corpus("a.txt", tokenizer, context=4)


def test_lines_data_sets_and_files_give_the_same():
    texts = ["a b c", "d e", "f g h i"]
    for number, text in enumerate(texts):
        Path(f"t{number}.txt").write_text(text)
    Path("t.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    datasets.Dataset.from_dict({"text": texts}).save_to_disk("d")
    found = [
        open_corpus(t, transformers_tokenizer(), context=3) for t in ("t*.txt", "t.jsonl", "d")
    ]
    assert len({corpus.fingerprint for corpus in found}) == 1
    assert samples_of(found[0]) == samples_of(found[1]) == samples_of(found[2])


# -------------------------------------------------------------------------------- windows, batches


@given(
    rows=st.lists(st.lists(st.integers(0, 9), max_size=12), max_size=12),
    context=st.integers(2, 7),
    pack=st.booleans(),
    sizes=st.lists(st.integers(1, 9), min_size=2, max_size=2),
    tokens=st.integers(1, 30),
)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_documents_windows_and_batches(rows, context, pack, sizes, tokens):
    write_rows(rows)
    expected = _naive_samples(rows, context, pack)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus_module, "_TOKENS", tokens)
        patch.setattr(corpus_module, "_DOCUMENTS", 3)
        if not expected:
            with pytest.raises(DataError, match="no sample"):
                open_corpus("rows.jsonl", None, context=context, pack=pack)
            return
        corpus = open_corpus("rows.jsonl", None, context=context, pack=pack)
    for size in sizes:
        assert samples_of(corpus, size) == expected
    assert corpus.n_samples == len(expected)
    counts = Counter(label for _, label in expected)
    assert corpus.label_counts(10).tolist() == [counts[label] for label in range(10)]
    assert (
        corpus.fingerprint
        == open_corpus("rows.jsonl", None, context=context, pack=pack).fingerprint
    )


def _naive_samples(rows, context, pack):
    found, laid = [], []
    for row in rows:
        before = len(laid) % context if pack else 0
        packed = laid[len(laid) - before :]
        for place in range(len(row) - 1):
            start = max((before + place) // context * context - before, 0)
            inside = row[start : place + 1]
            if (before + place) // context == 0:
                inside = packed + inside
            found.append((inside, row[place + 1]))
        laid += row
    return found


def test_batches_are_those_of_a_share():
    write_rows([[1, 2]] * 7 + [[3]])
    corpus = open_corpus("rows.jsonl", None, context=2)
    assert len(corpus._starts) == 7
    assert [len(batch.labels) for batch in corpus.batches(3)] == [3, 3, 1]
    assert [len(batch.labels) for batch in corpus.batches(3, 0, 2)] == [3, 1]
    assert [len(batch.labels) for batch in corpus.batches(3, 1, 2)] == [3]
    assert list(corpus.batches(3, 3, 4)) == []


def test_a_batch_is_as_wide_as_its_longest_window():
    write_rows([[1, 2], [1, 2, 3], [1, 2, 3, 4, 5]])
    corpus = open_corpus("rows.jsonl", None, context=9)
    assert [batch.input_ids.shape for batch in corpus.batches(2)] == [(2, 3), (1, 5)]


def test_the_fingerprint_tells_tokens_labels_and_windows_apart():
    write_rows([[1, 2, 3, 4], [5, 6, 7, 8]])
    write_rows([[1, 2, 3, 4], [5, 6, 7, 9]], "other.jsonl")
    found = [
        open_corpus("rows.jsonl", None, context=4),
        open_corpus("other.jsonl", None, context=4),
        open_corpus("rows.jsonl", None, context=3),
        open_corpus("rows.jsonl", None, context=4, exclude=[8]),
        open_corpus("rows.jsonl", None, context=4, labels="argmax"),
        open_corpus("rows.jsonl", None, context=8, pack=True),
        open_corpus("rows.jsonl", None, context=4, max_tokens=4),
    ]
    assert len({corpus.fingerprint for corpus in found}) == len(found)
    again = open_corpus("rows.jsonl", None, context=4, pack=True)  # packing changes nothing here
    assert again.fingerprint == found[0].fingerprint


# ---------------------------------------------------------------------------- the first so many


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("most", [1, 2, 57, 10**6])
def test_the_first_samples_are_taken_as_all_would_be(most: int, pack: bool):
    write_rows(random_rows())
    every = samples_of(open_corpus("rows.jsonl", None, context=6, pack=pack))
    corpus = open_corpus("rows.jsonl", None, context=6, pack=pack, max_tokens=most)
    assert samples_of(corpus) == every[:most]
    assert corpus.n_samples == min(most, len(every)) == corpus.label_counts(7).sum()


@pytest.mark.parametrize("pack", [False, True])
def test_texts_are_read_no_further_than_needed(pack: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(texts_module, "_DOCUMENTS", 1)
    write_rows([[1, 2], [3, 4], [5, 6]])
    with Path("rows.jsonl").open("a") as file:
        file.write("this would be an error\n")
    corpus = open_corpus("rows.jsonl", None, context=4, pack=pack, max_tokens=1)
    (batch,) = corpus.batches(9)
    # The window of the last sample is whole: a model may look both ways.
    assert batch.input_ids.tolist() == ([[1, 2, 3, 4]] if pack else [[1, 2]])
    assert batch.labels.tolist() == ([[2, -1, -1, -1]] if pack else [[2, -1]])
    assert n_tokens(corpus) == (4 if pack else 2)


# -------------------------------------------------------------------------------------- long texts


def long_text(n: int, seed: int = 0) -> str:
    """Give words in lines, some of which are empty, some longer than a piece."""
    rng = np.random.default_rng(seed)
    ends = rng.choice([" ", "\n", "\n\n"], n, p=[0.8, 0.15, 0.05])
    ends[n // 2 : n // 2 + 60] = " "
    return "".join(
        word + end for word, end in zip(rng.choice(list("abcdefghij"), n), ends, strict=True)
    )


def tokens_of(corpus: Corpus) -> list[int]:
    return [
        i for batch in corpus.batches(1) for i in batch.input_ids[batch.attention_mask > 0].tolist()
    ]


@pytest.mark.parametrize(("piece", "batch"), [(16, 1), (16, 40), (50, 10**6)])
@pytest.mark.parametrize("labels", ["next", "argmax"])
def test_a_long_text_is_tokenized_in_pieces_as_one_document(monkeypatch, piece, batch, labels):
    texts = [long_text(400), "a b", "", long_text(50, seed=1)]
    for number, text in enumerate(texts):
        Path(f"{number}.txt").write_text(text)
    Path("a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    options = {"context": 7, "labels": labels, "max_tokens": None}
    whole = open_corpus("*.txt", transformers_tokenizer(special=True), **options)
    monkeypatch.setattr(texts_module, "PIECE", piece)
    monkeypatch.setattr(texts_module, "_CHARACTERS", batch)
    for source in ("*.txt", "a.jsonl"):
        for pack in (False, True):
            cut = open_corpus(source, transformers_tokenizer(special=True), pack=pack, **options)
            assert tokens_of(cut).count(1) == 3
            assert cut.n_token_ids == whole.n_token_ids
            assert n_tokens(cut) == n_tokens(whole)
        assert (
            open_corpus(source, transformers_tokenizer(special=True), **options).fingerprint
            == whole.fingerprint
        )


def test_a_cut_at_a_line_end_changes_no_token_of_byte_level_merges(monkeypatch):
    """Merges within words only, as in GPT-2; special tokens by template."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    lines = [" ".join(f"w{i * k % 41} über" for k in range(1, 9)) for i in range(80)]
    text = "\n".join(lines)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([text], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    ready = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    Path("a.txt").write_text(text)
    monkeypatch.setattr(texts_module, "PIECE", 300)
    cut = open_corpus("a.txt", ready, context=99)
    assert tokens_of(cut) == tokenizer.encode(text).ids


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("most", [1, 6, 7, 8, 29, 398, 400, 401, 402, 403, 404, 450, 10**6])
def test_the_first_samples_of_a_long_text_have_whole_windows(monkeypatch, most, pack):
    for number, text in enumerate([long_text(400), "a b", "", long_text(50, seed=1)]):
        Path(f"{number}.txt").write_text(text)
    options = {"context": 7, "pack": pack, "max_tokens": most}
    whole = open_corpus("*.txt", transformers_tokenizer(special=True), **options)
    monkeypatch.setattr(texts_module, "PIECE", 16)
    monkeypatch.setattr(texts_module, "_CHARACTERS", 1)
    cut = open_corpus("*.txt", transformers_tokenizer(special=True), **options)
    assert cut.fingerprint == whole.fingerprint
    assert cut.n_samples == whole.n_samples
    if most < 30:
        assert n_tokens(cut) < 60 < n_tokens(whole)


@pytest.mark.slow
def test_memory_does_not_grow_with_a_text_file(monkeypatch: pytest.MonkeyPatch):
    lengths = []

    def noted(tokenizer, texts, special):
        lengths.extend(map(len, texts))
        return original(tokenizer, texts, special)

    original = texts_module._encode
    monkeypatch.setattr(texts_module, "_encode", noted)
    monkeypatch.setattr(texts_module, "PIECE", 2**16)
    monkeypatch.setattr(texts_module, "_CHARACTERS", 2**18)
    monkeypatch.setattr(corpus_module, "_TOKENS", 2**13)
    line = " ".join(["a" * 60, "b", "c" * 60]) + "\n"
    n_lines = 4 * 2**20 // len(line)
    Path("a.txt").write_text(line * n_lines)
    tokenizer = transformers_tokenizer(special=True)
    tracemalloc.start()
    try:
        corpus = open_corpus("a.txt", tokenizer, context=64)
        peak = tracemalloc.get_traced_memory()[1]
        first = open_corpus("a.txt", tokenizer, context=64, max_tokens=10)
    finally:
        tracemalloc.stop()
    assert n_tokens(corpus) == 2 + 3 * n_lines
    assert peak < 2 * 2**20
    assert max(lengths) <= texts_module.PIECE
    assert n_tokens(first) < n_tokens(corpus) / 6


# ------------------------------------------------------------------------------- so many per class


def lowest(rows: list[list[int]], cap: int, seed: int) -> list[int]:
    """Choose positions by sorting all draws of each class."""
    labels = next_labels(rows)
    draws = np.random.Philox(key=seed).random_raw(len(labels))
    return sorted(
        place
        for label in set(labels.tolist()) - {-1}
        for place in sorted(np.flatnonzero(labels == label), key=lambda p: draws[p])[:cap]
    )


@pytest.mark.parametrize("block", [23, 64, 2**20])
@pytest.mark.parametrize("cap", [1, 3, 50, 10**6])
@pytest.mark.parametrize("seed", [0, 7])
def test_of_each_class_the_lowest_draws(
    block: int, cap: int, seed: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(corpus_module, "_TOKENS", block)
    rows = random_rows(150)
    write_rows(rows)
    labels = next_labels(rows)
    column = Column(np.int32)
    column.write(labels)
    expected = lowest(rows, cap, seed)
    assert corpus_module.lowest_per_class(column, cap, seed).tolist() == expected
    for pack in (False, True):
        options = {"context": 6, "pack": pack, "per_class_cap": cap, "seed": seed}
        corpus = open_corpus("rows.jsonl", None, **options)
        assert [label for _, label in samples_of(corpus)] == labels[expected].tolist()
        counts = np.bincount(labels[labels >= 0], minlength=7)
        assert corpus.label_counts(7).tolist() == np.minimum(counts, cap).tolist()
        first = open_corpus("rows.jsonl", None, **options, max_tokens=5)
        assert samples_of(first) == samples_of(corpus)[:5]


@given(start=st.integers(0, 50), length=st.integers(0, 50), seed=st.integers(0, 2**64 - 1))
def test_a_draw_depends_on_its_position_only(start: int, length: int, seed: int):
    whole = np.random.Philox(key=seed).random_raw(100)
    part = corpus_module.random_draws(start, start + length, seed)
    np.testing.assert_array_equal(part, whole[start : start + length])


def test_another_seed_draws_others():
    write_rows([[1, 2] * 50])
    first, second = (
        open_corpus("rows.jsonl", None, context=8, per_class_cap=10, seed=seed) for seed in (0, 1)
    )
    assert first.fingerprint != second.fingerprint
    assert first.n_samples == second.n_samples == 20


def test_windows_without_a_chosen_sample_are_left_out():
    write_rows([[1, 2, 3]] * 100)
    corpus = open_corpus("rows.jsonl", None, context=3, per_class_cap=2)
    assert corpus.n_samples == 4
    assert len(corpus._starts) <= 4
    for batch in corpus.batches(2):
        assert (batch.labels >= 0).any(axis=1).all()


# --------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exclude": [-1]}, "excluded id -1; expected ids of the vocabulary"),
        ({"exclude": [1.5]}, r"excluded ids \[1.5\]; expected a list of token ids"),
        ({"exclude": 5}, "excluded ids 5; expected a list of token ids"),
    ],
)
def test_options_are_checked_before_anything_is_read(options: dict, message: str):
    with pytest.raises(NcbatchError, match=message):
        open_corpus("nowhere.txt", None, **({"context": 4} | options))


def test_excluded_ids_are_those_of_the_tokenizer():
    Path("a.txt").write_text("a b c")
    tokenizer = transformers_tokenizer()
    with pytest.raises(
        UsageError, match="excluded id 13; expected ids of the vocabulary, below 13"
    ):
        open_corpus("a.txt", tokenizer, context=4, exclude=[4, 13])
    assert open_corpus("a.txt", tokenizer, context=4, exclude=[4, 12]).n_samples == 1


def test_no_room_for_temporary_files(monkeypatch: pytest.MonkeyPatch):
    write_rows([[1, 2]])
    monkeypatch.setattr("tempfile.tempdir", "/nowhere/at/all")
    with pytest.raises(OutputError, match=r"(?s)cannot be kept in a temporary file.*TMPDIR"):
        open_corpus("rows.jsonl", None, context=4)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_is_named(monkeypatch: pytest.MonkeyPatch):
    write_rows([[1, 2]])
    full = Path("/dev/full").open("wb", 0)  # noqa: SIM115 (the column closes it)
    monkeypatch.setattr("tempfile.TemporaryFile", lambda **options: full)
    with pytest.raises(OutputError, match="No space left on device; expected room for 8 bytes"):
        open_corpus("rows.jsonl", None, context=4)


# ------------------------------------------------------------------------------ memory, progress


@pytest.mark.slow
def test_memory_does_not_grow_with_the_corpus(monkeypatch: pytest.MonkeyPatch):
    # Blocks are made small, so that a corpus is many of them in no time.
    monkeypatch.setattr(corpus_module, "_TOKENS", 2**13)
    monkeypatch.setattr(texts_module, "_CHARACTERS", 2**13)

    def peak_of(n: int) -> int:
        with Path("big.jsonl").open("w") as file:
            for start in range(n):
                ids = [(start * 31 + i * i) % 50 for i in range(500)]
                file.write(json.dumps({"input_ids": ids}) + "\n")
        tracemalloc.start()
        try:
            corpus = open_corpus("big.jsonl", None, context=128, per_class_cap=20)
            for batch in corpus.batches(8):
                assert batch.labels.size
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    small = peak_of(100)
    assert peak_of(1000) < 1.2 * small < Path("big.jsonl").stat().st_size


class Watcher:
    def __init__(self) -> None:
        self.total = self.seen = 0
        self.ended = False

    def begin(self, label: str, total: int, unit: str) -> None:
        assert unit == "B"
        self.total = total

    def advance(self, size: int) -> None:
        self.seen += size

    def end(self) -> None:
        self.ended = True

    def note(self, text: str) -> None:
        raise AssertionError(text)


def test_progress_counts_the_bytes_read():
    write_rows(random_rows())
    watcher = Watcher()
    open_corpus("rows.jsonl", None, context=4, progress=watcher)
    assert (watcher.seen, watcher.ended) == (watcher.total, True)
    assert watcher.total == Path("rows.jsonl").stat().st_size
    watcher = Watcher()
    Path("rows.jsonl").write_text("bad")
    with pytest.raises(DataError):
        open_corpus("rows.jsonl", None, context=4, progress=watcher)
    assert watcher.ended


@pytest.mark.slow
def test_the_text_side_needs_no_torch():
    code = (
        "import sys; from ncbatch.ingest.language.corpus import open_corpus\n"
        "print([m for m in ('torch', 'transformers', 'datasets', 'pyarrow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---------------------------------------------------------------------------------- labels by hand


def corpus_of(*rows: dict, context: int = 8, **options) -> Corpus:
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return open_corpus("rows.jsonl", None, context=context, **options)


def all_of(corpus: Corpus) -> tuple[list, list, list]:
    """Give the only batch as lists."""
    (batch,) = corpus.batches(100)
    return batch.input_ids.tolist(), batch.attention_mask.tolist(), batch.labels.tolist()


def labels_of(*rows: dict, **options) -> list:
    return all_of(corpus_of(*rows, **options))[2]


def row(ids: list[int], **beside: list) -> dict:
    return {"input_ids": ids} | beside


# ------------------------------------------------------------------------- documents and windows


def test_a_position_carries_the_next_token_and_the_last_none():
    ids, mask, labels = all_of(corpus_of(row([5, 6, 7])))
    assert (ids, mask, labels) == ([[5, 6, 7]], [[1, 1, 1]], [[6, 7, -1]])


def test_documents_have_windows_of_their_own_padded_on_the_right():
    ids, mask, labels = all_of(corpus_of(row([5, 6, 7]), row([8, 9])))
    assert ids == [[5, 6, 7], [8, 9, 0]]
    assert mask == [[1, 1, 1], [1, 1, 0]]
    assert labels == [[6, 7, -1], [9, -1, -1]]


def test_the_end_of_a_window_knows_the_first_token_of_the_next():
    ids, mask, labels = all_of(corpus_of(row([5, 6, 7, 8, 9]), context=2))
    assert ids == [[5, 6], [7, 8]]  # the third window, [9], has nothing to say
    assert mask == [[1, 1], [1, 1]]
    assert labels == [[6, 7], [8, 9]]


def test_packed_documents_share_windows_but_no_labels():
    corpus = corpus_of(row([5, 6, 7]), row([8]), row([9, 10]), row([11, 12]), context=3, pack=True)
    ids, mask, labels = all_of(corpus)
    assert ids == [[5, 6, 7], [8, 9, 10], [11, 12, 0]]
    assert mask == [[1, 1, 1], [1, 1, 1], [1, 1, 0]]
    assert labels == [[6, 7, -1], [-1, 10, -1], [12, -1, -1]]


def test_packed_documents_go_on_in_the_next_window():
    corpus = corpus_of(row([5, 6]), row([7, 8, 9, 10]), context=3, pack=True)
    assert all_of(corpus)[0] == [[5, 6, 7], [8, 9, 10]]
    assert all_of(corpus)[2] == [[6, -1, 8], [9, 10, -1]]


def test_documents_of_one_token_and_of_none_give_no_window():
    corpus = corpus_of(row([5]), row([]), row([6, 7]), row([], attention_mask=[]))
    assert all_of(corpus)[0] == [[6, 7]]
    assert n_tokens(corpus) == 3
    assert (len(corpus._starts), corpus.n_samples, corpus.n_token_ids) == (1, 1, 8)


# ----------------------------------------------------------------------------------------- padding

PADDED = {
    "right": row([5, 6, 7, 0, 0], attention_mask=[1, 1, 1, 0, 0]),
    "left": row([0, 0, 5, 6, 7], attention_mask=[0, 0, 1, 1, 1]),
    "both": row([0, 5, 6, 7, 0], attention_mask=[0, 1, 1, 1, 0]),
}


@pytest.mark.parametrize("side", PADDED)
@pytest.mark.parametrize("context", [2, 8])
def test_padding_on_any_side_is_as_if_it_were_not_there(side: str, context: int):
    plain = all_of(corpus_of(row([5, 6, 7]), context=context))
    assert all_of(corpus_of(PADDED[side], context=context)) == plain


def test_masks_and_labels_stay_with_their_tokens_when_padding_goes():
    left = row([0, 5, 6, 7], attention_mask=[0, 1, 1, 1], loss_mask=[1, 1, 1, 0])
    assert labels_of(left) == [[6, -1, -1]]
    left = row([0, 5, 6, 7], attention_mask=[0, 1, 1, 1], labels=[-100, -100, 1, 2])
    assert labels_of(left, labels="given") == [[-1, 1, 2]]


def test_a_row_of_padding_is_an_empty_document():
    corpus = corpus_of(row([0, 0], attention_mask=[0, 0]), row([5, 6]))
    assert all_of(corpus)[0] == [[5, 6]]


def test_a_token_without_attention_in_the_middle_keeps_its_place():
    hole = row([5, 6, 7, 8], attention_mask=[1, 1, 0, 1])
    ids, mask, labels = all_of(corpus_of(hole))
    assert (ids, mask) == ([[5, 6, 7, 8]], [[1, 1, 0, 1]])
    assert labels == [[6, -1, -1, -1]]  # 7 is no target, and a position without attention no sample


# ----------------------------------------------------------------------------------------- masks


def test_a_masked_next_token_is_no_sample():
    assert labels_of(row([5, 6, 7, 8], labels=[-100, 6, -100, 8])) == [[6, -1, 8, -1]]
    assert labels_of(row([5, 6, 7, 8], labels=[5, -1, -7, 8])) == [[-1, -1, 8, -1]]
    assert labels_of(row([5, 6, 7, 8], loss_mask=[0, 0, 1, 1])) == [[-1, 7, 8, -1]]
    assert labels_of(row([5, 6, 7, 8], loss_mask=[True, False, True, False])) == [[-1, 7, -1, -1]]
    assert labels_of(row([5, 6, 7, 8], loss_mask=[0.5, 0.0, 0.5, 1.0])) == [[-1, 7, 8, -1]]


def test_all_masks_together():
    ids = [5, 6, 7, 8, 9, 10]
    masks = {
        "attention_mask": [1, 1, 1, 1, 1, 0],
        "loss_mask": [1, 1, 0, 1, 1, 1],
        "labels": [5, 6, 7, -100, 9, 10],
    }
    assert labels_of(row(ids, **masks)) == [[6, -1, -1, 9, -1]]


def test_a_mask_at_the_edge_of_a_window_is_that_of_the_next():
    masked = row([5, 6, 7, 8], loss_mask=[1, 1, 0, 1])
    assert labels_of(masked, context=2) == [[6, -1], [8, -1]]


def test_excluded_ids_are_inputs_but_no_labels():
    corpus = corpus_of(row([5, 6, 7, 6, 5]), exclude=[6, 9])
    assert all_of(corpus)[0] == [[5, 6, 7, 6, 5]]
    assert all_of(corpus)[2] == [[-1, 7, -1, 5, -1]]


# ------------------------------------------------------------------------------- given and argmax


def test_given_labels_stand_where_they_are():
    given = row([5, 6, 7], labels=[3, -100, 1])
    assert labels_of(given, row([8], labels=[2]), labels="given") == [[3, -1, 1], [2, -1, -1]]
    assert labels_of(given, labels="given", exclude=[1]) == [[3, -1, -1]]
    masked = row([5, 6, 7], labels=[3, 4, 1], loss_mask=[0, 1, 1])
    assert labels_of(masked, labels="given") == [[-1, 4, 1]]


def test_every_position_waits_for_what_the_model_decides():
    assert labels_of(row([5, 6]), row([7]), labels="argmax") == [[0, 0], [0, -1]]
    hole = row([5, 6, 7, 8], attention_mask=[1, 1, 0, 1])
    assert labels_of(hole, labels="argmax") == [[0, -1, -1, 0]]
    masked = row([5, 6, 7], labels=[-100, -100, 7])
    assert labels_of(masked, labels="argmax") == [[-1, 0, 0]]


def test_a_masked_model_speaks_about_the_position_itself():
    ids = [5, 6, 2, 8, 9, 2, 11]
    masked = row(ids, labels=[-100, -100, 7, -100, -100, 10, -100])
    options = {"labels": "argmax", "masked": True}
    assert labels_of(masked, **options) == [[-1, -1, 0, -1, -1, 0, -1]]
    assert labels_of(row([5, 6, 7], loss_mask=[1, 0, 1]), **options) == [[0, -1, 0]]
    hole = row([5, 6, 7, 8], attention_mask=[1, 1, 0, 1])
    assert labels_of(hole, **options) == [[0, 0, -1, 0]]
    assert labels_of(row([5, 6]), **options) == [[0, 0]]
    assert labels_of(row([5, 6]), masked=True) == [[6, -1]]


def test_labels_that_are_no_mask_of_the_tokens_are_refused():
    shifted = row([5, 6, 7], labels=[6, 7, -100])
    with pytest.raises(
        DataError, match=r"label 6 for token 5 in line 2 of 'rows.jsonl'.*\n.*given"
    ):
        corpus_of(row([5, 6]), shifted)


def test_given_labels_are_missed():
    with pytest.raises(DataError, match=r"labels 'given', but none in line 2"):
        corpus_of(row([5], labels=[1]), row([5, 6]), labels="given")
    with pytest.raises(DataError, match=r"labels 'given', but line 1 of 'rows.jsonl' is text"):
        corpus_of({"text": "a b"}, labels="given")


def test_argmax_leaves_nothing_to_choose_beforehand():
    for options in ({"exclude": [5]}, {"per_class_cap": 2}):
        with pytest.raises(UsageError, match=f"labels 'argmax' with {next(iter(options))}"):
            corpus_of(row([5, 6]), labels="argmax", **options)


# ---------------------------------------------------------------------------------------- counts


def test_counts_are_those_of_the_labels():
    corpus = corpus_of(row([5, 6, 7, 6]), row([1, 6, 2]), context=2)
    counts = corpus.label_counts(9)
    assert counts.dtype == np.int64
    assert counts.tolist() == [0, 0, 1, 0, 0, 0, 3, 1, 0]
    with pytest.raises(DataError, match="label 7 in the texts; expected labels below 7 classes"):
        corpus.label_counts(7)


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (
            [row([5]), row([6])],
            {},
            r"\(documents: 2, tokens: 2, empty documents: 0\); expected a document of",
        ),
        ([row([]), row([6])], {}, r"\(documents: 1, tokens: 1, empty documents: 1\)"),
        ([row([5, 6])], {"exclude": [6]}, r"no sample in the texts \(documents: 1, tokens: 2"),
        ([row([5, 6], labels=[-1, -1])], {"labels": "given"}, "labels that are not all negative"),
        ([], {}, r"no sample in the texts \(documents: 0, tokens: 0"),
    ],
)
def test_a_corpus_without_any_sample(rows: list[dict], options: dict, message: str):
    with pytest.raises(DataError, match=message):
        corpus_of(*rows, **options)
