"""Cases of dumping a language model, held against its bare forward pass."""

from __future__ import annotations

import inspect
import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks.case import Aim, Case, MissingError, Sample, Shape

_BLOCKS, _HEADS, _CONTEXT, _BATCH = 6, 8, 128, 16
_FULL, _QUICK = Shape(8192, 512, 32_768), Shape(1024, 128, 8192)


def dumped(shape: Shape, *, moments: bool) -> Sample:
    """Dump every layer, between two bare forward passes over the same batches."""
    model, tokenizer = _model(shape)
    import ncbatch as nc

    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "tokens.jsonl"
        _write_documents(text, shape)
        with _model_time(model) as spent:
            before = _bare_pass(model, tokenizer, text)
            spent.clear()
            start = time.perf_counter()
            nc.dump_language_model(
                model, text, Path(folder) / "out.zarr", tokenizer=tokenizer,
                context=_CONTEXT, batch_size=_BATCH, moments=moments, name="random weights",
            )  # fmt: skip
            seconds = time.perf_counter() - start
            within = sum(spent)
            after = _bare_pass(model, tokenizer, text)
    bare = (before + after) / 2
    return Sample(
        seconds, bare, None,
        parts={"bare forward pass": bare, "forward passes with hooks": within,
               "everything else": seconds - within},
        notes=[f"GPT-NeoX of {_BLOCKS} blocks, float32, windows of {_CONTEXT}, {_BATCH} at a time; "
               "tokens are read from JSON lines in the dump, not in the bare pass"],
    )  # fmt: skip


def _model(shape: Shape) -> tuple[Any, Any]:
    """Make a GPT-NeoX of random weights, and a tokenizer of as many words as it has rows."""
    try:
        import torch
        from tokenizers import Tokenizer, models
        from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast
    except ImportError as error:
        raise MissingError(f"{error.name} is not installed") from error
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=shape.k, hidden_size=shape.d, num_hidden_layers=_BLOCKS,
        num_attention_heads=_HEADS, intermediate_size=4 * shape.d,
        max_position_embeddings=_CONTEXT,
    )  # fmt: skip
    words = {f"w{i}": i for i in range(shape.k)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0"))
    )
    return GPTNeoXForCausalLM(config).eval(), tokenizer


def _write_documents(path: Path, shape: Shape) -> None:
    """Write documents of one window each, their tokens Zipf-distributed."""
    rng = np.random.default_rng(0)
    share = 1.0 / np.arange(1, shape.k + 1)
    assert shape.n is not None
    tokens = rng.choice(shape.k, shape.n, p=share / share.sum())
    with path.open("w", encoding="utf-8") as file:
        for row in tokens.reshape(-1, _CONTEXT).tolist():
            file.write(json.dumps({"input_ids": row}) + "\n")


def _bare_pass(model: Any, tokenizer: Any, text: Path) -> float:
    """Time the forward passes alone, over the batches that the dump makes."""
    import torch

    from ncbatch.ingest.language.corpus import open_corpus

    batches = open_corpus(text, tokenizer, context=_CONTEXT).batches(_BATCH)
    inputs = [
        {
            "input_ids": torch.from_numpy(batch.input_ids),
            "attention_mask": torch.from_numpy(batch.attention_mask),
            "use_cache": False,
        }
        for batch in batches
    ]
    with torch.inference_mode():
        model(**inputs[0])
        start = time.perf_counter()
        for batch in inputs:
            model(**batch)
        return time.perf_counter() - start


@contextmanager
def _model_time(model: Any) -> Iterator[list[float]]:
    """Give a list that the seconds of every call of the model are added to."""
    spent: list[float] = []
    forward = model.forward

    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return forward(*args, **kwargs)
        finally:
            spent.append(time.perf_counter() - start)

    timed.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    model.forward = timed
    try:
        yield spent
    finally:
        del model.forward


_AGAINST = "the bare forward pass over the same batches"
CASES = [
    Case(
        "dump-rows", "dump of every layer of a language model in float16", _AGAINST,
        partial(dumped, moments=False), _FULL, _QUICK, Aim(at_most=1.15),
    ),
    Case(
        "dump-moments", "the same, folded into moments", _AGAINST,
        partial(dumped, moments=True), _FULL, _QUICK,
    ),
]  # fmt: skip
