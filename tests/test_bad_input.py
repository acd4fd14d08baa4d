"""Everything a user can get wrong: one or two lines that name it, an exit code, and nothing changed."""

from __future__ import annotations

import json
import pickle
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zarr

from ncbatch.ingest import import_classifier, import_features
from ncbatch.store import FeatureStore
from tests.conftest import Answer, make_toy, run_command, run_here, tree

TOY = make_toy(300)
SPLITS = {"train": (TOY.X, TOY.y), "test": (TOY.X_test, TOY.y_test), "ood": (TOY.X_ood, None)}


def save_files() -> None:
    """Save good files, and some that are wrong."""
    files = {
        "x": TOY.X, "y": TOY.y, "w": TOY.W, "b": TOY.b, "x_short": TOY.X[:299],
        "y_short": TOY.y[:299], "w_padded": np.ones((8, 4)), "w_wide": np.ones((5, 6)),
        "w_few": np.ones((3, 4)), "b_few": np.ones(3), "w_nan": np.full((5, 4), np.nan),
        "y_float": TOY.y.astype(float), "y_column": TOY.y[:, None], "y_huge": TOY.y + 2**40,
        "x_cube": TOY.X.reshape(300, 2, 2), "x_empty": TOY.X[:0], "y_empty": TOY.y[:0],
        "x_text": np.array(["a", "b"]), "x_objects": np.array([{}, None]), "x_scalar": np.ones(()),
    }  # fmt: skip
    for name, array in files.items():
        np.save(f"{name}.npy", array)
    other = TOY.y.copy()
    other[[41, 77]] = 7, (other[77] + 1) % 5
    np.save("y_seven.npy", other)
    np.save("y_other.npy", np.where(other == 7, TOY.y, other))
    Path("x_pickle.npy").write_bytes(pickle.dumps([1, 2, 3]))
    Path("x_none.npy").write_bytes(b"")
    np.savez("two.npz", a=TOY.X, b=TOY.X)
    np.savez("broken.npz", a=TOY.X)
    content = bytearray(Path("broken.npz").read_bytes())
    content[len(content) // 2] ^= 0xFF
    Path("broken.npz").write_bytes(content)
    with zipfile.ZipFile("no-array.npz", "w") as archive:
        archive.writestr("readme.txt", "hello")
    zarr.open_group("group.zarr", mode="w").create_array("a", data=TOY.X)
    Path("folder").mkdir()
    Path("folder/other.txt").write_text("an empty folder would be free")
    Path("notes.txt").write_text("0 1 cat")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder of files and of a store with layers ``h`` (a classifier) and ``p`` (predictions)."""
    folder = tmp_path_factory.mktemp("prepared")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("ncbatch.store.format.CHUNK_BYTES", 2048)
        save_files()
        for split, (X, y) in SPLITS.items():
            for layer in ("h",) if split == "ood" else ("h", "p"):
                np.save("a.npy", X)
                np.save("l.npy", np.zeros(len(X), int) if y is None else y)
                predictions = "l.npy" if layer == "p" else None
                import_features("s", split, layer, "a.npy", "l.npy", predictions, n_classes=5)
        import_classifier("s", "h", "w.npy", "b.npy")
        Path("a.npy").unlink()
        Path("l.npy").unlink()
    return folder


@pytest.fixture
def folder(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in a copy of the store and of a few files."""
    shutil.copytree(prepared / "s", tmp_path / "s")
    for name in ("x.npy", "y.npy", "y_short.npy"):
        shutil.copy(prepared / name, tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def check_refused(done: Answer, *named: str, code: int = 1) -> None:
    """One or two lines on stderr, of which every named pattern is found, and the exit code."""
    assert done.code == code, done.err
    assert 1 <= len(done.err.splitlines()) <= 2, done.err
    assert done.err.startswith("ncbatch: ")
    assert "Traceback" not in done.err
    for part in named:
        assert re.search(part, done.err), (part, done.err)


def refused(folder: Path, line: str, *named: str, code: int = 1) -> None:
    before = tree(folder)
    done = run_here(*line.split(), cwd=folder)
    check_refused(done, *named, code=code)
    assert done.out == ""
    assert tree(folder) == before


# --------------------------------------------------------------------------------- import, classifier

NEW = "import new --split train --layer h --features x.npy --labels y.npy"

IMPORTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "label of K": (
        "import s --split val --layer h --features x.npy --labels y_seven.npy",
        ("label 7 in row 41", "labels below 5"),
    ),
    "label of K in a new store": (
        f"{NEW} --classes 4",
        (f"label 4 in row {TOY.y.argmax()}", "labels below 4", "larger --classes"),
    ),
    "lengths": (NEW.replace("y.npy", "y_short.npy"), ("299 labels", "300 rows of features")),
    "lengths of shards": (NEW.replace("x.npy", "x_short.npy"), ("300 labels", "299 rows")),
    "length of a layer": (
        "import s --split train --layer new --features x_short.npy",
        ("299 rows of features", "300, the rows of split 'train'"),
    ),
    "other labels": (
        "import s --split train --layer new --features x.npy --labels y_other.npy",
        (f"label {(TOY.y[77] + 1) % 5} in row 77", f"expected {TOY.y[77]}, as stored in split 'tr"),
    ),
    "no labels": ("import new --split train --layer h --features x.npy", ("no labels", "--labels")),
    "no K": ("import new --split ood --layer h --features x.npy", ("new store 'new'", "--classes")),
    "other K": (
        "import s --split val --layer h --features x.npy --labels y.npy --classes 6",
        ("--classes 6", "5, as recorded in s"),
    ),
    "float labels": (NEW.replace("y.npy", "y_float.npy"), (r"\(300,\), float64", "integers")),
    "label columns": (NEW.replace("y.npy", "y_column.npy"), (r"\(300, 1\)", r"shape \(N,\)")),
    "huge labels": (NEW.replace("y.npy", "y_huge.npy"), ("classes", "1 to 2147483647")),
    "three axes": (NEW.replace("x.npy", "x_cube.npy"), (r"\(300, 2, 2\)", r"\(N, D\)")),
    "one axis": (NEW.replace("x.npy", "b.npy").replace("y.npy", "b.npy"), (r"\(5,\)",)),
    "no rows": (
        "import new --split train --layer h --features x_empty.npy --labels y_empty.npy",
        ("no rows in 'x_empty.npy'",),
    ),
    "text": (NEW.replace("x.npy", "x_text.npy"), ("'x_text.npy'", "expected numbers")),
    "objects": (NEW.replace("x.npy", "x_objects.npy"), ("type object", "expected numbers")),
    "a pickle": (NEW.replace("x.npy", "x_pickle.npy"), ("'x_pickle.npy'", "intact file")),
    "no bytes": (NEW.replace("x.npy", "x_none.npy"), ("'x_none.npy'", "intact file")),
    "a scalar": (NEW.replace("x.npy", "x_scalar.npy"), ("single value",)),
    "a damaged archive": (NEW.replace("x.npy", "broken.npz"), ("'broken.npz:a'", "intact file")),
    "no array": (NEW.replace("x.npy", "no-array.npz"), ("holds no array",)),
    "no member named": (NEW.replace("x.npy", "two.npz"), ("arrays a, b", "two.npz:a")),
    "another member": (NEW.replace("x.npy", "two.npz:c"), ("no array 'c'", "one of: a, b")),
    "a group": (NEW.replace("x.npy", "group.zarr"), ("Zarr group of arrays a", "group.zarr/a")),
    "a folder": (NEW.replace("x.npy", "folder"), ("'folder' is a folder",)),
    "a text file": (NEW.replace("x.npy", "notes.txt"), ("'notes.txt' of an unknown kind",)),
    "no file": (NEW.replace("x.npy", "nothing*.npy"), (r"no features at 'nothing\*.npy'",)),
    "no labels file": (NEW.replace("y.npy", "none.npy"), ("no labels at 'none.npy'",)),
    "layer exists": (
        "import s --split train --layer h --features x.npy",
        ("layer 'h' exists in split 'train' of s", "--overwrite"),
    ),
    "other width": (
        "import s --split val --layer h --features x_cube.npy --labels y.npy",
        (r"shape \(300, 2, 2\)",),
    ),
    "layer name": (NEW.replace("--layer h", "--layer a/b"), ("layer name 'a/b'", "without '/'")),
    "split name": (NEW.replace("train", "classifier"), ("split name 'classifier'",)),
    "store in a file": (NEW.replace("new", "notes.txt/new"), ("notes.txt/new", "Not a directory")),
    "store is a file": (NEW.replace("new", "notes.txt"), ("'notes.txt' is a file",)),
    "store is a folder": (NEW.replace("new", "folder"), ("'folder' is no store",)),
    "store is a group": (NEW.replace("new", "group.zarr"), ("Zarr group but no ncbatch store",)),
    "padded classifier": (
        "classifier s --layer h --weight w_padded.npy",
        (r"shape \(8, 4\)", r"\(5, D\)", "--rows 5"),
    ),
    "wide classifier": (
        "classifier s --layer h --weight w_wide.npy",
        ("6 features", "expected 4, as in split"),
    ),
    "few rows": ("classifier s --layer h --weight w_few.npy", (r"shape \(3, 4\)", "one row per")),
    "rows too few": ("classifier s --layer h --weight w_padded.npy --rows 4", (r"\(4, 4\)",)),
    "bias": ("classifier s --layer h --weight w.npy --bias b_few.npy", (r"bias of shape \(3,\)",)),
    "NaN": ("classifier s --layer h --weight w_nan.npy", ("not finite in row 0",)),
    "no weight": ("classifier s --layer h --weight none.npy", ("no weight at 'none.npy'",)),
    "classifier of no layer": (
        "classifier s --layer hh --weight w.npy",
        ("no layer 'hh' in s", "did you mean 'h'"),
    ),
    "classifier of no store": ("classifier new --layer h --weight w.npy", ("no store at 'new'",)),
}


@pytest.mark.parametrize("case", IMPORTS)
def test_a_bad_import_is_refused(prepared, case):
    line, named = IMPORTS[case]
    refused(prepared, line, *named)


# -------------------------------------------------------------------------------------- measure

MEASURES: dict[str, tuple[str, tuple[str, ...]]] = {
    "layer": ("s --layer hh", ("no layer 'hh' in split 'train' of s", "one of: h, p", "mean 'h'")),
    "train": ("s --train trian", ("no split 'trian' in s", "did you mean 'train'")),
    "test": ("s --test tset", ("no split 'tset'", "did you mean 'test'")),
    "ood": ("s --ood odd", ("no split 'odd'", "did you mean 'ood'")),
    "metric": ("s --metrics nc1_pinv,nc1_svvd", ("no metric 'nc1_svvd'", "did you mean 'nc1_svd'")),
    "no metric": ("s --metrics ,", ("--metrics ','", "ncbatch metrics")),
    "nothing there": ("new", ("no store at 'new'", "nothing is there")),
    "a file": ("x.npy", ("'x.npy' is a file",)),
    "a folder": ("folder", ("'folder' is no store", "ncbatch import")),
    "a group": ("group.zarr", ("no ncbatch store",)),
    "one of two": ("s new", ("no store at 'new'",)),
    "twice": ("s ./s/", ("/s' is given twice",)),
    "ending": ("s --out r.txt", ("output 'r.txt'", r"\.zarr, \.nc, \.csv, \.json")),
    "no ending": ("s --out r", ("output 'r'",)),
    "missing folder": ("s --out no/r.csv", ("no folder '.*/no'", "create it first")),
    "folder is a file": ("s --out x.npy/r.csv", ("no folder",)),
    "over a store": (
        "s --out r.csv --out group.zarr",
        ("'group.zarr' exists and holds no results",),
    ),
    "into a store": ("s --out s/zarr.json", ("inside the Zarr store '.*/s'", "another place")),
    "deep in a store": ("s --out s/train/r.csv", ("inside the Zarr store",)),
    "class list": ("s --classes notes.txt", ("class 'cat' in 'notes.txt'",)),
    "no class list": ("s --classes none.txt", ("classes 'none.txt' cannot be read",)),
    "class of K": ("s --classes y_seven.npy", ("class 7", r"0\.\.4")),
    "min-count": (
        "s --min-count 61",
        ("0 classes in split 'train'", "with these filters", "loosen"),
    ),
    "max-count": ("s --max-count 1", ("0 classes in split 'train'",)),
    "dist-exp": ("s --dist-exp 0", (r"dist_exp 0\.0", "above 0")),
    "memory": ("s --memory lots", ("memory 'lots'", "8GiB")),
    "no memory": ("s --memory 0", ("memory '0'", "above zero")),
    "small memory": ("s --memory 10MiB", (r"at most 10\.00 MiB", r"at least --memory \d+MiB")),
}


@pytest.mark.parametrize("case", MEASURES)
def test_a_bad_measure_is_refused(prepared, case):
    line, named = MEASURES[case]
    refused(prepared, f"measure {line}", *named)


@pytest.mark.parametrize(
    "line", ["info new", "validate new", "info x.npy", "validate folder", "info group.zarr"]
)
def test_info_and_validate_refuse_what_is_no_store(prepared, line):
    refused(prepared, line, f"'{line.split()[1]}'")


USAGE = {
    "mesure s": ("No such command 'mesure'", "ncbatch --help"),
    "measure": ("Missing argument 'STORE...'", "ncbatch measure --help"),
    "measure s --lyer h": ("No such option.*--lyer", "ncbatch measure --help"),
    "measure s --min-count 0": ("'--min-count': 0",),
    "measure s --min-count few": ("'few' is not a valid integer",),
    "measure s --precision fp16": ("'fp16' is not one of 'exact', 'fp32'",),
    "measure s --dist-exp two": ("'two' is not a valid float",),
    "import s --split train --layer h": ("Missing option '--features'",),
    "import s --split train --layer h --features x.npy --classes 0": ("'--classes': 0",),
    "classifier s --layer h --weight w.npy --rows 0": ("'--rows': 0",),
    "info": ("Missing argument 'STORE'",),
    "info s t": ("unexpected extra argument",),
}


@pytest.mark.parametrize("line", USAGE)
def test_bad_usage_has_exit_code_2(prepared, line):
    refused(prepared, line, *USAGE[line], code=2)


# ------------------------------------------------------------------------- what is in the store


def write(split: str, X: np.ndarray, y: np.ndarray) -> None:
    with FeatureStore.open("s").writer(
        split, layers={"h": 4}, dtype="float32", overwrite=True
    ) as w:
        w.append({"h": X}, y)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("split", ["train", "test", "ood"])
def test_a_feature_that_is_not_finite_names_split_layer_and_row(folder, split, value):
    X, y = SPLITS[split]
    X = X.copy()
    X[[70, 90], 2] = value
    labels = np.zeros(len(X), int) if y is None else y.copy()
    X[5], labels[5] = value, -1  # no sample, hence no fault
    write(split, X, labels)
    refused(
        folder, "measure s --layer h --out r.csv",
        "not finite", f"split '{split}', layer 'h', row 70 of s", "--skip-nonfinite",
    )  # fmt: skip


def test_a_stored_label_of_k_names_its_row(folder):
    zarr.open_array("s/train/label")[77] = 9
    refused(folder, "measure s", "label 9 in row 77 of split 'train' of s", "labels below 5")


@pytest.mark.parametrize(
    ("labels", "named"),
    [
        (np.full(300, 3), "1 class in split 'train' of s"),
        (np.where(np.arange(300) == 7, 2, -1), "1 class in split 'train' of s"),
        (np.full(300, -1), "split 'train' of s has no rows"),
        (np.zeros(0, int), "split 'train' of s has no rows"),
    ],
)
def test_train_needs_two_classes(folder, labels, named):
    write("train", TOY.X[: len(labels)], labels)
    refused(folder, "measure s --layer h", named, "expected (at least 2|labelled rows)")


def test_a_store_of_a_newer_format_is_refused(folder):
    metadata = json.loads(Path("s/zarr.json").read_text())
    metadata["attributes"]["ncbatch"]["format"] = 2
    Path("s/zarr.json").write_text(json.dumps(metadata))
    for line in ("measure s", "info s", "validate s", NEW.replace("new", "s")):
        refused(folder, line, "'s' has store format 2; expected format 1", "newer ncbatch")


def test_damaged_metadata_is_named(folder):
    Path("s/test/label/zarr.json").write_text('{"zarr')
    for line in ("measure s", "info s", "validate s"):
        refused(folder, line, "metadata 's/test/label/zarr.json' cannot be read")


@pytest.mark.parametrize("metric", ["nc3_dual_err", "nc4_agree", "nc5_ood_dev"])
def test_a_metric_that_cannot_be_had_says_why(folder, metric):
    store = FeatureStore.open("s")
    for split in ("test", "ood"):
        store.delete_split(split)
    shutil.rmtree("s/classifier")
    why = "no classifier" if metric < "nc5" else "no out-of-distribution split"
    refused(
        folder, f"measure s --layer h --metrics {metric}", f"metric '{metric}'", why, "ncbatch info"
    )


def test_an_output_that_cannot_be_written_is_noticed_before_anything_is_read(prepared, monkeypatch):
    def read(*_):
        raise AssertionError("rows were read")

    monkeypatch.setattr("ncbatch.store.chunks.read_rows", read)
    for out in ("no/r.csv", "s/r.csv", "r.txt", "folder/.", "group.zarr"):
        refused(prepared, f"measure s --out ok.csv --out {out}", "output|holds no results")


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="there is no /proc")
def test_a_folder_that_takes_no_files_is_noticed(folder):
    refused(folder, "measure s --out /proc/r.csv", "folder '/proc' cannot be written to")


def test_a_folder_in_the_place_of_the_output_is_noticed(folder):
    Path("r.csv").mkdir()
    refused(folder, "measure s --out r.csv", "output 'r.csv' is a folder; expected a file's path")


# ------------------------------------------------------------------------------------- bad chunks

CHUNKS = {
    "feature": ("train/layers/h/feature/c/1/0", "rows 128..255"),
    "label": ("train/label/c/2", "rows 256..299"),
    "test feature": ("test/layers/h/feature/c/1/0", "rows 128..149"),
    "test label": ("test/label/c/0", "rows 0..127"),
    "ood feature": ("ood/layers/h/feature/c/0/0", "rows 0..99"),
    "prediction": ("test/prediction/c/1", "rows 128..149"),
    "weight": ("classifier/h/weight/c/0/0", "rows 0..4"),
    "bias": ("classifier/h/bias/c/0", "rows 0..4"),
}


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "flipped": flip,
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "emptied": lambda file: file.write_bytes(b""),
    "deleted": lambda file: file.unlink(),
}


@pytest.mark.parametrize(
    ("place", "damage"),
    [(place, damage) for place in CHUNKS for damage in ("flipped", "deleted")]
    + [
        (place, damage)
        for place in ("feature", "label", "weight")
        for damage in ("truncated", "emptied")
    ],
)
def test_a_bad_chunk_is_named_by_validate_and_refused_by_measure(folder, place, damage):
    file, rows = CHUNKS[place]
    DAMAGES[damage](Path("s") / file)
    what = "chunk is missing" if damage == "deleted" else "checksum does not match its bytes"
    before = tree(folder)
    validated = run_here("validate", "s", cwd=folder)
    assert (validated.code, validated.err) == (1, "")
    assert validated.out == f"{file} ({rows}): {what}\n1 bad chunk in s\n"
    line = "measure s --metrics nc3_cos_mean,nc4_agree,nc5_ood_dev --out r.csv"
    refused(folder, line, re.escape(f"{file} ({rows})"), what, "ncbatch validate")
    assert tree(folder) == before


def test_damage_that_is_not_read_does_not_stop_measure(folder):
    for file in ("train/layers/p/feature/c/0/0", "test/prediction/c/1"):
        flip(Path("s") / file)
    done = run_here("measure", "s", "--layer", "h", cwd=folder)
    assert (done.code, done.err) == (0, "")
    flip(Path("s/classifier/h/weight/c/0/0"))
    done = run_here("measure", "s", "--layer", "h", "--metrics", "nc1_pinv,nc5_ood_dev", cwd=folder)
    assert (done.code, done.err) == (0, "")


# ------------------------------------------------------------------------- in a process of its own


@pytest.mark.slow
def test_a_process_says_the_same_and_exits_with_the_code(folder):
    X = TOY.X.copy()
    X[123, 0] = np.nan
    write("train", X, TOY.y)
    check_refused(
        run_command("measure", "s", "--layer", "h", "--out", "r.csv", cwd=folder),
        "split 'train', layer 'h', row 123 of s; expected finite features\n--skip-nonfinite",
    )
    assert not Path("r.csv").exists()
    check_refused(run_command("measure", "s", "--frobnicate", cwd=folder), "--frob", code=2)


@pytest.mark.slow
def test_a_process_that_validates_does_too(folder):
    flip(Path("s/test/layers/h/feature/c/1/0"))
    done = run_command("validate", "s", cwd=folder)
    assert (done.code, done.err) == (1, "")
    assert done.out.startswith("test/layers/h/feature/c/1/0 (rows 128..149): checksum")


def test_an_interrupted_command_says_so(folder, monkeypatch):
    def press(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("ncbatch.measurement.run.measure", press)
    done = run_here("measure", "s", "--out", "r.csv", cwd=folder)
    assert (done.code, done.err.strip()) == (130, "ncbatch: interrupted")
    assert not Path("r.csv").exists()


def test_the_smallest_memory_that_is_named_works(folder):
    refusal = run_here("measure", "s", "--memory", "20MiB", cwd=folder)
    check_refused(refusal, r"needs .* [MG]iB resident", r"at most 20\.00 MiB")
    found = re.search(r"--memory (\d+MiB)", refusal.err)
    assert found
    done = run_here("measure", "s", "--memory", found[1], cwd=folder)
    assert (done.code, done.err) == (0, "")


FULL = """
import resource
from ncbatch.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (1900, 1900))  # metadata fits, a chunk does not
main()
"""


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_leaves_nothing(folder):
    np.save("x64.npy", TOY.X.astype(np.float64))
    before = tree(folder)
    line = "import s --split train --layer new --features x64.npy"
    done = subprocess.run(
        [sys.executable, "-c", FULL, *line.split()], capture_output=True, text=True, timeout=60
    )
    check_refused(Answer(done.returncode, done.stdout, done.stderr), "File too large")
    assert tree(folder) == before
