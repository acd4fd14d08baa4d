"""Heads that are not, or not alone, the model's logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import ncbatch as nc
from ncbatch.errors import UsageError
from ncbatch.ingest.language.corpus import open_corpus
from ncbatch.ingest.language.model import open_language_model, with_checked_head
from tests.ingest.language.models import LONGEST, SHAPE, K, make_model, write_texts
from tests.ingest.language.tokenizers import transformers_tokenizer

Logged = pytest.LogCaptureFixture
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def model_of(kind: Any, config: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    return kind(config(**{**SHAPE, **IDS, **options})).eval()


def esm() -> Any:
    model = model_of(transformers.EsmForMaskedLM, transformers.EsmConfig, mask_token_id=0)
    with torch.no_grad():
        model.lm_head.bias.normal_(0, 3)
    return model


def checked(model: Any) -> Any:
    return with_checked_head(open_language_model(model, transformers_tokenizer()))


def test_a_bias_outside_of_the_head_is_part_of_the_classifier_and_of_predictions(
    tmp_path: Path,
) -> None:
    model, texts = esm(), write_texts(tmp_path / "texts", 3)
    store = nc.dump_language_model(
        model, texts, tmp_path / "s", tokenizer=transformers_tokenizer(), dtype="float32",
        context=LONGEST - 1,
    )  # fmt: skip
    head = "lm_head.decoder:input"
    weight, bias = store.classifier(head)  # type: ignore[misc]
    assert np.array_equal(weight, model.lm_head.decoder.weight.detach().numpy())
    assert np.array_equal(bias, model.lm_head.bias.detach().numpy())
    corpus = open_corpus(texts, transformers_tokenizer(), context=LONGEST - 1, labels="argmax")
    batch = corpus.batches(8)[0]
    with torch.no_grad():
        out = model(torch.from_numpy(batch.input_ids), torch.from_numpy(batch.attention_mask))
    own = out.logits[torch.from_numpy(batch.labels >= 0)].argmax(-1).numpy()
    part = store.split("train")
    assert np.array_equal(part.predictions()[: len(own)], own)
    assert np.array_equal(part.labels()[: len(own)], own)  # of a masked model


def test_a_dense_layer_over_hidden_states_is_no_head(tmp_path: Path, caplog: Logged) -> None:
    kind, config = transformers.DebertaV2ForMaskedLM, transformers.DebertaV2Config
    model, texts = model_of(kind, config, legacy=False, vocab_size=K + 4), tmp_path / "texts"
    store = nc.dump_language_model(
        model, write_texts(texts, 2), tmp_path / "s", tokenizer=transformers_tokenizer(),
        labels="next",
    )  # fmt: skip
    assert store.classifiers == []
    assert store.split("train").head is None
    assert caplog.text.count("does not give the logits: no classifier is stored, NC3 and NC4") == 1


def test_a_head_that_does_not_run_is_none(tmp_path: Path, caplog: Logged) -> None:
    model = model_of(
        transformers.MobileBertForMaskedLM, transformers.MobileBertConfig, embedding_size=8,
        intra_bottleneck_size=16, true_hidden_size=16,
    )  # fmt: skip
    assert checked(model).head is None
    assert "runs never or several times in a pass" in caplog.text
    with pytest.raises(UsageError, match="labels 'argmax' of MobileBertForMaskedLM, which has no"):
        nc.dump_language_model(
            model, write_texts(tmp_path / "texts", 1), tmp_path / "s",
            tokenizer=transformers_tokenizer(),
        )  # fmt: skip


def test_logits_that_are_scaled_or_capped_rank_as_the_head_does() -> None:
    cases: list[tuple[Any, Any, dict[str, Any]]] = [
        (transformers.Gemma2ForCausalLM, transformers.Gemma2Config, {"head_dim": 8}),
        (transformers.GraniteForCausalLM, transformers.GraniteConfig, {"logits_scaling": 8.0}),
    ]
    for kind, config, own in cases:
        found = checked(model_of(kind, config, num_key_value_heads=1, **own))
        assert (found.head, found.head_bias) == ("lm_head", None)


def test_logits_that_rank_otherwise_are_not_the_heads(caplog: Logged) -> None:
    model = make_model("neox")
    model.register_forward_hook(lambda _, __, out: setattr(out, "logits", -out.logits))
    assert checked(model).head is None
    assert "does not give the logits" in caplog.text


def test_the_check_leaves_the_model_as_it_was() -> None:
    model = make_model("neox").train()
    model.gpt_neox.layers[1].eval()
    modes = [part.training for part in model.modules()]
    assert checked(model).head is not None
    assert [part.training for part in model.modules()] == modes
    assert not any(part._forward_hooks for part in model.modules())
