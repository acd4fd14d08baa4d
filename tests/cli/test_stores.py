"""Commands that fill stores, as users call them: dumps of language models, ranks completed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ncbatch as nc
from tests.conftest import Answer, make_toy, run_command
from tests.ingest.language.models import K, layers_of, make_model, save_model, write_texts

LAYERS = layers_of("neox")
# One process after another may not share cores with other tests' threads.
ALONE = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture
def here(tmp_path: Path) -> Path:
    save_model(tmp_path / "run" / "checkpoint-200", "neox")
    write_texts(tmp_path / "texts", 4)
    return tmp_path


def test_what_it_prints_and_stores(here: Path, ncbatch: Callable[..., Answer]) -> None:
    done = ncbatch("dump", "run/checkpoint-200", "texts", "--out", "s.zarr", "--batch-size", 2)
    assert done.code == 0, done.err
    assert done.out.splitlines()[1] == "model run, step 200"
    n = nc.FeatureStore.open(here / "s.zarr").split("train").n_samples
    for layer in LAYERS:
        assert f"{layer} " in done.out
    assert f" {n} " in done.out
    assert f"K = {K} classes" in done.out
    assert f"note: {n} rows of 5 layers, 80 features in all, take " in done.err
    assert "tokens/s" in done.err
    measured = ncbatch("measure", "s.zarr", "--metrics", "nc1_pinv,nc4_agree", "--out", "r.json")
    assert measured.code == 0, measured.err
    values = json.loads((here / "r.json").read_text())["s.zarr"]
    assert sorted(values) == sorted(LAYERS)
    assert 0 <= values["lm_head:input"]["nc4_agree"] <= 1


def test_options_reach_the_dump(here: Path, ncbatch: Callable[..., Answer]) -> None:
    (here / "more.jsonl").write_text('{"body": "a b c d e f g h i j"}\n' * 3)
    made = make_model("neox").state_dict()
    done = ncbatch(
        "dump", "run/checkpoint-200", "texts/00.txt", "more.jsonl", "--out", "s.zarr",
        "--split", "test", "--layer", "gpt_neox.layers.1", "--layer", "lm_head:input",
        "--context", 8, "--pack", "--field", "body", "--exclude", "3, 4", "--max-tokens", 20,
        "--per-class-cap", 3, "--seed", 1, "--dtype", "float32", "--model-dtype", "bfloat16",
        "--device", "cpu", "--name", "mine", "--step", 7, "--tokenizer", "run/checkpoint-200",
    )  # fmt: skip
    assert done.code == 0, done.err
    store = nc.FeatureStore.open(here / "s.zarr")
    assert (store.splits, store.layers("test")) == (
        ["test"], ["gpt_neox.layers.1", "lm_head:input"]
    )  # fmt: skip
    assert (store.model, store.step) == ("mine", 7)
    labels = store.split("test").labels()
    assert len(labels) <= 20
    assert not np.isin(labels, [3, 4]).any()
    assert np.bincount(labels).max() <= 3
    rows = np.asarray(store.split("test").feature("lm_head:input")[:])
    assert rows.dtype == np.float32
    assert not (rows.view(np.uint32) & 0xFFFF).any()  # the model ran in bfloat16
    weight, _ = store.classifier("lm_head:input") or (None, None)
    assert np.array_equal(weight, made["lm_head.weight"].bfloat16().float().numpy())


def test_an_empty_folder_becomes_the_store(here: Path, ncbatch: Callable[..., Answer]) -> None:
    (here / "s.zarr").mkdir()
    done = ncbatch("dump", "run/checkpoint-200", "texts", "--out", "s.zarr")
    assert done.code == 0, done.err
    (here / "t.zarr").mkdir()
    np.save(here / "x.npy", np.eye(4, dtype=np.float32))
    np.save(here / "y.npy", np.arange(4) % 2)
    files = ("--features", "x.npy", "--labels", "y.npy")
    done = ncbatch("import", "t.zarr", "--split", "train", "--layer", "x", *files)
    assert done.code == 0, done.err
    assert nc.FeatureStore.open(here / "t.zarr").validate() == []


def test_moments(here: Path, ncbatch: Callable[..., Answer]) -> None:
    for split in (["--split", "train"], ["--split", "test", "--means", "train"]):
        done = ncbatch(
            "dump", "run/checkpoint-200", "texts", "--out", "s.zarr", "--moments", *split
        )
        assert done.code == 0, done.err
        assert "rows of 5 layers" not in done.err
    store = nc.FeatureStore.open(here / "s.zarr")
    assert store.splits == []
    assert sorted(store.state_layers("train", "moments")) == sorted(LAYERS)
    assert store.state_layers("test", "decisions") == ["lm_head:input"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--layer", "gpt_neox.layer.1"], 1, "did you mean 'gpt_neox.layers.1'?"),
        (["--exclude", "3,x"], 1, "--exclude '3,x'; expected token ids, separated by commas"),
        (["--context", 99], 1, "context of 99 tokens; expected 32 at most, for this model"),
        (["--means", "train"], 1, "means 'train' without moments"),
        (["--rank", 1], 1, "rank without world size; expected both, or none of them"),
        (["--rank", 2, "--world-size", 2], 1, "rank"),
        (["--device", "gpu"], 1, "device 'gpu'; expected auto, cpu, cuda or cuda:N"),
        (["--tokenizer", "./none"], 1, "no tokenizer at './none': nothing is there"),
        (["--step", -3], 2, "see 'ncbatch dump --help'"),
        (["--labels", "nxt"], 2, "see 'ncbatch dump --help'"),
    ],
)
def test_errors_are_a_line_or_two_and_nothing_is_written(
    arguments: list[Any], code: int, message: str, here: Path, ncbatch: Callable[..., Answer]
) -> None:
    done = ncbatch("dump", "run/checkpoint-200", "texts", "--out", "s.zarr", *arguments)
    assert done.code == code
    assert message in done.err
    assert len(done.err.splitlines()) <= 2
    assert sorted(path.name for path in here.iterdir()) == ["run", "texts"]


def test_text_that_is_not_there(here: Path, ncbatch: Callable[..., Answer]) -> None:
    done = ncbatch("dump", "run/checkpoint-200", "none.txt", "--out", "s.zarr")
    assert done.code == 1
    assert "none.txt" in done.err
    assert len(done.err.splitlines()) <= 2


def test_help_loads_no_torch() -> None:
    code = (
        "import sys; sys.argv = ['ncbatch', 'dump', '--help']\n"
        "from ncbatch.cli import main\n"
        "try: main()\n"
        "finally: print([m for m in ('torch', 'transformers', 'zarr') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "argmax for a masked model" in " ".join(done.stdout.split())


def test_finalize_completes_what_several_writers_wrote(
    ncbatch: Callable[..., Answer], tmp_path: Path, small_chunks: None
) -> None:
    toy = make_toy(300, 6)
    store = nc.FeatureStore.create(tmp_path / "run.zarr", 5, {"fc": 6}, "float32")
    for rank in (0, 1):
        if rank:
            answer = ncbatch("finalize", "run.zarr", "--split", "train")
            assert answer.code == 1
            assert "1" in answer.err
        with store.writer("train", rank=rank, world_size=2, n_samples=300) as writer:
            writer.append({"fc": toy.X[rank::2]}, toy.y[rank::2])
    done = ncbatch("finalize", "run.zarr", "--split", "train")
    assert done.code == 0, done.err
    assert "300 samples" in done.out
    measured = ncbatch("measure", "run.zarr")
    assert measured.code == 0, measured.err
    assert "300 samples, 5 classes" in measured.out


@pytest.mark.slow
def test_killed_and_resumed_by_the_same_command(here: Path) -> None:
    code = (
        "import os, signal, sys\n"
        "import ncbatch.store.format as format\n"
        "from ncbatch.ingest.model.capture import Capture\n"
        "from ncbatch.cli import main\n"
        "format.CHUNK_BYTES, run, left = 1024, Capture.run, [int(os.environ['PASSES'])]\n"
        "def counted(*arguments):\n"
        "    left[0] -= 1\n"
        "    if not left[0]: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return run(*arguments)\n"
        "Capture.run = counted\n"
        "main()"
    )
    arguments = ["dump", "run/checkpoint-200", "texts", "--context", "16", "--batch-size", "1"]

    def run(out: str, passes: int, *more: str) -> int:
        command = [sys.executable, "-c", code, *arguments, "--out", out, *more]
        environment = {**ALONE, "PASSES": str(passes)}
        done = subprocess.run(command, cwd=here, env=environment, capture_output=True, timeout=120)
        return done.returncode

    assert run("whole.zarr", 0) == 0
    assert run("cut.zarr", 6) == -9
    begun = nc.FeatureStore.open(here / "cut.zarr").split("train")
    assert begun.n_samples > 0
    assert not begun.finalized
    assert run("cut.zarr", 0, "--resume") == 0
    whole, cut = (nc.FeatureStore.open(here / f"{name}.zarr") for name in ("whole", "cut"))
    assert cut.validate() == []
    for layer in LAYERS:
        rows, truth = (np.asarray(s.split("train").feature(layer)[:]) for s in (cut, whole))
        assert np.array_equal(rows, truth)


@pytest.mark.slow
def test_ranks_at_once_write_one_store(here: Path) -> None:
    command = [
        str(Path(sys.executable).with_name("ncbatch")),
        "dump",
        "run/checkpoint-200",
        "texts",
    ]
    command += ["--context", "16", "--batch-size", "1", "--out"]
    ranks = [
        subprocess.Popen(
            [*command, "ranks.zarr"],
            cwd=here,
            env={**ALONE, "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    alone = run_command(*command[1:], "one.zarr", cwd=here, env=ALONE)
    assert alone.code == 0, alone.err
    one, two = (
        nc.FeatureStore.open(here / name).split("train") for name in ("one.zarr", "ranks.zarr")
    )
    assert two.finalized
    rows = []
    for part in (one, two):
        there = part.labels() >= 0
        columns = [np.asarray(part.feature(layer)[:])[there] for layer in LAYERS]
        table = np.column_stack([part.labels()[there], *columns])
        rows.append(table[np.lexsort(table.T)])
    assert np.array_equal(*rows)
