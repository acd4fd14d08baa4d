"""Loading: which checkpoints have a head, and what cannot be loaded."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import T5Config

import ncbatch as nc
from ncbatch.errors import DataError, UsageError
from ncbatch.ingest.language.corpus import open_corpus
from ncbatch.ingest.language.model import (
    LanguageModel,
    name_of,
    open_language_model,
    step_of,
    with_checked_head,
)
from tests.ingest.language.models import (
    HEADS,
    LONGEST,
    SHAPE,
    K,
    make_model,
    save_model,
    write_texts,
)
from tests.ingest.language.tokenizers import transformers_tokenizer


def edit_config(folder: Path, **values: Any) -> None:
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | values))


@pytest.mark.parametrize("family", ["neox", "llama", "tied", "bert"])
def test_a_checkpoint_with_its_head(
    family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = open_language_model(save_model(tmp_path / "tiny" / "checkpoint-30", family))
    made = make_model(family)
    assert type(found.module) is type(made)
    assert (found.head, found.masked) == (HEADS[family], family == "bert")
    assert (found.name, found.step, found.n_tokens) == ("tiny", 30, K)
    wanted = made.state_dict()
    assert all(torch.equal(v, wanted[name]) for name, v in found.module.state_dict().items())
    assert not caplog.records


@pytest.mark.parametrize("family", ["neox", "tied", "bert"])
def test_a_base_model_has_no_head_even_where_it_would_be_tied(
    family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = save_model(tmp_path / "base", family, make_model(family).base_model)
    found = open_language_model(folder)
    assert type(found.module) is type(make_model(family).base_model)
    assert found.head is None
    assert found.masked == (family == "bert")
    assert [r.getMessage() for r in caplog.records] == [
        "base has no head that was trained: no classifier is stored, NC3 and NC4 are left out"
    ]


@pytest.mark.parametrize("family", ["neox", "llama", "bert"])
def test_a_head_without_weights_is_no_head(family: str, tmp_path: Path) -> None:
    model = make_model(family)
    folder = save_model(tmp_path / "base", family, model.base_model)
    edit_config(folder, architectures=[type(model).__name__])
    found = open_language_model(folder)
    assert found.head is None
    assert HEADS[family] not in dict(found.module.named_modules())
    stored = model.base_model.state_dict()
    assert all(torch.equal(v, stored[name]) for name, v in found.module.state_dict().items())


def test_a_classifier_of_texts_has_no_head_over_tokens(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = transformers.LlamaForSequenceClassification(make_model("tied").config)
    assert open_language_model(save_model(tmp_path / "m", "tied", model)).head is None


def test_pretrained_bert_with_two_heads_keeps_that_over_tokens(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = transformers.BertForPreTraining(make_model("bert").config)
    found = open_language_model(save_model(tmp_path / "m", "bert", model))
    assert (found.head, found.masked) == (HEADS["bert"], True)


def test_weights_of_blocks_that_are_missing_are_named(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "m", "llama")
    edit_config(folder, num_hidden_layers=4)
    with pytest.raises(
        DataError, match=r"lacks 9 weights, such as 'model.layers.3.input_layernorm"
    ):
        open_language_model(folder)


def test_dtypes(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "m", "neox", make_model("neox").to(torch.bfloat16))
    assert open_language_model(folder).dtype == "bfloat16"
    assert open_language_model(folder, model_dtype="float32").dtype == "float32"


@pytest.mark.parametrize(("version", "name"), [("4.50.3", "torch_dtype"), ("4.56.0", "dtype")])
def test_the_option_is_named_as_transformers_names_it(
    version: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ncbatch.ingest.language.model import _dtype_option

    monkeypatch.setattr(sys.modules["transformers"], "__version__", version)
    assert _dtype_option() == name


def test_a_loaded_model(tmp_path: Path) -> None:
    module, tokenizer = make_model("bert"), transformers_tokenizer()
    found = open_language_model(module, tokenizer)
    assert found.module is module
    assert found.tokenizer is tokenizer
    assert (found.name, found.head, found.masked) == ("BertForMaskedLM", HEADS["bert"], True)
    with pytest.raises(UsageError, match="a loaded model without tokenizer; expected tokenizer="):
        open_language_model(module)
    with pytest.raises(UsageError, match="a loaded model, and options of loading"):
        open_language_model(module, tokenizer, device="cpu")
    with pytest.raises(UsageError, match="a model of type Linear; expected a path"):
        open_language_model(torch.nn.Linear(2, 2), tokenizer)
    saved = save_model(tmp_path / "m", "neox")
    assert open_language_model(module, saved).n_tokens == K


@pytest.mark.parametrize("rows", [K - 1, K + 5])
def test_a_tokenizer_larger_than_the_vocabulary_is_refused(rows: int) -> None:
    model = open_language_model(make_model("tied", vocab_size=rows), transformers_tokenizer())
    if rows >= K:  # padded
        model.check_vocabulary()
        return
    with pytest.raises(
        DataError,
        match=rf"does not match the vocabulary of LlamaForCausalLM: {K} token ids, {rows} rows",
    ):
        model.check_vocabulary()


def test_ids_with_gaps_count_to_the_largest() -> None:
    class Gaps:
        def __len__(self) -> int:
            return 2

        def get_vocab(self) -> dict[str, int]:
            return {"a": 0, "b": 7}

    assert LanguageModel(make_model("neox"), Gaps(), "m", None, None, False).n_tokens == 8


def test_windows_are_as_long_as_the_model_takes() -> None:
    model = open_language_model(make_model("neox"), transformers_tokenizer())
    assert model.context(None) == LONGEST
    assert model.context(8) == 8
    with pytest.raises(UsageError, match=f"context of 33 tokens; expected {LONGEST} at most"):
        model.context(33)
    long = make_model("neox", max_position_embeddings=100_000)
    assert open_language_model(long, transformers_tokenizer()).context(None) == 2048
    short = transformers_tokenizer(model_max_length=20)
    assert open_language_model(long, short).context(None) == 20


def test_roberta_counts_positions_from_behind_its_padding(tmp_path: Path) -> None:
    config = transformers.RobertaConfig(**SHAPE, pad_token_id=1)
    model = open_language_model(transformers.RobertaForMaskedLM(config), transformers_tokenizer())
    assert model.context(None) == LONGEST - 2
    ids = torch.full((1, model.context(None)), 5)
    assert model.module.eval()(input_ids=ids).logits.shape == (1, LONGEST - 2, K)
    with pytest.raises(UsageError, match=f"expected {LONGEST - 2} at most"):
        model.context(LONGEST - 1)


def test_an_encoder_with_a_decoder_is_refused(tmp_path: Path) -> None:
    T5Config(vocab_size=K).save_pretrained(tmp_path / "m")
    with pytest.raises(DataError, match="is an encoder with a decoder; expected a causal or"):
        open_language_model(tmp_path / "m")


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no model at '.*gone': nothing is there"):
        open_language_model(tmp_path / "gone")
    folder = save_model(tmp_path / "m", "neox")
    with pytest.raises(DataError, match=r"no model at '.*checkpoint-7': nothing is there"):
        open_language_model(tmp_path / "checkpoint-7")
    with pytest.raises(DataError, match=r"no tokenizer at '.*gone': nothing is there"):
        open_language_model(folder, tmp_path / "gone")


@pytest.mark.parametrize(
    ("environment", "rank", "device"),
    [({}, None, "cuda:0"), ({}, 3, "cuda:1"), ({"LOCAL_RANK": "0", "RANK": "3"}, 3, "cuda:0")],
)
def test_each_rank_has_a_gpu_of_its_own(
    environment: dict[str, str], rank: int | None, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ncbatch.ingest.language.model import _device

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name in ("LOCAL_RANK", "RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert _device("auto", rank) == device


def test_an_unknown_name_without_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError) as caught:
        open_language_model("no-one/has-this")
    assert str(caught.value).splitlines() == [
        "model 'no-one/has-this' cannot be loaded: it is neither a folder nor on this machine, and "
        "the hub cannot be reached",
        "give the path of a folder, or download it first",
    ]


def test_pickled_weights_are_read_when_allowed(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "m", "neox")
    weights = make_model("neox").state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(DataError, match="--allow-pickle"):
        open_language_model(folder)
    found = open_language_model(folder, allow_pickle=True)
    assert torch.equal(found.module.lm_head.weight, weights["lm_head.weight"])


def test_damaged_files_are_errors_of_a_line(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "m", "neox")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(DataError, match=r"model '.*m' cannot be loaded: ") as caught:
        open_language_model(folder)
    assert len(str(caught.value).splitlines()) == 1
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match=r"tokenizer '.*m' cannot be loaded: "):
        open_language_model(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(DataError, match=r"model '.*m' cannot be loaded: "):
        open_language_model(folder)


def test_code_that_comes_with_a_model_is_not_run(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "m", "neox")
    (folder / "odd.py").write_text("raise SystemExit('it ran')\n")
    edit_config(
        folder,
        model_type="odd",
        architectures=["OddForCausalLM"],
        auto_map={"AutoConfig": "odd.OddConfig", "AutoModelForCausalLM": "odd.OddForCausalLM"},
    )
    with pytest.raises(DataError, match="it comes with code of its own\n--trust-remote-code"):
        open_language_model(folder)


def test_devices(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "m", "neox")
    with pytest.raises(UsageError, match="device 'gpu'; expected auto, cpu, cuda or cuda:N"):
        open_language_model(folder, device="gpu")
    with pytest.raises(UsageError, match="device 'cuda:99'; expected one of the"):
        open_language_model(folder, device="cuda:99")


def test_without_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UsageError, match=r'pip install "ncbatch\[hf\]"'):
        open_language_model(tmp_path)


def test_transformers_reports_as_before(tmp_path: Path) -> None:
    from transformers.utils import logging as reports

    before = reports.get_verbosity(), reports.is_progress_bar_enabled()
    open_language_model(save_model(tmp_path / "m", "neox"))
    with pytest.raises(DataError):
        open_language_model(tmp_path, transformers_tokenizer())
    assert (reports.get_verbosity(), reports.is_progress_bar_enabled()) == before
    assert logging.getLogger("transformers").level == before[0]


@pytest.mark.parametrize(
    ("path", "name", "step"),
    [
        ("runs/tiny/checkpoint-1000", "tiny", 1000),
        ("runs/tiny/step_500", "tiny", 500),
        ("runs/tiny/global_step20", "tiny", 20),
        ("EleutherAI/pythia-70m", "EleutherAI/pythia-70m", None),
        ("org/model-step1000", "org/model-step1000", 1000),
        ("org/stage1-step300-tokens2B", "org/stage1-step300-tokens2B", 300),
        ("org/step-350M", "org/step-350M", None),
        ("org/footstep12", "org/footstep12", None),
    ],
)
def test_names_and_steps(path: str, name: str, step: int | None) -> None:
    assert name_of(path) == name
    assert step_of(path) == step


def test_a_local_folder_is_named_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tiny" / "checkpoint-5").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "tiny" / "checkpoint-5")
    assert name_of(".") == "tiny"
    assert name_of(str(tmp_path / "tiny")) == "tiny"
    assert step_of("main", "step143000-x") == 143000


# ---------------------------------------------------- heads that are not, or not alone, the logits


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
    batch = next(corpus.batches(8))
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
