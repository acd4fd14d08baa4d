"""The command line, end to end: features that no pipeline made become oracle values in every output."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

import ncbatch as nc
from ncbatch.cli import main
from ncbatch.metrics import CATALOGUE
from ncbatch.store import FeatureStore
from tests.conftest import Answer, make_toy, run_command, run_here
from tests.oracles import base_metrics

TOY = make_toy(300, 6)
# A layer without a classifier: K > D, and a common offset.
NARROW = (TOY.X[:, :3] + 50).astype(np.float16)
PREDICTIONS = np.where(np.arange(150) % 10, TOY.y_test, (TOY.y_test + 1) % 5)
# The oracle has no logarithms of the Riesz energies: they follow from the energies.
LOGARITHMS = {"nc2g_riesz_log": "nc2g_riesz", "nc2g_riesz_log_mean": "nc2g_riesz_mean"}


def oracle(**options: Any) -> dict[str, float]:
    splits = {"X_test": TOY.X_test, "y_test": TOY.y_test, "X_ood": TOY.X_ood}
    return with_logarithms(
        base_metrics(TOY.X, TOY.y, 5, **({"W": TOY.W, "b": TOY.b} | splits | options))
    )


def with_logarithms(values: dict[str, float]) -> dict[str, float]:
    values.pop("n_coincident_pairs")
    return values | {name: math.log(abs(values[of])) for name, of in LOGARITHMS.items()}


def narrow_oracle() -> dict[str, float]:
    return with_logarithms(base_metrics(NARROW, TOY.y, 5))


BASE = set(oracle())


def assert_equal(found: Mapping[str, float | None], wanted: Mapping[str, float]) -> None:
    """Every base metric equals the oracle's to 1e-6, and is empty where the oracle lacks it."""
    assert {name for name, value in found.items() if value is not None} & BASE == set(wanted)
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value, rel=1e-6, abs=1e-12), name


def save_files(folder: Path) -> None:
    """Save features as users have them: shards, archives, big-endian and Fortran arrays."""
    np.save(folder / "x1.npy", TOY.X[:20])
    np.save(folder / "x2.npy", TOY.X[20:250])
    np.save(folder / "x10.npy", np.asfortranarray(TOY.X[250:]))
    np.save(folder / "y.npy", TOY.y.astype(">i4"))
    np.savez(folder / "test.npz", x=TOY.X_test, y=TOY.y_test, p=PREDICTIONS)
    np.save(folder / "ood.npy", TOY.X_ood)
    np.save(folder / "narrow.npy", NARROW)
    np.savez_compressed(folder / "head.npz", W=np.vstack([TOY.W, np.ones((3, 6))]), b=TOY.b)


COMMANDS = {
    "import": "import run.zarr --split train --layer fc --features x*.npy --labels y.npy",
    "layer": "import run.zarr --split train --layer narrow --features narrow.npy",
    "test": "import run.zarr --split test --layer fc --features test.npz:x --labels test.npz:y",
    "ood": "import run.zarr --split ood --layer fc --features ood.npy",
    "classifier": "classifier run.zarr --layer fc --weight head.npz:W --bias head.npz:b --rows 5",
    "info": "info run.zarr",
    "validate": "validate run.zarr",
    "measure": "measure run.zarr --out r.csv --out r.json --out r.nc --out r.zarr",
}


@dataclass(frozen=True)
class Run:
    folder: Path
    said: dict[str, Answer]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Do the main job in a fresh folder, its three main steps in processes of their own."""
    folder = tmp_path_factory.mktemp("whole")
    save_files(folder)
    said: dict[str, Answer] = {}
    for name, line in COMMANDS.items():
        run = run_command if name in ("import", "classifier", "measure") else run_here
        said[name] = run(*line.split(), cwd=folder)
    return Run(folder, said)


@pytest.fixture
def stores(tmp_path: Path) -> Path:
    """Make a store of the toy data, made without the command line."""
    store = FeatureStore.create(tmp_path / "s", 5, {"fc": 6}, "float32")
    outside = np.zeros(len(TOY.X_ood), int)
    for name, X, y in [
        ("train", TOY.X, TOY.y), ("test", TOY.X_test, TOY.y_test), ("ood", TOY.X_ood, outside)
    ]:  # fmt: skip
        with store.writer(name) as writer:
            writer.append({"fc": X}, y)
    store.set_classifier("fc", TOY.W, TOY.b)
    return tmp_path


def measured(ncbatch: Callable[..., Answer], *arguments: object, layer: str = "fc") -> dict:
    """Measure store ``s`` in this process and read the JSON."""
    done = ncbatch("measure", "s", *arguments, "--out", "r.json")
    assert (done.code, done.err) == (0, "")
    return json.loads(Path("r.json").read_text())["s"][layer]


# ------------------------------------------------------------------------------------ the main job


@pytest.mark.slow
class TestMainJob:
    @pytest.mark.parametrize("name", COMMANDS)
    def test_every_command_succeeds_without_a_word_on_stderr(self, whole, name):
        assert (whole.said[name].code, whole.said[name].err) == (0, "")

    def test_import_prints_the_shards_and_what_it_did(self, whole):
        shards = [line.split() for line in whole.said["import"].out.splitlines()]
        assert shards[:3] == [["20", "rows", "x1.npy"], ["230", "rows", "x2.npy"], ["50", "rows", "x10.npy"]]  # fmt: skip
        assert "300 rows of 6 features imported into run.zarr/train/fc" in whole.said["import"].out
        assert "created with K = 5 classes" in whole.said["import"].out
        assert "has K = 5 classes" in whole.said["test"].out

    def test_classifier_and_validate_say_what_they_did(self, whole):
        assert (
            "classifier of 5 classes and 6 features stored for fc" in whole.said["classifier"].out
        )
        assert whole.said["validate"].out == "run.zarr is valid: splits ood, test, train\n"

    def test_info_shows_splits_layers_sizes_and_classifiers(self, whole):
        said = whole.said["info"].out
        assert "K = 5 classes" in said
        assert FeatureStore.open(whole.folder / "run.zarr").id in said
        rows = [
            [cell.strip() for cell in line.split("│")[1:-1]]
            for line in said.splitlines()
            if line.startswith("│")
        ]
        assert rows == [
            ["ood", "fc", "100", "6", "float32", "2.34 kiB", "128", "classifier"],
            ["test", "fc", "150", "6", "float32", "3.52 kiB", "256", "classifier"],
            ["train", "fc", "300", "6", "float32", "7.03 kiB", "512", "classifier"],
            ["train", "narrow", "300", "3", "float16", "1.76 kiB", "512", ""],
        ]

    def test_the_table_shows_every_metric_and_what_was_left_out(self, whole):
        said = whole.said["measure"].out
        assert said.startswith("run.zarr: 300 samples, 5 classes")
        for name, value in oracle().items():
            line = next(line for line in said.splitlines() if line.startswith(f"│ {name} "))
            assert f" {value:.5g} " in line
            assert CATALOGUE[name].long_name in line
        notes = [line for line in said.splitlines() if line.startswith("note: ")]
        for part in (
            "no classifier for",
            "no classifier and no predictions",
            "no out-of-distribution",
        ):
            [note] = [note for note in notes if part in note]
            assert "narrow" in note

    def test_csv_holds_oracle_values_that_round_trip(self, whole):
        with (whole.folder / "r.csv").open(newline="") as file:
            header, *lines = csv.reader(file)
        assert header[:2] == ["store", "layer"]
        assert [n for n in header if n in BASE] == [n for n in CATALOGUE if n in BASE]
        assert [line[:2] for line in lines] == [["run.zarr", "fc"], ["run.zarr", "narrow"]]
        for line, wanted in zip(lines, [oracle(), narrow_oracle()], strict=True):
            cells = dict(zip(header[2:], line[2:], strict=True))
            assert all(repr(float(cell)) == cell for cell in cells.values() if cell)
            assert_equal({n: float(cell) if cell else None for n, cell in cells.items()}, wanted)

    def test_json_holds_the_same_numbers_and_null(self, whole):
        found = json.loads((whole.folder / "r.json").read_text())
        with (whole.folder / "r.csv").open(newline="") as file:
            lines = list(csv.DictReader(file))
        assert list(found) == ["run.zarr"]
        assert list(found["run.zarr"]) == ["fc", "narrow"]
        for line in lines:
            cells = found["run.zarr"][line["layer"]]
            assert {n: "" if v is None else repr(v) for n, v in cells.items()} == {
                name: cell for name, cell in line.items() if name not in ("store", "layer")
            }
        assert found["run.zarr"]["narrow"]["nc3_dual_err"] is None

    def test_datasets_hold_the_same_numbers_with_their_provenance(self, whole):
        dataset = nc.load_results(whole.folder / "r.zarr")
        found = json.loads((whole.folder / "r.json").read_text())["run.zarr"]
        assert dataset["nc1_pinv"].dims == ("store", "layer")
        for layer, cells in found.items():
            for name, value in cells.items():
                stored = float(dataset[name].sel(store="run.zarr", layer=layer))
                assert stored == value or (value is None and math.isnan(stored))
        for name in BASE:
            about = dataset[name].attrs
            assert about["long_name"], name
            assert about["units"], name
            assert about["source"], name
        store = FeatureStore.open(whole.folder / "run.zarr")
        assert json.loads(dataset.attrs["store_id"]) == {"run.zarr": store.id}
        assert dataset.attrs["ncbatch_version"] == nc.__version__
        assert dataset.attrs["precision"] == "exact"
        assert dataset.attrs["device"] == "cpu"
        assert dataset.attrs["date"][:2] == "20"
        assert set(json.loads(dataset.attrs["fingerprint"])["run.zarr"]) == {"fc", "narrow"}
        assert dataset["n_samples"].values.tolist() == [[300, 300]]

    def test_netcdf_and_zarr_hold_the_same_and_any_reader_opens_them(self, whole):
        netcdf = nc.load_results(whole.folder / "r.nc")
        opened = xr.open_zarr(whole.folder / "r.zarr", consolidated=False)
        xr.testing.assert_identical(netcdf, opened.load())

    def test_nothing_is_left_beside_what_was_asked_for(self, whole):
        made = {"run.zarr", "r.csv", "r.json", "r.nc", "r.zarr"}
        given = {"x1.npy", "x2.npy", "x10.npy", "y.npy", "test.npz", "ood.npy", "narrow.npy", "head.npz"}  # fmt: skip
        assert {path.name for path in whole.folder.iterdir()} == made | given

    def test_stores_of_one_name_are_told_apart_by_the_shortest_suffix(self, whole):
        folder = whole.folder
        for place in ("a/1", "b/1"):
            (folder / place).mkdir(parents=True)
            (folder / place / "run.zarr").symlink_to(folder / "run.zarr")
        done = run_command(
            "measure", "a/1/run.zarr", "b/1/run.zarr", "--layer", "fc", "--metrics", "nc4_agree,nc1_quot",
            "--out", "two.csv", "--out", "two.json", cwd=folder,
        )  # fmt: skip
        assert (done.code, done.err) == (0, "")
        header, *lines = csv.reader((folder / "two.csv").read_text().splitlines())
        assert header == ["store", "layer", "nc1_quot", "nc4_agree"]
        assert [line[0] for line in lines] == ["a/1/run.zarr", "b/1/run.zarr"]
        assert lines[0][1:] == lines[1][1:]
        assert list(json.loads((folder / "two.json").read_text())) == [
            "a/1/run.zarr",
            "b/1/run.zarr",
        ]
        assert "a/1/run.zarr: 300 samples" in done.out
        for path in ("a", "b"):
            (folder / path / "1/run.zarr").unlink()
            (folder / path / "1").rmdir()
            (folder / path).rmdir()
        (folder / "two.csv").unlink()
        (folder / "two.json").unlink()


# ------------------------------------------------------------------------------- quick to start


def test_help_answers_within_0_7_seconds(tmp_path):
    times = []
    for _ in range(3):
        start = time.perf_counter()
        done = run_command("--help", cwd=tmp_path)
        times.append(time.perf_counter() - start)
        assert done.code == 0
    assert min(times) < 0.7
    for name in ("import", "classifier", "info", "validate", "measure", "metrics"):
        assert f"\n  {name} " in done.out


def test_import_loads_nothing_heavy():
    heavy = ["torch", "cupy", "distributed", "matplotlib", "sklearn", "transformers"]
    code = f"import sys, ncbatch; dir(ncbatch); print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")


@pytest.mark.slow
def test_the_commands_load_nothing_heavy_either(stores):
    code = (
        "import sys\nfrom ncbatch.cli import main\nsys.argv = ['ncbatch', 'measure', 's']\n"
        "try:\n    main()\nfinally:\n"
        "    loaded = [m for m in ('torch', 'cupy', 'distributed', 'matplotlib') if m in sys.modules]\n"
        "    print(loaded, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=stores, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "[]\n")


def test_every_command_explains_its_options(ncbatch):
    for name in ("import", "classifier", "info", "validate", "measure", "metrics"):
        for flag in ("--help", "-h"):
            done = ncbatch(name, flag)
            assert done.code == 0
            assert f"ncbatch {name}" in done.out
    assert ncbatch("--version").out.strip().endswith(nc.__version__)


def test_a_terminal_without_the_letters_gets_others(monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "argv", ["ncbatch", "metrics"])
    with redirect_stdout(terminal), pytest.raises(SystemExit) as left:
        main()
    assert not left.value.code
    terminal.seek(0)
    assert "Gy?rgy" in terminal.read()


def test_metrics_lists_the_whole_catalogue(ncbatch):
    said = ncbatch("metrics").out
    for metric in CATALOGUE.values():
        [line] = [line for line in said.splitlines() if line.startswith(f"│ {metric.name} ")]
        for part in (metric.long_name, metric.formula, metric.source):
            assert part in line


# ---------------------------------------------------------------------------- options of measure


CHOSEN = [0, 2, 3]
COUNTS = np.bincount(TOY.y)
UNEVEN = np.where(np.arange(300) < 200, 0, TOY.y)  # class 0 has most samples

OPTIONS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "none": ([], {}),
    "weighted": (["--weighted"], {"weighted": True}),
    "dist-exp 2": (["--dist-exp", "2"], {"dist_exp": 2.0}),
    "dist-exp 0.5": (["--dist-exp", "0.5"], {"dist_exp": 0.5}),
    "min-count": (["--min-count", "20"], {"min_count": 20}),
    "max-count": (["--max-count", "100"], {"max_count": 100}),
    "classes": (["--classes", "classes.txt"], {"classes": CHOSEN}),
    "classes of two files": (
        ["--classes", "classes.txt", "--classes", "others.txt"],
        {"classes": [*CHOSEN, 4]},
    ),
    "all": (
        ["--weighted", "--max-count", "299", "--classes", "classes.txt", "--dist-exp", "2"],
        {"weighted": True, "max_count": 299, "classes": CHOSEN, "dist_exp": 2.0},
    ),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_options_mean_what_the_oracle_means(ncbatch, stores, case):
    arguments, options = OPTIONS[case]
    store = FeatureStore.open(stores / "s")
    with store.writer("train", overwrite=True) as writer:
        writer.append({"fc": TOY.X}, UNEVEN)
    Path("classes.txt").write_text("0, 2, 3")
    Path("others.txt").write_text("4")
    wanted = with_logarithms(
        base_metrics(
            TOY.X, UNEVEN, 5, W=TOY.W, b=TOY.b, X_test=TOY.X_test, y_test=TOY.y_test,
            X_ood=TOY.X_ood, **options,
        )
    )  # fmt: skip
    assert_equal(measured(ncbatch, *arguments), wanted)


def test_fp32_is_good_to_1e_6_in_traces_and_is_recorded(ncbatch, stores):
    names = "nc1_quot,nc1_cdnv,nc1_pinv,nc1_svd"
    found = measured(ncbatch, "--precision", "fp32", "--metrics", names, "--out", "r.nc")
    wanted = oracle()
    for name in ("nc1_quot", "nc1_cdnv"):
        assert found[name] == pytest.approx(wanted[name], rel=1e-6)
    for name in ("nc1_pinv", "nc1_svd"):
        assert found[name] == pytest.approx(wanted[name], rel=1e-3)
    assert nc.load_results("r.nc").attrs["precision"] == "fp32"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_skip_nonfinite_leaves_rows_out_and_counts_them(ncbatch, stores, value):
    X, X_test = TOY.X.copy(), TOY.X_test.copy()
    X[[3, 200, 299], [0, 5, 2]] = value
    X_test[7] = value
    store = FeatureStore.open(stores / "s")
    for name, rows, y in [("train", X, TOY.y), ("test", X_test, TOY.y_test)]:
        with store.writer(name, overwrite=True) as writer:
            writer.append({"fc": rows}, y)
    good, good_test = np.isfinite(X).all(axis=1), np.isfinite(X_test).all(axis=1)
    wanted = with_logarithms(
        base_metrics(
            X[good], TOY.y[good], 5, W=TOY.W, b=TOY.b, X_test=X_test[good_test],
            y_test=TOY.y_test[good_test], X_ood=TOY.X_ood,
        )
    )  # fmt: skip
    assert_equal(measured(ncbatch, "--skip-nonfinite"), wanted)
    done = ncbatch("measure", "s", "--skip-nonfinite", "--metrics", "nc4_agree", "--out", "r.zarr")
    assert "4 rows with values that are not finite were left out" in done.out
    dataset = nc.load_results("r.zarr")
    assert dataset["n_rows_skipped"].values.tolist() == [[4]]
    assert dataset["n_samples"].values.tolist() == [[297]]


def test_stored_predictions_decide_at_their_layer(ncbatch, stores):
    store = FeatureStore.open(stores / "s")
    with store.writer("test", head="fc", overwrite=True) as writer:
        writer.append({"fc": TOY.X_test}, TOY.y_test, PREDICTIONS)
    wanted = oracle(predictions=PREDICTIONS)
    assert wanted["nc4_agree"] != oracle()["nc4_agree"]
    assert_equal(measured(ncbatch), wanted)


def test_nc4_takes_the_samples_of_train_where_there_is_no_test(ncbatch, stores):
    FeatureStore.open(stores / "s").delete_split("test")
    assert_equal(measured(ncbatch), oracle(X_test=None, y_test=None))


def test_splits_of_other_names_are_named_by_options(ncbatch, stores):
    for old, new in [("train", "fit"), ("test", "val"), ("ood", "far")]:
        (stores / "s" / old).rename(stores / "s" / new)
    assert_equal(measured(ncbatch, "--train", "fit", "--test", "val", "--ood", "far"), oracle())


def test_metrics_and_layers_can_be_chosen(ncbatch, stores):
    store = FeatureStore.open(stores / "s")
    with store.add_layers("train", {"x": 3}, "float16") as writer:
        writer.append({"x": NARROW})
    names = ["nc5_ood_dev", "nc1_pinv"]
    found = measured(ncbatch, "--metrics", names[0], "--metrics", f"{names[1]},", "--layer", "fc")
    assert_equal(found, {name: oracle()[name] for name in names})
    assert list(json.loads(Path("r.json").read_text())["s"]) == ["fc"]
    assert [name for name in found if name in BASE] == ["nc1_pinv", "nc5_ood_dev"]


def test_earlier_results_are_replaced(ncbatch, stores):
    for _ in range(2):
        outs = [part for end in ("csv", "json", "nc", "zarr") for part in ("--out", f"r.{end}")]
        done = ncbatch("measure", "s", "--metrics", "nc1_quot", *outs)
        assert (done.code, done.err) == (0, "")
    assert {path.name for path in stores.iterdir()} == {"s", "r.csv", "r.json", "r.nc", "r.zarr"}
    assert float(nc.load_results("r.zarr")["nc1_quot"][0, 0]) == pytest.approx(oracle()["nc1_quot"])


def test_many_layers_become_lines(ncbatch, stores):
    store = FeatureStore.open(stores / "s")
    with store.add_layers("train", {f"h.{i}": 6 for i in range(6)}, "float32") as writer:
        writer.append({f"h.{i}": TOY.X for i in range(6)})
    said = ncbatch("measure", "s").out
    for i in range(6):
        lines = [line for line in said.splitlines() if line.startswith(f"│ h.{i} ")]
        for name in ("nc1_pinv", "nc2_etf_err"):
            assert any(f" {oracle()[name]:.5g} " in line for line in lines)
    assert f" {oracle()['nc5_ood_dev']:.5g} " in said


@pytest.mark.parametrize("width", [80, 200])
def test_tables_of_many_layers_fit_a_terminal(ncbatch, stores, monkeypatch, width):
    store = FeatureStore.open(stores / "s")
    with store.add_layers("train", {f"h.{i}": 6 for i in range(6)}, "float32") as writer:
        writer.append({f"h.{i}": TOY.X for i in range(6)})
    for name, value in {"FORCE_COLOR": "1", "TERM": "dumb", "COLUMNS": str(width)}.items():
        monkeypatch.setenv(name, value)
    said = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", ncbatch("measure", "s").out)
    tables = said.partition("note:")[0]
    assert max(map(len, tables.splitlines())) <= width
    assert "…" not in tables
    for name, value in oracle().items():
        assert f" {name} " in tables
        assert f" {value:.5g} " in tables


def test_names_with_brackets_and_colons_are_printed_as_they_are(ncbatch, tmp_path):
    names = ["blocks[0]", "fc:input", "x[bold]", "a:100:b"]
    store = FeatureStore.create(tmp_path / "[red]s", 5, dict.fromkeys(names, 6), "float32")
    with store.writer("train") as writer:
        writer.append(dict.fromkeys(names, TOY.X), TOY.y)
    for command in ("info", "measure"):
        said = ncbatch(command, "[red]s").out
        assert "[red]s" in said
        for name in names:
            assert name in said
