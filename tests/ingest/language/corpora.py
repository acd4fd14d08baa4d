"""Corpora of every kind of text and option; `corpora.json` keeps what the version before made of them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from tests.ingest.language.tokenizers import transformers_tokenizer

RECORDS = Path(__file__).with_name("corpora.json")


def write_sources(folder: Path) -> None:
    """Write texts, lines of texts and of ids with masks, and saved data sets."""
    import datasets

    rng = np.random.default_rng(11)

    def words(n: int) -> str:
        ends = rng.choice([" ", "\n", "\n\n", "\t"], n, p=[0.8, 0.12, 0.05, 0.03])
        return "".join(map("".join, zip(rng.choice(list("abcdefghijz"), n), ends, strict=True)))

    def lines(name: str, rows: list[dict[str, Any]]) -> None:
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    (folder / "texts" / "below").mkdir(parents=True)
    for number in (10, 2, 1):
        (folder / "texts" / f"t{number}.txt").write_text(words(7 * number + 3))
    (folder / "texts" / "below" / "empty.txt").write_text("")
    # Longer than two pieces, with and without lines to cut at.
    (folder / "long.txt").write_text(words(290_000))
    lines(
        "long.jsonl", [{"text": "b a"}, {"text": words(140_000).replace("\n", "c")}, {"text": ""}]
    )
    lines(
        "lines.jsonl", [{"text": words(int(n)), "body": words(5)} for n in rng.integers(0, 40, 60)]
    )
    lengths = rng.integers(0, 30, 50).tolist()
    ids = [rng.integers(0, 13, n).tolist() for n in lengths]
    lines("ids.jsonl", [{"input_ids": row} for row in ids])
    masked = []
    for row in ids:
        n = len(row)
        pad = int(rng.integers(0, 3))
        masks = {
            "attention_mask": [0] * pad + (rng.random(n) < 0.95).astype(int).tolist() + [0],
            "loss_mask": (rng.random(n + pad + 1) < 0.7).astype(int).tolist(),
            "labels": [-100] * pad + np.where(rng.random(n) < 0.8, row, -100).tolist() + [-100],
        }
        masked.append({"input_ids": [0] * pad + row + [0], **masks})
    lines("masked.jsonl", masked)
    given = [{"input_ids": row, "labels": rng.integers(-1, 13, len(row)).tolist()} for row in ids]
    lines("given.jsonl", given)
    lines(
        "mixed.jsonl", [{"text": "a b z"}, {"text": "no", "input_ids": [5, 1, 7]}, {"text": "c d"}]
    )
    columns = {name: [row[name] for row in masked] for name in masked[0]}
    datasets.Dataset.from_dict(columns).save_to_disk(str(folder / "saved-ids"), num_shards=2)
    rows = datasets.Dataset.from_dict({"text": [words(int(n)) for n in rng.integers(0, 40, 30)]})
    rows.select(range(29, 2, -2)).save_to_disk(str(folder / "sets" / "saved-texts"))


#: Name, texts, tokenizer, options.
CASES: dict[str, tuple[Any, str | None, dict[str, Any]]] = {
    "texts": ("texts", "words", {"context": 8}),
    "texts packed": (["texts/t*.txt", "lines.jsonl"], "special", {"context": 8, "pack": True}),
    "globs": (["texts/**/*.txt", "mixed.jsonl"], "words", {"context": 5}),
    "long": ("long.txt", "special", {"context": 64}),
    "long capped": ("long.txt", "words", {"context": 64, "per_class_cap": 9, "seed": 3}),
    "long first": ("long.txt", "special", {"context": 64, "max_tokens": 150_001}),
    "long line": ("long.jsonl", "special", {"context": 32, "pack": True}),
    "long line argmax": ("long.jsonl", "special", {"context": 32, "labels": "argmax"}),
    "lines": ("lines.jsonl", "special", {"context": 7}),
    "lines of a field": ("lines.jsonl", "words", {"context": 7, "field": "body"}),
    "lines excluded": ("lines.jsonl", "special", {"context": 7, "exclude": [2, 0, 5]}),
    "lines first": ("lines.jsonl", "special", {"context": 7, "max_tokens": 101}),
    "lines first packed": ("lines.jsonl", "words", {"context": 7, "max_tokens": 101, "pack": True}),
    "lines capped": ("lines.jsonl", "special", {"context": 7, "per_class_cap": 4, "seed": 1}),
    "lines capped first": (
        "lines.jsonl",
        "special",
        {"context": 7, "per_class_cap": 4, "max_tokens": 21, "pack": True},
    ),
    "lines argmax": ("lines.jsonl", "special", {"context": 7, "labels": "argmax"}),
    "ids": ("ids.jsonl", None, {"context": 6}),
    "ids packed": ("ids.jsonl", None, {"context": 6, "pack": True}),
    "ids given": ("given.jsonl", None, {"context": 6, "labels": "given", "exclude": [4]}),
    "masked": ("masked.jsonl", None, {"context": 6}),
    "masked packed": ("masked.jsonl", None, {"context": 6, "pack": True, "max_tokens": 90}),
    "masked given": ("masked.jsonl", None, {"context": 6, "labels": "given"}),
    "masked argmax": ("masked.jsonl", None, {"context": 6, "labels": "argmax"}),
    "masked model": ("masked.jsonl", None, {"context": 6, "labels": "argmax", "masked": True}),
    "saved ids": ("saved-ids", None, {"context": 6}),
    "saved ids given": ("saved-ids", None, {"context": 6, "labels": "given", "per_class_cap": 3}),
    "saved texts": ("sets", "special", {"context": 9}),
}


def record_of(name: str, open_corpus: Any) -> dict[str, Any]:
    """Open a corpus from the working folder; say what is in it: counts, windows of 64 a batch."""
    texts, tokenizer, options = CASES[name]
    ready = transformers_tokenizer(special="special" in tokenizer) if tokenizer else None
    corpus = open_corpus(texts, ready, **options)
    content = hashlib.sha256()
    windows = []
    for batch in corpus.batches(64):
        for ids, mask, labels in zip(*vars(batch).values(), strict=True):
            content.update(np.stack([ids, mask, labels]).astype("<i8").tobytes())
            windows.append([ids.tolist(), mask.tolist(), labels.tolist()])
    return {
        "fingerprint": corpus.fingerprint,
        "n_samples": corpus.n_samples,
        "n_windows": len(corpus._starts),
        "content": content.hexdigest(),
        "first windows": windows[:2],
    }
