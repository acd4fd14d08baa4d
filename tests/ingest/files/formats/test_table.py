"""Every format gives back what its own library wrote, and names files that are cut short."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ncbatch.errors import DataError, UnknownNameError
from ncbatch.ingest.files.formats.table import FORMATS
from ncbatch.ingest.files.layers import find_paths, open_rows, open_shards
from tests.ingest.files.formats import writers as w
from tests.ingest.files.formats.writers import Array, make

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


def test_a_checkpoint_may_end_in_bin(tmp_path):
    source = w.save_pt(tmp_path / "pytorch_model", make((5, 3), "float16"))
    (tmp_path / "pytorch_model.pt").rename(tmp_path / "pytorch_model.bin")
    (block,) = open_rows(source.replace(".pt:", ".bin:")).batches(9)
    assert block.tobytes() == make((5, 3), "float16").tobytes()
    assert open_rows(f"{tmp_path}/pytorch_model.bin:uint8").row_shape == ()
    with pytest.raises(UnknownNameError, match=r"expected one of: acts\.h\.0, acts\.list\.0"):
        open_rows(f"{tmp_path}/pytorch_model.bin:head")


def test_the_page_on_import_names_every_ending():
    page = (Path(__file__).parents[4] / "docs" / "import.md").read_text(encoding="utf-8")
    assert [ending for ending in FORMATS if ending not in page] == []
