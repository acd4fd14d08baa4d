"""nc.dump with moments=True: states equal those of stored rows, also after an interruption."""

from __future__ import annotations

import logging

import numpy as np
import pytest

import ncbatch as nc
from ncbatch.errors import DataError, StoreError, UnknownNameError, UsageError
from ncbatch.ingest.model import states
from ncbatch.store import FeatureStore
from tests.ingest.model.folds import (
    SPLIT,
    assert_close_states,
    assert_moments,
    assert_same_states,
    fold,
    fold_batches,
    interrupt_fold,
    naive_moments,
    other_batches,
    save_often,
)
from tests.ingest.model.models import (
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
nn = torch.nn


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
            seeded(Mlp, 32), fold_batches(), path, SPLIT, {"h1": "act1"}, moments=True, means=SPLIT
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
    store = nc.dump(model, fold_batches(), path, SPLIT, {"h1": "act1"}, **options)
    assert store.classifiers == []
    nc.dump(model, fold_batches(), path, SPLIT, {"in": "fc1:input", "last": "fc:input"}, **options)
    assert_same_states(store, folded)
    with pytest.raises(StoreError, match="has moments of layers h1, in, last; expected new layers"):
        fold(path)
    with pytest.raises(StoreError, match="has moments of layers h1"):
        nc.dump(model, fold_batches(), path, SPLIT, {"h1": "act1", "z": "fc2"}, **options)
    fold(path, fold_batches()[:3], overwrite=True)
    n = sum(int((y >= 0).sum()) for _, y in fold_batches()[:3])
    assert store.state_attributes(SPLIT, "in", "moments") == {"n_samples": n}
    fold(path, overwrite=True)
    assert_same_states(store, folded)
    passes = model.passes
    nc.dump(model, fold_batches(), path, SPLIT, WIDE_LAYERS, resume=True, **options)
    assert model.passes == passes  # nothing was left to do


def test_replaced_moments_take_their_decisions_along(tmp_path):
    path = tmp_path / "s.zarr"
    fold(path)
    store = fold(path, means=SPLIT)
    fold(path, fold_batches()[:5], overwrite=True)
    assert store.state_layers(SPLIT, "decisions") == []


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
    batches = fold_batches()
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


@pytest.mark.parametrize(
    "after",
    [1, *(pytest.param(after, marks=pytest.mark.slow) for after in (0, 4, 6))],
)
def test_an_interrupted_fold_goes_on_to_the_same_bits(tmp_path, folded, after, place):
    path = tmp_path / "s.zarr"
    whole = fold(tmp_path / "whole.zarr") if place == "tensors" else folded
    same = assert_same_states
    if (place, after) == ("tensors", 6):
        same = assert_close_states  # nothing is left to fold: the end is computed on the host
    interrupt_fold(path, after)
    model = seeded(Mlp, 32)
    if after:
        with pytest.raises(StoreError, match="rank 0 of 1 has begun layers h1, in, last"):
            fold(path)
    store = nc.dump(model, fold_batches(), path, SPLIT, WIDE_LAYERS, moments=True, resume=True)
    assert model.passes == 6 - after
    same(store, whole)


@pytest.mark.slow
def test_a_fold_killed_between_layers_goes_on_to_the_same_bits(tmp_path, monkeypatch, folded):
    """Layers are stored one after another, and so at different numbers of samples."""
    save_often(monkeypatch)
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
    fold(path)
    original = FeatureStore.delete_state
    interrupt_fold(path, 2, batches=other_batches(), split="test", means="train")
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


def test_means_that_changed_are_noticed(tmp_path):
    path = tmp_path / "s.zarr"
    fold(path)
    interrupt_fold(path, 2, batches=other_batches(), split="test", means="train")
    fold(path, fold_batches()[:3], overwrite=True)
    with pytest.raises(StoreError, match="begun with other class means"):
        fold(path, other_batches(), "test", means="train", resume=True)
    fold(path, other_batches(), "test", means="train", overwrite=True)


def test_resume_wants_the_same_batches(tmp_path, folded):
    path = tmp_path / "s.zarr"
    interrupt_fold(path, 4)
    with pytest.raises(
        DataError, match=r"(?s)other labels among the first 3.. samples.*same order"
    ):
        fold(path, fold_batches()[::-1], resume=True)
    with pytest.raises(DataError, match="batches of 184 samples; expected the 370 already"):
        fold(path, fold_batches()[:2], resume=True)
    with pytest.raises(StoreError, match="begun by 1 ranks; expected 2"):
        fold(path, fold_batches(), resume=True, rank=0, world_size=2)
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
    monkeypatch.setattr(states, "_SAVE_BYTES", 1)
    monkeypatch.setattr(states, "_SAVE_RATIO", 5)
    nc.dump(seeded(Mlp, 32), fold_batches(), tmp_path / "s", SPLIT, {"h": "act1"}, moments=True)
    # State: 5 (32 * 12 + 16) + 32 * 32 * 8 bytes; 5 times that is 4 batches of 32 floats a row.
    assert stored == ["running-0", "moments"]


def test_layers_are_folded_while_the_model_runs(tmp_path, monkeypatch, folded, place):
    """Only what the model's own decisions are needed for is held until they are there."""
    held = []
    append = states.StateTarget.append

    def seen(self, features, *args):
        held.append({name for name, rows in features.items() if rows is not None})
        append(self, features, *args)

    monkeypatch.setattr(states.StateTarget, "append", seen)
    fold(tmp_path / "s.zarr")
    assert held == [set(WIDE_LAYERS)] + [set()] * 5
    held.clear()
    store = fold(tmp_path / "s.zarr", other_batches(), "test", means="train")
    assert held[1:] == [{"last"}] * (len(held) - 1)
    if place == "host":
        assert_same_states(store, folded, "test")
