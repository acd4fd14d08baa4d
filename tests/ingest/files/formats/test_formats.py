"""Every format gives back, bit for bit, what its own library wrote, and names what is damaged."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from ncbatch.errors import DataError, NcbatchError, UnknownNameError, UsageError
from ncbatch.ingest.files.formats.table import FORMATS
from ncbatch.ingest.files.layers import find_paths, open_rows, open_shards
from tests.ingest.files.formats import writers as w
from tests.ingest.files.formats.writers import BFLOAT16, Array

ANY = ["float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8"]
WITH_BFLOAT16 = [*ANY, "bfloat16"]
WRITERS: dict[str, tuple[Callable[[Path, Array], str], list[str], int]] = {
    # writer, dtypes, axes at most
    "npy": (w.save_npy, ANY, 4),
    "npz": (w.save_npz, ANY, 4),
    "raw": (w.save_raw, WITH_BFLOAT16, 4),
    "safetensors": (w.save_safetensors, WITH_BFLOAT16, 4),
    "safetensors.numpy": (w.save_safetensors_numpy, ANY, 4),
    "pt": (w.save_pt, WITH_BFLOAT16, 4),
    "pth": (w.save_pt_alone, WITH_BFLOAT16, 4),
    "pt before 1.6": (w.save_old_pt, WITH_BFLOAT16, 4),
    "hdf5": (w.save_hdf5, ANY, 4),
    "zarr 2": (w.save_zarr2, ANY, 4),
    "zarr 3": (w.save_zarr3, WITH_BFLOAT16, 4),
    "parquet": (w.save_parquet, ANY, 4),
    "parquet, fixed": (w.save_parquet_fixed, ANY, 4),
    "feather": (w.save_feather, ANY, 4),
    "arrow stream": (w.save_arrow, ANY, 4),
    "datasets": (w.save_dataset, ["float32", "float64", "int32", "int64"], 4),
    "fbin": (w.save_bin, ["float32", "int32", "uint8"], 2),
    "fvecs": (w.save_vecs, ["float32", "int32", "uint8"], 2),
}
SHAPES = {1: (23,), 2: (23, 6), 3: (13, 4, 6), 4: (5, 3, 4, 6)}
SKIPPED = {("arrow stream", 1)}  # a tensor has an axis
CASES = [
    (name, dtype, ndim)
    for name, (_, dtypes, most) in WRITERS.items()
    for ndim in range(1, most + 1)
    for dtype in (dtypes if ndim == 2 else dtypes[:1] + dtypes[-1:])
    if (name, ndim) not in SKIPPED
]


def make(shape: tuple[int, ...], dtype: str, seed: int = 0) -> Array:
    """Draw values of every sign and of many exponents."""
    rng = np.random.default_rng(seed)
    kind = BFLOAT16 if dtype == "bfloat16" else np.dtype(dtype)
    if kind.kind in "iu":
        info = np.iinfo(kind)
        return rng.integers(info.min, info.max, shape, kind, endpoint=True)
    return (rng.standard_normal(shape) * 2.0 ** rng.integers(-9, 9, shape)).astype(kind)


@pytest.mark.parametrize(("name", "dtype", "ndim"), CASES)
def test_a_file_comes_back_bit_for_bit(tmp_path, name, dtype, ndim):
    array = make(SHAPES[ndim], dtype)
    source = WRITERS[name][0](tmp_path / "x", array)
    what = "labels" if ndim == 1 else "features"
    (shard,) = open_shards(source, what)
    assert (shard.shape, shard.dtype) == (array.shape, array.dtype)
    for n in (1, 5, 1000):
        parts = list(shard.blocks(n))
        assert all(0 < len(part) <= n for part in parts)
        whole = np.concatenate(parts)
        assert whole.dtype == array.dtype
        assert whole.tobytes() == array.tobytes()
    if shard.read is not None:
        index = (slice(1, 4), *[slice(1, 3)] * (ndim - 1))
        assert np.ascontiguousarray(shard.read(index)).tobytes() == array[index].tobytes()


@pytest.mark.parametrize("name", WRITERS)
def test_shards_of_every_format_come_in_natural_order(tmp_path, name):
    array = make((23, 6), "float32")
    for number, (start, stop) in {2: (0, 5), 10: (5, 22), 11: (22, 23)}.items():
        source = WRITERS[name][0](tmp_path / f"x{number}", array[start:stop])
    stream = open_rows(source.replace("x11", "x*"))
    assert [shard.shape[0] for shard in stream.shards] == [5, 17, 1]
    assert np.concatenate(list(stream.batches(7))).tobytes() == array.tobytes()


@pytest.mark.parametrize("name", [n for n in WRITERS if n not in ("zarr 2", "zarr 3")])
def test_a_file_that_is_cut_short_is_named_in_one_line(tmp_path, name):
    source = WRITERS[name][0](tmp_path / "x", make((500, 6), "float32"))
    (path,), _ = find_paths(source, "features")
    files = [f for f in Path(path).rglob("*.arrow")] if Path(path).is_dir() else [Path(path)]
    file = sorted(files)[-1]
    size = file.stat().st_size
    headless = name in ("raw", "fvecs")  # whole rows of them, or nothing, may well be meant
    for keep in (3, size // 2 + 1, size - 3, *([] if headless else [0, size // 2])):
        content = file.read_bytes()
        file.write_bytes(content[:keep])
        with pytest.raises((DataError, UnknownNameError)) as refused:
            list(open_rows(source).batches(100))
        first = str(refused.value).splitlines()[0]
        assert path in first
        assert len(str(refused.value).splitlines()) <= 2
        file.write_bytes(content)
    assert open_rows(source).n_rows == 500


# ------------------------------------------------------------------------- names of arrays in files


def two(path: Path) -> dict[str, str]:
    """Save files of two arrays ``a`` and ``b`` in every format that has names."""
    import h5py
    import pyarrow as pa
    import torch
    from pyarrow import feather, parquet
    from safetensors.numpy import save_file

    a, b = make((4, 3), "float32"), make((4, 3), "float32", 1)
    np.savez(path / "x.npz", a=a, b=b)
    save_file({"a": a, "b": b}, path / "x.safetensors")
    torch.save({"a": torch.from_numpy(a), "b": torch.from_numpy(b)}, path / "x.pt")
    with h5py.File(path / "x.h5", "w") as file:
        file["a"], file["b"] = a, b
    table = pa.table({"a": list(a), "b": list(b)})
    parquet.write_table(table, path / "x.parquet")
    feather.write_feather(table, str(path / "x.feather"))
    names = ("npz", "safetensors", "pt", "h5", "parquet", "feather")
    return {name: str(path / f"x.{name}") for name in names}


def test_a_name_that_is_left_out_or_wrong_is_answered_with_those_there(tmp_path):
    for path in two(tmp_path).values():
        with pytest.raises(DataError, match=r"s a, b; expected one of them") as refused:
            open_rows(path)
        assert str(refused.value).splitlines()[1] == f"write '{path}:a'"
        with pytest.raises(UnknownNameError, match=r"no \w+ 'bb' in '.*'; expected one of: a, b\n"):
            open_rows(f"{path}:bb")
        assert np.concatenate(list(open_rows(f"{path}:b").batches(9))).shape == (4, 3)


def test_a_name_that_is_left_out_of_a_glob_is_written_behind_it(tmp_path):
    for part in range(2):
        np.savez(tmp_path / f"x{part}.npz", a=np.ones((2, 2)), b=np.ones(2))
    with pytest.raises(DataError, match=r"\nwrite '.*/x\*\.npz:a'$"):
        open_rows(f"{tmp_path}/x*.npz")


def test_nested_names_of_torch_may_be_written_with_slashes(tmp_path):
    import torch

    torch.save({"a": {"b": [torch.ones(2, 3), torch.zeros(2, 3)]}}, tmp_path / "x.pt")
    for key in ("a.b.1", "a/b/1"):
        (block,) = open_rows(f"{tmp_path}/x.pt:{key}").batches(9)
        np.testing.assert_array_equal(block, np.zeros((2, 3)))


def test_a_view_of_a_torch_tensor_is_read_as_it_is_seen(tmp_path):
    import torch

    base = torch.arange(24.0).reshape(4, 6)
    torch.save({"x": base.T[1:5:2]}, tmp_path / "x.pt")
    (block,) = open_rows(f"{tmp_path}/x.pt:x").batches(9)
    np.testing.assert_array_equal(block, base.numpy().T[1:5:2])


def test_a_checkpoint_may_end_in_bin(tmp_path):
    source = w.save_pt(tmp_path / "pytorch_model", make((5, 3), "float16"))
    (tmp_path / "pytorch_model.pt").rename(tmp_path / "pytorch_model.bin")
    (block,) = open_rows(source.replace(".pt:", ".bin:")).batches(9)
    assert block.tobytes() == make((5, 3), "float16").tobytes()
    assert open_rows(f"{tmp_path}/pytorch_model.bin:uint8").row_shape == ()
    with pytest.raises(UnknownNameError, match=r"expected one of: acts\.h\.0, acts\.list\.0"):
        open_rows(f"{tmp_path}/pytorch_model.bin:head")


def test_a_sharded_checkpoint_is_read_by_its_index(tmp_path):
    first = Path(w.save_safetensors(tmp_path / "model-1-of-2", make((5, 3), "bfloat16")).partition(":")[0])  # fmt: skip
    index = {"weight_map": {"deep.name": first.name, "gone": "no.safetensors"}}
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps(index))
    (block,) = open_rows(f"{path}:deep.name").batches(9)
    assert block.tobytes() == make((5, 3), "bfloat16").tobytes()
    with pytest.raises(DataError, match=r"no\.safetensors"):
        open_rows(f"{path}:gone")
    with pytest.raises(UnknownNameError, match=r"expected one of: deep\.name, gone"):
        open_rows(f"{path}:name")


def test_a_name_where_there_is_none_is_refused(tmp_path):
    np.save(tmp_path / "x.npy", make((3, 2), "float32"))
    with pytest.raises(DataError, match=r"x.npy:k', but that file holds one array without a name"):
        open_rows(f"{tmp_path}/x.npy:k")


def test_a_dictionary_of_data_sets_is_answered_with_its_parts(tmp_path):
    import datasets

    datasets.disable_progress_bars()
    part = datasets.Dataset.from_dict({"x": [[1.0, 2.0]]})
    datasets.DatasetDict(train=part, test=part).save_to_disk(tmp_path / "d")
    with pytest.raises(DataError, match="data sets train, test") as refused:
        open_rows(f"{tmp_path}/d:x")
    assert f"write '{tmp_path}/d/train:COLUMN'" in str(refused.value)
    assert open_rows(f"{tmp_path}/d/train:x").row_shape == (2,)


def test_a_data_set_saved_with_an_order_of_its_own_is_refused(tmp_path):
    source = w.save_dataset(tmp_path / "d", make((6, 2), "float32"))
    state = json.loads((tmp_path / "d/state.json").read_text())
    state["_indices_data_files"] = [{"filename": "indices.arrow"}]  # as datasets before 2.10 wrote
    (tmp_path / "d/state.json").write_text(json.dumps(state))
    with pytest.raises(DataError, match=r"indices mapping[\s\S]*flatten_indices"):
        open_rows(source)


def test_bfloat16_that_numpy_made_nameless_can_be_named(tmp_path):
    array = make((9, 4), "bfloat16")
    np.save(tmp_path / "x.npy", array)
    source = f"{tmp_path}/x.npy"
    with pytest.raises(DataError, match=r"write '.*x.npy:bfloat16' \(.npy\) if that is what it is"):
        open_rows(source)
    stream = open_rows(f"{source}:bfloat16")
    assert stream.dtype == BFLOAT16
    assert np.concatenate(list(stream.batches(4))).tobytes() == array.tobytes()
    np.save(tmp_path / "x.npy", array.astype(np.float32))
    with pytest.raises(DataError, match="holds one array without a name"):
        open_rows(f"{source}:bfloat16")


# ----------------------------------------------------------------------------- what cannot be taken


def save_column(path: Path, column: Any) -> str:
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.table({"x": column}), path)
    return str(path)


COLUMNS = {
    "uneven": ([[1.0, 2.0], [3.0]], r"has 1 values in row 1; expected 2, as in its first row\n.*mask"),
    "null row": ([[1.0, 2.0], None], "has no value in row 1; expected no nulls"),
    "null value": ([[1.0, 2.0], [3.0, None]], "has no value in row 1"),
    "null first": ([None, [1.0, 2.0]], "has no value in row 0; expected no nulls"),
    "empty first": ([[], [1.0, 2.0]], "has 0 values in row 0; expected 2, as in its first row that"),
    "empty for long": ([[]] * 200 + [[1.0, 2.0]], "has 0 values in row 0; expected 2"),
    "empty inside": ([[[], [1.0]], [[3.0], [4.0]]], "has 0 values in row 0; expected 1"),
    "text": (["a", "b"], "holds values of type string; expected numbers, or lists"),
    "uneven inside": ([[[1.0], [2.0]], [[3.0], [4.0, 5.0]]], "has 2 values in row 1; expected 1"),
}  # fmt: skip


@pytest.mark.parametrize("case", COLUMNS)
def test_a_column_that_is_no_array_names_the_row(tmp_path, case):
    column, message = COLUMNS[case]
    source = save_column(tmp_path / "x.parquet", column)
    with pytest.raises(DataError, match=message):
        list(open_rows(source).batches(9))
    if "first" in case or "long" in case:
        assert open_rows(source).row_shape == (2,)


RAW = {
    "x.bin": r"without a known type: ''; expected path:dtype:width",
    "x.bin:complex64:3": "without a known type",
    "x.bin:float32:0": "the width '0'",
    "x.bin:float32:7": r"48 bytes: 1 rows and 20 bytes; expected whole rows of 28 bytes",
}


@pytest.mark.parametrize("source", RAW)
def test_raw_values_need_their_type_and_whole_rows(tmp_path, source):
    (tmp_path / "x.bin").write_bytes(bytes(48))
    with pytest.raises((DataError, UsageError), match=RAW[source]):
        open_rows(f"{tmp_path}/{source}")


def test_raw_values_may_be_big_endian(tmp_path):
    array = make((5, 3), "float32")
    (tmp_path / "x.raw").write_bytes(array.astype(">f4").tobytes())
    (block,) = open_rows(f"{tmp_path}/x.raw:>float32:3").batches(9)
    np.testing.assert_array_equal(block, array)


def test_vectors_of_uneven_width_are_refused(tmp_path):
    source = w.save_vecs(tmp_path / "x", make((6, 3), "float32"))
    content = bytearray(Path(source).read_bytes())
    content[16 * 4] = 2
    Path(source).write_bytes(content)
    with pytest.raises(DataError, match="a row of another width; expected 3 values in every row"):
        list(open_rows(source).batches(9))


def test_labels_in_vector_files_are_one_value_a_row(tmp_path):
    y = make((6,), "int32")
    for save in (w.save_bin, w.save_vecs):
        (block,) = open_rows(save(tmp_path / "y", y), "labels").batches(9)
        np.testing.assert_array_equal(block, y)


def test_code_in_a_torch_file_is_not_run(tmp_path):
    import pickle

    import torch

    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "boom",))

    torch.save({"x": Bomb()}, tmp_path / "x.pt")
    (tmp_path / "y.pt").write_bytes(pickle.dumps(Bomb()))
    for name in ("x.pt", "y.pt"):
        with pytest.raises(DataError, match=r"more than tensors[\s\S]*save its tensors alone"):
            open_rows(str(tmp_path / name))
    assert not (tmp_path / "boom").exists()


def test_a_safetensors_header_that_lies_is_refused(tmp_path):
    header = json.dumps({"x": {"dtype": "F32", "shape": [4, 3], "data_offsets": [0, 40]}}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(40))
    with pytest.raises(DataError, match=r"x.* of shape \(4, 3\) in bytes 0 to 40; expected an"):
        open_rows(str(path))
    header = json.dumps({"x": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(2))
    with pytest.raises(DataError, match="holds values of type F8_E4M3; expected F64"):
        open_rows(str(path))


@pytest.mark.parametrize(
    ("module", "ending", "extra"),
    [("torch", "pt", "torch"), ("pyarrow", "parquet", "files"), ("pyarrow", "feather", "files")],
)
def test_a_library_that_is_missing_is_named_with_what_to_install(
    tmp_path, monkeypatch, module, ending, extra
):
    path = two(tmp_path)[ending]
    for name in [n for n in sys.modules if n == module or n.startswith(f"{module}.")]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        DataError, match=f"cannot be read without {module}, which is not"
    ) as refused:
        open_rows(f"{path}:a")
    assert str(refused.value).splitlines()[1] == f'pip install "ncbatch[{extra}]"'


def test_safetensors_need_no_library(tmp_path, monkeypatch):
    source = w.save_safetensors(tmp_path / "x", make((4, 3), "bfloat16"))
    for name in ("safetensors", "torch"):
        monkeypatch.setitem(sys.modules, name, None)
    assert open_rows(source).n_rows == 4


def test_the_page_on_import_names_every_ending():
    page = (Path(__file__).parents[4] / "docs" / "import.md").read_text(encoding="utf-8")
    assert [ending for ending in FORMATS if ending not in page] == []


def test_a_zarr_group_is_answered_with_its_arrays(tmp_path):
    source = w.save_zarr3(tmp_path / "g", make((4, 3), "float32"))
    with pytest.raises(
        UnknownNameError, match=r"no array 'x' in '.*g\.zarr'; expected one of: deep/x"
    ):
        open_rows(source.replace("deep/x", "x"))
    shutil.rmtree(tmp_path / "g.zarr" / "deep")
    zarr.create_group(tmp_path / "h.zarr")
    with pytest.raises(NcbatchError, match="Zarr group"):
        open_rows(str(tmp_path / "h.zarr"))
