"""nc.dump with moments=True: states equal those of stored rows, by ranks, after kills, and in little memory."""

from __future__ import annotations

import logging
import threading
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest

import ncbatch as nc
from ncbatch.errors import BudgetError, DataError, StoreError, UnknownNameError, UsageError
from ncbatch.ingest.model import ranks as turns
from ncbatch.ingest.model import room as fold_memory
from ncbatch.ingest.model import states as state_target
from ncbatch.ingest.model import target
from ncbatch.ingest.model.ranks import finalize_if_last
from ncbatch.states import moments
from ncbatch.states.moments import MomentsAccumulator
from ncbatch.states.moments_fold import Scratch
from ncbatch.store import FeatureStore
from tests.conftest import run_here
from tests.ingest.model.test_dumps import (
    WIDE_LAYERS,
    K,
    Mlp,
    Transformer,
    by_hand,
    hooks_of,
    mlp_batches,
    rows_of,
    seeded,
    token_batches,
)

torch = pytest.importorskip("torch")

SPLIT = "train"


N = 556  # samples of `wide_batches`


def wide_batches():
    """600 positions in 6 batches, some of them ignored."""
    batches = mlp_batches(600, 100)
    for number, (_, labels) in enumerate(batches):
        labels[number::14] = -1
    return batches


def other_batches():
    """Give other samples than those of the train split."""
    return [(x * 0.9 + 0.1, y) for x, y in mlp_batches(300, 90)]


def fold(path, batches=None, split=SPLIT, **options):
    return nc.dump(
        seeded(Mlp, 32), wide_batches() if batches is None else batches, path, split,
        WIDE_LAYERS, moments=True, **options,
    )  # fmt: skip


def store_rows(path, batches=None, split=SPLIT, **options):
    return nc.dump(
        seeded(Mlp, 32), wide_batches() if batches is None else batches, path, split,
        WIDE_LAYERS, dtype="float32", **options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Rows of train and test, in float32."""
    path = tmp_path_factory.mktemp("rows") / "s.zarr"
    store_rows(path)
    return store_rows(path, other_batches(), "test")


@pytest.fixture(scope="module")
def folded(tmp_path_factory):
    """States of both, with the decisions of test."""
    path = tmp_path_factory.mktemp("folded") / "s.zarr"
    fold(path)
    return fold(path, other_batches(), "test", means="train")


def naive_moments(store, layer, split=SPLIT):
    """Compute the arrays of the state from stored rows, in float64, class by class."""
    x, y = rows_of(store, layer, split).astype(np.float64), store.split(split).labels()
    classes = np.unique(y)
    parts = [x[y == c] for c in classes]
    residuals = [part - part.mean(0) for part in parts]
    return {
        "class": classes,
        "count": np.array([len(part) for part in parts]),
        "mean": np.stack([part.mean(0) for part in parts]),
        "trace": np.array([(r**2).sum() for r in residuals]),
        "scatter": sum(r.T @ r for r in residuals),
    }


def assert_moments(store, expected, layer, split=SPLIT, kind="moments"):
    arrays, about = store.state(split, layer, kind)
    assert arrays.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(arrays[name], values, rtol=1e-10, atol=1e-10, err_msg=name)
    assert about["n_samples"] == expected["count"].sum()


def assert_same_states(one, other, split=SPLIT):
    """Check that two stores hold the same states, bit by bit."""
    assert one.state_kinds(split) == other.state_kinds(split)
    for layer, kind in one.state_kinds(split):
        (mine, about), (theirs, other_about) = (s.state(split, layer, kind) for s in (one, other))
        assert mine.keys() == theirs.keys()
        for name, values in mine.items():
            np.testing.assert_array_equal(values, theirs[name], err_msg=f"{layer} {kind} {name}")
        assert about == other_about


@pytest.fixture(params=["host", "tensors"])
def place(request, monkeypatch):
    """Fold NumPy arrays, or torch tensors where the features are, as on a GPU."""
    if request.param == "tensors":
        monkeypatch.setattr(state_target, "choose_place", lambda *_: False)
    return request.param


# ------------------------------------------------------------------------------- what is stored


def test_moments_are_those_of_the_rows(tmp_path, rows, place):
    store = fold(tmp_path / "s.zarr")
    assert store.splits == []
    assert store.state_splits == [SPLIT]
    assert store.state_layers(SPLIT) == sorted(WIDE_LAYERS)
    for layer in WIDE_LAYERS:
        assert_moments(store, naive_moments(rows, layer), layer)
    assert store.state_kinds(SPLIT) == [(layer, "moments") for layer in sorted(WIDE_LAYERS)]
    assert store.classifiers == ["last"]
    assert store.validate() == []


def test_measured_states_are_measured_rows(tmp_path, rows, place):
    path = tmp_path / "s.zarr"
    fold(path)
    states = fold(path, other_batches(), "test", means="train")
    mine, theirs = nc.measure(states, ["last"]), nc.measure(rows, ["last"])
    compared = [name for name in theirs.data_vars if name in mine and name.startswith("nc")]
    assert {"nc1_pinv", "nc1_cdnv", "nc2_etf_err", "nc3_dual_err", "nc4_agree"} <= set(compared)
    for name in compared:
        np.testing.assert_allclose(
            mine[name].values, theirs[name].values, rtol=1e-9, atol=1e-12, err_msg=name
        )


def test_decisions_are_those_of_rows(rows, folded):
    """The nearest of the means, by naive distances, and the model's own arg-max."""
    means = naive_moments(rows, "last")["mean"]
    x, y = rows_of(rows, "last", "test").astype(np.float64), rows.split("test").labels()
    nearest = ((x[:, None] - means[None]) ** 2).sum(2).argmin(1)
    decided = rows.split("test").predictions()
    arrays, about = folded.state("test", "last", "decisions")
    for name, marks in {
        "samples": y >= 0, "agreements": nearest == decided,
        "ncc_hits": nearest == y, "clf_hits": decided == y,
    }.items():  # fmt: skip
        np.testing.assert_array_equal(arrays[name], np.bincount(y[marks], minlength=K), name)
    assert about == {
        "n_samples": len(y),
        "means_split": "train",
        "means_fingerprint": folded.state_fingerprint("train", "last", "moments"),
        "classifier_fingerprint": folded.classifier_fingerprint("last"),
    }
    assert folded.state_layers("test", "decisions") == ["last"]
    assert folded.state_layers("test", "moments") == sorted(WIDE_LAYERS)


def test_a_stored_classifier_decides_where_the_model_does_not(tmp_path, rows, place):
    path = tmp_path / "s.zarr"
    fold(path)
    weight = np.random.default_rng(0).normal(size=(K, 32))
    FeatureStore.open(path).set_classifier("h1", weight, np.arange(K) / 9)
    store = fold(path, other_batches(), "test", means="train", predictions=False)
    assert store.state_layers("test", "decisions") == ["h1", "last"]
    y = rows.split("test").labels()
    x = rows_of(rows, "h1", "test")
    hits = (x.astype(np.float64) @ weight.T + np.arange(K) / 9).argmax(1) == y
    found, _ = store.state("test", "h1", "decisions")
    np.testing.assert_array_equal(found["clf_hits"], np.bincount(y[hits], minlength=K))
    hits = rows.split("test").predictions() == y  # the head, from its weights
    found, _ = store.state("test", "last", "decisions")
    np.testing.assert_array_equal(found["clf_hits"], np.bincount(y[hits], minlength=K))


def test_decisions_on_the_split_of_the_means(tmp_path, rows):
    path = tmp_path / "s.zarr"
    store = fold(path)
    before = {layer: store.state(SPLIT, layer, "moments")[0]["mean"] for layer in WIDE_LAYERS}
    fold(path, means=SPLIT)
    assert store.state_layers(SPLIT, "decisions") == ["last"]
    for layer, mean in before.items():
        np.testing.assert_array_equal(store.state(SPLIT, layer, "moments")[0]["mean"], mean)
    mine, theirs = (
        nc.measure(store, ["last"], metrics=["nc4_agree"]),
        nc.measure(rows, ["last"], test="train", metrics=["nc4_agree"]),
    )
    assert mine.nc4_agree.item() == theirs.nc4_agree.item()
    with pytest.raises(StoreError, match="no classifier reads one"):
        nc.dump(
            seeded(Mlp, 32), wide_batches(), path, SPLIT, {"h1": "act1"}, moments=True, means=SPLIT
        )
    fold(path, means=SPLIT, overwrite=True)  # the means that decide stay
    assert store.state_layers(SPLIT, "moments") == sorted(WIDE_LAYERS)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_models_of_any_dtype(tmp_path, dtype, place):
    model = seeded(Mlp).to(dtype)
    batches = [(x.to(dtype), y) for x, y in mlp_batches(300)]
    store = nc.dump(model, batches, tmp_path / "s.zarr", SPLIT, {"h": "act1"}, moments=True)
    stored = nc.dump(
        model, batches, tmp_path / "r.zarr", SPLIT, {"h": "act1"},
        dtype=str(dtype).removeprefix("torch."),
    )  # fmt: skip
    assert_moments(store, naive_moments(stored, "h"), "h")


def test_tokens_with_ignored_positions_and_few_classes_seen(tmp_path):
    model, batches = seeded(Transformer), token_batches()
    options = {"layers": {"h": "h.1", "head": "lm_head:input"}, "n_classes": K}
    store = nc.dump(model, batches, tmp_path / "s.zarr", SPLIT, moments=True, **options)
    stored = nc.dump(model, batches, tmp_path / "r.zarr", SPLIT, dtype="float32", **options)
    for layer in ("h", "head"):
        assert_moments(store, naive_moments(stored, layer), layer)


def test_the_heads_decisions_as_labels(tmp_path):
    model, batches = seeded(Mlp), mlp_batches()
    store = nc.dump(
        model, batches, tmp_path / "s.zarr", SPLIT, {"last": "fc:input"},
        moments=True, argmax_labels=True,
    )  # fmt: skip
    decided = by_hand(model, batches, lambda m, x: m(x)).argmax(1).numpy()
    arrays, _ = store.state(SPLIT, "last", "moments")
    np.testing.assert_array_equal(arrays["class"], np.unique(decided))
    np.testing.assert_array_equal(arrays["count"], np.bincount(decided)[np.unique(decided)])
    nc.dump(
        model, batches, store, SPLIT, {"last": "fc:input"},
        moments=True, argmax_labels=True, means=SPLIT,
    )  # fmt: skip
    arrays, _ = store.state(SPLIT, "last", "decisions")
    np.testing.assert_array_equal(arrays["clf_hits"], arrays["samples"])


def test_layers_are_added_and_states_replaced(tmp_path, folded):
    path = tmp_path / "s.zarr"
    model, options = seeded(Mlp, 32), {"moments": True}
    store = nc.dump(model, wide_batches(), path, SPLIT, {"h1": "act1"}, **options)
    assert store.classifiers == []
    nc.dump(model, wide_batches(), path, SPLIT, {"in": "fc1:input", "last": "fc:input"}, **options)
    assert_same_states(store, folded)
    with pytest.raises(StoreError, match="has moments of layers h1, in, last; expected new layers"):
        fold(path)
    with pytest.raises(StoreError, match="has moments of layers h1"):
        nc.dump(model, wide_batches(), path, SPLIT, {"h1": "act1", "z": "fc2"}, **options)
    fold(path, wide_batches()[:3], overwrite=True)
    n = sum(int((y >= 0).sum()) for _, y in wide_batches()[:3])
    assert store.state_attributes(SPLIT, "in", "moments") == {"n_samples": n}
    fold(path, overwrite=True)
    assert_same_states(store, folded)
    passes = model.passes
    nc.dump(model, wide_batches(), path, SPLIT, WIDE_LAYERS, resume=True, **options)
    assert model.passes == passes  # nothing was left to do


def test_replaced_moments_take_their_decisions_along(tmp_path):
    path = tmp_path / "s.zarr"
    fold(path)
    store = fold(path, means=SPLIT)
    fold(path, wide_batches()[:5], overwrite=True)
    assert store.state_layers(SPLIT, "decisions") == []


# ------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"means": "train", "moments": False}, UsageError, "means='train' without moments"),
        ({"means": "train"}, UnknownNameError, "no split with moments 'train'"),
        ({"resume": True, "overwrite": True}, UsageError, "both resume and overwrite"),
        ({"rank": 1, "world_size": 2, "overwrite": True}, UsageError, "overwrite with several"),
        ({"rank": 2, "world_size": 2}, UsageError, "writer 2 of 2"),
    ],
)
def test_bad_options(tmp_path, options, error, message):
    model = seeded(Mlp)
    with pytest.raises(error, match=message):
        nc.dump(
            model,
            mlp_batches(),
            tmp_path / "s.zarr",
            "test",
            ["fc1"],
            **{"moments": True} | options,
        )
    assert model.passes == 0
    assert not (tmp_path / "s.zarr").exists()


def test_means_must_be_those_of_the_layers(tmp_path):
    path = tmp_path / "s.zarr"
    nc.dump(seeded(Mlp), mlp_batches(), path, SPLIT, {"h1": "act1"}, moments=True)
    with pytest.raises(StoreError, match="split 'train' holds no moments of layers last"):
        nc.dump(
            seeded(Mlp), mlp_batches(), path, "test", {"last": "fc:input"},
            moments=True, means="train",
        )  # fmt: skip
    with pytest.raises(UnknownNameError, match="no layer 'last' in the moments of split 'train'"):
        nc.dump(
            seeded(Mlp), mlp_batches(), path, "test", {"h1": "act1", "last": "fc:input"},
            moments=True, means="train",
        )  # fmt: skip
    assert FeatureStore.open(path).state_splits == [SPLIT]
    with pytest.raises(UnknownNameError, match="no split with moments 'tran'"):
        nc.dump(
            seeded(Mlp), mlp_batches(), path, "test", {"h1": "act1"}, moments=True, means="tran"
        )


def test_no_classifier_no_decisions(tmp_path, caplog):
    path = tmp_path / "s.zarr"
    nc.dump(seeded(Mlp), mlp_batches(), path, SPLIT, {"h1": "act1"}, moments=True)
    with caplog.at_level(logging.WARNING, "ncbatch"):
        store = nc.dump(
            seeded(Mlp), mlp_batches(), path, "test", {"h1": "act1"}, moments=True, means="train"
        )
    assert "no decisions of split 'test': no classifier reads a layer" in caplog.text
    assert store.state_kinds("test") == [("h1", "moments")]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused(tmp_path, value, place):
    batches = wide_batches()
    batches[2][0][41, 3] = value
    kept = int((torch.cat([y for _, y in batches])[:241] >= 0).sum())
    assert batches[2][1][41] >= 0
    model = seeded(Mlp, 32)
    with pytest.raises(DataError, match=rf"layer 'in' row {kept} holds NaN or an infinity"):
        nc.dump(model, batches, tmp_path / "s.zarr", SPLIT, {"in": "fc1:input"}, moments=True)
    assert hooks_of(model) == 0
    assert FeatureStore.open(tmp_path / "s.zarr").state_kinds(SPLIT) == []
    batches[2][1][41] = -1
    nc.dump(model, batches, tmp_path / "t.zarr", SPLIT, {"in": "fc1:input"}, moments=True)


def test_labels_beyond_the_classes_are_refused(tmp_path):
    batches = mlp_batches()
    batches[1][1][7] = K
    with pytest.raises(DataError, match=f"label {K} in row 39"):
        nc.dump(seeded(Mlp), batches, tmp_path / "s.zarr", SPLIT, ["fc1"], moments=True)


def test_no_sample_at_all(tmp_path):
    with pytest.raises(DataError, match="no sample in any batch"):
        fold(tmp_path / "s.zarr", [(torch.zeros(2, 8), torch.tensor([-1, -1]))])


# ---------------------------------------------------------------------------------------- memory


def with_memory(monkeypatch, n_bytes):
    memory = SimpleNamespace(available=n_bytes)
    monkeypatch.setattr(fold_memory.psutil, "virtual_memory", lambda: memory)


def test_states_that_do_not_fit_are_refused_before_anything_is_stored(tmp_path, monkeypatch):
    with_memory(monkeypatch, 350 * 2**20)
    model, layers = seeded(Mlp, 512), {"h": "act1", "z": "fc2", "last": "fc:input"}
    # 12,000 classes of 512 features: 70 MiB each, as much again when it is stored, and a compiler.
    options = {"moments": True, "head": False, "n_classes": 12_000}
    with pytest.raises(BudgetError) as error:
        nc.dump(model, mlp_batches(), tmp_path / "s.zarr", SPLIT, layers, **options)
    assert "the moments of 3 layers need" in str(error.value)
    assert "1 fit; others can be added to the split by further calls" in str(error.value)
    assert hooks_of(model) == 0
    assert FeatureStore.open(tmp_path / "s.zarr").state_splits == []
    with_memory(monkeypatch, 100 * 2**20)
    with pytest.raises(BudgetError, match="give n_samples="):
        nc.dump(model, mlp_batches(), tmp_path / "t.zarr", SPLIT, {"h": "act1"}, **options)
    with_memory(monkeypatch, 350 * 2**20)  # there are no more classes than samples
    nc.dump(model, mlp_batches(), tmp_path / "u.zarr", SPLIT, layers, n_samples=100, **options)


def test_a_gpu_is_used_where_all_fits(monkeypatch):
    price = fold_memory.FoldPrice(held=100, passing=10)
    cuda, cpu = torch.device("cuda", 0), torch.device("cpu")
    with_memory(monkeypatch, 250)
    free = {"a": 110}
    monkeypatch.setattr(fold_memory, "_free_on", lambda device: free["a"])
    assert not fold_memory.choose_place({"x": price}, {"x": cuda})
    assert fold_memory.choose_place({"x": price, "y": price}, {"x": cuda, "y": cuda})
    assert fold_memory.choose_place({"x": price}, {"x": cpu})
    free["a"] = 109
    assert fold_memory.choose_place({"x": price}, {"x": cuda})
    with pytest.raises(BudgetError, match="2 fit"):
        fold_memory.choose_place(dict.fromkeys("xyz", price), dict.fromkeys("xyz", cpu))


# ----------------------------------------------------------------------------------- interruptions


def saving_often(monkeypatch):
    monkeypatch.setattr(state_target, "_SAVE_BYTES", 1)
    monkeypatch.setattr(state_target, "_SAVE_RATIO", 0)


def interrupt(path, after, batches=None, **options):
    def some():
        yield from (wide_batches() if batches is None else batches)[:after]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fold(path, some(), **options)


@pytest.mark.parametrize("after", [0, 1, 4, 6])
def test_an_interrupted_fold_goes_on_to_the_same_bits(tmp_path, monkeypatch, folded, after, place):
    path = tmp_path / "s.zarr"
    saving_often(monkeypatch)
    whole = fold(tmp_path / "whole.zarr") if place == "tensors" else folded
    same = assert_same_states
    if (place, after) == ("tensors", 6):
        same = assert_close_states  # nothing is left to fold: the end is computed on the host
    interrupt(path, after)
    model = seeded(Mlp, 32)
    if after:
        with pytest.raises(StoreError, match="rank 0 of 1 has begun layers h1, in, last"):
            fold(path)
    store = nc.dump(model, wide_batches(), path, SPLIT, WIDE_LAYERS, moments=True, resume=True)
    assert model.passes == 6 - after
    same(store, whole)


@pytest.mark.slow
def test_a_fold_killed_between_layers_goes_on_to_the_same_bits(tmp_path, monkeypatch, folded):
    """Layers are stored one after another, and so at different numbers of samples."""
    saving_often(monkeypatch)
    original, left = FeatureStore.set_state, [0]

    def failing(self, *args, **kwargs):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(FeatureStore, "set_state", failing)
    for count in (1, 2, 4, 12, 18, 19, 20, 21):  # 6 batches of 3 layers, then the ends
        path = tmp_path / f"{count}.zarr"
        left[0] = count
        with pytest.raises(KeyboardInterrupt):
            fold(path)
        left[0] = -1
        store = fold(path, resume=True)
        assert_same_states(store, folded)


def test_decisions_go_on_to_the_same_bits(tmp_path, monkeypatch, folded):
    path = tmp_path / "s.zarr"
    saving_often(monkeypatch)
    fold(path)
    original = FeatureStore.delete_state
    interrupt(path, 2, batches=other_batches(), split="test", means="train")
    with pytest.raises(StoreError, match=r"moments and decisions of layer 'last' .* were begun"):
        fold(path, other_batches(), "test", resume=True)

    def killed(self, split, layer, kind):
        raise KeyboardInterrupt  # moments and decisions of the first layer are there

    monkeypatch.setattr(FeatureStore, "delete_state", killed)
    with pytest.raises(KeyboardInterrupt):
        fold(path, other_batches(), "test", means="train", resume=True)
    monkeypatch.setattr(FeatureStore, "delete_state", original)
    store = fold(path, other_batches(), "test", means="train", resume=True)
    for split in ("train", "test"):
        assert_same_states(store, folded, split)


def test_means_that_changed_are_noticed(tmp_path, monkeypatch):
    path = tmp_path / "s.zarr"
    saving_often(monkeypatch)
    fold(path)
    interrupt(path, 2, batches=other_batches(), split="test", means="train")
    fold(path, wide_batches()[:3], overwrite=True)
    with pytest.raises(StoreError, match="begun with other class means"):
        fold(path, other_batches(), "test", means="train", resume=True)
    fold(path, other_batches(), "test", means="train", overwrite=True)


def test_resume_wants_the_same_batches(tmp_path, monkeypatch, folded):
    path = tmp_path / "s.zarr"
    saving_often(monkeypatch)
    interrupt(path, 4)
    with pytest.raises(
        DataError, match=r"(?s)other labels among the first 3.. samples.*same order"
    ):
        fold(path, wide_batches()[::-1], resume=True)
    with pytest.raises(DataError, match="batches of 184 samples; expected the 370 already"):
        fold(path, wide_batches()[:2], resume=True)
    with pytest.raises(StoreError, match="begun by 1 ranks; expected 2"):
        fold(path, wide_batches(), resume=True, rank=0, world_size=2)
    fold(path, overwrite=True)
    assert_same_states(FeatureStore.open(path), folded)


def test_states_are_stored_seldom(tmp_path, monkeypatch):
    stored = []
    original = FeatureStore.set_state
    monkeypatch.setattr(
        FeatureStore, "set_state",
        lambda self, split, layer, kind, *rest: (
            stored.append(kind),
            original(self, split, layer, kind, *rest),
        ),
    )  # fmt: skip
    monkeypatch.setattr(state_target, "_SAVE_BYTES", 1)
    monkeypatch.setattr(state_target, "_SAVE_RATIO", 5)
    nc.dump(seeded(Mlp, 32), wide_batches(), tmp_path / "s", SPLIT, {"h": "act1"}, moments=True)
    # State: 5 (32 * 12 + 16) + 32 * 32 * 8 bytes; 5 times that is 4 batches of 32 floats a row.
    assert stored == ["running-0", "moments"]


# ----------------------------------------------------------------------------------------- ranks


def fold_rank(path, rank, world_size, batches=None, split=SPLIT, **options):
    given = wide_batches() if batches is None else batches
    return fold(path, given[rank::world_size], split, rank=rank, world_size=world_size, **options)


def assert_close_states(one, other, split=SPLIT):
    assert one.state_kinds(split) == other.state_kinds(split)
    for layer, kind in one.state_kinds(split):
        (mine, about), (theirs, other_about) = (s.state(split, layer, kind) for s in (one, other))
        for name, values in mine.items():
            np.testing.assert_allclose(values, theirs[name], rtol=1e-9, atol=1e-9)
        assert about["n_samples"] == other_about["n_samples"]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_ranks_give_the_states_of_one(tmp_path, folded, order):
    path = tmp_path / "s.zarr"
    for rank in order:
        store = fold_rank(path, rank, 3)
    assert store.state_layers(SPLIT, "moments") == []
    nc.finalize(path, SPLIT)
    assert_close_states(store, folded, SPLIT)
    for rank in order:
        fold_rank(path, rank, 3, other_batches(), "test", means="train")
    answer = run_here("finalize", path, "--split", "test", cwd=tmp_path)
    assert answer.code == 0
    assert "split test" in answer.out
    assert "300 samples" in answer.out
    assert_close_states(store, folded, "test")
    arrays, about = store.state("test", "last", "decisions")
    for name, values in folded.state("test", "last", "decisions")[0].items():
        np.testing.assert_array_equal(arrays[name], values)
    assert about["means_fingerprint"] == store.state_fingerprint("train", "last", "moments")
    assert about["classifier_fingerprint"] == store.classifier_fingerprint("last")
    for split in ("train", "test"):
        nc.finalize(store, split)  # nothing is left to do
    assert store.validate() == []
    assert nc.measure(store, ["last"], metrics=["nc4_agree"]).nc4_agree.item() > 0


def test_the_order_of_ranks_does_not_matter(tmp_path):
    for name, order in (("a", (0, 1, 2)), ("b", (1, 2, 0))):
        for rank in order:
            fold_rank(tmp_path / name, rank, 3)
        nc.finalize(tmp_path / name, SPLIT)
    assert_same_states(FeatureStore.open(tmp_path / "a"), FeatureStore.open(tmp_path / "b"))


def test_ranks_that_are_missing_are_named(tmp_path, monkeypatch, folded):
    path = tmp_path / "s.zarr"
    saving_often(monkeypatch)
    fold_rank(path, 0, 4)
    with pytest.raises(StoreError, match="rank 0 of 4 has begun layers"):
        fold_rank(path, 0, 4)
    interrupt(path, 1, batches=wide_batches()[3::4], rank=3, world_size=4)
    with pytest.raises(StoreError, match="no states of rank 1, 2 and no end of rank 3"):
        nc.finalize(path, SPLIT)
    assert not finalize_if_last(FeatureStore.open(path), SPLIT)
    for rank in (1, 2, 3, 0):
        store = fold_rank(path, rank, 4, resume=True)
    assert finalize_if_last(store, SPLIT)
    assert_close_states(store, folded, SPLIT)
    with pytest.raises(UnknownNameError, match="no split 'other'"):
        nc.finalize(path, "other")


def test_ranks_of_other_jobs_are_refused(tmp_path):
    path = tmp_path / "s.zarr"
    store = fold_rank(path, 0, 2)
    for rank, world_size in ((1, 3), (0, 3), (0, 1)):
        with pytest.raises(StoreError, match=rf"begun by 2 ranks; expected {world_size}"):
            fold_rank(path, rank, world_size, resume=True)
    arrays, about = store.state(SPLIT, "in", "part-0")
    store.set_state(SPLIT, "in", "part-1", arrays, about | {"world_size": 3})
    with pytest.raises(StoreError, match="states of jobs of 2 and 3 ranks"):
        nc.finalize(path, SPLIT)


def test_parts_of_an_earlier_job_are_replaced(tmp_path, folded):
    path = tmp_path / "s.zarr"
    fold_rank(path, 0, 2)
    fold(path, overwrite=True)
    assert_same_states(FeatureStore.open(path), folded)
    fold_rank(tmp_path / "t.zarr", 0, 2)
    answer = run_here("delete", "t.zarr", "--split", "trian", cwd=tmp_path)
    assert answer.code == 1
    assert "train" in answer.err
    assert run_here("delete", "t.zarr", "--split", SPLIT, cwd=tmp_path).code == 0
    for rank in (0, 1):
        fold_rank(tmp_path / "t.zarr", rank, 2)


def test_a_rank_that_stored_some_of_its_layers_has_not_ended(tmp_path, monkeypatch, folded):
    path = tmp_path / "s.zarr"
    fold_rank(path, 0, 2)
    original, left = FeatureStore.set_state, [2]

    def failing(self, *args):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return original(self, *args)

    monkeypatch.setattr(FeatureStore, "set_state", failing)
    with pytest.raises(KeyboardInterrupt):
        fold_rank(path, 1, 2)
    with pytest.raises(StoreError, match="no end of rank 1"):
        nc.finalize(path, SPLIT)
    store = fold_rank(path, 1, 2, resume=True)
    assert_close_states(nc.finalize(store, SPLIT), folded, SPLIT)


def test_a_merge_that_was_interrupted_is_repeated(tmp_path, monkeypatch, folded):
    original = FeatureStore.delete_state
    for count in (1, 3, 9, 11):  # 2 ranks of 3 layers, each with two kinds to be deleted
        path, left = tmp_path / f"{count}.zarr", [count]
        for rank in (0, 1):
            fold_rank(path, rank, 2)

        def failing(self, *args, left=left):
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt
            return original(self, *args)

        monkeypatch.setattr(FeatureStore, "delete_state", failing)
        with pytest.raises(KeyboardInterrupt):
            nc.finalize(path, SPLIT)
        monkeypatch.setattr(FeatureStore, "delete_state", original)
        assert_close_states(nc.finalize(path, SPLIT), folded, SPLIT)


def test_a_rank_without_samples(tmp_path, monkeypatch, folded):
    path = tmp_path / "s.zarr"
    batches = [
        b
        for pair in zip(wide_batches(), [(torch.zeros(1, 8), [-1])] * 6, strict=True)
        for b in pair
    ]
    waiting = threading.Thread(target=fold_rank, args=(path, 1, 2, batches))
    waiting.start()  # until another rank has made the store
    fold_rank(path, 0, 2, batches)
    waiting.join(60)
    assert not waiting.is_alive()
    assert_same_states(nc.finalize(path, SPLIT), folded)
    monkeypatch.setattr(target, "PATIENCE_S", 0.0)
    with pytest.raises(DataError, match="no sample in any batch of rank 1"):
        fold_rank(tmp_path / "none", 1, 2, [])
    FeatureStore.create(tmp_path / "empty", K)
    for rank in (0, 1):
        fold_rank(tmp_path / "empty", rank, 2, [])
    with pytest.raises(StoreError, match="no rank had a sample"):
        nc.finalize(tmp_path / "empty", SPLIT)


def test_ranks_that_end_at_once_complete_the_split_once(tmp_path, folded):
    for turn in range(3):
        path = tmp_path / f"{turn}.zarr"
        barrier, done = threading.Barrier(3), []
        for rank in range(3):
            fold_rank(path, rank, 3)

        def end(path=path, barrier=barrier, done=done):
            store = FeatureStore.open(path)
            barrier.wait()
            done.append(finalize_if_last(store, SPLIT))

        threads = [threading.Thread(target=end) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert done == [True] * 3
        store = FeatureStore.open(path)
        assert_close_states(store, folded, SPLIT)
        assert store.validate() == []


def test_a_turn_that_was_not_given_back_is_taken_over(tmp_path, monkeypatch, caplog):
    store = fold_rank(tmp_path / "s.zarr", 0, 1)
    nc.finalize(store, SPLIT)
    ended = turns._machine() + " 999999999 token"  # no process has such a number
    for holder, patience in ((ended, 300.0), ("elsewhere 1 token", 0.0)):
        assert store.claim(SPLIT, "finalizing", holder)
        monkeypatch.setattr(turns, "PATIENCE_S", patience)
        with caplog.at_level(logging.WARNING, "ncbatch"):
            assert finalize_if_last(store, SPLIT)
        assert "began to complete split 'train'" in caplog.text
        assert store.claimant(SPLIT, "finalizing") is None
        caplog.clear()
    assert store.claim(SPLIT, "finalizing", "elsewhere 1 token")
    nc.finalize(store, SPLIT)
    assert store.claimant(SPLIT, "finalizing") is None


def test_layers_are_folded_while_the_model_runs(tmp_path, monkeypatch, folded, place):
    """Only what the model's own decisions are needed for is held until they are there."""
    held = []
    append = state_target.StateTarget.append

    def seen(self, features, *args):
        held.append({name for name, rows in features.items() if rows is not None})
        append(self, features, *args)

    monkeypatch.setattr(state_target.StateTarget, "append", seen)
    fold(tmp_path / "s.zarr")
    assert held == [set(WIDE_LAYERS)] + [set()] * 5
    held.clear()
    store = fold(tmp_path / "s.zarr", other_batches(), "test", means="train")
    assert held[1:] == [{"last"}] * (len(held) - 1)
    if place == "host":
        assert_same_states(store, folded, "test")


def test_memory_that_layers_share_is_priced(tmp_path):
    """Of ten layers folded by compiled code one residual buffer is held, as `FoldPrice` says."""
    d, n, k, layers = 512, 8192, 13, 10
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(n, d)).astype("f4"), rng.integers(0, k, n)
    shared = Scratch()
    MomentsAccumulator(k, d, like=x).add(x, y)  # the compiler is not traced
    price = fold_memory.FoldPrice.of(k, (n, d), itemsize=4, n_samples=None, moments=True)
    tracemalloc.start()
    folds = [MomentsAccumulator(k, d, like=x, scratch=shared) for _ in range(layers)]
    for each in folds:
        each.add(x, y)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak <= layers * price.held + price.passing - moments._COMPILER_BYTES
    for each in folds[1:]:
        for name, values in each.arrays().items():
            np.testing.assert_array_equal(values, folds[0].arrays()[name])


def test_rows_of_ranks_are_completed_too(tmp_path):
    path = tmp_path / "s.zarr"
    for rank in (0, 1):
        store = store_rows(path, wide_batches()[rank::2], rank=rank, world_size=2, n_samples=600)
        assert finalize_if_last(store, SPLIT) is (rank == 1)
    assert store.split(SPLIT).finalized
    assert nc.finalize(path, SPLIT).split(SPLIT).n_samples == N
