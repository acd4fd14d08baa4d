"""Where hidden states are: depths of layers, and modules that are not there or run twice."""

from __future__ import annotations

from pathlib import Path

import pytest

import ncbatch as nc
from ncbatch.errors import DataError, UnknownNameError
from tests.ingest.language.models import make_model, save_model, write_texts
from tests.ingest.language.tokenizers import transformers_tokenizer


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    return write_texts(tmp_path / "texts")


def test_depths(tmp_path: Path, texts: Path) -> None:
    layers = [
        "model.layers.1:input", "model.layers.1.mlp", "model.norm", "model.embed_tokens",
        "model.layers.0.self_attn.q_proj", "lm_head:input", "model.layers.2",
    ]  # fmt: skip
    store = nc.dump_language_model(
        make_model("llama"),
        texts,
        tmp_path / "s",
        tokenizer=transformers_tokenizer(),
        layers=layers,
    )
    notes = store.layer_notes
    assert {name: (n.get("depth"), n["hidden_state"]) for name, n in notes.items()} == {
        "model.layers.1:input": (1 / 3, 1),
        "model.layers.1.mlp": (1 / 3, None),
        "model.norm": (1.0, 3),
        "model.embed_tokens": (0.0, 0),
        "model.layers.0.self_attn.q_proj": (0.0, None),
        "lm_head:input": (1.0, 3),
        "model.layers.2": (1.0, None),
    }


def test_unknown_layers_name_the_nearest(tmp_path: Path, texts: Path) -> None:
    folder = save_model(tmp_path / "m", "llama")
    with pytest.raises(UnknownNameError, match=r"no module 'model.layer.1'.*\n.*'model.layers.1'"):
        nc.dump_language_model(folder, texts, tmp_path / "s", layers="model.layer.1:input")
    assert not (tmp_path / "s").exists()


def test_a_module_that_runs_twice_is_refused_before_anything_is_written(
    tmp_path: Path, texts: Path
) -> None:
    model = make_model("llama")
    model.model.layers[1].mlp.act_fn = model.model.layers[0].mlp.act_fn
    with pytest.raises(DataError, match=r"'model.layers.0.mlp.act_fn' ran 2 times"):
        nc.dump_language_model(
            model, texts, tmp_path / "s", tokenizer=transformers_tokenizer(),
            layers="model.layers.0.mlp.act_fn",
        )  # fmt: skip
    assert not (tmp_path / "s").exists()
