"""Moments of language models: ranks that were killed at the end, and room on the disk."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ncbatch as nc
from ncbatch.errors import OutputError, StoreError
from ncbatch.ingest.language import dumps as dumping
from ncbatch.ingest.model.room import states_bytes
from tests.conftest import run_here
from tests.ingest.language.models import layers_of, make_model, write_texts
from tests.ingest.language.tokenizers import transformers_tokenizer


@dataclass
class Told:
    notes: list[str] = field(default_factory=list)

    def begin(self, *_: Any) -> None: ...
    def end(self) -> None: ...
    def advance(self, n_rows: int) -> None: ...

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model("neox")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("moments") / "texts")


@pytest.fixture
def folded(tmp_path: Path, model: Any, texts: Path) -> Any:
    def dump(name: str, **options: Any) -> tuple[nc.FeatureStore, list[str]]:
        told = Told()
        store = nc.dump_language_model(
            model, texts, tmp_path / name, tokenizer=transformers_tokenizer(), moments=True,
            progress=told, **options,
        )  # fmt: skip
        return store, told.notes

    return dump


def test_the_last_rank_killed_before_it_merged(
    folded: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = folded("whole")
    folded("s", rank=0, world_size=2)

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(dumping, "finalize_if_last", killed)
        with pytest.raises(KeyboardInterrupt):
            folded("s", rank=1, world_size=2)
    monkeypatch.setenv("COLUMNS", "200")
    table = run_here("info", "s", cwd=tmp_path).out
    assert table.count("part of ranks 0, 1, to be merged: 'ncbatch finalize'") == 5
    with pytest.raises(StoreError, match="unfinished moments of layers"):
        nc.measure(tmp_path / "s")
    store, notes = folded("s", rank=1, world_size=2, resume=True)
    assert notes == [f"split 'train' of {store.path} is complete: nothing to resume"]
    assert store.state_kinds("train") == whole.state_kinds("train")
    for layer in layers_of("neox"):
        for name, values in store.state("train", layer, "moments")[0].items():
            np.testing.assert_allclose(
                values, whole.state("train", layer, "moments")[0][name], atol=1e-9
            )


def test_a_rank_resumed_before_the_others_ended_is_not_all(folded: Any) -> None:
    folded("s", rank=0, world_size=2)
    _, notes = folded("s", rank=0, world_size=2, resume=True)
    assert "rank 0 of split 'train'" in notes[0]
    assert "the split is not: 'ncbatch finalize " in notes[0]
    with pytest.raises(StoreError, match="were begun by 2 ranks; expected 1"):
        folded("s", resume=True)
    store, _ = folded("s", overwrite=True)
    assert {kind for _, kind in store.state_kinds("train")} == {"moments"}


def test_room_on_the_disk(folded: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, notes = folded("s")
    arrays = [store.state("train", layer, "moments")[0] for layer in layers_of("neox")]
    n_seen, width = arrays[0]["mean"].shape
    assert notes[0].startswith(
        f"moments of 5 layers, {n_seen} classes of {5 * width} features in all"
    )
    n = int(arrays[0]["count"].sum())
    needed = states_bytes(dict.fromkeys(layers_of("neox"), width), n_seen, n, 1)
    held = sum(values.nbytes for state in arrays for values in state.values())
    assert held <= needed <= 2 * held
    usage = type(shutil.disk_usage("/"))
    for free in (needed, needed - 1):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: usage(0, 0, free))
        if free == needed:
            folded("enough")
            continue
        with pytest.raises(OutputError, match=r"take at most .* are free at '.*'\ntake fewer"):
            folded("full")
    assert not (tmp_path / "full").exists()
    folded("s", overwrite=True)  # what is replaced is there already
