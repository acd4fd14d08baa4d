"""Rows of a dump: added, refused, resumed after a kill, and written by several ranks."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import ncbatch as nc
from ncbatch.errors import DataError, StoreError, UsageError
from ncbatch.ingest.model import capture, target
from ncbatch.store import format as store_format
from ncbatch.store import writer as writing
from tests.ingest.model.models import (
    SMALL_CHUNKS,
    WIDE_LAYERS,
    K,
    Mlp,
    assert_same_store,
    dump_wide,
    mlp_batches,
    rows_of,
    seeded,
    wide_batches,
)

torch = pytest.importorskip("torch")
nn = torch.nn


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr("ncbatch.store.format.CHUNK_BYTES", SMALL_CHUNKS)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "s.zarr"
    return nc.dump(seeded(Mlp, 32), wide_batches(), path, "train", WIDE_LAYERS, dtype="float32")


def test_layers_are_added_later(tmp_path):
    path, model, batches = tmp_path / "s.zarr", seeded(Mlp), mlp_batches()
    store = nc.dump(model, batches, path, "train", ["fc1"])
    assert store.classifiers == []
    nc.dump(model, batches, path, "train", {"last": "fc:input", "act1": "act1"})
    whole = nc.dump(model, batches, tmp_path / "w.zarr", "train", ["fc1", "act1", "fc:input"])
    assert store.split("train").layers == ["fc1", "last", "act1"]
    assert store.classifiers == ["last"]
    for mine, theirs in (("fc1", "fc1"), ("act1", "act1"), ("last", "fc:input")):
        np.testing.assert_array_equal(rows_of(store, mine), rows_of(whole, theirs))
    with pytest.raises(StoreError, match="has layers act1"):
        nc.dump(model, batches, path, "train", ["act1", "fc2"])


def test_layers_are_not_added_to_other_rows(tmp_path):
    path, model, batches = tmp_path / "s.zarr", seeded(Mlp), mlp_batches()
    store = nc.dump(model, batches, path, "train", ["fc1"])
    with pytest.raises(DataError, match="as stored in split 'train'"):
        nc.dump(model, batches[::-1], path, "train", ["act1"])
    with pytest.raises(DataError, match="96 rows for split 'train'"):
        nc.dump(model, batches[:-1], path, "train", ["act1"])
    assert store.split("train").layers == ["fc1"]
    nc.dump(model, batches, path, "train", ["act1"])  # what was left unfinished is no obstacle
    assert store.split("train").layers == ["fc1", "act1"]


def test_layers_are_not_added_to_a_split_with_holes(tmp_path):
    store = nc.FeatureStore.create(tmp_path / "s.zarr", K, {"x": 2})
    with store.writer("train") as writer:
        writer.append({"x": np.zeros((3, 2), np.float16)}, np.array([0, -1, 1]))
    with pytest.raises(StoreError, match="no samples"):
        nc.dump(seeded(Mlp), mlp_batches(), store, "train", ["fc1"])


def test_a_split_that_exists(tmp_path):
    path, model, batches = tmp_path / "s.zarr", seeded(Mlp), mlp_batches()
    nc.dump(model, batches, path, "train", ["fc1"])
    passes = model.passes
    with pytest.raises(StoreError, match="overwrite=True"):
        nc.dump(model, batches, path, "train", ["fc1"])
    store = nc.dump(model, batches, path, "train", ["fc1"], resume=True)  # nothing to do
    assert model.passes == passes
    nc.dump(model, batches[:2], path, "train", ["fc1"], overwrite=True)
    assert store.split("train").n_samples == 64


@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float64])
def test_an_overflow_in_the_first_batch_leaves_no_store(tmp_path, source):
    batches = [(torch.full((3, 8), 1e6, dtype=source), torch.arange(3))]
    given = (nn.Identity(), batches, tmp_path / "s.zarr", "train", {"x": ""})
    with pytest.raises(DataError, match=r"layer 'x' row 0 overflows float16\n.*--dtype"):
        nc.dump(*given, n_classes=K, head=False)
    assert list(tmp_path.iterdir()) == []
    store = nc.dump(*given, n_classes=K, head=False, dtype="float32")
    assert store.split("train").spec("x").dtype == "float32"


@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float64])
def test_overflow_names_the_row(tmp_path, source):
    x = torch.ones(6, 8, dtype=source)
    x[1] = torch.inf  # what is infinite already is not an overflow
    x[4, 3] = 1e6
    batches = [(torch.ones(10, 8, dtype=source), torch.zeros(10, dtype=int))]
    batches.append((x, torch.tensor([0, 1, -1, 2, 3, 4])))
    with pytest.raises(DataError, match="layer 'x' row 13 overflows float16"):
        nc.dump(
            nn.Identity(), batches, tmp_path / "s.zarr", "train", {"x": ""}, n_classes=K, head=False
        )


def test_rows_are_converted_while_the_model_runs(tmp_path, monkeypatch):
    held, run = [], capture.Capture.run

    def spied(self, *args):
        found = run(self, *args)
        held.append({type(rows) for rows in found.values()})
        return found

    monkeypatch.setattr(capture.Capture, "run", spied)
    store = nc.dump(seeded(Mlp), mlp_batches(), tmp_path / "s.zarr", "train", ["fc1", "fc:input"])
    # The first batch is held, so that the head's input is found among its rows.
    assert held == [{torch.Tensor}, *[{np.ndarray}] * 3]
    assert rows_of(store, "fc1").dtype == np.float16


REPOSITORY = Path(__file__).parents[3]


def kill_at(path: str, moment: str, count: int) -> None:
    """Dump, and SIGKILL this process at the `count`-th time of `moment`."""
    store_format.CHUNK_BYTES = SMALL_CHUNKS
    left = [count]

    def tick(*_):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def before(owner, name):
        original = getattr(owner, name)

        def wrapped(*args, **kwargs):
            tick()
            return original(*args, **kwargs)

        setattr(owner, name, wrapped)

    def ticking(batches):
        for batch in batches:
            tick()
            yield batch

    owners = {
        "flush": writing.RowBuffer,
        "save": writing.ranks.CommitRecord,
        "finalize_split": writing.ranks,
    }
    if moment != "batch":
        before(owners[moment], moment)
    dump_wide(path, ticking(wide_batches()) if moment == "batch" else None)


@pytest.mark.parametrize(
    ("moment", "count"),
    [
        ("batch", 1),  # nothing there
        ("batch", 3),  # a split without a committed row
        ("batch", 9),
        ("flush", 9),  # features of a block without its labels
        ("save", 2),  # labels without their record
        ("finalize_split", 1),  # everything but the end
    ],
)
@pytest.mark.slow
def test_a_killed_dump_resumes_to_the_same_store(tmp_path, monkeypatch, moment, count):
    path = tmp_path / "s.zarr"
    script = f"from tests.ingest.model.test_rows import kill_at; kill_at({str(path)!r}, {moment!r}, {count})"
    child = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, check=False, timeout=120)
    assert child.returncode == -signal.SIGKILL

    monkeypatch.setattr(store_format, "CHUNK_BYTES", SMALL_CHUNKS)
    whole = dump_wide(tmp_path / "whole.zarr")
    assert whole.split("train").base_block == 512
    if path.exists():
        store = nc.FeatureStore.open(path)
        assert store.validate() == []
        if "train" in store.splits:
            part = store.split("train")
            labels = part.labels()
            n = int(np.flatnonzero(labels >= 0)[-1]) + 1
            assert part.n_samples == n
            for layer in part.layers:
                np.testing.assert_array_equal(part.read(layer, 0, n), rows_of(whole, layer)[:n])
    resumed = dump_wide(path, resume=True)
    assert_same_store(resumed, whole)


def interrupt(path, monkeypatch, after=9):
    """Stop a dump by an exception after some batches."""
    monkeypatch.setattr(store_format, "CHUNK_BYTES", SMALL_CHUNKS)

    def batches():
        yield from wide_batches()[:after]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dump_wide(path, batches())
    return nc.FeatureStore.open(path)


def test_an_interrupted_dump_skips_whole_batches(tmp_path, monkeypatch):
    store = interrupt(tmp_path / "s.zarr", monkeypatch)
    assert store.split("train").n_samples == 512
    model = seeded(Mlp, 32)
    nc.dump(model, wide_batches(), store, "train", WIDE_LAYERS, dtype="float32", resume=True)
    assert model.passes == 16 - 5
    assert_same_store(store, dump_wide(tmp_path / "whole.zarr"))


def test_resume_wants_the_same_batches(tmp_path, monkeypatch):
    store = interrupt(tmp_path / "s.zarr", monkeypatch)
    with pytest.raises(DataError, match="in the same order"):
        dump_wide(store, wide_batches()[::-1], resume=True)
    with pytest.raises(DataError, match="batches of 279 samples; expected the 512 already stored"):
        dump_wide(store, wide_batches()[:3], resume=True)
    with pytest.raises(DataError, match="predictions of layer none; expected last"):
        dump_wide(store, predictions=False, resume=True)
    with pytest.raises(StoreError, match="begun with layers h1, in, last"):
        nc.dump(seeded(Mlp, 32), wide_batches(), store, "train", ["fc1"], resume=True)
    with pytest.raises(StoreError, match="resume=True"):
        dump_wide(store)
    dump_wide(store, resume=True)
    assert_same_store(store, dump_wide(tmp_path / "whole.zarr"))


def test_an_interrupted_dump_can_start_again(tmp_path, monkeypatch):
    store = interrupt(tmp_path / "s.zarr", monkeypatch)
    dump_wide(store, overwrite=True)
    assert_same_store(store, dump_wide(tmp_path / "whole.zarr"))


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


@pytest.mark.parametrize("order", [pytest.param((0, 1, 2), marks=pytest.mark.slow), (2, 1, 0)])
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


@pytest.mark.parametrize("after", [pytest.param(0, marks=pytest.mark.slow), 1, 7])
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
