"""Import of files: what arrives in the store, K, labels, and nothing left of what failed."""

from __future__ import annotations

import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import zarr

from ncbatch.errors import DataError, NcbatchError, StoreError, UnknownNameError, UsageError
from ncbatch.ingest import import_classifier, import_features, read_classes
from ncbatch.store import FeatureStore
from tests.conftest import make_toy, tree

TOY = make_toy(300)
FILES = {
    "x.npy": TOY.X, "y.npy": TOY.y, "w.npy": TOY.W, "b.npy": TOY.b, "x_test.npy": TOY.X_test,
    "y_test.npy": TOY.y_test, "x_ood.npy": TOY.X_ood, "p.npy": (TOY.y + 1) % 5,
    "wide.npy": np.hstack([TOY.X, TOY.X]),
}  # fmt: skip


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in a fresh folder that holds the files."""
    monkeypatch.chdir(tmp_path)
    for name, array in FILES.items():
        np.save(name, array)
    return tmp_path


def train(path: str = "s", layer: str = "h", features: str = "x.npy", **options):
    return import_features(path, "train", layer, features, **({"labels": "y.npy"} | options))


def stored(path: str = "s", split: str = "train", layer: str = "h") -> np.ndarray:
    found = FeatureStore.open(path).split(split)
    return found.read(layer, 0, found.n_rows)


# ------------------------------------------------------------------------------------ what arrives


def test_a_new_store_holds_the_rows_as_they_are():
    done = train()
    assert (done.created, done.n_classes, done.features.n_rows) == (True, 5, 300)
    store = FeatureStore.open("s")
    assert store.n_classes == 5
    assert store.split("train").spec("h").dtype == "float32"
    np.testing.assert_array_equal(stored(), TOY.X)
    np.testing.assert_array_equal(store.split("train").labels(), TOY.y)
    assert store.validate() == []


def test_splits_and_layers_are_added_one_at_a_time():
    train()
    train(layer="fc", features="wide.npy", labels=None)
    done = import_features("s", "test", "h", "x_test.npy", "y_test.npy")
    assert not done.created
    import_features("s", "ood", "h", "x_ood.npy")
    store = FeatureStore.open("s")
    assert store.splits == ["ood", "test", "train"]
    assert store.layers("train") == ["h", "fc"]
    np.testing.assert_array_equal(stored(layer="fc"), FILES["wide.npy"])
    np.testing.assert_array_equal(stored(split="test"), TOY.X_test)
    np.testing.assert_array_equal(store.split("ood").labels(), np.zeros(100))
    assert store.validate() == []


DTYPES = {
    "float16": "float16", "float32": "float32", "float64": "float64", ">f4": "float32",
    ">f8": "float64", "int8": "float32", "uint8": "float32", "int16": "float32", ">i2": "float32",
    "int32": "float64", "int64": "float64",
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", ["C", "F"])
def test_npy_of_any_dtype_and_order_is_stored_without_loss(dtype, order):
    rows = np.asarray(np.round(TOY.X * 20).astype(dtype), order=order)
    np.save("x.npy", rows)
    train()
    assert FeatureStore.open("s").split("train").spec("h").dtype == DTYPES[dtype]
    np.testing.assert_array_equal(stored(), rows)


def test_bfloat16_is_kept():
    rows = TOY.X.astype(ml_dtypes.bfloat16)
    zarr.save_array("x.zarr", rows)
    train(features="x.zarr")
    assert FeatureStore.open("s").split("train").spec("h").dtype == "bfloat16"
    np.testing.assert_array_equal(stored(), rows.astype(np.float32))


@pytest.mark.parametrize("dtype", ["longdouble", "complex64"])
def test_a_dtype_that_cannot_be_stored_is_refused(dtype):
    np.save("x.npy", TOY.X.astype(dtype))
    with pytest.raises(DataError, match=r"expected (one of: float16|numbers)"):
        train()
    assert not Path("s").exists()


def test_shards_of_unequal_length_meet_labels_sharded_otherwise(monkeypatch):
    monkeypatch.setattr("ncbatch.ingest.files.layers._READ_BYTES", 100 * 16)
    for number, (start, stop) in zip([1, 2, 10], [(0, 7), (7, 250), (250, 300)], strict=True):
        np.savez(f"x{number}.npz", x=TOY.X[start:stop])
    for number, (start, stop) in zip(
        [9, 10, 11, 100], [(0, 100), (100, 101), (101, 101), (101, 300)], strict=True
    ):
        np.save(f"y{number}.npy", TOY.y[start:stop])
    done = train(features="x*.npz", labels="y[0-9]*.npy")
    assert [shard.shape[0] for shard in done.features.shards] == [7, 243, 50]
    np.testing.assert_array_equal(stored(), TOY.X)
    np.testing.assert_array_equal(FeatureStore.open("s").split("train").labels(), TOY.y)


@pytest.mark.parametrize("suffix", ["npy", "npz", "zarr"])
def test_files_larger_than_what_is_read_at_a_time(monkeypatch, suffix):
    monkeypatch.setattr("ncbatch.ingest.files.layers._READ_BYTES", 500)  # 31 rows
    monkeypatch.setattr("ncbatch.store.format.CHUNK_BYTES", 1024)
    if suffix == "npz":
        np.savez("x.npz", TOY.X)
    elif suffix == "zarr":
        zarr.create_array("x.zarr", data=TOY.X, chunks=(90, 2))
    seen = []

    class Counting:
        def begin(self, label, total, unit):
            seen.append((total, unit))

        def advance(self, size):
            seen.append(size)

        def end(self):
            seen.append("end")

    train(features=f"x.{suffix}", predictions="p.npy", progress=Counting())
    assert seen == [(300, "rows"), *[31] * 9, 21, "end"]
    np.testing.assert_array_equal(stored(), TOY.X)
    split = FeatureStore.open("s").split("train")
    np.testing.assert_array_equal(split.labels(), TOY.y)
    np.testing.assert_array_equal(split.predictions(), FILES["p.npy"])


def test_predictions_belong_to_the_layer_they_came_with():
    train()
    assert FeatureStore.open("s").split("train").head is None
    train(layer="fc", features="wide.npy", labels=None, predictions="p.npy")
    split = FeatureStore.open("s").split("train")
    assert split.head == "fc"
    np.testing.assert_array_equal(split.predictions(), FILES["p.npy"])


def test_negative_labels_are_holes():
    np.save("y.npy", np.where(np.arange(300) % 2, TOY.y, -100))
    train()
    split = FeatureStore.open("s").split("train")
    assert (split.n_samples, split.n_rows) == (150, 300)
    train(layer="again")  # labels given once more are compared as they were stored
    assert FeatureStore.open("s").layers() == ["h", "again"]


# ------------------------------------------------------------------------------------------- K


def test_k_is_the_largest_label_plus_one():
    np.save("y.npy", np.where(TOY.y == 4, 11, TOY.y))
    assert train().n_classes == 12
    assert FeatureStore.open("s").n_classes == 12


def test_predictions_above_the_largest_label_need_k():
    np.save("p.npy", np.full(300, 8))
    with pytest.raises(DataError, match=r"prediction 8 in row 0; expected predictions below 5.*\n"):
        train(predictions="p.npy")
    assert not Path("s").exists()
    assert train(predictions="p.npy", n_classes=9).n_classes == 9


def test_k_is_what_is_asked_for():
    assert train(n_classes=1000).n_classes == 1000
    assert train(layer="fc", n_classes=1000).n_classes == 1000
    with pytest.raises(DataError, match="--classes 999; expected 1000, as recorded in s"):
        train(layer="fd", n_classes=999)
    assert FeatureStore.open("s").layers() == ["h", "fc"]


def test_k_must_be_known_for_a_new_store_without_labels():
    with pytest.raises(DataError, match=r"neither labels nor a number of classes.*--classes"):
        import_features("s", "ood", "h", "x_ood.npy")
    assert not Path("s").exists()
    assert import_features("s", "ood", "h", "x_ood.npy", n_classes=5).n_classes == 5
    assert train().n_classes == 5


@pytest.mark.parametrize("what", ["labels", "predictions"])
def test_a_value_of_k_or_more_names_its_input_row(what):
    values = TOY.y.copy()
    values[77] = 6
    np.save("bad.npy", values)
    np.save("bad1.npy", values[:50])
    np.save("bad2.npy", values[50:])
    message = rf"{what[:-1]} 6 in row 77 \(row 27 of 'bad2.npy'\); expected {what} below 5"
    with pytest.raises(DataError, match=f"{message}.*\n.*larger --classes"):
        train(n_classes=5, **{what: "bad[12].npy"})
    assert not Path("s").exists()
    import_features("s", "test", "h", "x_test.npy", "y_test.npy")
    before = tree(Path("s"))
    with pytest.raises(DataError, match=message):
        train(**{what: "bad[12].npy"})
    assert tree(Path("s")) == before


# ----------------------------------------------------------------------------------------- labels


def test_labels_that_differ_from_the_stored_ones_name_the_input_row():
    train()
    values = TOY.y.copy()
    values[[123, 200]] = (values[[123, 200]] + 1) % 5
    for part in range(3):
        np.save(f"z{part}.npy", values[part * 100 : part * 100 + 100])
    before = tree(Path("s"))
    with pytest.raises(
        DataError,
        match=rf"label {values[123]} in row 123 \(row 23 of 'z1.npy'\); expected {TOY.y[123]}, as",
    ):
        train(layer="fc", features="wide.npy", labels="z*.npy")
    assert tree(Path("s")) == before
    train(layer="fc", features="wide.npy", labels="y.npy")


def test_labels_are_needed_for_a_new_split_unless_it_is_outside_data():
    with pytest.raises(DataError, match="no labels for the new split 'train'; expected --labels"):
        train(labels=None)
    train()
    with pytest.raises(DataError, match="no labels for the new split 'test'"):
        import_features("s", "test", "h", "x_test.npy")
    import_features("s", "near-ood", "h", "x_ood.npy")
    assert FeatureStore.open("s").splits == ["near-ood", "train"]


# -------------------------------------------------------------------------------------- overwrite


def test_a_layer_that_exists_is_replaced_only_when_asked():
    train()
    before = tree(Path("s"))
    with pytest.raises(StoreError, match="layer 'h' exists in split 'train' of s"):
        train()
    assert tree(Path("s")) == before
    np.save("x.npy", -TOY.X)
    train(overwrite=True)
    np.testing.assert_array_equal(stored(), -TOY.X)
    assert FeatureStore.open("s").validate() == []


def interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave a split that a killed writer began."""
    monkeypatch.setattr("ncbatch.store.format.CHUNK_BYTES", 1024)
    store = FeatureStore.create("s", 5, {"h": 4}, "float32")
    store.writer("train").append({"h": TOY.X[:100]}, TOY.y[:100])


def test_an_interrupted_split_is_replaced_only_when_asked(monkeypatch):
    interrupted(monkeypatch)
    before = tree(Path("s"))
    with pytest.raises(StoreError, match="not complete: 64 samples of an interrupted writer") as e:
        train()
    assert "--overwrite" in str(e.value)
    assert tree(Path("s")) == before
    train(overwrite=True)
    np.testing.assert_array_equal(stored(), TOY.X)


def test_an_interrupted_split_stays_when_the_import_that_replaces_it_fails(monkeypatch):
    interrupted(monkeypatch)
    monkeypatch.setattr("ncbatch.ingest.files.layers._READ_BYTES", 500)
    before = tree(Path())
    with pytest.raises(KeyboardInterrupt):
        train(overwrite=True, progress=Interrupting())
    assert tree(Path()) == before
    assert FeatureStore.open("s").split("train").n_samples == 64
    train(overwrite=True)
    assert FeatureStore.open("s").split("train").n_samples == 300
    assert [path.name for path in Path().iterdir() if path.is_dir()] == ["s"]


def test_a_split_that_was_begun_without_rows_is_not_deleted_unasked(monkeypatch):
    store = FeatureStore.create("s", 5, {"h": 4}, "float32")
    store.writer("train")
    before = tree(Path("s"))
    assert "train" in before
    with pytest.raises(StoreError, match="begun but without rows"):
        train()
    assert tree(Path("s")) == before
    train(overwrite=True)
    np.testing.assert_array_equal(stored(), TOY.X)


# --------------------------------------------------------------------------------------- failures


def cut(name: str, array: np.ndarray) -> None:
    """Save an archive of which the end is damaged: found when it has been read half."""
    np.savez(name, x=array)
    content = bytearray(Path(name).read_bytes())
    content[-400] ^= 0xFF
    Path(name).write_bytes(content)


FAILURES = {
    "damaged features": dict(features="cut.npz"),
    "damaged labels": dict(labels="cut_y.npz"),
    "damaged predictions": dict(predictions="cut_y.npz"),
    "too few labels": dict(labels="y_test.npy"),
    "too few predictions": dict(predictions="y_test.npy"),
    "labels as floats": dict(labels="b.npy"),
    "labels as columns": dict(labels="columns.npy"),
    "three axes": dict(features="three.npy"),
    "one axis": dict(features="y.npy"),
    "no rows": dict(features="empty.npy", labels="empty_y.npy"),
    "no features": dict(features="thin.npy"),
    "no file": dict(features="none.npy"),
    "layer name": dict(layer="a/b"),
    "interrupted": dict(progress=None),
}


class Interrupting:
    """A progress display during which the user presses Ctrl-C."""

    def begin(self, label, total, unit):
        self.left = 5

    def advance(self, size):
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt

    def end(self):
        pass


@pytest.fixture
def failing_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ncbatch.ingest.files.layers._READ_BYTES", 500)
    monkeypatch.setattr("ncbatch.store.format.CHUNK_BYTES", 1024)
    cut("cut.npz", TOY.X)
    cut("cut_y.npz", TOY.y)
    np.save("columns.npy", TOY.y[:, None])
    np.save("three.npy", TOY.X.reshape(300, 2, 2))
    np.save("empty.npy", TOY.X[:0])
    np.save("empty_y.npy", TOY.y[:0])
    np.save("thin.npy", TOY.X[:, :0])


@pytest.mark.usefixtures("failing_files")
@pytest.mark.parametrize("case", FAILURES)
def test_a_failed_import_leaves_no_new_store(case):
    before = tree(Path())
    options = FAILURES[case] | ({"progress": Interrupting()} if case == "interrupted" else {})
    with pytest.raises((NcbatchError, KeyboardInterrupt)):
        train("deep/er/s", **options)
    assert tree(Path()) == before


@pytest.fixture(scope="module")
def small_chunks_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Import the training split once, with predictions, into small chunks."""
    folder = tmp_path_factory.mktemp("once")
    files = {"features": "x.npy", "labels": "y.npy", "predictions": "p.npy"}
    for what, name in files.items():
        files[what] = str(folder / name)
        np.save(files[what], FILES[name])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ncbatch.store.format.CHUNK_BYTES", 1024)
        train(str(folder / "s"), **files)
    return folder / "s"


HALFWAY = ["damaged features", "damaged labels", "damaged predictions", "interrupted"]
TARGETS = ["new split", "new layer", "same layer"]


@pytest.mark.usefixtures("failing_files")
@pytest.mark.parametrize(
    ("case", "target"),
    [(case, target) for case in HALFWAY for target in TARGETS]
    + [(case, "new split") for case in FAILURES if case not in HALFWAY],
)
def test_a_failed_import_leaves_an_existing_store_as_it_was(case, target, small_chunks_store):
    options = FAILURES[case] | ({"progress": Interrupting()} if case == "interrupted" else {})
    shutil.copytree(small_chunks_store, "s")
    before = tree(Path())
    split = "test" if target == "new split" else "train"
    layer = "fc" if target == "new layer" else "h"
    arguments = {"layer": layer, "features": "x.npy", "labels": "y.npy", "overwrite": True}
    with pytest.raises((NcbatchError, KeyboardInterrupt)):
        import_features("s", split, **(arguments | options))
    assert tree(Path()) == before


def test_features_of_another_width_are_refused():
    train()
    import_classifier("s", "h", "w.npy", "b.npy")
    np.save("wide_test.npy", np.hstack([TOY.X_test] * 2))
    before = tree(Path("s"))
    with pytest.raises(DataError, match="layer 'h' with 8 features; expected 4, as in split"):
        import_features("s", "test", "h", "wide_test.npy", "y_test.npy")
    with pytest.raises(DataError, match="layer 'h' with 8 features; expected 4, as its classifier"):
        train(features="wide.npy", overwrite=True)
    with pytest.raises(DataError, match="150 rows of features; expected 300, the rows of split"):
        train(layer="fc", features="x_test.npy", labels=None)
    assert tree(Path("s")) == before


def test_a_split_name_that_is_reserved_is_refused():
    with pytest.raises(UsageError, match="this one holds the classifiers"):
        import_features("s", "classifier", "h", "x.npy", "y.npy")
    assert not Path("s").exists()


# -------------------------------------------------------------------------------------- classifier


def test_a_classifier_comes_from_files():
    train()
    assert import_classifier("s", "h", "w.npy", "b.npy") == (5, 4)
    weight, bias = FeatureStore.open("s").classifier("h")
    np.testing.assert_array_equal(weight, TOY.W)
    np.testing.assert_array_equal(bias, TOY.b)


def test_a_padded_classifier_is_cut_to_its_first_rows():
    train()
    np.save("w.npy", np.vstack([TOY.W, np.zeros((3, 4))]))
    np.save("b.npy", np.append(TOY.b, np.zeros(3)))
    with pytest.raises(DataError, match="--rows 5"):
        import_classifier("s", "h", "w.npy", "b.npy")
    assert import_classifier("s", "h", "w.npy", "b.npy", rows=5) == (5, 4)
    np.testing.assert_array_equal(FeatureStore.open("s").classifier("h")[0], TOY.W)


def test_a_classifier_needs_a_store_and_a_layer():
    with pytest.raises(StoreError, match="nothing is there"):
        import_classifier("s", "h", "w.npy")
    train()
    with pytest.raises(UnknownNameError, match="no layer 'hh' in s; expected one of: h"):
        import_classifier("s", "hh", "w.npy")
    assert not Path("s/classifier").exists()


# ------------------------------------------------------------------------------- lists of classes


@pytest.mark.parametrize("text", ["0\n3\n12\n", "0, 3, 12", " 0 3\t12", "0,3,12,"])
def test_classes_are_read_from_text(text):
    Path("classes.txt").write_text(text)
    assert read_classes("classes.txt") == [0, 3, 12]


def test_classes_are_read_from_npy():
    np.save("classes.npy", np.array([4, 0], np.uint8))
    assert read_classes("classes.npy") == [4, 0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"0\ncat\n", "class 'cat' in 'classes.txt'; expected class ids"),
        (b"-1", "class '-1'"),
        (b"1.5", "class '1.5'"),
        ("²".encode(), "class '²'"),
        (b"\xff\xfe", "cannot be read"),
        (None, "cannot be read"),
    ],
)
def test_what_is_no_list_of_classes_is_refused(content, message):
    if content is not None:
        Path("classes.txt").write_bytes(content)
    with pytest.raises(DataError, match=message) as refused:
        read_classes("classes.txt")
    assert len(str(refused.value).splitlines()) == 1


def test_classes_in_npy_must_be_integers_in_one_axis():
    for array in (np.ones(3), np.ones((3, 1), int)):
        np.save("classes.npy", array)
        with pytest.raises(DataError, match="expected integers of shape"):
            read_classes("classes.npy")
