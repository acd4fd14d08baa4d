"""Stores in an object store: everything that works in a folder.

The tests run against obstore's store of a folder, through the same code as others; and, as slow ones,
against an S3 server on localhost.
"""

from __future__ import annotations

import asyncio
import http.server
import pickle
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

import ncbatch as nc
from ncbatch.engine.jobs import Item
from ncbatch.errors import CorruptionError, DataError, StoreError, UnknownNameError, UsageError
from ncbatch.measurement.samples import Samples
from ncbatch.store import FeatureStore
from ncbatch.store import place as object_store
from tests.conftest import make_toy
from tests.objects import BUCKET, SECRET, set_environment

pytest.importorskip("obstore")


@pytest.fixture
def s3_url(monkeypatch) -> str:
    """Give a URL of a server that does not answer."""
    set_environment(monkeypatch, "http://127.0.0.1:9")
    return f"s3://{BUCKET}/run.zarr"


def fill(path: object, toy) -> FeatureStore:
    """Write three splits of two layers, predictions and a classifier."""
    store = FeatureStore.create(path, 5, {"a": 4, "b": 2}, "float32")
    sets = {"train": (toy.X, toy.y), "test": (toy.X_test, toy.y_test), "ood": (toy.X_ood, None)}
    for split, (X, y) in sets.items():
        labels = np.zeros(len(X), int) if y is None else y
        with store.writer(split, head="a") as writer:
            for start in range(0, len(X), 70):
                part = slice(start, start + 70)
                writer.append({"a": X[part], "b": X[part, :2]}, labels[part], labels[part])
    store.set_classifier("a", toy.W, toy.b)
    return store


def assert_same(one, other) -> None:
    """Compare every value bit for bit."""
    assert set(one.data_vars) == set(other.data_vars)
    for name in one.data_vars:
        np.testing.assert_array_equal(one[name].values, other[name].values, err_msg=name)


@pytest.fixture(scope="module")
def made(objects, tmp_path_factory) -> tuple[FeatureStore, FeatureStore]:
    """Write the same content to a folder and to an object store, in chunks of 1 KiB."""
    toy, folder = make_toy(), tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ncbatch.store.format.CHUNK_BYTES", 1024)
        return fill(folder / "run.zarr", toy), fill(f"{objects.root}/made/run.zarr", toy)


@pytest.fixture
def both(made, objects, url, tmp_path, small_chunks) -> tuple[FeatureStore, FeatureStore]:
    """Give copies of both stores, which may be altered."""
    local, remote = made
    for key, content in objects.keys(remote.path).items():
        objects.put(url, key, content)
    folder = shutil.copytree(local.path, tmp_path / "run.zarr")
    return FeatureStore.open(folder), FeatureStore.open(url)


def test_objects_are_those_of_a_folder_byte_for_byte(both, objects):
    local, remote = both
    found = objects.keys(remote.path)
    files = {
        str(path.relative_to(local.path)): path.read_bytes()
        for path in sorted(Path(local.path).rglob("*"))
        if path.is_file()
    }
    claims = [
        key for key in files if "/writers/" in key
    ]  # they carry a token until the first record
    assert sorted(found) == sorted(files)
    differ = [key for key in files if found[key] != files[key] and key not in claims]
    assert differ == ["zarr.json"]  # each store has its own id


def test_everything_reads_as_in_a_folder(both):
    local, made = both
    remote = FeatureStore.open(made.path + "/")
    assert repr(remote) == f"FeatureStore('{made.path}', K=5, splits=['ood', 'test', 'train'])"
    assert (remote.layers(), remote.classifiers) == (local.layers(), local.classifiers)
    assert remote.validate() == []
    for split in local.splits:
        here, there = local.split(split), remote.split(split)
        assert (here.n_samples, here.head) == (there.n_samples, there.head)
        np.testing.assert_array_equal(here.labels(), there.labels())
        np.testing.assert_array_equal(here.predictions(), there.predictions())
        assert here.prediction_fingerprint() == there.prediction_fingerprint()
        for layer in here.layers:
            assert here.fingerprint(layer) == there.fingerprint(layer)
    assert local.classifier_fingerprint("a") == remote.classifier_fingerprint("a")
    W, b = remote.classifier("a")
    np.testing.assert_array_equal(W, local.classifier("a")[0])
    np.testing.assert_array_equal(b, local.classifier("a")[1])
    lazy, _ = remote.classifier("a", lazily=True)
    np.testing.assert_array_equal(lazy[1:3], W[1:3])


def test_views_hold_the_rows(both):
    local, remote = both
    there = remote.to_xarray("train", "a").compute(scheduler="threads")
    np.testing.assert_array_equal(there.feature, local.to_xarray("train", "a").feature)
    assert there.attrs["store"] == remote.path
    assert remote.to_dask("train", "b").chunks == local.to_dask("train", "b").chunks


def test_measuring_gives_the_same_bits(both):
    local, remote = both
    assert_same(nc.measure(local.path), nc.measure(remote.path))
    attributes = nc.measure(remote).attrs
    assert remote.path in attributes["store_path"]


@pytest.mark.slow
@pytest.mark.parametrize("objects", ["s3"], indirect=True)
def test_workers_of_other_processes_open_the_url(both):
    local, remote = both
    assert_same(
        nc.measure(local.path, cluster="processes:2"),
        nc.measure(remote.path, cluster="processes:2"),
    )


def test_what_is_sent_to_workers_holds_no_credentials(both):
    _, remote = both
    sent = pickle.dumps((remote, Samples(remote.split("train"), "a")))
    assert SECRET.encode() not in sent
    store, source = pickle.loads(sent)
    assert store.splits == remote.splits
    assert source.split.labels().size == 300


@pytest.mark.slow
def test_options_go_before_the_environment(server, monkeypatch):
    url = f"s3://{BUCKET}/options/run.zarr"
    FeatureStore.create(url, 3, {"h": 2})
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    opened = FeatureStore.open(url, storage_options={"endpoint": server})
    assert pickle.loads(pickle.dumps(opened)).declared_layers == opened.declared_layers
    again = FeatureStore.create(url + "2", 3, {"h": 2}, storage_options={"endpoint": server})
    assert again.n_classes == 3


def test_names_need_no_letters(url):
    names = ["h[0].mlp", "model.é 1", "a%41+b", "x?y#z"]
    store = FeatureStore.create(url, 2, dict.fromkeys(names, 2), "float32")
    with store.writer("tr ain") as writer:
        writer.append({name: np.ones((3, 2)) for name in names}, np.array([0, 1, -1]))
    opened = FeatureStore.open(url)
    assert sorted(opened.layers()) == sorted(names)
    assert opened.splits == ["tr ain"]
    assert opened.validate() == []


# Writing


class Killed(BaseException):
    """Stands for a kill."""


def test_a_writer_that_stopped_resumes(url, small_chunks):
    toy = make_toy()
    store = FeatureStore.create(url, 5, {"a": 4}, "float32")
    with pytest.raises(Killed), store.writer("train", n_samples=300) as writer:  # noqa: PT012
        writer.append({"a": toy.X[:150]}, toy.y[:150])
        raise Killed
    part = FeatureStore.open(url).split("train")
    assert (part.finalized, part.n_samples) == (False, 128)
    with pytest.raises(StoreError, match="is not complete"):
        store.writer("train")
    with FeatureStore.open(url).writer("train", n_samples=300, resume=True) as writer:
        rest = slice(writer.position, None)
        assert rest.start == 128
        writer.append({"a": toy.X[rest]}, toy.y[rest])
    split = store.split("train")
    np.testing.assert_array_equal(split.read("a", 0, 300), toy.X)
    np.testing.assert_array_equal(split.labels(), toy.y)
    assert store.validate() == []


KILLED = """
import os, signal, sys
import numpy as np
from ncbatch.store import FeatureStore, format
format.CHUNK_BYTES = 1024
X = np.arange(1200, dtype=np.float32).reshape(300, 4)
writer = FeatureStore.open(sys.argv[1]).writer("train", n_samples=300)
writer.append({"a": X[:200]}, np.arange(200) % 5)
print("written", flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
@pytest.mark.parametrize("objects", ["s3"], indirect=True)
def test_a_killed_process_leaves_a_valid_store_that_resumes(url, small_chunks):
    store = FeatureStore.create(url, 5, {"a": 4}, "float32")
    done = subprocess.run([sys.executable, "-c", KILLED, url], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("written\n", -9), done.stderr
    assert store.validate() == []
    X = np.arange(1200, dtype=np.float32).reshape(300, 4)
    with store.writer("train", n_samples=300, resume=True) as writer:
        assert writer.position == 192
        writer.append({"a": X[192:]}, np.arange(192, 300) % 5)
    np.testing.assert_array_equal(store.split("train").read("a", 0, 300), X)


def test_several_writers_and_their_end(url, small_chunks):
    toy = make_toy()
    store = FeatureStore.create(url, 5, {"a": 4}, "float32")

    def write(rank: int) -> None:
        own = slice(0, 100) if rank == 0 else slice(100, 300)
        with FeatureStore.open(url).writer(
            "train", rank=rank, world_size=2, n_samples=300, head="a"
        ) as writer:
            writer.append({"a": toy.X[own]}, toy.y[own], toy.y[own])

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write, range(2)))
    assert store.split("train").finalized is False
    assert store.split("train").n_samples == 300
    split = store.finalize("train")
    assert (
        split.n_rows == 456
    )  # 199 is row 7 of the fourth block of writer 1, of all blocks the eighth
    assert split.n_samples == 300
    labels = split.labels()
    rows = split.read("a", 0, split.n_rows)[labels >= 0]
    order, expected = np.lexsort(rows.T), np.lexsort(toy.X.T)
    np.testing.assert_array_equal(rows[order], toy.X[expected])
    assert FeatureStore.open(url).validate() == []


def test_of_writers_that_take_a_rank_at_once_one_wins(url):
    FeatureStore.create(url, 5, {"a": 4}, "float32")
    stores, ready = [FeatureStore.open(url) for _ in range(6)], threading.Barrier(6)

    def begin(store: FeatureStore) -> str:
        ready.wait()
        try:
            store.writer("train", rank=1, world_size=2, n_samples=10)
        except StoreError as error:
            return error.found
        return "won"

    with ThreadPoolExecutor(6) as pool:
        said = Counter(pool.map(begin, stores))
    assert said.pop("won") == 1
    assert [found for found in said if "writer 1 of 2" not in found] == []


def test_of_processes_that_make_a_store_at_once_one_wins(url, monkeypatch):
    monkeypatch.setattr("ncbatch.store.place.is_there", lambda *_: False)  # all look first
    ready = threading.Barrier(6)

    def make(n_classes: int) -> int | None:
        ready.wait()
        with suppress(StoreError):
            return FeatureStore.create(url, n_classes).n_classes
        return None

    with ThreadPoolExecutor(6) as pool:
        won = [k for k in pool.map(make, range(2, 8)) if k is not None]
    assert won == [FeatureStore.open(url).n_classes]


def test_room_that_is_not_used_is_cut(url, small_chunks, objects):
    store = FeatureStore.create(url, 5, {"a": 4}, "float32")
    with store.writer("train", n_samples=10_000) as writer:
        writer.append({"a": np.ones((100, 4))}, np.zeros(100, int))
    assert store.split("train").n_rows == 100
    assert (
        len([key for key in objects.keys(url) if key.startswith("train/layers/a/feature/c/")]) == 2
    )


def test_a_split_is_deleted_and_a_store_overwritten(both, objects):
    _, store = both
    store.delete_split("test")
    assert FeatureStore.open(store.path).splits == ["ood", "train"]
    assert not [key for key in objects.keys(store.path) if key.startswith("test")]
    with pytest.raises(StoreError, match="exists; expected a path that is free"):
        FeatureStore.create(store.path, 3)
    with pytest.raises(StoreError, match="is no store"):
        FeatureStore.create(store.path.rpartition("/")[0], 3, overwrite=True)
    FeatureStore.create(store.path, 3, overwrite=True)
    assert list(objects.keys(store.path)) == ["zarr.json"]


# Layers that are added or replaced


def test_a_layer_is_added_and_hidden_until_it_is_complete(both, objects):
    _, store = both
    X = np.random.default_rng(1).standard_normal((300, 3)).astype(np.float32)
    with store.add_layers("train", {"c": 3}, "float32") as writer:
        writer.append({"c": X[:200]})
        assert store.layers("train") == ["a", "b"]
        writer.append({"c": X[200:]})
    np.testing.assert_array_equal(store.split("train").read("c", 0, 300), X)
    with pytest.raises(DataError), store.add_layers("train", {"d": 3}) as writer:
        writer.append({"d": X[:10]})
    assert store.layers("train") == ["a", "b", "c"]
    assert not [key for key in objects.keys(store.path) if "/d/" in key]
    assert store.validate() == []


def replace(store: FeatureStore, X) -> None:
    with store.add_layers("train", {"a": 4}, "float32", head="a", overwrite=True) as writer:
        writer.append({"a": X}, predictions=np.full(len(X), 2))


def test_a_layer_and_predictions_are_replaced(both, objects):
    _, store = both
    X = np.random.default_rng(1).standard_normal((300, 4)).astype(np.float32)
    replace(store, X)
    opened = FeatureStore.open(store.path)
    np.testing.assert_array_equal(opened.split("train").read("a", 0, 300), X)
    assert set(opened.split("train").predictions().tolist()) == {2}
    assert not [key for key in objects.keys(store.path) if "/." in key]
    assert opened.validate() == []


# Five chunks are copied, the array's metadata, and the group's own, which comes last; then predictions.
@pytest.mark.parametrize("copies", [0, 3, 6, 8])
def test_a_replacement_that_is_interrupted_is_never_half_seen(both, monkeypatch, copies, objects):
    _, store = both
    X = np.random.default_rng(1).standard_normal((300, 4)).astype(np.float32)
    copy, done = object_store.RemoteStore.copy, []

    async def failing(self, source: str, target: str) -> None:
        if len(done) >= copies:
            raise StoreError("the network is gone")
        done.append(target)
        await copy(self, source, target)

    with monkeypatch.context() as patch:
        patch.setattr(object_store.RemoteStore, "copy", failing)
        with pytest.raises(StoreError, match="the network is gone"):
            replace(store, X)
    opened = FeatureStore.open(store.path)
    taken = copies >= 7
    assert opened.layers("train") == (["b", "a"] if taken else ["b"])
    assert opened.split("train").incomplete_layers == ([] if taken else ["a"])
    assert opened.split("train").head == (None if taken else "a")
    opened.finalize("train")
    again = FeatureStore.open(store.path)
    np.testing.assert_array_equal(again.split("train").read("a", 0, 300), X)
    assert set(again.split("train").predictions().tolist()) == {2}
    assert not [key for key in objects.keys(store.path) if "/." in key]
    assert again.validate() == []
    replace(again, X + 1)
    np.testing.assert_array_equal(again.split("train").read("a", 0, 300), X + 1)


# What is lost or altered


def test_a_missing_chunk_is_noticed(both, objects):
    _, store = both
    objects.delete(store.path, "train/layers/a/feature/c/2/0")
    fault = r"train/layers/a/feature/c/2/0 \(rows 128..191\): chunk is missing"
    with pytest.raises(CorruptionError, match=fault):
        nc.measure(store.path)
    assert [str(f) for f in store.validate()] == [fault.replace("\\", "")]


def test_an_altered_chunk_is_noticed(both, objects):
    _, store = both
    key = "train/layers/a/feature/c/1/0"
    content = bytearray(objects.keys(store.path)[key])
    before = store.split("train").fingerprint("a")
    content[100] ^= 1
    objects.put(store.path, key, bytes(content))
    fault = r"train/layers/a/feature/c/1/0 \(rows 64..127\): checksum does not match its bytes"
    with pytest.raises(CorruptionError, match=fault):
        nc.measure(store.path, layers=["a"])
    assert [str(f) for f in store.validate()] == [fault.replace("\\", "")]
    content[-1] ^= 1  # the checksum, which is all that a fingerprint reads
    objects.put(store.path, key, bytes(content))
    assert store.split("train").fingerprint("a") != before


def test_damaged_metadata_is_named(both, objects):
    _, store = both
    objects.put(store.path, "train/label/zarr.json", b"{")
    with pytest.raises(CorruptionError, match=r"metadata 'train/label/zarr.json' cannot be read"):
        nc.measure(store.path)


# Requests


@pytest.fixture
def asked(monkeypatch) -> list[str]:
    """Record the keys of whole objects that are read."""
    found: list[str] = []
    get = object_store.RemoteStore.get

    async def recorded(self, key, prototype, byte_range=None):
        if byte_range is None:
            found.append(key)
        return await get(self, key, prototype, byte_range)

    monkeypatch.setattr(object_store.RemoteStore, "get", recorded)
    return found


def test_a_pass_reads_every_chunk_once(both, monkeypatch, asked):
    _, store = both
    monkeypatch.setattr(
        "ncbatch.measurement.samples.BLOCK_BYTES", 1
    )  # several blocks of rows per chunk ...
    source = Samples(store.split("train"), "a")
    monkeypatch.setattr(Samples, "block_rows", 10)
    asked.clear()
    blocks = list(source.blocks(Item(0, 300, 0)))
    assert len(blocks) == 4 * 7 + 5
    chunks = Counter(key for key in asked if "/c/" in key)
    assert set(chunks.values()) == {1}  # ... and label chunks longer than those of features
    assert sorted(chunks) == [
        *(f"train/label/c/{i}" for i in range(3)),
        *(f"train/layers/a/feature/c/{i}/0" for i in range(5)),
    ]


def test_fingerprints_read_no_chunk(both, asked):
    _, store = both
    store.split("train").fingerprint("a")
    assert [key for key in asked if "/c/" in key] == []


def test_several_chunks_are_read_at_once_but_not_many(both, monkeypatch):
    _, store = both
    source = Samples(store.split("train"), "a")
    stored = source.split.read("a", 0, 300)
    running, most, get = [0], [0], object_store.RemoteStore.get

    async def slow(self, key, prototype, byte_range=None):
        if "feature/c/" not in key:
            return await get(self, key, prototype, byte_range)
        running[0] += 1
        most[0] = max(most[0], running[0])
        await asyncio.sleep(0.1)
        running[0] -= 1
        return await get(self, key, prototype, byte_range)

    monkeypatch.setattr(object_store.RemoteStore, "get", slow)
    X = np.concatenate([block.features for block in source.blocks(Item(0, 300, 0))])
    np.testing.assert_array_equal(X, stored)
    assert 2 <= most[0] <= source.split.chunks_at_once


def test_what_is_read_ahead_is_planned_for(both):
    local, remote = both
    here, there = (Samples(store.split("train"), "a") for store in both)
    assert (
        there.read_bytes - here.read_bytes == 3 * (remote.split("train").chunks_at_once - 1) * 1024
    )
    assert local.split("train").chunks_at_once == 1


# What can go wrong before anything is read


@pytest.mark.slow
@pytest.mark.parametrize("use", [FeatureStore.open, lambda path: FeatureStore.create(path, 3)])
def test_a_missing_bucket_is_said(server, use):
    with pytest.raises(StoreError, match=r"no bucket 'nowhere' for 's3://nowhere/x.zarr'"):
        use("s3://nowhere/x.zarr")


@pytest.mark.slow
def test_a_command_says_so_in_two_lines(server, ncbatch):
    done = ncbatch("info", "s3://nowhere/x")
    assert (done.code, done.err.count("\n")) == (1, 2)


def test_nothing_there_is_said(url, both):
    with pytest.raises(StoreError, match=r"no store at '.*none.zarr': nothing is there"):
        FeatureStore.open(url.replace("run.zarr", "none.zarr"))
    with pytest.raises(StoreError, match="is no store: no Zarr v3 group"):
        FeatureStore.open(url.rpartition("/")[0])
    with pytest.raises(UnknownNameError, match="no split 'val'"):
        both[1].split("val")


def test_a_server_that_is_not_there_is_said_within_seconds(s3_url):
    begin = time.monotonic()
    with pytest.raises(StoreError, match=r"nothing answers at http://127.0.0.1:9"):
        FeatureStore.open(s3_url)
    assert time.monotonic() - begin < 10


def test_missing_credentials_are_said(s3_url, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(StoreError, match=r"no credentials for .*\nset AWS_ACCESS_KEY_ID"):
        FeatureStore.open(s3_url)
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:9")  # where machines get theirs
    with pytest.raises(StoreError, match=r"no credentials for .*\nset AWS_ACCESS_KEY_ID"):
        FeatureStore.open(s3_url)


class Refusing(http.server.BaseHTTPRequestHandler):
    """A store that lets nobody in."""

    def do_GET(self) -> None:
        body = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
        self.send_response(403)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def test_refused_access_is_said(s3_url, monkeypatch):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as refusing:
        threading.Thread(target=refusing.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{refusing.server_address[1]}")
        with pytest.raises(StoreError, match=r"'s3://.*' refuses access: AccessDenied"):
            FeatureStore.open(s3_url)
        refusing.shutdown()


def test_a_network_that_goes_is_no_bad_chunk(both, monkeypatch):
    _, store = both
    split = store.split("train")

    async def gone(self, key, prototype, byte_range=None):
        raise StoreError("nothing answers")

    monkeypatch.setattr(object_store.RemoteStore, "get", gone)
    with pytest.raises(StoreError, match=r"^nothing answers$") as caught:
        split.read("a", 0, 300)
    assert not isinstance(caught.value, CorruptionError)


def test_a_missing_library_is_said(s3_url, monkeypatch):
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(
        UsageError, match=r"without the library obstore.*\npip install 'ncbatch\[s3\]'"
    ):
        FeatureStore.open(s3_url)


def test_options_that_do_not_fit_are_refused(s3_url, tmp_path):
    with pytest.raises(UsageError, match="'nonsense' is not valid"):
        FeatureStore.open(s3_url, storage_options={"nonsense": "1"})
    with pytest.raises(UsageError, match="storage_options for a local path"):
        FeatureStore.create(tmp_path / "s", 3, storage_options={"region": "x"})


def test_other_urls_cannot_be_written(tmp_path):
    with pytest.raises(
        UsageError, match=r"a new store at 'ftp://x/y'; expected a folder, or a URL"
    ):
        FeatureStore.create("ftp://x/y", 3)
    with pytest.raises(StoreError, match="'nosuch://x/y' cannot be opened: Protocol not known"):
        FeatureStore.open("nosuch://x/y")


# The command line


def test_commands_take_urls(url, ncbatch, tmp_path):
    toy = make_toy()
    for name, values in {"X": toy.X, "y": toy.y, "W": toy.W, "b": toy.b}.items():
        np.save(tmp_path / f"{name}.npy", values)
    rows = ("--split", "train", "--layer", "fc", "--features", "X.npy", "--labels", "y.npy")
    for place in (url, "here.zarr"):
        done = ncbatch("import", place, *rows)
        assert done.code == 0, done.err
        assert "the store created with K = 5 classes" in done.out
        done = ncbatch("classifier", place, "--layer", "fc", "--weight", "W.npy", "--bias", "b.npy")
        assert done.code == 0, done.err
        name = place.rpartition("/")[-1]
        done = ncbatch("measure", place, "--out", f"{name}.csv", "--state", f"{name}.state")
        assert done.code == 0, done.err
    answers = [(tmp_path / f"{name}.csv").read_text() for name in ("run.zarr", "here.zarr")]
    assert answers[0].replace("run.zarr", "here.zarr") == answers[1]
    assert "is valid: splits train" in ncbatch("validate", url).out
    assert "300" in ncbatch("info", url).out
    assert "fc" in ncbatch("plan", url).out
    done = ncbatch("import", url, *rows)
    assert done.code == 1
    assert "layer 'fc' exists" in done.err
    done = ncbatch("finalize", url, "--split", "val")
    assert done.code == 1
    assert "no split 'val'" in done.err


def test_an_import_that_fails_leaves_nothing(url, ncbatch, tmp_path, objects):
    X = np.ones((10, 2), np.float64)
    X[7] = 1e300
    np.save(tmp_path / "X.npy", X)
    np.save(tmp_path / "y.npy", np.full(10, 7))
    done = ncbatch(
        "import", url, "--split", "train", "--layer", "fc", "--features", "X.npy", "--labels",
        "y.npy", "--classes", "3",
    )  # fmt: skip
    assert done.code == 1
    assert "7" in done.err
    assert objects.keys(url) == {}
