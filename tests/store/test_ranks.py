"""Several writers of one split: whoever writes when, every row is there once; what is lost is noticed."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ncbatch.errors import CorruptionError, DataError, StoreError, UnknownNameError, UsageError
from ncbatch.store import FeatureStore
from ncbatch.store.ranks import CommitRecord, Share
from ncbatch.store.writer import Writer
from tests.conftest import tree

K = 5
WIDTHS = {"h": 4, "fc": 8}  # 64 and 32 rows per chunk of 1 KiB: a base block is 64 rows
REPOSITORY = Path(__file__).parents[2]
ID = 100_000  # the rows of writer r have numbers from r * ID on

pytestmark = pytest.mark.usefixtures("small_chunks")


def features(ids: np.ndarray) -> dict[str, np.ndarray]:
    """Give rows from which their number can be read: whole in h, and halved in fc."""
    return {
        "h": (ids[:, None] + np.arange(4) / 4).astype(np.float32),
        "fc": (np.arange(8) - ids[:, None] / 2).astype(np.float32),
    }


def labels_of(ids: np.ndarray) -> np.ndarray:
    return np.where(ids % 11 == 3, -1, ids % K)


def append(writer: Writer, rank: int, stop: int, *, step: int = 50) -> None:
    """Append the rows of writer `rank` from where it is to its row `stop`."""
    head = writer._head
    while writer.position < stop:
        own = np.arange(writer.position, min(writer.position + step, stop))
        ids = rank * ID + own
        writer.append(features(ids), labels_of(ids), None if head is None else ids * 3 % K)


def assert_holds(store: FeatureStore, counts: Sequence[int], *, predictions: bool = False) -> None:
    """Check that every writer's rows are there once, in its order, and nothing else."""
    split = store.split("train")
    labels, h, fc = split.labels(), *(split.read(x, 0, split.n_rows) for x in WIDTHS)
    rows = np.flatnonzero(labels >= 0)
    ids = h[rows, 0].astype(np.int64)
    expected = np.concatenate([r * ID + np.arange(n) for r, n in enumerate(counts)])
    expected = expected[labels_of(expected) >= 0]
    np.testing.assert_array_equal(np.sort(ids), np.sort(expected))
    assert split.n_samples == len(expected)
    np.testing.assert_array_equal(labels[rows], ids % K)
    np.testing.assert_array_equal(h[rows], features(ids)["h"])
    np.testing.assert_array_equal(fc[rows], features(ids)["fc"])
    for rank in range(len(counts)):
        mine = ids[ids // ID == rank]
        np.testing.assert_array_equal(mine, np.sort(mine))
        blocks = rows[ids // ID == rank] // split.base_block
        np.testing.assert_array_equal(blocks % len(counts), rank)
    if predictions:
        np.testing.assert_array_equal(split.predictions()[rows], ids * 3 % K)
    for layer in WIDTHS:
        split.check_chunks(layer)
    assert store.validate() == []


def make(path: Path) -> FeatureStore:
    return FeatureStore.create(path, K, WIDTHS, "float32")


def writer(store: FeatureStore, rank: int, world_size: int = 2, **options) -> Writer:
    return store.writer(
        "train", rank=rank, world_size=world_size, **({"n_samples": 1000} | options)
    )


def write(store: FeatureStore, counts: Sequence[int], **options) -> FeatureStore:
    for rank, n in enumerate(counts):
        with writer(store, rank, len(counts), **options) as one:
            append(one, rank, n)
    return store


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    return make(tmp_path / "s")


# ------------------------------------------------------------------------------ what is written


@pytest.mark.slow
@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    counts=st.lists(st.integers(0, 80), min_size=2, max_size=4),
    chunk_bytes=st.sampled_from([128, 512, 2048]),
    spare=st.sampled_from([0, 1, 5000]),
    seed=st.integers(0, 99),
    head=st.sampled_from([None, "h", "fc"]),
)
def test_writers_that_take_turns_give_every_row_once(
    tmp_path_factory, monkeypatch, counts, chunk_bytes, spare, seed, head
):
    monkeypatch.setattr("ncbatch.store.format.CHUNK_BYTES", chunk_bytes)
    store = make(tmp_path_factory.mktemp("turns") / "s")
    n_samples = max(sum(counts), 1) + spare
    writers = [
        writer(store, rank, len(counts), n_samples=n_samples, head=head)
        for rank in range(len(counts))
    ]
    rng = np.random.default_rng(seed)
    while any(one.position < n for one, n in zip(writers, counts, strict=True)):
        rank = int(rng.integers(len(counts)))
        stop = min(writers[rank].position + int(rng.integers(1, 40)), counts[rank])
        append(writers[rank], rank, stop)
    for rank in rng.permutation(len(counts)):
        writers[rank].close()
    split = store.finalize("train")
    assert split.head == head
    assert_holds(FeatureStore.open(store.path), counts, predictions=head is not None)
    block = split.base_block
    ends = [Share(r, len(counts)).row(n - 1, block) + 1 for r, n in enumerate(counts) if n]
    assert split.n_rows == max(ends, default=0)
    assert {array.shape[0] for array in split.arrays.values()} == {split.n_rows}


@pytest.mark.parametrize(("own", "row"), [(0, 8), (3, 11), (4, 20), (11, 35)])
def test_a_writer_owns_every_nth_block(own, row):
    assert Share(2, 3).row(own, block=4) == row
    assert Share().row(own, block=4) == own


def test_one_writer_may_have_all_the_rows(store):
    write(store, [0, 900, 0], n_samples=900)
    split = store.finalize("train")
    assert split.base_block == 64
    assert_holds(store, [0, 900, 0])


def test_chunks_are_no_longer_than_an_even_share(store):
    write(store, [20, 20], n_samples=40)
    split = store.finalize("train")
    assert split.base_block == 32
    assert (split.n_rows, split.n_samples) == (52, (split.labels() >= 0).sum())


def test_layers_have_chunks_of_their_own_within_the_base_block(store):
    write(store, [100, 100])
    split = store.finalize("train")
    assert (split.feature("h").chunks[0], split.feature("fc").chunks[0]) == (64, 32)


def test_blocks_of_holes_only_are_stored_by_a_resumed_writer(store):
    append(writer(store, 0), 0, 64)
    with writer(store, 0, resume=True) as one:
        one.append(features(np.arange(64, 192)), np.full(128, -1))
    with writer(store, 1) as other:
        append(other, 1, 64)
    assert [path.name for path in sorted(Path(store.path, "train/label/c").iterdir())] == [
        *("0", "1", "2", "4")
    ]
    assert store.finalize("train").n_rows == 64 * 5
    assert store.validate() == []


# ----------------------------------------------------------------------------------- processes

WRITING = """
import os, signal, sys
import ncbatch.store.format
ncbatch.store.format.CHUNK_BYTES = 1024
from tests.store import test_ranks as t
store = t.FeatureStore.open(sys.argv[1])
rank, world_size, count, kill_at = map(int, sys.argv[2:6])
print("ready", flush=True)
for name in sys.argv[6:]:
    sys.stdin.readline()
    try:
        shares = {"rank": rank, "world_size": world_size, "n_samples": 1000} if world_size > 1 else {}
        with store.writer(name, head="fc", **shares) as writer:
            while writer.position < count:
                t.append(writer, rank, min(writer.position + 10, count))
                if writer.position == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
        print("done", flush=True)
    except t.StoreError as error:
        print("refused", error.found, flush=True)
"""


def start(path: str, world_size: int, names: Sequence[str], counts: Sequence[int], kill: int = -1):
    """Start a process per writer; each waits for a line before each split."""
    processes = []
    for rank, count in enumerate(counts):
        numbers = (rank, world_size, count, 130 if rank == kill else -1)
        command = [sys.executable, "-c", WRITING, path, *map(str, numbers), *names]
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
        processes.append(
            subprocess.Popen(command, cwd=REPOSITORY, text=True, env=environment, **pipes)
        )
    for process in processes:
        assert process.stdout.readline() == "ready\n", process.communicate()[1]
    return processes


def go(processes: Sequence[subprocess.Popen[str]]) -> list[str]:
    """Let all write a split at once; give what each says."""
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    return [process.stdout.readline().strip() for process in processes]


def end(processes: Sequence[subprocess.Popen[str]]) -> list[int]:
    for process in processes:
        _, err = process.communicate(timeout=60)
        assert err == ""
    return [process.returncode for process in processes]


@pytest.mark.slow
def test_processes_that_start_at_once_write_one_split(store):
    counts, names = [200, 64, 0, 333], [f"split{i}" for i in range(8)]
    processes = start(store.path, 4, names, counts)
    for name in names:
        assert go(processes) == ["done"] * 4
        shutil.move(Path(store.path) / name, Path(store.path) / "train")
        store.finalize("train")
        assert_holds(store, counts, predictions=True)
        store.delete_split("train")
    assert end(processes) == [0] * 4


@pytest.mark.slow
def test_of_processes_that_know_of_no_others_one_writes(store):
    names = [f"split{i}" for i in range(8)]
    processes = start(store.path, 1, names, [100, 100, 100])
    for name in names:
        said = go(processes)
        assert sorted(word.split(" ")[0] for word in said) == ["done", "refused", "refused"]
        winner = said.index("done")
        split = store.split(name)
        ids = winner * ID + np.arange(100)
        np.testing.assert_array_equal(split.labels(), labels_of(ids))
        np.testing.assert_array_equal(split.read("h", 0, 100), features(ids)["h"])
    assert end(processes) == [0] * 3
    assert store.validate() == []


@pytest.mark.slow
def test_a_killed_writer_resumes_and_the_split_is_whole(store):
    processes = start(store.path, 2, ["train"], [200, 300], kill=1)
    go(processes)
    assert end(processes) == [0, -signal.SIGKILL]
    store = FeatureStore.open(store.path)
    assert_holds(store, [200, 128], predictions=True)
    with pytest.raises(StoreError, match=r"split 'train' of .* has no end of writer 1; expected"):
        store.finalize("train")
    with writer(store, 1, resume=True, head="fc") as one:
        assert one.position == 128
        append(one, 1, 300)
    store.finalize("train")
    assert_holds(store, [200, 300], predictions=True)


# ---------------------------------------------------------------------------- before the end


def test_what_is_committed_can_be_read_before_the_end(store):
    first, second = writer(store, 0, n_samples=10**9), writer(store, 1, n_samples=10**9)
    assert store.splits == []
    append(second, 1, 70)
    split = store.split("train")
    assert (split.n_rows, split.finalized) == (128, False)
    assert split.n_samples == (labels_of(ID + np.arange(64)) >= 0).sum()
    append(first, 0, 200)
    assert (split.n_rows, store.split("train").n_rows) == (128, 64 * 5)
    assert_holds(store, [192, 64])
    dataset = store.to_xarray("train", "h")
    assert dataset["feature"].shape == (store.split("train").n_samples, 4)
    ids = np.asarray(dataset["feature"])[:, 0].astype(int)
    np.testing.assert_array_equal(dataset["label"], ids % K)
    before = store.split("train").fingerprint("h")
    append(first, 0, 256)
    assert store.split("train").fingerprint("h") != before


def test_rows_are_the_same_before_and_after_the_end(store):
    write(store, [200, 100])
    before = store.split("train")
    labels, h = before.labels(), before.read("h", 0, before.n_rows)
    assert [record.position for record in before.records] == [200, 100]
    n = before.n_samples
    after = store.finalize("train")
    assert after.n_samples == n
    np.testing.assert_array_equal(after.labels(), labels[: after.n_rows])
    np.testing.assert_array_equal(after.read("h", 0, after.n_rows), h[: after.n_rows])


# ---------------------------------------------------------------------------------- finalize


def test_the_split_is_not_complete_until_finalize(store):
    write(store, [100, 100])
    assert not store.split("train").finalized
    assert store.finalize("train").finalized
    before = tree(Path(store.path))
    assert store.finalize("train").n_samples == store.split("train").n_samples
    assert tree(Path(store.path)) == before


def test_finalize_names_the_writers_that_are_missing_or_at_work(store):
    write_some = [writer(store, rank, 4) for rank in (0, 2)]
    append(write_some[0], 0, 100)
    append(write_some[1], 2, 100)
    write_some[0].close()
    before = tree(Path(store.path))
    with pytest.raises(
        StoreError, match=r"no record of writer 1, 3 and no end of writer 2; expected all of 0\.\.3"
    ):
        store.finalize("train")
    assert tree(Path(store.path)) == before


def test_finalize_of_no_split_is_refused(store):
    with pytest.raises(UnknownNameError, match="no split 'train'"):
        store.finalize("train")
    writer(store, 0).close()
    store.delete_split("train")
    with pytest.raises(UnknownNameError, match="no split 'train'"):
        store.finalize("train")


def test_a_single_writer_that_stopped_is_not_complete_either(store):
    with pytest.raises(ZeroDivisionError), store.writer("train") as one:  # noqa: PT012
        append(one, 0, 100)
        raise ZeroDivisionError
    with pytest.raises(StoreError, match=r"no end of writer 0; expected it to be closed"):
        store.finalize("train")
    store.writer("train", resume=True).close()
    assert_holds(store, [64])


def test_writers_without_rows_give_an_empty_split(store):
    write(store, [0, 0], head="h")
    assert store.splits == []
    split = store.finalize("train")
    assert (split.n_rows, split.n_samples, split.layers, split.head) == (0, 0, ["h", "fc"], "h")
    assert store.validate() == []


def test_room_that_nobody_needed_is_given_back_at_once(store):
    """Room for 1e12 rows is 3e10 chunks, none of which may be looked for."""
    write(store, [100, 200], n_samples=10**12)
    assert store.finalize("train").n_rows == 64 * 7 + 8
    assert_holds(store, [100, 200])


def test_chunks_beyond_the_end_are_deleted(store):
    one = writer(store, 0)
    append(one, 0, 64 * 3 + 40)  # a chunk of fc in block 6 has no labels
    writer(store, 0, resume=True).close()
    writer(store, 1).close()
    file = Path(store.path) / "train/layers/fc/feature/c/12/0"
    assert file.exists()
    store.finalize("train")
    assert not file.exists()
    assert_holds(store, [64 * 3, 0])


class Stop(BaseException):
    """Stands for a kill."""


def stopping(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, number: int) -> None:
    """Let the numbered call raise, before it does anything."""
    original, calls = getattr(owner, name), itertools.count(1)

    def counted(*arguments, **options):
        if next(calls) == number:
            raise Stop
        return original(*arguments, **options)

    monkeypatch.setattr(owner, name, counted)


@pytest.mark.parametrize(
    "number", [1, 5, *(pytest.param(number, marks=pytest.mark.slow) for number in (2, 3, 4))]
)
def test_finalize_that_was_interrupted_is_done_again(store, tmp_path, number):
    write(store, [300, 100, 5], head="fc")
    shutil.copytree(store.path, tmp_path / "whole")
    FeatureStore.open(tmp_path / "whole").finalize("train")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):  # noqa: PT012
        if number == 5:
            stopping(patch, zarr.Group, "update_attributes", 1)
        else:
            stopping(patch, zarr.AsyncArray, "resize", number)
        store.finalize("train")
    assert store.validate() == []
    assert_holds(store, [300, 100, 5], predictions=True)
    store.finalize("train")
    assert_holds(store, [300, 100, 5], predictions=True)
    assert tree(tmp_path / "s/train") == tree(tmp_path / "whole/train")


# ------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("number", range(2, 5))
def test_a_writer_stopped_before_a_record_leaves_no_rows_of_its_last_attempt(store, number):
    """Stopped between labels and record, and then given fewer rows: none of the first may stay."""
    with writer(store, 1) as other:
        append(other, 1, 300)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):  # noqa: PT012
        stopping(patch, CommitRecord, "save", number)
        with writer(store, 0) as one:
            append(one, 0, 64 * 3 + 40)
    assert store.validate() == []
    with writer(store, 0, resume=True) as one:
        assert one.position in (64 * number, 64 * 3, 64 * 3 + 40)
        count = max(one.position, 64 * 3 + 10)
        append(one, 0, count)
    store.finalize("train")
    assert_holds(store, [count, 300])


def test_a_writer_that_had_ended_has_nothing_to_resume(store):
    write(store, [100, 70])
    with writer(store, 0, resume=True) as one:
        assert one.position == 100
        with pytest.raises(
            StoreError, match=r"writer 0 of .* ended with 100 rows; expected no more"
        ):
            append(one, 0, 101)
        one.append(features(np.arange(0)), np.arange(0))
    store.finalize("train")
    assert_holds(store, [100, 70])


def test_a_job_that_is_started_again_as_a_whole_resumes_whatever_its_writers_did(store):
    with writer(store, 0, 3) as one:
        append(one, 0, 100)
    append(writer(store, 1, 3), 1, 100)
    for rank in range(3):
        with writer(store, rank, 3, resume=True, n_samples=None) as one:
            assert one.position == [100, 64, 0][rank]
            append(one, rank, 100)
    store.finalize("train")
    assert_holds(store, [100, 100, 100])
    with pytest.raises(StoreError, match=r"is complete: \d+ samples"):
        writer(store, 0, 3, resume=True)
    with pytest.raises(StoreError, match="exists; expected a new split"):
        writer(store, 0, 3)


def test_a_rank_belongs_to_one_process(store):
    writer(store, 0)
    with pytest.raises(StoreError, match=r"writer 0 of 2 of split 'train' .* has begun already"):
        writer(store, 0)


# -------------------------------------------------------------------------- what is refused

OTHERS = {
    "world_size": (dict(world_size=3), "was begun with world_size 2; expected 3, as this"),
    "n_samples": (dict(n_samples=999), "was begun with n_samples 1000; expected 999"),
    "head": (dict(head="h"), "was begun with head None; expected h"),
    "layers": (dict(layers=["h"]), "was begun with layers fc, h; expected h"),
    "more layers": (
        dict(layers=WIDTHS | {"g": 3}, dtype="float32"),
        "layers fc, h; expected fc, g, h",
    ),
    "dtype": (dict(layers=WIDTHS, dtype="float16"), r"layer 'fc' .*float32.*; expected .*float16"),
    "one writer": (dict(world_size=1, rank=0), "was begun by 2 writers; expected a single one"),
}


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("rows", [0, 100])
@pytest.mark.parametrize("case", OTHERS)
def test_a_writer_with_other_arguments_is_refused(store, case, rows, resume):
    options, message = OTHERS[case]
    append(writer(store, 0), 0, rows)
    append(writer(store, 1), 1, rows)
    before = tree(Path(store.path))
    with pytest.raises(StoreError, match=message):
        writer(store, **({"rank": 1, "resume": resume} | options))
    assert tree(Path(store.path)) == before


def test_a_writer_cannot_join_a_single_one(store):
    append(store.writer("train"), 0, 100)
    for resume in (False, True):
        with pytest.raises(StoreError, match="was begun by a single writer; expected a split of 2"):
            writer(store, 1, resume=resume)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(rank=2), r"writer 2 of 2; expected a rank in 0\.\.1"),
        (dict(rank=-1), "writer -1 of 2"),
        (dict(rank=1, world_size=1), "writer 1 of 1"),
        (dict(rank=0, world_size=0), "a split of 0 writers"),
        (dict(rank=0, n_samples=None), "n_samples None for several writers"),
        (dict(rank=0, n_samples=0), "n_samples 0 for several"),
        (
            dict(rank=0, overwrite=True),
            r"overwrite with several writers.*\n.*delete_split\('train'\)",
        ),
    ],
)
def test_arguments_that_make_no_sense_are_refused_and_nothing_is_made(store, options, message):
    before = tree(Path(store.path))
    with pytest.raises(UsageError, match=message):
        writer(store, **options)
    assert tree(Path(store.path)) == before


def test_more_rows_than_announced_are_refused_and_nothing_of_the_call_is_stored(store):
    one = writer(store, 1, n_samples=100)
    append(one, 1, 90)
    before = tree(Path(store.path))
    with pytest.raises(DataError, match=r"101 rows of writer 1 .*; expected n_samples=100 at most"):
        append(one, 1, 101)
    assert tree(Path(store.path)) == before
    append(one, 1, 100)
    one.close()
    writer(store, 0, n_samples=100).close()
    store.finalize("train")
    assert_holds(store, [0, 100])


def test_predictions_come_from_all_writers_or_from_none(store):
    ids = np.arange(10)
    with pytest.raises(DataError, match="no predictions; expected predictions in all calls where"):
        writer(store, 0, head="h").append(features(ids), labels_of(ids))
    store.delete_split("train")
    with pytest.raises(DataError, match="predictions without a head layer"):
        writer(store, 0).append(features(ids), labels_of(ids), ids % K)


def test_a_resumed_single_writer_keeps_its_head(store):
    with pytest.raises(Stop), store.writer("train", head="h") as one:  # noqa: PT012
        append(one, 0, 100)
        raise Stop
    before = tree(Path(store.path))
    with pytest.raises(
        StoreError, match="was begun with predictions of layer 'h'; expected those o"
    ):
        store.writer("train", head="fc", resume=True)
    assert tree(Path(store.path)) == before
    store.writer("train", resume=True)


# ------------------------------------------------------------------------------------- losses


def lose(file: str) -> Callable[[FeatureStore], None]:
    return lambda store: (Path(store.path) / "train" / file).unlink()


@pytest.mark.parametrize("finalized", [False, True])
@pytest.mark.parametrize("block", [0, 1, 2, 6])
def test_a_lost_label_chunk_is_noticed(store, block, finalized):
    write(store, [64 * 3 + 10, 100])  # writer 0 has blocks 0, 2, 4, 6 and writer 1 has 1 and 3
    if finalized:
        store.finalize("train")
    lose(f"label/c/{block}")(store)
    stop = block * 64 + 9 if finalized and block == 6 else block * 64 + 63
    name = rf"train/label/c/{block} \(rows {block * 64}\.\.{stop}\): chunk is missing"
    split = store.split("train")
    for read in (lambda: list(split.label_blocks()), lambda: split.check_chunks("h")):
        with pytest.raises(CorruptionError, match=name):
            read()
    faults = [fault for fault in store.validate() if "label" in fault.file]
    assert [fault.file for fault in faults] == [f"train/label/c/{block}"]
    if not finalized:
        with pytest.raises(CorruptionError, match=rf"train/label/c/{block} \(rows {block * 64}"):
            store.finalize("train")


def test_a_lost_label_chunk_is_noticed_by_the_writer_that_resumes(store):
    for rank in range(2):
        append(writer(store, rank), rank, 200)
    lose("label/c/2")(store)
    before = tree(Path(store.path))
    with pytest.raises(
        CorruptionError, match=r"train/label/c/2 \(rows 128\.\.191\): chunk is miss"
    ):
        writer(store, 0, resume=True)
    assert tree(Path(store.path)) == before


def test_blocks_that_were_never_written_are_not_lost(store):
    append(writer(store, 0), 0, 64 * 3)
    append(writer(store, 1), 1, 64)
    assert_holds(store, [64 * 3, 64])
    for rank in range(2):
        writer(store, rank, resume=True).close()
    store.finalize("train")
    assert_holds(store, [64 * 3, 64])
    assert len(list(Path(store.path, "train/label/c").iterdir())) == 5
    assert not Path(store.path, "train/layers/h/feature/c/3").exists()


@pytest.mark.parametrize("finalized", [False, True])
def test_a_label_that_was_wiped_out_is_noticed(store, finalized):
    write(store, [100, 100])
    if finalized:
        store.finalize("train")
    zarr.open_array(Path(store.path) / "train/label")[70] = -1
    [fault] = store.validate()
    n = store.split("train").n_samples if finalized else (labels_of(ID + np.arange(100)) >= 0).sum()
    assert f"{n - 1} samples" in str(fault)
    assert f"expected {n}" in str(fault)


@pytest.mark.parametrize("name", ["layers/fc", "prediction", "label"])
def test_an_array_that_is_gone_altogether_is_noticed(store, name):
    write(store, [100, 100], head="h")
    store.finalize("train")
    shutil.rmtree(Path(store.path) / "train" / name)
    faults = [str(fault) for fault in FeatureStore.open(store.path).validate()]
    assert len(faults) == 1
    assert faults[0].startswith(f"train/{name} (rows 0..")
    assert faults[0].endswith("array is missing")


def test_an_added_layer_that_is_gone_is_noticed(store):
    with store.writer("train", layers=["h"]) as one:
        one.append({"h": features(np.arange(100))["h"]}, np.arange(100) % K)
    with store.add_layers("train", {"fc": 8}, "float32") as added:
        added.append({"fc": features(np.arange(100))["fc"]})
    assert store.validate() == []
    shutil.rmtree(Path(store.path) / "train/layers/fc")
    assert [fault.file for fault in store.validate()] == ["train/layers/fc"]


def test_a_store_without_a_list_of_its_arrays_is_read_as_before(store):
    write(store, [100, 100])
    n = store.finalize("train").n_samples
    zarr.open_group(Path(store.path) / "train").update_attributes({"ncbatch": {"n_samples": n}})
    shutil.rmtree(Path(store.path) / "train/layers/fc")
    assert FeatureStore.open(store.path).validate() == []
