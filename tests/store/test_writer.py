"""Writers: any way of appending gives the same store, and what is committed survives whatever happens."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings

from ncbatch.errors import DataError, StoreError, UnknownNameError, UsageError
from ncbatch.store import FeatureStore
from ncbatch.store.writer import Writer
from tests.conftest import make_toy, tree
from tests.strategies import partitions

K = 5
WIDTHS = {"h": 4, "fc": 8}  # 64 and 32 rows per chunk of 1 KiB: a base block is 64 rows
REPOSITORY = Path(__file__).parents[2]

pytestmark = pytest.mark.usefixtures("small_chunks")
rng = np.random.default_rng(1)
N = 150
ROWS = {name: rng.standard_normal((N, width)).astype(np.float32) for name, width in WIDTHS.items()}
LABELS = np.where(rng.random(N) < 0.1, -1, np.arange(N) % K)
PREDICTIONS = np.arange(N)[::-1] % K


def append(writer: Writer, start: int, stop: int, predictions: bool = False) -> None:
    block = {name: rows[start:stop] for name, rows in ROWS.items()}
    writer.append(block, LABELS[start:stop], PREDICTIONS[start:stop] if predictions else None)


def write(
    path: Path, cuts: Sequence[int] = (), *, n_samples: int | None = None, predictions: bool = False
) -> FeatureStore:
    store = FeatureStore.create(path, K, WIDTHS, "float32")
    head = "h" if predictions else None
    with store.writer("train", n_samples=n_samples, head=head) as writer:
        for start, stop in zip([0, *cuts], [*cuts, N], strict=True):
            append(writer, start, stop, predictions)
    return store


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes | None]:
    """Give the files of the split, written in one call without interruption."""
    path = tmp_path_factory.mktemp("whole") / "s"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ncbatch.store.format.CHUNK_BYTES", 1024)
        write(path, predictions=True)
    return content(path)


def content(path: Path) -> dict[str, bytes | None]:
    """Give the files of the split."""
    return tree(path / "train")


def assert_holds(store: FeatureStore, n: int) -> None:
    """Check that the first n rows are there, as they were appended, and nothing else."""
    split = store.split("train")
    labels = split.labels()
    np.testing.assert_array_equal(labels[:n], LABELS[:n])
    assert (labels[n:] == -1).all()
    assert split.n_samples == (LABELS[:n] >= 0).sum()
    for name, rows in ROWS.items():
        np.testing.assert_array_equal(split.read(name, 0, n), rows[:n])
        split.check_chunks(name)
    assert store.validate() == []


# ---------------------------------------------------------------------------- ways of appending


@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(cuts=partitions(N))
def test_any_partition_into_calls_gives_the_same_files(whole, tmp_path_factory, cuts):
    path = tmp_path_factory.mktemp("parts") / "s"
    assert_holds(write(path, cuts, predictions=True), N)
    assert content(path) == whole


@pytest.mark.parametrize("n_samples", [5, 149, 150, 151, 512, 5000])
def test_a_wrong_hint_of_the_rows_to_come_does_no_harm(tmp_path, n_samples):
    store = write(tmp_path / "s", [50, 100], n_samples=n_samples)
    assert_holds(store, N)
    assert store.split("train").n_rows == N


def test_negative_labels_are_holes(tmp_path):
    split = write(tmp_path / "s").split("train")
    assert split.n_samples == (LABELS >= 0).sum() < split.n_rows == N


def test_every_negative_label_is_stored_as_minus_one(tmp_path):
    store = FeatureStore.create(tmp_path / "s", K, {"h": 1}, "float32")
    with store.writer("train") as writer:
        writer.append({"h": np.ones((3, 1))}, np.array([-100, 2, np.iinfo(np.int64).min]))
    np.testing.assert_array_equal(store.split("train").labels(), [-1, 2, -1])


def test_an_empty_split_can_be_written_and_opened(tmp_path):
    store = FeatureStore.create(tmp_path / "s", K, WIDTHS, "float32")
    with store.writer("train"):
        pass
    split = FeatureStore.open(tmp_path / "s").split("train")
    assert (split.n_rows, split.n_samples, split.layers) == (0, 0, ["h", "fc"])
    assert split.read("h", 0, 0).shape == (0, 4)
    assert store.to_xarray("train", "h")["feature"].shape == (0, 4)
    assert store.validate() == []


def test_calls_without_rows_change_nothing(tmp_path):
    write(tmp_path / "plain")
    write(tmp_path / "empties", [0, 0, 64, 64, 150])
    assert content(tmp_path / "plain") == content(tmp_path / "empties")


@pytest.mark.parametrize("kind", ["list", "torch", "float64", "strided"])
def test_rows_of_other_kinds_are_stored_alike(tmp_path, kind):
    rows, labels = ROWS["h"], LABELS
    if kind == "torch":
        torch = pytest.importorskip("torch")
        rows, labels = torch.tensor(rows, requires_grad=True), torch.tensor(labels)
    elif kind == "float64":
        rows, labels = rows.astype(np.float64), labels.astype(np.int16)
    elif kind == "strided":
        rows = np.asfortranarray(np.repeat(rows, 2, axis=0))[::2]
    else:
        labels = labels.tolist()
    store = FeatureStore.create(tmp_path / "s", K, {"h": 4}, "float32")
    with store.writer("train") as writer:
        writer.append({"h": rows}, labels)
    np.testing.assert_array_equal(store.split("train").read("h", 0, N), ROWS["h"])
    np.testing.assert_array_equal(store.split("train").labels(), LABELS)


def test_several_splits_live_side_by_side(tmp_path):
    store = write(tmp_path / "s")
    before = content(tmp_path / "s")
    with store.writer("test", layers=["h"]) as writer:
        writer.append({"h": ROWS["h"][:10]}, LABELS[:10])
    assert store.splits == ["test", "train"]
    assert store.layers("test") == ["h"]
    assert store.layers() == ["h", "fc"]
    assert content(tmp_path / "s") == before


# -------------------------------------------------------------------------- calls that are refused


BAD_CALLS = {
    "labels too many": (dict(labels=LABELS), DataError, r"shape \(10, 4\); expected \(150, 4\)"),
    "label of K": (dict(labels=[0] * 9 + [5]), DataError, "label 5 in row 73; expected labels below 5"),
    "float labels": (dict(labels=np.zeros(10)), DataError, r"labels of shape \(10,\), float64"),
    "label columns": (dict(labels=np.zeros((10, 1), int)), DataError, r"shape \(10, 1\)"),
    "prediction of K": (dict(predictions=[5] * 10), DataError, "prediction 5 in row 64"),
    "predictions short": (dict(predictions=[1] * 9), DataError, "9 predictions for 10 labels"),
    "predictions begun": (dict(predictions=[1] * 10), DataError, "in some calls of append only"),
    "layer missing": (dict(features={"h": ROWS["h"][:10]}), DataError, "no features for layer 'fc'"),
    "layer unknown": (dict(features={"hh": ROWS["h"][:10]}), UnknownNameError, "did you mean 'h'"),
    "width": (dict(features={"h": ROWS["fc"][:10], "fc": ROWS["fc"][:10]}), DataError, r"\(10, 4\)"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_CALLS)
def test_a_bad_call_is_refused_and_stores_nothing(tmp_path, case):
    arguments, kind, message = BAD_CALLS[case]
    store = FeatureStore.create(tmp_path / "s", K, WIDTHS, "float32")
    good = {"features": {n: r[:10] for n, r in ROWS.items()}, "labels": [0] * 10}
    with store.writer("train") as writer:
        append(writer, 0, 64)
        before = content(tmp_path / "s")
        with pytest.raises(kind, match=message):
            writer.append(**(good | arguments))
        assert content(tmp_path / "s") == before
        append(writer, 64, N)
    assert_holds(store, N)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_value_that_overflows_names_its_row_and_stores_nothing(tmp_path, dtype):
    store = FeatureStore.create(tmp_path / "s", K, {"h": 4}, dtype)
    rows = np.ones((100, 4))
    rows[[42, 57], 3] = -1e300, np.nan
    with store.writer("train") as writer:
        writer.append({"h": np.full((64, 4), np.inf)}, np.zeros(64, int))
        before = content(tmp_path / "s")
        with pytest.raises(DataError, match=f"layer 'h' row 106 overflows {dtype}"):
            writer.append({"h": rows}, np.zeros(100, int))
        assert content(tmp_path / "s") == before
    assert store.split("train").n_rows == 64


def test_predictions_cannot_stop_halfway(tmp_path):
    store = FeatureStore.create(tmp_path / "s", K, WIDTHS, "float32")
    with store.writer("train", head="h") as writer:
        append(writer, 0, 10, predictions=True)
        with pytest.raises(DataError, match="predictions in all calls or in none"):
            append(writer, 10, 20)
        append(writer, 10, 20, predictions=True)
    split = store.split("train")
    np.testing.assert_array_equal(split.predictions(), PREDICTIONS[:20])
    assert split.head == "h"


def test_a_split_without_predictions_has_no_head(tmp_path):
    split = write(tmp_path / "s").split("train")
    assert split.head is None
    with pytest.raises(StoreError, match="has no predictions"):
        split.predictions()


def test_a_closed_writer_takes_no_rows(tmp_path):
    store = FeatureStore.create(tmp_path / "s", K, WIDTHS, "float32")
    with store.writer("train") as writer:
        append(writer, 0, 10)
    with pytest.raises(UsageError, match="closed"):
        append(writer, 10, 20)


def test_an_unknown_head_is_refused(tmp_path):
    store = FeatureStore.create(tmp_path / "s", K, WIDTHS, "float32")
    with pytest.raises(UnknownNameError, match="no head layer 'fd'"):
        store.writer("train", head="fd")
    assert store.splits == []


# --------------------------------------------------------------------------------- interruptions


def test_an_exception_keeps_the_committed_blocks_only(tmp_path):
    store = FeatureStore.create(tmp_path / "s", K, WIDTHS, "float32")
    with pytest.raises(ZeroDivisionError), store.writer("train") as writer:  # noqa: PT012
        append(writer, 0, 150)
        raise ZeroDivisionError
    store = FeatureStore.open(tmp_path / "s")
    assert not store.split("train").finalized
    assert_holds(store, 128)


def test_an_exception_before_the_first_block_leaves_no_split(tmp_path):
    store = FeatureStore.create(tmp_path / "s", K, WIDTHS, "float32")
    with pytest.raises(ZeroDivisionError), store.writer("train") as writer:  # noqa: PT012
        append(writer, 0, 63)
        raise ZeroDivisionError
    assert FeatureStore.open(tmp_path / "s").splits == []
    with pytest.raises(StoreError, match="begun but without rows"):
        store.writer("train")


class Stop(BaseException):
    """Stands for a kill: no handler of the package may swallow it."""


ARRAYS = ["feature", "label", "prediction"]


def stop_at(monkeypatch: pytest.MonkeyPatch, what: str, number: int) -> None:
    """Let the numbered write of a chunk of labels (or features ...), or of metadata, raise."""
    calls = {"n": 0}

    def counted(original):
        def wrapper(self, *arguments, **options):
            if what == "metadata" or getattr(self, "basename", "") == what:
                calls["n"] += 1
                if calls["n"] == number:
                    raise Stop
            return original(self, *arguments, **options)

        return wrapper

    places = [(zarr.Array, "__setitem__")]
    if what == "metadata":
        places = [(zarr.Group, "update_attributes"), (zarr.AsyncArray, "resize")]
    for owner, name in places:
        monkeypatch.setattr(owner, name, counted(getattr(owner, name)))


@pytest.mark.parametrize(
    ("what", "number", "n_samples"),
    [(what, 2, 500) for what in ARRAYS]
    # The last ones are the records of blocks, the trimming of arrays and the end.
    + [("metadata", *at) for at in [(2, None), (12, None), (15, None), (17, None), (3, 500)]]
    + [
        pytest.param(what, *at, marks=pytest.mark.slow)
        for what in ARRAYS
        for at in [(1, None), (3, None)]
    ]
    + [
        pytest.param("metadata", *at, marks=pytest.mark.slow)
        for at in [(7, None), (13, None), (1, 500), (5, 500), (8, 500)]
    ],
)
def test_a_write_that_never_happens_leaves_a_valid_store_that_resumes(
    tmp_path, whole, what, number, n_samples
):
    store = FeatureStore.create(tmp_path / "s", K, WIDTHS, "float32")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):  # noqa: PT012
        stop_at(patch, what, number)
        with store.writer("train", n_samples=n_samples, head="h") as writer:
            for start in range(0, N, 30):
                append(writer, start, start + 30, predictions=True)
    store = FeatureStore.open(tmp_path / "s")
    assert store.validate() == []
    if "train" in store.splits:
        exists = store.split("train").labels() >= 0
        committed = int(np.flatnonzero(exists)[-1]) + 1 if exists.any() else 0
        assert_holds(store, committed)
    with store.writer("train", n_samples=n_samples, head="h", resume=True) as writer:
        assert writer.position % 64 == 0 or writer.position == N
        append(writer, writer.position, N, predictions=True)
    assert_holds(FeatureStore.open(tmp_path / "s"), N)
    assert content(tmp_path / "s") == whole


def test_features_are_stored_before_the_labels_that_commit_them(tmp_path, monkeypatch):
    order = []
    original = zarr.Array.__setitem__

    def noted(self, selection, value):
        order.append(self.path.rpartition("/")[2])
        original(self, selection, value)

    monkeypatch.setattr(zarr.Array, "__setitem__", noted)
    write(tmp_path / "s", predictions=True)
    blocks = "".join(name[0] for name in order).split("l")
    assert blocks[-1] == ""
    assert len(blocks) == 4
    for block in blocks[:-1]:
        assert block.endswith("p")
        assert block.count("f") >= 2


def test_a_split_that_exists_is_not_written_over_unasked(tmp_path):
    store = write(tmp_path / "s")
    before = tree(tmp_path / "s")
    with pytest.raises(StoreError, match=r"split 'train' of .* exists; expected a new split"):
        store.writer("train")
    with pytest.raises(StoreError, match=r"is complete: 1.. samples"):
        store.writer("train", resume=True)
    assert tree(tmp_path / "s") == before
    with store.writer("train", overwrite=True) as writer:
        append(writer, 0, 10)
    assert_holds(store, 10)


def test_overwriting_the_only_split_may_change_the_width(tmp_path):
    store = write(tmp_path / "s")
    with store.writer("train", layers={"h": 2}, overwrite=True) as writer:
        writer.append({"h": ROWS["h"][:, :2]}, LABELS)
    assert store.split("train").spec("h").n_features == 2


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"h": 4}, "has layers h, fc; expected the layers of this writer: h"),
        ({"h": 4, "g": 16}, "the layers of this writer: h, g"),
        ({"h": 5, "fc": 16}, "layer 'h' with 5 features|n_features=4"),
    ],
)
def test_a_resumed_writer_must_write_the_same_layers(tmp_path, layers, message):
    store = FeatureStore.create(tmp_path / "s", K, WIDTHS, "float32")
    with pytest.raises(Stop), store.writer("train") as writer:  # noqa: PT012
        append(writer, 0, 150)
        raise Stop
    before = tree(tmp_path / "s")
    with pytest.raises((StoreError, DataError), match=message):
        store.writer("train", layers=layers, dtype="float32", resume=True)
    assert tree(tmp_path / "s") == before


KILLED = """
import os, signal, sys
import numpy as np
import ncbatch.store.format
ncbatch.store.format.CHUNK_BYTES = 1024
from tests.store import test_writer as t
store = t.FeatureStore.create(sys.argv[1], t.K, t.WIDTHS, "float32")
with store.writer("train", head="h") as writer:
    for start in range(0, t.N, 10):
        t.append(writer, start, start + 10, predictions=True)
        if start == 100:
            os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_a_killed_process_leaves_a_valid_store_that_resumes(tmp_path, whole):
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "s")],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr
    store = FeatureStore.open(tmp_path / "s")
    assert not store.split("train").finalized
    assert_holds(store, 64)
    with store.writer("train", head="h", resume=True) as writer:
        assert writer.position == 64
        append(writer, writer.position, N, predictions=True)
    assert content(tmp_path / "s") == whole


def test_the_commit_record_says_what_was_written(tmp_path):
    store = FeatureStore.create(tmp_path / "s", K, WIDTHS, "float32")
    writers = tmp_path / "s/train/writers/0"
    with store.writer("train") as writer:
        append(writer, 0, 130)
        record = zarr.open_group(writers, mode="r").attrs["ncbatch"]
        assert (record["rank"], record["world_size"], record["final"]) == (0, 1, False)
        assert (record["blocks"], record["position"]) == (2, 128)
        assert record["rows"] == (LABELS[:128] >= 0).sum()
    record = zarr.open_group(writers, mode="r").attrs["ncbatch"]
    assert (record["blocks"], record["position"], record["final"]) == (3, 130, True)


def test_memory_holds_a_block_and_not_the_split(tmp_path, monkeypatch):
    """A writer keeps at most a base block of rows of each layer."""
    store = FeatureStore.create(tmp_path / "s", K, {"h": 4}, "float32")
    toy = make_toy(64 * 20)
    with store.writer("train") as writer:
        for start in range(0, len(toy.y), 10):
            writer.append({"h": toy.X[start : start + 10]}, toy.y[start : start + 10])
            held = writer._buffers["h"]._rows
            assert held.nbytes <= 1024
            assert writer._ids["label"]._rows.nbytes <= 256
    assert store.split("train").n_rows == 64 * 20
