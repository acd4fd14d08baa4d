"""Dumps of moments by several ranks: named while they are missing, merged once they have ended."""

from __future__ import annotations

import logging
import threading

import numpy as np
import pytest

import ncbatch as nc
from ncbatch.errors import DataError, StoreError, UnknownNameError
from ncbatch.ingest.model import ranks, target
from ncbatch.ingest.model.ranks import finalize_if_last
from ncbatch.store import FeatureStore
from tests.conftest import run_here
from tests.ingest.model.folds import (
    SPLIT,
    N,
    assert_close_states,
    assert_same_states,
    fold,
    fold_batches,
    fold_rank,
    interrupt_fold,
    other_batches,
    store_rows,
)
from tests.ingest.model.models import (
    K,
)

torch = pytest.importorskip("torch")
nn = torch.nn


@pytest.mark.slow
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


def test_ranks_that_are_missing_are_named(tmp_path, folded):
    path = tmp_path / "s.zarr"
    fold_rank(path, 0, 4)
    with pytest.raises(StoreError, match="rank 0 of 4 has begun layers"):
        fold_rank(path, 0, 4)
    interrupt_fold(path, 1, batches=fold_batches()[3::4], rank=3, world_size=4)
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


@pytest.mark.parametrize(
    "count",
    [1, pytest.param(3, marks=pytest.mark.slow), 9, pytest.param(11, marks=pytest.mark.slow)],
)
def test_a_merge_that_was_interrupted_is_repeated(tmp_path, monkeypatch, folded, count):
    """Of 2 ranks of 3 layers, each with two kinds to be deleted."""
    path = tmp_path / "s.zarr"
    original, left = FeatureStore.delete_state, [count]
    for rank in (0, 1):
        fold_rank(path, rank, 2)

    def failing(self, *args):
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
        for pair in zip(fold_batches(), [(torch.zeros(1, 8), [-1])] * 6, strict=True)
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


@pytest.mark.slow
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
    ended = ranks._machine() + " 999999999 token"  # no process has such a number
    for holder, patience in ((ended, 300.0), ("elsewhere 1 token", 0.0)):
        assert store.claim(SPLIT, "finalizing", holder)
        monkeypatch.setattr(ranks, "PATIENCE_S", patience)
        with caplog.at_level(logging.WARNING, "ncbatch"):
            assert finalize_if_last(store, SPLIT)
        assert "began to complete split 'train'" in caplog.text
        assert store.claimant(SPLIT, "finalizing") is None
        caplog.clear()
    assert store.claim(SPLIT, "finalizing", "elsewhere 1 token")
    nc.finalize(store, SPLIT)
    assert store.claimant(SPLIT, "finalizing") is None


def test_rows_of_ranks_are_completed_too(tmp_path):
    path = tmp_path / "s.zarr"
    for rank in (0, 1):
        store = store_rows(path, fold_batches()[rank::2], rank=rank, world_size=2, n_samples=600)
        assert finalize_if_last(store, SPLIT) is (rank == 1)
    assert store.split(SPLIT).finalized
    assert nc.finalize(path, SPLIT).split(SPLIT).n_samples == N
