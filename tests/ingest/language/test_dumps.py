"""Dumps of language models against what transformers itself gives, bit for bit."""

from __future__ import annotations

import errno
import inspect
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
import torch
from transformers import LlamaForCausalLM

import ncbatch as nc
from ncbatch.errors import (
    BudgetError,
    DataError,
    NcbatchError,
    OutputError,
    StoreError,
    UsageError,
)
from ncbatch.ingest.language import dumps as dumping
from ncbatch.ingest.language.corpus import open_corpus
from ncbatch.ingest.model.room import states_bytes
from tests.conftest import run_here
from tests.ingest.language.models import (
    DEPTH,
    FAMILIES,
    HEADS,
    LONGEST,
    STACKS,
    WIDTH,
    K,
    layers_of,
    make_model,
    save_model,
    write_texts,
)
from tests.ingest.language.tokenizers import transformers_tokenizer

Array = npt.NDArray[Any]
NUMPY = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Products this small are slower on several threads, much so on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    return write_texts(tmp_path / "texts")


@dataclass
class Wanted:
    """What transformers gives at the samples: hidden states and logits in float32, labels."""

    states: list[torch.Tensor]
    logits: torch.Tensor
    labels: Array


def wanted(model: Any, texts: Path, batch_size: int = 8, **options: Any) -> Wanted:
    """Run the model as its users do, and keep the positions that have a label."""
    given = {"context": LONGEST, "labels": "next"} | options
    corpus = open_corpus(texts, transformers_tokenizer(), **given)
    takes = inspect.signature(model.forward).parameters
    cache = {"use_cache": False} if "use_cache" in takes else {}
    found = []
    for batch in corpus.batches(batch_size):
        with torch.inference_mode():
            out = model(
                input_ids=torch.from_numpy(batch.input_ids),
                attention_mask=torch.from_numpy(batch.attention_mask),
                output_hidden_states=True,
                **cache,
            )
        at = torch.from_numpy(batch.labels >= 0)
        logits = out.logits if "logits" in out else out.last_hidden_state
        found.append(
            ([x[at] for x in out.hidden_states], logits[at], batch.labels[batch.labels >= 0])
        )
    states, logits, labels = zip(*found, strict=True)
    return Wanted(
        [torch.cat(parts) for parts in zip(*states, strict=True)],
        torch.cat(logits),
        np.concatenate(labels),
    )


def rows_of(store: nc.FeatureStore, layer: str, split: str = "train") -> Array:
    return np.asarray(store.split(split).feature(layer)[:])


def as_bits(values: Array | torch.Tensor) -> Array:
    if isinstance(values, torch.Tensor):
        values = values.contiguous().view(getattr(torch, f"int{8 * values.dtype.itemsize}")).numpy()
    return np.ascontiguousarray(values).view(f"i{values.dtype.itemsize}")


def sorted_rows(store: nc.FeatureStore, split: str = "train") -> Array:
    """All layers, label and prediction of every sample, as bytes, in an order of their own."""
    part = store.split(split)
    columns = [np.asarray(part.labels()), np.asarray(part.predictions())]
    columns += [as_bits(rows_of(store, layer, split)) for layer in sorted(part.layers)]
    table = np.column_stack([c.reshape(len(c), -1).astype(np.int64) for c in columns])
    table = table[table[:, 0] >= 0]
    return table[np.lexsort(table.T)]


# ------------------------------------------------------------------------------------------- bits


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        *((family, "float32") for family in FAMILIES),
        *(("llama", dtype) for dtype in ("float16", "bfloat16")),
        *(
            pytest.param(family, dtype, marks=pytest.mark.slow)
            for family in ("neox", "tied", "bert")
            for dtype in ("float16", "bfloat16")
        ),
    ],
)
def test_stored_rows_are_the_hidden_states_bit_for_bit(
    family: str, dtype: str, tmp_path: Path, texts: Path
) -> None:
    model = make_model(family)
    store = nc.dump_language_model(
        save_model(tmp_path / "m", family), texts, tmp_path / "s", labels="next", dtype=dtype
    )
    truth = wanted(model, texts)
    assert store.layers("train") == layers_of(family)
    at = {name: notes["hidden_state"] for name, notes in store.layer_notes.items()}
    after = DEPTH if family == "bert" else None  # others norm the last block's output
    seen = None if family == "bert" else DEPTH  # and BERT transforms it before its head
    assert list(at.values()) == [0, 1, 2, after, seen]
    for name, index in at.items():
        if index is not None:
            values = truth.states[index].to(getattr(torch, dtype))
            assert np.array_equal(as_bits(rows_of(store, name)), as_bits(values)), name
    assert np.array_equal(store.split("train").labels(), truth.labels)
    assert np.array_equal(store.split("train").predictions(), truth.logits.argmax(1).numpy())


@pytest.mark.parametrize("family", list(FAMILIES))
def test_the_heads_input_and_the_classifier_give_the_logits(
    family: str, tmp_path: Path, texts: Path
) -> None:
    model = make_model(family)
    store = nc.dump_language_model(
        save_model(tmp_path / "m", family), texts, tmp_path / "s", labels="next", dtype="float32"
    )
    layer = f"{HEADS[family]}:input"
    assert (store.classifiers, store.split("train").head) == ([layer], layer)
    weight, bias = store.classifier(layer) or (None, None)
    assert (bias is not None) == (family == "bert")
    logits = rows_of(store, layer).astype(np.float64) @ weight.T + (0 if bias is None else bias)
    truth = wanted(model, texts).logits.numpy()
    np.testing.assert_allclose(logits, truth, rtol=1e-4, atol=1e-4)
    assert np.array_equal(logits.argmax(1), store.split("train").predictions())


def test_bfloat16_models_are_stored_as_they_are(tmp_path: Path, texts: Path) -> None:
    folder = save_model(tmp_path / "m", "llama", make_model("llama").to(torch.bfloat16))
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    store = nc.dump_language_model(folder, texts, tmp_path / "s")
    assert store.split("train").spec("model.layers.0").dtype == "bfloat16"
    truth = wanted(model, texts)
    assert np.array_equal(as_bits(rows_of(store, "lm_head:input")), as_bits(truth.states[-1]))
    wide = nc.dump_language_model(folder, texts, tmp_path / "wide", model_dtype="float32")
    assert wide.split("train").spec("model.layers.0").dtype == "float16"


# ------------------------------------------------------------------------- heads and vocabularies


def test_a_padded_vocabulary(tmp_path: Path, texts: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = make_model("neox", vocab_size=K + 11)
    with torch.no_grad():
        model.lm_head.weight[K:] = 100  # what padding decides must not matter
    store = nc.dump_language_model(save_model(tmp_path / "m", "neox", model), texts, tmp_path / "s")
    assert store.n_classes == K
    weight, _ = store.classifier("lm_head:input") or (None, None)
    assert np.array_equal(weight, model.lm_head.weight[:K].detach().numpy())
    decided = wanted(model, texts).logits[:, :K].argmax(1)
    assert np.array_equal(store.split("train").predictions(), decided)
    assert f"the first {K} of {K + 11} rows of 'lm_head'" in caplog.text


@pytest.mark.parametrize("family", ["neox", "bert"])
def test_without_a_head(
    family: str, tmp_path: Path, texts: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = make_model(family).base_model
    folder = save_model(tmp_path / "m", family, base)
    store = nc.dump_language_model(folder, texts, tmp_path / "s", labels="next", dtype="float32")
    stack = STACKS[family].partition(".")[2]
    assert store.layers("train") == [f"{stack}.0:input", *(f"{stack}.{i}" for i in range(DEPTH))]
    assert (store.classifiers, store.split("train").head, store.n_classes) == ([], None, K)
    assert caplog.text.count("NC3 and NC4 are left out") == 1
    truth = wanted(base, texts)
    assert np.array_equal(rows_of(store, f"{stack}.1"), truth.states[2].numpy())
    with pytest.raises(UsageError, match=r"labels 'argmax' of m, which has no head; expected"):
        nc.dump_language_model(folder, texts, tmp_path / "t", labels="argmax")
    assert not (tmp_path / "t").exists()


def test_a_tokenizer_that_does_not_match(tmp_path: Path, texts: Path) -> None:
    folder = save_model(tmp_path / "m", "tied", vocab_size=K - 1)
    with pytest.raises(DataError, match="does not match the vocabulary of m"):
        nc.dump_language_model(folder, texts, tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_token_ids_and_labels_beyond_the_vocabulary(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "m", "neox")
    for name, document, message in (
        ("ids", '{"input_ids": [3, 4, 99, 5]}', "token id 99 in the texts; expected ids below 13"),
        ("labels", '{"input_ids": [3, 4], "labels": [1, 13]}', "label 13 in the texts; expected"),
    ):
        (tmp_path / f"{name}.jsonl").write_text(document)
        with pytest.raises(DataError, match=message):
            nc.dump_language_model(
                folder, tmp_path / f"{name}.jsonl", tmp_path / "s", labels="given"
                if name == "labels" else "argmax",
            )  # fmt: skip
        assert not (tmp_path / "s").exists()


def test_a_masked_model_is_asked_for_its_own_decisions(tmp_path: Path, texts: Path) -> None:
    model = make_model("bert")
    store = nc.dump_language_model(save_model(tmp_path / "m", "bert"), texts, tmp_path / "s")
    decided = wanted(model, texts, labels="argmax").logits.argmax(1).numpy()
    assert np.array_equal(store.split("train").labels(), decided)
    assert np.array_equal(store.split("train").predictions(), decided)


def test_labels_of_a_masked_model_mark_positions_themselves(tmp_path: Path) -> None:
    model = make_model("bert")
    ids, labels = [5, 6, 2, 8, 9, 2, 11], [-100, -100, 7, -100, -100, 10, -100]
    (tmp_path / "m.jsonl").write_text(json.dumps({"input_ids": ids, "labels": labels}))
    folder = save_model(tmp_path / "m", "bert", model)
    store = nc.dump_language_model(folder, tmp_path / "m.jsonl", tmp_path / "s", dtype="float32")
    with torch.no_grad():
        states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[1][0]
    stored = rows_of(store, "bert.encoder.layer.0")
    assert np.array_equal(stored, states[[2, 5]].numpy())


# ------------------------------------------------------------------------ stopping, ranks, choices


@dataclass
class Told:
    """A progress that remembers what it was told of the last pass."""

    rows: int = 0
    notes: list[str] = field(default_factory=list)
    running: int = 0

    def begin(self, label: str, total: int, unit: str) -> None:
        self.running += 1
        self.rows = 0

    def advance(self, size: int) -> None:
        self.rows += size

    def note(self, text: str) -> None:
        self.notes.append(text)

    def end(self) -> None:
        self.running -= 1


@pytest.fixture
def dumped(tmp_path: Path, texts: Path) -> Any:
    """Dump the same model and texts to stores by name, in small chunks."""
    folder = save_model(tmp_path / "checkpoint-70", "neox")

    def run(name: str, **options: Any) -> nc.FeatureStore:
        return nc.dump_language_model(
            folder, texts, tmp_path / name, context=16, batch_size=2, **options
        )

    return run


@pytest.mark.usefixtures("small_chunks")
def test_a_dump_that_was_stopped_goes_on_to_the_same_rows(dumped: Any) -> None:
    whole = dumped("whole")
    n = whole.split("train").n_samples
    stopped = Told()
    with stopping_after(8), pytest.raises(KeyboardInterrupt):
        dumped("cut", progress=stopped)
    assert stopped.running == 0
    part = nc.FeatureStore.open(whole.path.replace("whole", "cut")).split("train")
    assert 0 < part.n_samples < n
    assert not part.finalized
    with pytest.raises(NcbatchError, match=r"is not complete\n.*resume"):
        dumped("cut")
    resumed = dumped("cut", resume=True, progress=(told := Told()))
    assert told.rows == n
    assert resumed.validate() == []
    assert np.array_equal(sorted_rows(resumed), sorted_rows(whole))
    for layer in layers_of("neox"):
        assert np.array_equal(as_bits(rows_of(resumed, layer)), as_bits(rows_of(whole, layer)))
    assert (resumed.step, resumed.layer_notes) == (70, whole.layer_notes)


def same_head(seed: int) -> Any:
    """Make models that differ in their blocks only."""
    model = make_model("neox")
    torch.manual_seed(seed)
    with torch.no_grad():
        for values in model.gpt_neox.layers.parameters():
            values.normal_(0, 0.3)
    return model


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("labels", ["next", pytest.param("argmax", marks=pytest.mark.slow)])
def test_a_dump_goes_on_with_the_same_model_texts_and_batches_only(
    labels: str, tmp_path: Path, texts: Path
) -> None:
    def go(model: Any = None, batch_size: int = 2, context: int = 16, **options: Any) -> Any:
        return nc.dump_language_model(
            model or same_head(1), texts, tmp_path / "s", tokenizer=transformers_tokenizer(),
            context=context, batch_size=batch_size, labels=labels, **options,
        )  # fmt: skip

    with stopping_after(8), pytest.raises(KeyboardInterrupt):
        go()
    n = nc.FeatureStore.open(tmp_path / "s").split("train").n_samples
    others: list[tuple[str, dict[str, Any]]] = [
        ("weights", {"model": same_head(2)}),
        ("batch size 2; expected 3,", {"batch_size": 3}),
        ("texts and windows", {"context": 8}),
        ("texts and windows", {"max_tokens": 150}),
        ("model GPTNeoXForCausalLM; expected other,", {"name": "other"}),
        ("model dtype float32; expected float16", {"model": same_head(1).half()}),
    ]
    for message, other in others:
        with pytest.raises(StoreError, match=f"split 'train' of .* was begun with {message}"):
            go(resume=True, **other)
    assert nc.FeatureStore.open(tmp_path / "s").split("train").n_samples == n > 0
    assert go(resume=True).split("train").finalized


@pytest.mark.slow
def test_moments_go_on_with_the_same_data_only(
    dumped: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ncbatch.ingest.model.states._SAVE_BYTES", 1)
    monkeypatch.setattr("ncbatch.ingest.model.states._SAVE_RATIO", 0)
    with stopping_after(8), pytest.raises(KeyboardInterrupt):
        dumped("s", moments=True, labels="argmax")
    with pytest.raises(StoreError, match="was begun with texts and windows"):
        dumped("s", moments=True, labels="argmax", resume=True, max_tokens=100)
    assert dumped("s", moments=True, labels="argmax", resume=True).state_splits == ["train"]


def test_ranks_are_given_the_same_data(dumped: Any) -> None:
    dumped("s", rank=0, world_size=2)
    with pytest.raises(StoreError, match="was begun with texts and windows"):
        dumped("s", rank=1, world_size=2, seed=1, per_class_cap=5)
    assert dumped("s", rank=1, world_size=2).split("train").finalized


def test_another_model_or_step_is_not_added_to_a_store(dumped: Any) -> None:
    dumped("s")
    with pytest.raises(StoreError) as caught:
        dumped("s", split="test", step=80)
    assert "s holds features of step 70; expected those of step 80" in str(caught.value)
    assert "use a store per checkpoint, or say --step 70" in str(caught.value)
    assert nc.FeatureStore.open(dumped("s", split="test").path).step == 70
    with pytest.raises(StoreError, match="features of step 70"):
        dumped("s", split="test", step=80, overwrite=True)  # train would be called 80, too
    dumped("t")
    assert dumped("t", step=80, overwrite=True).step == 80


def test_another_name_is_not_given_to_a_store(tmp_path: Path, texts: Path) -> None:
    def dump_as(name: str, split: str) -> nc.FeatureStore:
        return nc.dump_language_model(
            make_model("neox"), texts, tmp_path / "s", split, tokenizer=transformers_tokenizer(),
            name=name,
        )  # fmt: skip

    dump_as("one", "train")
    with pytest.raises(
        StoreError, match=r"of model one; expected those of model two.*\n.*--name one"
    ):
        dump_as("two", "test")
    assert dump_as("one", "test").model == "one"


def test_a_value_that_overflows_leaves_no_store(tmp_path: Path, texts: Path) -> None:
    model = make_model("neox")
    with torch.no_grad():
        model.gpt_neox.layers[2].mlp.dense_4h_to_h.bias.add_(1e6)
    given = (model, texts, tmp_path / "s")
    with pytest.raises(DataError, match=r"overflows float16\n.*--dtype bfloat16 or float32"):
        nc.dump_language_model(*given, tokenizer=transformers_tokenizer())
    assert not (tmp_path / "s").exists()
    nc.FeatureStore.create(tmp_path / "s", K, dict.fromkeys(layers_of("neox"), WIDTH), "float16")
    store = nc.dump_language_model(*given, tokenizer=transformers_tokenizer(), dtype="float32")
    assert {store.split("train").spec(x).dtype for x in layers_of("neox")} == {"float32"}


def test_a_second_split_is_stored_as_the_first(dumped: Any) -> None:
    dumped("s", dtype="float32")
    store = dumped("s", split="test", progress=(told := Told()))
    assert store.split("test").spec("lm_head:input").dtype == "float32"
    assert any(" as float32; " in note for note in told.notes)
    with pytest.raises(UsageError, match=r"dtype float16 for layer .*float32, as in split 'te"):
        dumped("s", split="more", dtype="float16")


def test_means_of_rows_and_moments_beside_rows(
    dumped: Any, caplog: pytest.LogCaptureFixture
) -> None:
    dumped("s")
    with pytest.raises(StoreError, match=r"holds rows, and no moments .*\n.*--moments"):
        dumped("s", split="test", moments=True, means="train")
    store = dumped("s", moments=True)
    assert "split 'train' has rows of gpt_neox.layers.0:input, " in caplog.text
    dumped("s", split="test", moments=True, means="train")
    assert store.state_layers("test", "decisions") == ["lm_head:input"]


@contextmanager
def stopping_after(forward_passes: int) -> Iterator[None]:
    """Interrupt as Ctrl-C does, in a forward pass."""
    from ncbatch.ingest.model.capture import Capture

    run, done = Capture.run, []

    def counted(self: Any, *arguments: Any) -> Any:
        done.append(1)
        if len(done) > forward_passes:
            raise KeyboardInterrupt
        return run(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Capture, "run", counted)
        yield


def test_what_is_complete_is_not_read_again(dumped: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    dumped("s")
    monkeypatch.setattr("ncbatch.ingest.language.dumps.open_corpus", None)  # must not be called
    assert dumped("s", resume=True, progress=(told := Told())).splits == ["train"]
    assert "is complete: nothing to resume" in told.notes[0]
    with pytest.raises(NcbatchError, match=r"has layers .*; expected new layers, or a new split"):
        dumped("s")
    with pytest.raises(UsageError, match="both resume and overwrite"):
        dumped("s", resume=True, overwrite=True)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("moments", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_two_ranks_write_what_one_does(
    moments: bool, dumped: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = dumped("one", moments=moments)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        two = dumped("two", moments=moments)
    assert (two.model, two.step, two.layer_notes) == (one.model, one.step, one.layer_notes)
    if not moments:
        assert two.split("train").finalized
        assert np.array_equal(sorted_rows(two), sorted_rows(one))
        return
    assert two.state_layers("train", "moments") == one.state_layers("train", "moments")
    for layer in layers_of("neox"):
        (found, _), (truth, _) = (
            two.state("train", layer, "moments"),
            one.state("train", layer, "moments"),
        )
        assert found.keys() == truth.keys()
        for name in truth:
            np.testing.assert_allclose(found[name], truth[name], rtol=1e-9, atol=1e-12)


def test_more_ranks_than_batches(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("a b c d e")
    folder = save_model(tmp_path / "m", "neox")
    for rank in range(2):
        store = nc.dump_language_model(
            folder, tmp_path / "x.txt", tmp_path / "s", rank=rank, world_size=2
        )
    assert store.split("train").n_samples == 4
    assert store.split("train").finalized


def test_ranks_by_halves_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="rank without world size; expected both"):
        nc.dump_language_model("m", "x", tmp_path / "s", rank=0)
    with pytest.raises(UsageError, match="world size without rank; expected both"):
        nc.dump_language_model("m", "x", tmp_path / "s", world_size=2)


@pytest.mark.usefixtures("small_chunks")
def test_capped_classes_are_some_of_the_same_rows(dumped: Any) -> None:
    whole, capped = dumped("whole"), dumped("capped", per_class_cap=5)
    labels = capped.split("train").labels()
    assert np.array_equal(
        np.bincount(labels, minlength=K),
        np.minimum(np.bincount(whole.split("train").labels(), minlength=K), 5),
    )
    for layer in layers_of("neox"):
        # Windows without a chosen sample are not run, so that batches differ, and with them bits.
        rows, all_rows = rows_of(capped, layer), rows_of(whole, layer)
        there = whole.split("train").labels()
        for row, label in zip(rows.astype(float), labels, strict=True):
            distances = np.abs(all_rows[there == label].astype(float) - row).max(1)
            assert distances.min() < 2e-3


def test_excluded_ids_and_max_tokens(dumped: Any) -> None:
    labels = dumped("s", exclude=[3, 4], max_tokens=50).split("train").labels()
    assert len(labels) == 50
    assert not np.isin(labels, [3, 4]).any()


def test_layers_are_added_to_a_complete_split(dumped: Any) -> None:
    whole = dumped("whole")
    dumped("s", layers="gpt_neox.layers.0")
    store = dumped("s", layers=["gpt_neox.layers.1", "lm_head:input"])
    for layer in ("gpt_neox.layers.0", "gpt_neox.layers.1", "lm_head:input"):
        assert np.array_equal(as_bits(rows_of(store, layer)), as_bits(rows_of(whole, layer)))
    assert sorted(store.layer_notes) == sorted(store.layers("train"))


# ------------------------------------------------------------------------------------- disk, memory


def test_the_estimate_and_its_refusal(dumped: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    store = dumped("s", progress=(told := Told()))
    n = store.split("train").n_samples
    assert told.notes[0].startswith(f"{n} rows of 5 layers, {5 * WIDTH} features in all, take ")
    needed = n * (5 * WIDTH * 2 + 8)
    usage = type(shutil.disk_usage("/"))
    for free in (needed, needed - 1):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: usage(0, 0, free))
        name = f"with{free}"
        if free == needed:
            dumped(name)
            continue
        with pytest.raises(
            OutputError, match=r"\d+ rows of 5 layers.* are free at '.*'\ntake fewer"
        ):
            dumped(name)
        assert not Path(store.path).with_name(name).exists()
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, 2**30))
        dumped(name, moments=True)
    # What is replaced or resumed is there already.
    held = sum(
        p.stat().st_size for p in Path(store.path).glob("train/layers/**/c/**/*") if p.is_file()
    )
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, needed - held))
    dumped("s", overwrite=True)


@contextmanager
def full_disk(after: int) -> Iterator[None]:
    """Let the disk be full after some files."""
    from zarr.storage import _local

    put, files = _local._put, []

    def limited(*arguments: Any, **options: Any) -> Any:
        files.append(1)
        if len(files) > after:
            raise OSError(errno.ENOSPC, "No space left on device")
        return put(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_local, "_put", limited)
        yield


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(
    "after", [12, *(pytest.param(after, marks=pytest.mark.slow) for after in (0, 3, 60))]
)
def test_a_disk_that_is_full_leaves_what_was_written(dumped: Any, after: int) -> None:
    whole = dumped("whole")
    with full_disk(after), pytest.raises(OutputError) as caught:
        dumped("s")
    assert str(caught.value).splitlines()[0].startswith("no space left for '")
    assert "--resume" in str(caught.value)
    path = Path(whole.path).with_name("s")
    if path.exists():
        assert nc.FeatureStore.open(path).validate() == []
    resumed = dumped("s", resume=True)
    assert np.array_equal(sorted_rows(resumed), sorted_rows(whole))
    assert resumed.validate() == []


def test_a_full_gpu_is_named(dumped: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("transformers.GPTNeoXForCausalLM.forward", full)
    with pytest.raises(
        BudgetError, match=r"no memory left for a batch\ntake a smaller --batch-size"
    ):
        dumped("s")


def test_options_without_sense(tmp_path: Path) -> None:
    for options, message in (
        ({"labels": "nxt"}, "labels 'nxt'; expected next, given or argmax"),
        ({"batch_size": 0}, "batch_size 0; expected an integer, at least 1"),
        ({"dtype": "int8"}, "dtype 'int8'; expected float16, bfloat16, float32 or float64"),
        ({"means": "train"}, "means 'train' without moments; expected --moments"),
        ({"step": -3}, "step -3; expected an integer, at least 0"),
        ({"model_dtype": "int8"}, "model_dtype 'int8'; expected auto, float32, bfloat16 or "),
        ({"context": 1}, "context 1; expected an integer, at least 2"),
        ({"max_tokens": 0}, "max_tokens 0; expected an integer, at least 1"),
        ({"per_class_cap": 0}, "per_class_cap 0; expected an integer, at least 1"),
        ({"split": "a/b"}, "split name 'a/b'; expected"),
    ):
        with pytest.raises(UsageError, match=message):
            nc.dump_language_model("m", "x", tmp_path / "s", **options)


# --------------------------------------------------------------------------------- what comes next


@pytest.mark.parametrize("family", ["tied", pytest.param("bert", marks=pytest.mark.slow)])
def test_measuring_what_was_dumped(family: str, tmp_path: Path, texts: Path) -> None:
    folder = save_model(tmp_path / "m", family)
    store = nc.dump_language_model(folder, texts, tmp_path / "s", labels="next", dtype="float32")
    head = f"{HEADS[family]}:input"
    names = ["nc1_pinv", "nc2_etf_err", "nc3_dual_err", "nc4_agree"]
    found = nc.measure(store, metrics=names).isel(store=0)
    assert np.isfinite(found["nc1_pinv"].sel(layer=layers_of(family))).all()
    for name in ("nc3_dual_err", "nc4_agree"):
        values = found[name].sel(layer=layers_of(family))
        assert np.isfinite(values.sel(layer=head))
        assert np.isnan(values.drop_sel(layer=head)).all()
    labels, decided = store.split("train").labels(), store.split("train").predictions()
    X = rows_of(store, head).astype(np.float64)
    means = np.array(
        [
            X[labels == k].mean(0) if (labels == k).any() else np.full(WIDTH, np.inf)
            for k in range(K)
        ]
    )
    nearest = ((X[:, None] - means) ** 2).sum(2).argmin(1)
    assert float(found["nc4_agree"].sel(layer=head)) == pytest.approx((nearest == decided).mean())


def test_moments_measure_as_rows_do(tmp_path: Path, texts: Path) -> None:
    folder = save_model(tmp_path / "m", "neox")
    rows = nc.dump_language_model(folder, texts, tmp_path / "rows", dtype="float32")
    sums = nc.dump_language_model(folder, texts, tmp_path / "sums", moments=True)
    assert sums.splits == []
    nc.dump_language_model(
        folder, texts, tmp_path / "sums", split="test", moments=True, means="train"
    )
    names = ["nc1_pinv", "nc2_etf_err", "nc3_dual_err", "nc4_agree"]
    truth, found = (nc.measure(s, metrics=names).isel(store=0) for s in (rows, sums))
    for name in names:
        of = layers_of("neox")
        np.testing.assert_allclose(found[name].sel(layer=of), truth[name].sel(layer=of), rtol=1e-6)


# ---------------------------------------------- moments: ranks killed at the end, room on the disk


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model("neox")


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


@pytest.mark.slow
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
