"""Plain arrays: values whose type must be said, and vectors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ncbatch.errors import DataError, UsageError
from ncbatch.ingest.files.layers import open_rows
from tests.ingest.files.formats import writers as w
from tests.ingest.files.formats.writers import BFLOAT16, make


def test_a_name_where_there_is_none_is_refused(tmp_path):
    np.save(tmp_path / "x.npy", make((3, 2), "float32"))
    with pytest.raises(DataError, match=r"x.npy:k', but that file holds one array without a name"):
        open_rows(f"{tmp_path}/x.npy:k")


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
