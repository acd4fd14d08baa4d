"""nc.dump by several ranks, and with the head's decisions as labels."""

from __future__ import annotations

import logging
import multiprocessing
import threading
from pathlib import Path

import numpy as np
import pytest

import ncbatch as nc
from ncbatch.arrays.namespace import to_numpy
from ncbatch.errors import DataError, StoreError, UsageError
from ncbatch.ingest.model import target
from ncbatch.ingest.model.target import make_store
from tests.ingest.model.test_dumps import (
    SMALL_CHUNKS,
    WIDE_LAYERS,
    K,
    Mlp,
    Transformer,
    assert_same_store,
    by_hand,
    mlp_batches,
    rows_of,
    seeded,
    token_batches,
    wide_batches,
)

torch = pytest.importorskip("torch")

LAYERS = {"h1": "act1", "last": "fc:input"}


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr("ncbatch.store.format.CHUNK_BYTES", SMALL_CHUNKS)


def dump_rank(path, rank, world_size, batches=None, **options):
    """Dump every `world_size`-th batch."""
    given = wide_batches() if batches is None else batches
    options = {"n_samples": 1600} | options
    return nc.dump(
        seeded(Mlp, 32), given[rank::world_size], path, "train", WIDE_LAYERS, dtype="float32",
        rank=rank, world_size=world_size, **options,
    )  # fmt: skip


def sorted_rows(store):
    """Give labels, predictions and features of all samples, in an order of their own."""
    split = store.split("train")
    labels = split.labels()
    kept = labels >= 0
    features = [rows_of(store, layer)[kept] for layer in sorted(split.layers)]
    order = np.lexsort(features[0].T)
    return [part[order] for part in (labels[kept], split.predictions()[kept], *features)]


def assert_same_rows(one, other):
    assert one.validate() == []
    assert one.split("train").finalized
    for mine, theirs in zip(sorted_rows(one), sorted_rows(other), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert one.classifiers == other.classifiers == ["last"]
    for mine, theirs in zip(one.classifier("last"), other.classifier("last"), strict=True):
        np.testing.assert_array_equal(mine, theirs)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "s.zarr"
    return nc.dump(seeded(Mlp, 32), wide_batches(), path, "train", WIDE_LAYERS, dtype="float32")


# ------------------------------------------------------------------------------------- ranks


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_ranks_in_turn_give_the_rows_of_one(tmp_path, whole, order):
    path = tmp_path / "s.zarr"
    for rank in order:
        store = dump_rank(path, rank, 3)
        assert not store.split("train").finalized
    store.finalize("train")
    assert store.split("train").head == "last"
    assert_same_rows(store, whole)
    # The rows of a rank are in the order of its batches.
    alone = nc.dump(
        seeded(Mlp, 32), wide_batches()[1::3], tmp_path / "a", "train", WIDE_LAYERS, dtype="float32"
    )
    split, block = store.split("train"), store.split("train").base_block
    own = rows_of(alone, "h1")
    assert len(own) < block
    np.testing.assert_array_equal(split.read("h1", block, block + len(own)), own)


def _rank_process(path, rank, world_size, barrier):
    torch.set_num_threads(1)
    barrier.wait()
    dump_rank(path, rank, world_size)


@pytest.mark.slow
def test_ranks_at_once_make_one_store(tmp_path, whole):
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(3)
    ranks = [
        context.Process(target=_rank_process, args=(tmp_path / "s.zarr", rank, 3, barrier))
        for rank in range(3)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(120)
    assert [rank.exitcode for rank in ranks] == [0, 0, 0]
    store = nc.FeatureStore.open(tmp_path / "s.zarr")
    store.finalize("train")
    # Chunk sizes of the processes are not small: rows are the same, their places are not.
    assert_same_rows(store, whole)
    assert [p.name for p in tmp_path.iterdir()] == ["s.zarr"]


def test_a_store_made_by_many_at_once_is_one_store(tmp_path):
    for turn in range(10):
        path, barrier, found = tmp_path / f"{turn}.zarr", threading.Barrier(6), []

        def make(path=path, barrier=barrier, found=found):
            barrier.wait()
            found.append(make_store(path, K, {"x": 4}, "float32").id)

        threads = [threading.Thread(target=make) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 6
        assert set(found) == {nc.FeatureStore.open(path).id}
        assert nc.FeatureStore.open(path).n_classes == K
    assert len(list(tmp_path.iterdir())) == 10  # nothing else is left


def test_a_store_is_made_only_where_one_can_be(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match=r"'.*/file' is a file"):
        make_store(tmp_path / "file", K, {"x": 4}, "float32")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    with pytest.raises(StoreError, match="is no store"):
        make_store(tmp_path / "full", K, {"x": 4}, "float32")
    with pytest.raises(StoreError) as error:
        make_store(tmp_path / "file" / "s.zarr", K, {"x": 4}, "float32")
    assert "partial" not in str(error.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "full"]


def test_another_number_of_classes_made_meanwhile_is_refused(tmp_path):
    path = tmp_path / "s.zarr"

    def batches():
        nc.FeatureStore.create(path, 9)
        yield from wide_batches()

    with pytest.raises(UsageError, match=f"n_classes={K}; expected 9"):
        nc.dump(seeded(Mlp, 32), batches(), path, "train", ["act1"])


def test_a_rank_without_samples_takes_its_place(tmp_path, monkeypatch, whole):
    path = tmp_path / "s.zarr"
    for rank in range(2):
        dump_rank(path, rank, 3, batches=[*_dealt(wide_batches())])
    store = dump_rank(path, 2, 3, batches=[([], [])] * 2)
    store.finalize("train")
    assert_same_rows(store, whole)
    monkeypatch.setattr(target, "PATIENCE_S", 0.0)
    with pytest.raises(DataError, match="no sample in any batch of rank 1, and no other rank"):
        dump_rank(tmp_path / "alone", 1, 2, batches=[])
    assert not (tmp_path / "alone").exists()


def _dealt(batches):
    """Lay batches out so that only ranks 0 and 1 of 3 get any."""
    for a, b in zip(batches[::2], batches[1::2], strict=True):
        yield from (a, b, None)


def test_a_rank_waits_for_another(tmp_path, whole):
    path = tmp_path / "s.zarr"
    waiting = threading.Thread(target=dump_rank, args=(path, 1, 2, []))
    waiting.start()
    dump_rank(path, 0, 2, batches=[x for b in wide_batches() for x in (b, None)])
    waiting.join(60)
    assert not waiting.is_alive()
    store = nc.FeatureStore.open(path)
    store.finalize("train")
    assert_same_rows(store, whole)


def test_rank_0_without_samples_says_what_is_lost(tmp_path, caplog):
    path = tmp_path / "s.zarr"
    dump_rank(path, 1, 2)
    with caplog.at_level(logging.WARNING, "ncbatch"):
        store = dump_rank(path, 0, 2, batches=[])
    assert "rank 0, which stores it, had no sample" in caplog.text
    store.finalize("train")
    assert store.classifiers == []


def interrupted(path, rank, after):
    def batches():
        yield from wide_batches()[rank::2][:after]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        nc.dump(
            seeded(Mlp, 32), batches(), path, "train", WIDE_LAYERS, dtype="float32",
            rank=rank, world_size=2, n_samples=1600,
        )  # fmt: skip


@pytest.mark.parametrize("after", [0, 1, 7])
def test_every_rank_resumes_by_itself(tmp_path, whole, after):
    path = tmp_path / "s.zarr"
    interrupted(path, 1, after)
    dump_rank(path, 0, 2)
    with pytest.raises(StoreError, match=r"no (record|end) of writer 1"):
        nc.FeatureStore.open(path).finalize("train")
    if after:
        with pytest.raises(
            StoreError, match=r"writer 1 of 2 of split 'train' .* has begun already"
        ):
            dump_rank(path, 1, 2)
    for rank in (0, 1):  # a whole job can be started again
        model = seeded(Mlp, 32)
        store = nc.dump(
            model, wide_batches()[rank::2], path, "train", WIDE_LAYERS, dtype="float32",
            rank=rank, world_size=2, n_samples=1600, resume=True,
        )  # fmt: skip
        assert model.passes == {(0, 0): 0, (1, 0): 8, (1, 1): 8, (1, 7): 3}.get((rank, after), 0)
    store.finalize("train")
    assert_same_rows(store, whole)
    model = seeded(Mlp, 32)
    nc.dump(
        model, wide_batches(), path, "train", WIDE_LAYERS, rank=1, world_size=2, resume=True
    )  # fmt: skip
    assert model.passes == 0


def test_a_rank_resumes_with_its_own_batches(tmp_path):
    path = tmp_path / "s.zarr"
    dump_rank(path, 0, 2)
    interrupted(path, 1, 7)
    with pytest.raises(DataError, match=r"(?s)for row .* in the same order"):
        dump_rank(path, 1, 2, batches=wide_batches()[::-1], resume=True)
    with pytest.raises(DataError, match="predictions of layer none; expected last"):
        dump_rank(path, 1, 2, predictions=False, resume=True)
    with pytest.raises(StoreError, match="begun with layers h1, in, last"):
        nc.dump(
            seeded(Mlp, 32), wide_batches()[1::2], path, "train", ["fc1"],
            rank=1, world_size=2, resume=True,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_samples": None}, "no n_samples for 2 ranks"),
        ({"rank": 2}, "writer 2 of 2"),
        ({"rank": -1}, "writer -1 of 2"),
        ({"overwrite": True}, "overwrite with several ranks"),
    ],
)
def test_bad_ranks(tmp_path, options, message):
    model = seeded(Mlp)
    given = {"rank": 0, "world_size": 2, "n_samples": 100} | options
    with pytest.raises(UsageError, match=message):
        nc.dump(model, mlp_batches(), tmp_path / "s.zarr", "train", ["fc1"], **given)
    assert model.passes == 0
    assert not (tmp_path / "s.zarr").exists()


def test_more_samples_than_announced_are_refused(tmp_path):
    with pytest.raises(DataError, match="n_samples=300 at most"):
        dump_rank(tmp_path / "s.zarr", 0, 2, n_samples=300)


def test_layers_are_added_by_one_process(tmp_path):
    store = nc.dump(seeded(Mlp), mlp_batches(), tmp_path / "s.zarr", "train", ["fc1"])
    with pytest.raises(UsageError, match="layers to be added to the complete split 'train'"):
        nc.dump(
            seeded(Mlp), mlp_batches(), store, "train", ["act1"],
            rank=0, world_size=2, n_samples=100,
        )  # fmt: skip


def test_a_split_of_one_process_is_not_joined(tmp_path):
    path = tmp_path / "s.zarr"

    def batches():
        yield from wide_batches()[:9]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        nc.dump(seeded(Mlp, 32), batches(), path, "train", WIDE_LAYERS, dtype="float32")
    for resume in (False, True):
        with pytest.raises(StoreError, match="begun by a single writer"):
            dump_rank(path, 1, 2, resume=resume)


# --------------------------------------------------------------------- decisions as labels


def test_the_heads_decisions_become_the_labels(tmp_path):
    model, batches = seeded(Mlp), mlp_batches()
    marks = [(x, torch.where(y == 2, -5, y * 1000)) for x, y in batches]
    layers = ["act1", "fc:input"]
    store = nc.dump(
        model, marks, tmp_path / "s.zarr", "train", layers, argmax_labels=True, dtype="float32"
    )
    kept = torch.cat([y for _, y in batches]).numpy() != 2
    decided = by_hand(model, batches, lambda m, x: m(x)).argmax(1).numpy()[kept]
    split = store.split("train")
    assert store.n_classes == K
    np.testing.assert_array_equal(split.labels(), decided)
    np.testing.assert_array_equal(split.predictions(), decided)
    h = by_hand(model, batches, lambda m, x: torch.relu(m.fc1(x))).numpy()[kept]
    np.testing.assert_array_equal(rows_of(store, "act1"), h)


def test_decisions_among_the_first_classes_without_the_heads_layer(tmp_path, caplog):
    model, batches = seeded(Transformer), token_batches()
    with caplog.at_level(logging.WARNING, "ncbatch"):
        store = nc.dump(
            model, batches, tmp_path / "s.zarr", "train", ["h.1"], argmax_labels=True, n_classes=3
        )
    assert "no classifier and no predictions stored" in caplog.text
    logits = [by_hand(model, [b], lambda m, t: m(t))[..., :3].flatten(0, 1) for b in batches]
    kept = [labels.reshape(-1) >= 0 for _, labels in batches]
    decided = torch.cat([z[k].argmax(1) for z, k in zip(logits, kept, strict=True)])
    np.testing.assert_array_equal(store.split("train").labels(), to_numpy(decided))
    assert store.split("train").head is None


def test_layers_are_added_under_the_same_decisions(tmp_path):
    model, batches = seeded(Mlp), mlp_batches()
    store = nc.dump(model, batches, tmp_path / "s.zarr", "train", ["act1"], argmax_labels=True)
    nc.dump(model, batches, store, "train", ["fc:input"], argmax_labels=True)
    assert store.split("train").layers == ["act1", "fc:input"]
    with pytest.raises(DataError, match="as stored in split 'train'"):
        nc.dump(model, batches, store, "train", ["fc2"])


def test_a_dump_of_decisions_resumes(tmp_path):
    def dump(path, batches, **options):
        return nc.dump(
            seeded(Mlp, 32), batches, path, "train", WIDE_LAYERS,
            dtype="float32", argmax_labels=True, **options,
        )  # fmt: skip

    def batches():
        yield from wide_batches()[:9]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dump(tmp_path / "s.zarr", batches())
    store = dump(tmp_path / "s.zarr", wide_batches(), resume=True)
    assert_same_store(store, dump(tmp_path / "whole.zarr", wide_batches()))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"head": False, "n_classes": K}, UsageError, "argmax_labels with head=False"),
        ({"n_classes": 9}, DataError, "head 'fc' has 5 outputs; expected 9 or more"),
        ({"layers": ["fc1"], "n_classes": 9}, DataError, "head 'fc' has 5 outputs"),
    ],
)
def test_decisions_need_a_head(tmp_path, options, error, message):
    options = {"layers": ["fc:input"]} | options
    layers = options.pop("layers")
    with pytest.raises(error, match=message):
        nc.dump(
            seeded(Mlp), mlp_batches(), tmp_path / "s.zarr", "train", layers,
            argmax_labels=True, **options,
        )  # fmt: skip
    path = tmp_path / "s.zarr"
    assert not path.exists() or nc.FeatureStore.open(path).splits == []


def test_decisions_at_other_positions_are_no_labels(tmp_path):
    batches = [(torch.arange(12).reshape(3, 4) % K, torch.tensor([0, 1, 2]))]
    with pytest.raises(DataError, match="head 'lm_head': no decisions at the positions"):
        nc.dump(
            seeded(Transformer), batches, tmp_path / "s.zarr", "train", ["h.0"],
            pool="mean", argmax_labels=True,
        )  # fmt: skip
    assert not (tmp_path / "s.zarr").exists()


def test_a_model_without_a_head_decides_nothing(tmp_path):
    batches = [(torch.zeros(2, 8), torch.tensor([0, 1]))]
    with pytest.raises(DataError, match=r"no torch\.nn\.Linear ran: no decisions"):
        nc.dump(
            torch.nn.Identity(), batches, tmp_path / "s.zarr", "train", {"x": ""},
            n_classes=K, argmax_labels=True,
        )  # fmt: skip


def test_paths_of_any_kind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = nc.dump(seeded(Mlp), mlp_batches(), "relative.zarr", "train", ["fc1"])
    assert store.path == "relative.zarr"
    assert Path("relative.zarr").is_dir()
