"""Labels by hand: documents, windows, packing, padding on either side, masks, excluded ids."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from ncbatch.errors import DataError, UsageError
from ncbatch.ingest.language.corpus import Corpus, open_corpus


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


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
    assert (corpus.n_documents, corpus.n_empty, corpus.n_tokens) == (2, 2, 3)
    assert (corpus.n_windows, corpus.n_samples, corpus.n_token_ids) == (1, 1, 8)


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
    assert (corpus.n_empty, corpus.n_documents) == (1, 1)


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
    with pytest.raises(UsageError, match="yet to decide"):
        corpus_of(row([5, 6]), labels="argmax").label_counts(9)


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
