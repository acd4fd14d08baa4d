"""Rows of every kind of file, in order; axes; and layers by an axis or an array each."""

from __future__ import annotations

import itertools
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st

from ncbatch.errors import DataError, NcbatchError, UnknownNameError, UsageError
from ncbatch.ingest import import_classifier, import_features
from ncbatch.ingest.files.layers import (
    RowStream,
    Shard,
    as_rows,
    find_axes,
    open_rows,
    open_shards,
    parse_axes,
    read_rows_of,
)
from ncbatch.store import FeatureStore
from tests.conftest import make_toy, run_here, tree
from tests.ingest.files.formats import writers as w

X = np.random.default_rng(0).standard_normal((4, 2, 5, 3)).astype(np.float32)  # B, L, T, D
Y = np.arange(20).reshape(4, 5) % 7


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "layers"
    folder.mkdir()
    monkeypatch.chdir(folder)
    np.save("x.npy", X)
    np.save("y.npy", Y)
    np.savez(
        "parts.npz", h_3=X[:, 0].reshape(20, 3), h_12=X[:, 1, :, :2].reshape(20, 2), y=Y.ravel()
    )
    return folder


def stored(layer: str, split: str = "train") -> np.ndarray:
    return FeatureStore.open("s").split(split).read(layer, 0, 20)


@pytest.mark.parametrize("read_bytes", [1, 200, 2**20])
@pytest.mark.parametrize("names", ["h.{}", ["h.0", "h.1"]])
def test_layers_along_an_axis_arrive_in_one_pass(monkeypatch, read_bytes, names):
    monkeypatch.setattr("ncbatch.ingest.files.layers._READ_BYTES", read_bytes)
    done = import_features("s", "train", names, "x.npy", "y.npy")
    assert (done.layers, done.axes) == (("h.0", "h.1"), ("B", "L", "T", "D"))
    for i in range(2):
        np.testing.assert_array_equal(stored(f"h.{i}"), X[:, i].reshape(20, 3))
    np.testing.assert_array_equal(FeatureStore.open("s").split("train").labels(), Y.ravel())
    assert FeatureStore.open("s").validate() == []


def test_one_layer_of_an_axis_is_taken_by_its_index():
    import_features("s", "train", "last", "x.npy", "y.npy", layer_index=1)
    import_features("s", "train", "h.{}", "x.npy", "y.npy", layer_index=0)
    assert FeatureStore.open("s").layers() == ["last", "h.0"]
    np.testing.assert_array_equal(stored("last"), X[:, 1].reshape(20, 3))
    np.testing.assert_array_equal(stored("h.0"), X[:, 0].reshape(20, 3))


@pytest.mark.parametrize("read_bytes", [1, 200, 2**20])
def test_arrays_of_their_own_become_layers_of_their_own_width(monkeypatch, read_bytes):
    monkeypatch.setattr("ncbatch.ingest.files.layers._READ_BYTES", read_bytes)
    done = import_features("s", "train", "h.{}", "parts.npz:h_{}", ":y")
    assert done.layers == ("h.3", "h.12")
    np.testing.assert_array_equal(stored("h.3"), X[:, 0].reshape(20, 3))
    np.testing.assert_array_equal(stored("h.12"), X[:, 1, :, :2].reshape(20, 2))
    import_features("s", "test", ["a", "b"], "parts.npz:h_{}", ":y")
    np.testing.assert_array_equal(stored("b", "test"), X[:, 1, :, :2].reshape(20, 2))


REFUSED = {
    "one name": (dict(layer="h"), r"1 layer name for 2 layers, features of shape \(4, 2, 5, 3\).*\nwrite --layer 'h.{}'"),
    "three names": (dict(layer=["a", "b", "c"]), "3 layer names for 2 layers"),
    "twice": (dict(layer=["a", "a"]), "--layer a twice"),
    "two patterns": (dict(layer=["a.{}", "b"]), "one pattern, or a name per layer"),
    "pattern of one": (dict(features="f.npy"), "for a single layer in 'f.npy'; expected a name without"),
    "index of none": (dict(features="f.npy", layer="h", layer_index=0), r"layers on an axis\nsuch as --axes N,L,D"),
    "index too high": (dict(layer_index=2), "--layer-index 2; expected 0 to 1"),
    "axes and keys": (dict(features="l.npz:h_{}", axes="N,L,D"), "by array or by axis, not both"),
    "no such key": (dict(features="parts.npz:g_{}"), "no array 'g_{}' in 'parts.npz'; expected one of"),
    "key in path": (dict(features="x{}.npy"), "no features at"),
    "rows": (dict(features="uneven.npz:h_{}"), "9 rows in 'uneven.npz:h_1'; expected 20"),
    "predictions": (dict(predictions="y.npy"), "predictions with 2 layers; expected the one layer"),
    "bad name": (dict(layer="a/{}"), "a/{}"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_names_and_layers_that_do_not_fit_are_refused_before_anything_is_written(case):
    flat = X[:, 0].reshape(20, 3)
    np.save("f.npy", flat)
    np.savez("l.npz", h_0=flat[:, None])
    np.savez("uneven.npz", h_0=flat, h_1=flat[:9])
    options, message = REFUSED[case]
    before = tree(Path())
    with pytest.raises(NcbatchError, match=message) as refused:
        import_features(
            "s", "train", **({"layer": "h.{}", "features": "x.npy", "labels": "y.npy"} | options)
        )
    assert isinstance(refused.value, UsageError | DataError | UnknownNameError)
    assert tree(Path()) == before


def test_numbers_of_layers_may_have_leading_zeros():
    flat = X[:, 0].reshape(20, 3)
    np.savez("a.npz", layer_00=flat, layer_01=-flat, layer_10=2 * flat, y=Y.ravel())
    done = import_features("s", "train", "h.{}", "a.npz:layer_{}", ":y")
    assert done.layers == ("h.0", "h.1", "h.10")
    np.testing.assert_array_equal(stored("h.1"), -flat)
    np.savez("b.npz", layer_1=flat, layer_01=flat)
    with pytest.raises(DataError, match=r"'b.npz' holds 'layer_1' and 'layer_01'; expected one"):
        import_features("t", "train", "h.{}", "b.npz:layer_{}", "y.npy")


@pytest.mark.parametrize("later", [{"h_0"}, {"h_0", "h_1", "h_2"}, {"h_0", "h_2"}])
def test_every_file_holds_the_same_layers(later: set[str]):
    flat = X[:, 0].reshape(20, 3)
    np.savez("k0.npz", h_0=flat, h_1=flat, y=Y.ravel())
    np.savez("k1.npz", y=Y.ravel(), **dict.fromkeys(later, flat))
    with pytest.raises(DataError, match=r"'k1.npz' holds layers 0.*; expected 0, 1, as 'k0.npz'"):
        import_features("s", "train", "h.{}", "k?.npz:h_{}", ":y")
    assert not Path("s").exists()


def test_layers_have_the_same_rows_file_by_file():
    for number, rows in enumerate([(4, 2), (2, 4)]):
        np.savez(
            f"k{number}.npz", h_0=X[0, 0, : rows[0]], h_1=X[0, 0, : rows[1]], y=Y[0, : rows[0]]
        )
    with pytest.raises(DataError, match=r"2 rows in 'k0.npz:h_1'; expected 4, as in 'k0.npz:h_0'"):
        import_features("s", "train", "h.{}", "k?.npz:h_{}", ":y")
    np.savez("turned.npz", h_0=X[:, 0], h_1=X[:, 0].transpose(1, 0, 2), y=Y)
    with pytest.raises(DataError, match=r"5 x 4 rows in 'turned.npz:h_1'; expected 4 x 5"):
        import_features("s", "train", "h.{}", "turned.npz:h_{}", ":y", axes="B,T,D")


def test_the_command_line_takes_patterns_names_and_axes(folder):
    line = ["import", "s", "--split", "train", "--features", "x.npy", "--labels", "y.npy"]
    done = run_here(*line, "--layer", "h.{}", "--axes", "B,L,T,D", cwd=folder)
    assert done.code == 0, done.err
    assert "axes of the features: B,L,T,D" in done.out
    assert "20 rows of 3 features of 2 layers imported into s/train/h.0, h.1" in done.out
    done = run_here(*line, "--layer", "a", "--layer", "b", cwd=folder)
    assert done.code == 0, done.err
    done = run_here(*line, "--layer", "c", "--layer-index", 1, cwd=folder)
    assert done.code == 0, done.err
    assert FeatureStore.open("s").layers() == ["h.0", "h.1", "a", "b", "c"]


def test_a_classifier_comes_from_any_format(tmp_path):
    import torch
    from safetensors.torch import save_file

    import_features("s", "train", "h.{}", "x.npy", "y.npy")
    weight = torch.randn(7, 3).to(torch.bfloat16)
    torch.save({"model": {"lm_head": {"weight": weight}}}, "m.pt")
    save_file({"lm_head.weight": weight, "bias": torch.ones(7)}, "m.safetensors")
    assert import_classifier("s", "h.1", "m.pt:model.lm_head.weight") == (7, 3)
    assert import_classifier("s", "h.0", "m.safetensors:lm_head.weight", "m.safetensors:bias") == (
        7,
        3,
    )
    for layer in ("h.0", "h.1"):
        found, _ = FeatureStore.open("s").classifier(layer)
        np.testing.assert_array_equal(np.asarray(found, np.float32), weight.float().numpy())


# ------------------------------------------------------------------------------------------- axes

SIZES = {"N": 7, "B": 3, "T": 5, "L": 4, "D": 6}
SPELLINGS = [
    "N,D", "T,D", "B,T,D", "L,N,D", "N,L,D", "L,T,D", "T,L,D", "L,B,T,D", "B,L,T,D", "B,T,L,D",
]  # fmt: skip


def numbered(axes: tuple[str, ...]) -> np.ndarray:
    """Let each value tell its index."""
    shape = [SIZES[a] for a in axes]
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def by_hand(array: np.ndarray, axes: tuple[str, ...], layer: int) -> np.ndarray:
    """Collect the rows of a layer one at a time."""
    counted = [a for a in ("N", "B", "T") if a in axes]
    rows = []
    for at in itertools.product(*(range(SIZES[a]) for a in counted)):
        index = dict(zip(counted, at, strict=True)) | {"L": layer, "D": slice(None)}
        rows.append(array[tuple(index[a] for a in axes)])
    return np.stack(rows)


@pytest.mark.parametrize("save", [w.save_npy, w.save_npz, w.save_hdf5, w.save_parquet])
@pytest.mark.parametrize("text", SPELLINGS)
def test_rows_come_in_order_for_every_spelling(tmp_path: Path, save, text):
    axes = parse_axes(text)
    array = numbered(axes)
    (shard,) = open_shards(save(tmp_path / "x", array), "features")
    layers = range(SIZES["L"]) if "L" in axes else (0,)
    if shard.read is None and axes[0] == "L":
        with pytest.raises(DataError, match="this format is read in order"):
            as_rows(shard, axes)
        return
    for n in (1, 2, 4, 6, 100):
        whole = np.concatenate(list(as_rows(shard, axes).blocks(n)))
        for layer in layers:
            expected = by_hand(array, axes, layer)
            np.testing.assert_array_equal(whole[:, layer] if "L" in axes else whole, expected)
            if "L" in axes:
                one = as_rows(shard, axes, layer)
                assert one.shape == expected.shape
                np.testing.assert_array_equal(np.concatenate(list(one.blocks(n))), expected)


def test_no_more_is_read_at_a_time_than_was_asked_for(tmp_path):
    (shard,) = open_shards(w.save_npy(tmp_path / "x", numbered(("L", "B", "T", "D"))), "features")
    for n in range(1, 30):
        assert max(len(b) for b in as_rows(shard, ("L", "B", "T", "D")).blocks(n)) <= n


@pytest.mark.parametrize("text", ["", "D", "T,B,D", "D,N", "N,T,D", "N,N,D", "X,D", "B,D", "L,D"])
def test_axes_that_make_no_rows_are_refused(text):
    with pytest.raises(UsageError, match=r"--axes '.*'; expected N,D  T,D"):
        parse_axes(text)


def axes_of(tmp_path: Path, features: str, others: tuple[int, ...] | None, **options) -> str:
    shards = open_shards(w.save_npy(tmp_path / "x", numbered(tuple(features))), "features")
    beside = (
        ()
        if others is None
        else open_shards(w.save_npy(tmp_path / "y", np.zeros(others, int)), "labels")
    )
    arguments = {"asked": None, "layers": None} | options
    return ",".join(find_axes(shards, arguments["asked"], beside, arguments["layers"]))


@pytest.mark.parametrize(
    ("features", "others", "axes"),
    [
        ("ND", None, "N,D"), ("BTD", (3, 5), "B,T,D"), ("BTD", (15,), "B,T,D"),
        ("TLD", (5,), "N,L,D"), ("LTD", (5,), "L,N,D"), ("BLTD", (3, 5), "B,L,T,D"),
        ("LBTD", (3, 5), "L,B,T,D"), ("BTLD", (3, 5), "B,T,L,D"), ("LBTD", (15,), "L,B,T,D"),
    ],
)  # fmt: skip
def test_axes_are_seen_from_the_labels_where_one_reading_fits(tmp_path, features, others, axes):
    assert axes_of(tmp_path, features, others) == axes


def test_axes_that_are_not_clear_are_asked_for(tmp_path):
    with pytest.raises(DataError, match=r"shape \(3, 5, 6\), which can be read in several") as e:
        axes_of(tmp_path, "BTD", None)
    assert str(e.value).endswith(
        "--axes B,T,D, --axes T,L,D, --axes L,T,D, --axes N,L,D, --axes L,N,D "
        "(B sequences, T positions, L layers)"
    )
    with pytest.raises(DataError, match=r"the \(8,\) of '.*' do not fit"):
        axes_of(tmp_path, "BTD", (8,))
    with pytest.raises(DataError, match="3 axes, as in --axes B,T,D"):
        axes_of(tmp_path, "ND", None, asked="B,T,D")
    square = open_shards(w.save_npy(tmp_path / "z", np.zeros((4, 4, 2))), "features")
    labels = open_shards(w.save_npy(tmp_path / "y", np.zeros(4, int)), "labels")
    with pytest.raises(DataError, match="which can be read in several ways"):
        find_axes(square, None, labels, None)


def test_a_layer_that_is_not_there_is_refused(tmp_path):
    (shard,) = open_shards(w.save_npy(tmp_path / "x", numbered(("T", "L", "D"))), "features")
    with pytest.raises(UsageError, match="--layer-index 4; expected 0 to 3"):
        as_rows(shard, ("T", "L", "D"), 4)


# ------------------------------------------------------------------------------------ row streams

ROWS = make_toy(300).X


def save_zarr(path: Path, array: np.ndarray, **options) -> None:
    zarr.create_array(path, data=array, **({"chunks": (70, 3)} | options))


def save_in_group(path: Path, array: np.ndarray) -> None:
    zarr.open_group(path.parent, mode="w").create_array(path.name, data=array, chunks=(64, 4))


KINDS = {
    "x.npy": lambda path: np.save(path, ROWS),
    "fortran.npy": lambda path: np.save(path, np.asfortranarray(ROWS)),
    "big-endian.npy": lambda path: np.save(path, ROWS.astype(">f4")),
    "double.npy": lambda path: np.save(path, ROWS.astype(np.float64)),
    "one.npz": lambda path: np.savez(path, anything=ROWS),
    "small.npz": lambda path: np.savez_compressed(path, x=ROWS),
    "two.npz:b": lambda path: np.savez(str(path)[:-2], a=ROWS[:3], b=ROWS),
    "v3.zarr": lambda path: save_zarr(path, ROWS),
    "v2.zarr": lambda path: save_zarr(path, ROWS, zarr_format=2),
    "sharded.zarr": lambda path: save_zarr(path, ROWS, chunks=(10, 4), shards=(100, 4)),
    "g.zarr/inner": lambda path: save_in_group(path, ROWS),
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("n", [1, 64, 299, 300, 10_000])
def test_every_kind_of_file_gives_its_rows(tmp_path, name, n):
    KINDS[name](tmp_path / name)
    stream = open_rows(str(tmp_path / name))
    assert (stream.n_rows, stream.row_shape) == (300, (4,))
    blocks = list(stream.batches(n))
    assert [len(block) for block in blocks[:-1]] == [n] * (len(blocks) - 1)
    assert 0 < len(blocks[-1]) <= n
    np.testing.assert_array_equal(np.concatenate(blocks), ROWS)


@pytest.mark.parametrize("dtype", ["int8", "uint16", "int64", "float16", "bool_"])
def test_the_dtype_is_that_of_the_file(tmp_path, dtype):
    np.save(tmp_path / "x.npy", (ROWS > 0).astype(dtype))
    if dtype == "bool_":
        with pytest.raises(DataError, match="holds values of type bool; expected numbers"):
            open_rows(str(tmp_path / "x.npy"))
    else:
        assert open_rows(str(tmp_path / "x.npy")).dtype == dtype


def test_bfloat16_comes_from_zarr(tmp_path):
    save_zarr(tmp_path / "x.zarr", ROWS.astype(ml_dtypes.bfloat16))
    stream = open_rows(str(tmp_path / "x.zarr"))
    assert stream.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(
        np.concatenate(list(stream.batches(77))).astype(np.float32),
        ROWS.astype(ml_dtypes.bfloat16).astype(np.float32),
    )


def test_bfloat16_that_numpy_made_nameless_is_refused_with_a_remedy(tmp_path):
    np.save(tmp_path / "x.npy", ROWS.astype(ml_dtypes.bfloat16))
    with pytest.raises(DataError, match="save it as float32, or as a Zarr array"):
        open_rows(str(tmp_path / "x.npy"))


def test_shards_come_in_natural_order_and_know_their_rows(tmp_path):
    sizes = {"x1": 5, "x2": 0, "x10": 7, "x9": 1}
    start = 0
    for name in ("x1", "x2", "x9", "x10"):
        np.save(tmp_path / f"{name}.npy", ROWS[start : start + sizes[name]])
        start += sizes[name]
    stream = open_rows(str(tmp_path / "x*.npy"))
    assert [Path(shard.path).stem for shard in stream.shards] == ["x1", "x2", "x9", "x10"]
    np.testing.assert_array_equal(np.concatenate(list(stream.batches(4))), ROWS[:13])
    for row, (inner, name) in {0: (0, "x1"), 5: (0, "x9"), 6: (0, "x10"), 12: (6, "x10")}.items():
        assert stream.row_of(row) == f"row {row} (row {inner} of '{tmp_path / name}.npy')"


def test_a_single_file_names_rows_alone(tmp_path):
    np.save(tmp_path / "x.npy", ROWS)
    assert open_rows(str(tmp_path / "x.npy")).row_of(12) == "row 12"


def test_globs_reach_members_of_archives_and_zarr_arrays(tmp_path):
    for part in range(3):
        np.savez(tmp_path / f"p{part}.npz", x=ROWS[part * 100 : part * 100 + 100], y=ROWS[:1])
        save_zarr(tmp_path / f"q{part}.zarr", ROWS[part * 100 : part * 100 + 100])
    for source in ("p*.npz:x", "q*.zarr"):
        stream = open_rows(str(tmp_path / source))
        np.testing.assert_array_equal(np.concatenate(list(stream.batches(33))), ROWS)


def test_a_file_whose_name_looks_like_a_glob_is_taken_as_it_is(tmp_path):
    np.save(tmp_path / "x[1].npy", ROWS[:3])
    np.save(tmp_path / "x1.npy", ROWS)
    assert open_rows(str(tmp_path / "x[1].npy")).n_rows == 3


def test_shards_of_several_dtypes_are_held_by_the_widest(tmp_path):
    np.save(tmp_path / "a.npy", ROWS[:5].astype(np.float16))
    np.save(tmp_path / "b.npy", ROWS[5:].astype(np.float64))
    assert open_rows(str(tmp_path / "*.npy")).dtype == np.float64


@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=6), st.integers(1, 50), st.integers(1, 50)
)  # fmt: skip
def test_batches_do_not_depend_on_shards_or_chunks(sizes, chunk, n):
    rows = np.arange(sum(sizes))
    starts = np.cumsum([0, *sizes[:-1]])

    def shard(start: int, size: int) -> Shard:
        part = rows[start : start + size]
        step = min(chunk, 7)
        return Shard(
            "x",
            part.shape,
            part.dtype,
            lambda m: (part[i : i + min(step, m)] for i in range(0, size, min(step, m))),
        )

    stream = RowStream("rows", tuple(map(shard, starts, sizes)))
    blocks = list(stream.batches(n))
    assert [len(block) for block in blocks] == [n] * (len(rows) // n) + [len(rows) % n] * (
        len(rows) % n > 0
    )
    assert np.array_equal(np.concatenate([rows[:0], *blocks]), rows)


def test_reading_asks_for_at_most_32_mib_and_at_least_a_row():
    assert read_rows_of(4) == 2**23
    assert read_rows_of(2**40) == 1
    assert read_rows_of(0) >= 1


def test_npy_blocks_are_copies_that_outlive_the_file(tmp_path):
    np.save(tmp_path / "x.npy", ROWS)
    stream = open_rows(str(tmp_path / "x.npy"))
    blocks = list(stream.batches(100))
    (tmp_path / "x.npy").unlink()
    np.testing.assert_array_equal(np.concatenate(blocks), ROWS)


# -------------------------------------------------------------------------- files that are refused


def truncated(path: Path, make, keep: float) -> None:
    make(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])


def flipped(path: Path, make) -> None:
    make(path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def zip_of(path: Path, **members: str) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in members.items():
            archive.writestr(name.replace("_", "."), text)


def broken_zarr(path: Path) -> None:
    save_zarr(path, ROWS)
    (path / "c/2/0").write_bytes(b"damage")


BAD_FILES = {
    "none.npy": (lambda p: None, "no features at '.*none.npy'; expected an existing file"),
    "none*.npy": (lambda p: None, "no features at"),
    "text.npy": (lambda p: p.write_text("1 2 3"), "'.*' cannot be read: .*; expected an intact"),
    "void.npy": (lambda p: p.write_bytes(b""), "cannot be read: EOF.*; expected an intact file$"),
    "cut.npy": (lambda p: truncated(p, KINDS["x.npy"], 0.5), "cannot be read: mmap length"),
    "objects.npy": (lambda p: np.save(p, np.array([{}, 1])), "holds values of type object"),
    "text-array.npy": (lambda p: np.save(p, np.array(["a"])), "of type <U1; expected numbers"),
    "complex.npy": (lambda p: np.save(p, ROWS + 1j), "of type complex"),
    "scalar.npy": (lambda p: np.save(p, np.float32(1)), "holds a single value"),
    "two.npz": (lambda p: np.savez(p, a=ROWS, b=ROWS), r"arrays a, b.*\nwrite '.*two.npz:a'$"),
    "one.npz:b": (lambda p: np.savez(str(p)[:-2], bb=ROWS), r"no array 'b'.*\ndid you mean 'bb'"),
    "void.npz": (lambda p: zip_of(p), "holds no array; expected an archive made by numpy.savez"),
    "text.npz": (lambda p: zip_of(p, readme_txt="hi"), "holds no array"),
    "nonsense.npz": (lambda p: zip_of(p, a_npy="hi"), "cannot be read"),
    "cut.npz": (lambda p: truncated(p, KINDS["one.npz"], 0.5), "not a zip file"),
    "flipped.npz": (lambda p: flipped(p, KINDS["one.npz"]), "Bad CRC-32"),
    "flipped-small.npz": (lambda p: flipped(p, KINDS["small.npz"]), "cannot be read"),
    "columns.npz": (lambda p: np.savez(p, a=np.asfortranarray(ROWS)), "stored by columns"),
    "folder": (lambda p: p.mkdir(), "'.*' is a folder; expected a file, or a Zarr array"),
    "group.zarr": (lambda p: save_in_group(p / "a", ROWS), r"group of arrays a; .*\nwrite '.*zarr/a'"),
    "void.zarr": (lambda p: zarr.create_group(p), "is a Zarr group; expected a Zarr array"),
    "json.zarr": (lambda p: (p.mkdir(), (p / "zarr.json").write_text("{")), "cannot be read"),
    "broken.zarr": (broken_zarr, "'.*broken.zarr' cannot be read"),
    "x.txt": (lambda p: p.write_text("1 2"), "of an unknown kind; expected a .npy file"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_that_cannot_be_used_is_named_in_two_lines_at_most(tmp_path, name):
    make, message = BAD_FILES[name]
    make(tmp_path / name)
    with pytest.raises((DataError, UnknownNameError), match=message) as refused:
        list(open_rows(str(tmp_path / name)).batches(100))
    assert len(str(refused.value).splitlines()) <= 2
    assert name.rpartition(":")[0] or name in str(refused.value)


def test_shards_of_uneven_width_are_named(tmp_path):
    np.save(tmp_path / "x1.npy", ROWS)
    np.save(tmp_path / "x2.npy", ROWS[:, :3])
    with pytest.raises(DataError, match=r"x2.npy' with rows of shape \(3,\); expected \(4,\), as"):
        open_rows(str(tmp_path / "x*.npy"))


def test_a_shard_that_cannot_be_read_is_named_among_others(tmp_path):
    for part in range(3):
        np.savez(tmp_path / f"p{part}.npz", x=ROWS)
    flipped(tmp_path / "p1.npz", KINDS["one.npz"])
    with pytest.raises(DataError, match=r"p1.npz"):
        list(open_rows(str(tmp_path / "p*.npz")).batches(50))
