"""The language-model recipes run from the command line, and learning can be seen in what they leave."""

from __future__ import annotations
import __future__

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import ncbatch as nc

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

RECIPES = Path(__file__).parents[2] / "pipelines"
STEPS = [0, 1, 30]
LAYERS = ["gpt_neox.layers.0:input", "gpt_neox.layers.0", "gpt_neox.layers.1", "lm_head:input"]
PNG = b"\x89PNG"

pytestmark = pytest.mark.slow


def run(recipe: str, *options: str | Path) -> str:
    command = [sys.executable, "-W", "error", str(RECIPES / recipe), *map(str, options)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=280, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """Run the recipe once; give its folder and what it printed."""
    out = tmp_path_factory.mktemp("tiny-lm")
    return out, run("tiny_lm.py", "--quick", "--out", out)


def test_documents_are_of_disjoint_files_and_all_of_their_text(quick):
    out, _ = quick
    found = {
        split: list(map(json.loads, (out / "text" / f"{split}.jsonl").read_bytes().splitlines()))
        for split in ("train", "test", "ood")
    }
    names = {split: {d["name"] for d in documents} for split, documents in found.items()}
    assert names["train"]
    assert names["test"]
    assert not names["train"] & names["test"]
    assert {name.partition("(")[0] for name in names["ood"]} == {"help"}
    assert not any("encodings" in name or "test" in name.split("/") for name in names["train"])
    pieces = [d["text"] for d in found["train"] + found["test"] if d["name"] == "__future__.py"]
    text = Path(__future__.__file__).read_text("utf-8")
    assert len(pieces) > 1
    assert sum(map(len, pieces)) == len(text)
    assert all(piece in text for piece in pieces)


def test_the_model_learns_and_checkpoints_are_whole_models(quick):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out, _ = quick
    losses = []
    for step in STEPS:
        folder = out / "checkpoints" / f"step-{step:06d}"
        losses.append(json.loads((folder / "losses.json").read_text()))
    for split in ("train", "test"):
        assert abs(losses[0][split] - np.log(384)) < 0.1  # knows nothing yet: all tokens alike
        assert losses[-1][split] < losses[0][split] - 1.0
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.config.vocab_size == len(tokenizer) == 384


def test_stores_results_and_figures_are_there(quick):
    out, said = quick
    for step in STEPS:
        store = nc.FeatureStore.open(out / "stores" / f"step-{step:06d}.zarr")
        assert store.validate() == []
        assert store.step == step
        assert store.splits == ["ood", "test", "train"]
        assert store.split("train").layers == LAYERS
    assert not (out / "stores" / "speed.zarr").exists()
    results = nc.load_results(out / "results.zarr")
    assert results["step"].values.tolist() == STEPS
    assert results["layer"].values.tolist() == LAYERS
    np.testing.assert_allclose(results["depth"], [[0, 0.5, 1, 1]] * 3)
    assert np.isfinite(results["nc1_pinv"]).all()
    assert (results["nc1_pinv"] < results["nc1_pinv_null"]).all()  # classes are no accident
    head = results.sel(layer="lm_head:input")
    assert head["nc4_clf_accuracy"].values[-1] > head["nc4_clf_accuracy"].values[0] + 0.05
    assert np.isnan(results["nc4_agree"].values[:, :-1]).all()
    assert len((out / "results.csv").read_text().splitlines()) == 1 + 4 * len(STEPS)
    for name in ("depth.png", "training.png"):
        assert (out / name).read_bytes().startswith(PNG)
    for part in ("train loss", "tokens/s", "dump over forward pass", "sweep of all stores"):
        assert part in said
    value, random = (float(head[name].values[-1]) for name in ("nc1_pinv", "nc1_pinv_random"))
    assert f"{value:.3g} ({random:.3g})" in said  # a line of the table over depth


def test_the_same_command_goes_on_and_repeats_nothing(quick):
    out, said = quick
    before = {p: p.stat().st_mtime_ns for p in sorted(out.glob("checkpoints/*/*"))}
    values = (out / "results.csv").read_text()
    timings = (out / "timings.json").read_text()
    again = run("tiny_lm.py", "--quick", "--out", out)
    assert {p: p.stat().st_mtime_ns for p in sorted(out.glob("checkpoints/*/*"))} == before
    assert (out / "results.csv").read_text() == values
    assert (out / "timings.json").read_text() == timings
    assert "loss" not in again.split("dumped")[0]
    assert again.splitlines()[-4:] == said.splitlines()[-4:]


@pytest.mark.parametrize("lost", STEPS[1:])
def test_training_goes_on_to_the_same_bits(quick, tmp_path, lost):
    """A run that lost a checkpoint, and all that came of its training, makes the same again."""
    out, _ = quick
    for part in ("text", "tokenizer", "checkpoints"):
        shutil.copytree(out / part, tmp_path / part)
    shutil.copy(out / "recipe.json", tmp_path)
    shutil.rmtree(tmp_path / "checkpoints" / f"step-{lost:06d}")
    run("tiny_lm.py", "--quick", "--out", tmp_path)
    assert (tmp_path / "results.csv").read_text() == (out / "results.csv").read_text()


def test_what_a_user_gets_wrong_is_said_in_a_line(quick, tmp_path):
    out, _ = quick
    wrong = {
        "another recipe": ["tiny_lm.py", "--out", out],
        "nothing is there": ["hf_layerwise.py", "./none", out / "text" / "train.jsonl"],
    }
    for said, (recipe, *options) in wrong.items():
        command = [sys.executable, str(RECIPES / recipe), *map(str, options)]
        done = subprocess.run(
            command, check=False, capture_output=True, text=True, timeout=100, cwd=tmp_path
        )
        assert done.returncode == 1
        assert said in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("kept", ["rows", "moments"])
def test_any_model_layer_by_layer(quick, tmp_path, kept):
    """Two checkpoints of the quick run, as somebody else's: the recipe finds the same values."""
    out, _ = quick
    first, last = (out / "checkpoints" / f"step-{step:06d}" for step in (0, 30))
    text = {split: out / "text" / f"{split}.jsonl" for split in ("train", "test", "ood")}
    said = run(
        "hf_layerwise.py", first, text["train"], "--also", last, "--test", text["test"],
        "--ood", text["ood"], "--out", tmp_path, "--context", "64", "--max-tokens", "2000",
        *(["--moments"] if kept == "moments" else []),
    )  # fmt: skip
    results = nc.load_results(tmp_path / "results.zarr")
    assert results["step"].values.tolist() == [0, 30]
    assert results["layer"].values.tolist() == LAYERS
    assert np.isfinite(results[["nc1_pinv", "nc2_etf_err", "nc5_ood_dev"]].to_array()).all()
    assert np.isfinite(results["nc4_agree"].sel(layer="lm_head:input")).all()
    assert "lm_head:input" in said
    for name in ("depth.png", "training.png"):
        assert (tmp_path / name).read_bytes().startswith(PNG)
    store = nc.FeatureStore.open(tmp_path / "stores" / "checkpoints-step-000030.zarr")
    assert store.splits == (["ood", "test", "train"] if kept == "rows" else [])
