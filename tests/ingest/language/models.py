"""Small models with random weights, of three families, saved as Hugging Face checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from tests.ingest.language.tokenizers import WORDS, transformers_tokenizer

K = len(WORDS)
DEPTH, WIDTH, LONGEST = 3, 16, 32
SHAPE = {
    "vocab_size": K,
    "hidden_size": WIDTH,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": LONGEST,
    # Large enough that blocks differ and logits are not nearly equal.
    "initializer_range": 0.3,
}
FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "neox": (GPTNeoXForCausalLM, GPTNeoXConfig, {}),
    "llama": (LlamaForCausalLM, LlamaConfig, {"num_key_value_heads": 1}),
    "tied": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": True}),
    "bert": (BertForMaskedLM, BertConfig, {}),
}
STACKS = {
    "neox": "gpt_neox.layers",
    "llama": "model.layers",
    "tied": "model.layers",
    "bert": "bert.encoder.layer",
}
HEADS = dict.fromkeys(STACKS, "lm_head") | {"bert": "cls.predictions.decoder"}


def make_model(family: str, **options: Any) -> Any:
    """Make a model with the same random weights every time, its biases too."""
    kind, configuration, own = FAMILIES[family]
    torch.manual_seed(0)
    model = kind(configuration(**{**SHAPE, **own, **options})).eval()
    with torch.no_grad():
        for name, values in model.named_parameters():
            if name.endswith("bias"):
                values.normal_(0, 0.3)
    return model


def save_model(folder: Path, family: str, model: Any = None, **options: Any) -> Path:
    """Save a model with its tokenizer."""
    (make_model(family, **options) if model is None else model).save_pretrained(folder)
    transformers_tokenizer().save_pretrained(folder)
    return folder


def layers_of(family: str) -> list[str]:
    """Name the layers that are stored by default."""
    stack = STACKS[family]
    return [f"{stack}.0:input", *(f"{stack}.{i}" for i in range(DEPTH)), f"{HEADS[family]}:input"]


def write_texts(folder: Path, n: int = 12) -> Path:
    """Write documents of 5 to 60 words, one file each."""
    rng = np.random.default_rng(1)
    folder.mkdir()
    for i in range(n):
        words = rng.choice(list("abcdefghij"), rng.integers(5, 60), p=np.arange(10, 0, -1) / 55)
        (folder / f"{i:02}.txt").write_text(" ".join(words))
    return folder
