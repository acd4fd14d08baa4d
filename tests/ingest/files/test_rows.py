"""Row streams: every kind of file gives its rows in order, whatever is asked for at a time."""

from __future__ import annotations

import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st

from ncbatch.errors import DataError, UnknownNameError
from ncbatch.ingest.files.layers import RowStream, Shard, open_rows, read_rows_of
from tests.conftest import make_toy

X = make_toy(300).X


def save_zarr(path: Path, array: np.ndarray, **options) -> None:
    zarr.create_array(path, data=array, **({"chunks": (70, 3)} | options))


def save_in_group(path: Path, array: np.ndarray) -> None:
    zarr.open_group(path.parent, mode="w").create_array(path.name, data=array, chunks=(64, 4))


KINDS = {
    "x.npy": lambda path: np.save(path, X),
    "fortran.npy": lambda path: np.save(path, np.asfortranarray(X)),
    "big-endian.npy": lambda path: np.save(path, X.astype(">f4")),
    "double.npy": lambda path: np.save(path, X.astype(np.float64)),
    "one.npz": lambda path: np.savez(path, anything=X),
    "small.npz": lambda path: np.savez_compressed(path, x=X),
    "two.npz:b": lambda path: np.savez(str(path)[:-2], a=X[:3], b=X),
    "v3.zarr": lambda path: save_zarr(path, X),
    "v2.zarr": lambda path: save_zarr(path, X, zarr_format=2),
    "sharded.zarr": lambda path: save_zarr(path, X, chunks=(10, 4), shards=(100, 4)),
    "g.zarr/inner": lambda path: save_in_group(path, X),
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
    np.testing.assert_array_equal(np.concatenate(blocks), X)


@pytest.mark.parametrize("dtype", ["int8", "uint16", "int64", "float16", "bool_"])
def test_the_dtype_is_that_of_the_file(tmp_path, dtype):
    np.save(tmp_path / "x.npy", (X > 0).astype(dtype))
    if dtype == "bool_":
        with pytest.raises(DataError, match="holds values of type bool; expected numbers"):
            open_rows(str(tmp_path / "x.npy"))
    else:
        assert open_rows(str(tmp_path / "x.npy")).dtype == dtype


def test_bfloat16_comes_from_zarr(tmp_path):
    save_zarr(tmp_path / "x.zarr", X.astype(ml_dtypes.bfloat16))
    stream = open_rows(str(tmp_path / "x.zarr"))
    assert stream.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(
        np.concatenate(list(stream.batches(77))).astype(np.float32),
        X.astype(ml_dtypes.bfloat16).astype(np.float32),
    )


def test_bfloat16_that_numpy_made_nameless_is_refused_with_a_remedy(tmp_path):
    np.save(tmp_path / "x.npy", X.astype(ml_dtypes.bfloat16))
    with pytest.raises(DataError, match="save it as float32, or as a Zarr array"):
        open_rows(str(tmp_path / "x.npy"))


def test_shards_come_in_natural_order_and_know_their_rows(tmp_path):
    sizes = {"x1": 5, "x2": 0, "x10": 7, "x9": 1}
    start = 0
    for name in ("x1", "x2", "x9", "x10"):
        np.save(tmp_path / f"{name}.npy", X[start : start + sizes[name]])
        start += sizes[name]
    stream = open_rows(str(tmp_path / "x*.npy"))
    assert [Path(shard.path).stem for shard in stream.shards] == ["x1", "x2", "x9", "x10"]
    np.testing.assert_array_equal(np.concatenate(list(stream.batches(4))), X[:13])
    for row, (inner, name) in {0: (0, "x1"), 5: (0, "x9"), 6: (0, "x10"), 12: (6, "x10")}.items():
        assert stream.row_of(row) == f"row {row} (row {inner} of '{tmp_path / name}.npy')"


def test_a_single_file_names_rows_alone(tmp_path):
    np.save(tmp_path / "x.npy", X)
    assert open_rows(str(tmp_path / "x.npy")).row_of(12) == "row 12"


def test_globs_reach_members_of_archives_and_zarr_arrays(tmp_path):
    for part in range(3):
        np.savez(tmp_path / f"p{part}.npz", x=X[part * 100 : part * 100 + 100], y=X[:1])
        save_zarr(tmp_path / f"q{part}.zarr", X[part * 100 : part * 100 + 100])
    for source in ("p*.npz:x", "q*.zarr"):
        stream = open_rows(str(tmp_path / source))
        np.testing.assert_array_equal(np.concatenate(list(stream.batches(33))), X)


def test_a_file_whose_name_looks_like_a_glob_is_taken_as_it_is(tmp_path):
    np.save(tmp_path / "x[1].npy", X[:3])
    np.save(tmp_path / "x1.npy", X)
    assert open_rows(str(tmp_path / "x[1].npy")).n_rows == 3


def test_shards_of_several_dtypes_are_held_by_the_widest(tmp_path):
    np.save(tmp_path / "a.npy", X[:5].astype(np.float16))
    np.save(tmp_path / "b.npy", X[5:].astype(np.float64))
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
            "x", part.shape, part.dtype, lambda m: (part[i : i + min(step, m)] for i in range(0, size, min(step, m)))
        )  # fmt: skip

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
    np.save(tmp_path / "x.npy", X)
    stream = open_rows(str(tmp_path / "x.npy"))
    blocks = list(stream.batches(100))
    (tmp_path / "x.npy").unlink()
    np.testing.assert_array_equal(np.concatenate(blocks), X)


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
    save_zarr(path, X)
    (path / "c/2/0").write_bytes(b"damage")


BAD_FILES = {
    "none.npy": (lambda p: None, "no features at '.*none.npy'; expected an existing file"),
    "none*.npy": (lambda p: None, "no features at"),
    "text.npy": (lambda p: p.write_text("1 2 3"), "'.*' cannot be read: .*; expected an intact"),
    "void.npy": (lambda p: p.write_bytes(b""), "cannot be read: EOF.*; expected an intact file$"),
    "cut.npy": (lambda p: truncated(p, KINDS["x.npy"], 0.5), "cannot be read: mmap length"),
    "objects.npy": (lambda p: np.save(p, np.array([{}, 1])), "holds values of type object"),
    "text-array.npy": (lambda p: np.save(p, np.array(["a"])), "of type <U1; expected numbers"),
    "complex.npy": (lambda p: np.save(p, X + 1j), "of type complex"),
    "scalar.npy": (lambda p: np.save(p, np.float32(1)), "holds a single value"),
    "two.npz": (lambda p: np.savez(p, a=X, b=X), r"arrays a, b.*\nwrite '.*two.npz:a'$"),
    "one.npz:b": (lambda p: np.savez(str(p)[:-2], bb=X), r"no array 'b'.*\ndid you mean 'bb'"),
    "void.npz": (lambda p: zip_of(p), "holds no array; expected an archive made by numpy.savez"),
    "text.npz": (lambda p: zip_of(p, readme_txt="hi"), "holds no array"),
    "nonsense.npz": (lambda p: zip_of(p, a_npy="hi"), "cannot be read"),
    "cut.npz": (lambda p: truncated(p, KINDS["one.npz"], 0.5), "not a zip file"),
    "flipped.npz": (lambda p: flipped(p, KINDS["one.npz"]), "Bad CRC-32"),
    "flipped-small.npz": (lambda p: flipped(p, KINDS["small.npz"]), "cannot be read"),
    "columns.npz": (lambda p: np.savez(p, a=np.asfortranarray(X)), "stored by columns"),
    "folder": (lambda p: p.mkdir(), "'.*' is a folder; expected a file, or a Zarr array"),
    "group.zarr": (lambda p: save_in_group(p / "a", X), r"group of arrays a; .*\nwrite '.*zarr/a'"),
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
    np.save(tmp_path / "x1.npy", X)
    np.save(tmp_path / "x2.npy", X[:, :3])
    with pytest.raises(DataError, match=r"x2.npy' with rows of shape \(3,\); expected \(4,\), as"):
        open_rows(str(tmp_path / "x*.npy"))


def test_a_shard_that_cannot_be_read_is_named_among_others(tmp_path):
    for part in range(3):
        np.savez(tmp_path / f"p{part}.npz", x=X)
    flipped(tmp_path / "p1.npz", KINDS["one.npz"])
    with pytest.raises(DataError, match=r"p1.npz"):
        list(open_rows(str(tmp_path / "p*.npz")).batches(50))
