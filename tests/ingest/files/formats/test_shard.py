"""Names of arrays in files, and libraries that are missing."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from ncbatch.errors import DataError, UnknownNameError
from ncbatch.ingest.files.layers import open_rows
from tests.ingest.files.formats.writers import two


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
