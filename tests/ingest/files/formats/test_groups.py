"""Arrays in groups."""

from __future__ import annotations

import shutil

import pytest
import zarr

from ncbatch.errors import NcbatchError, UnknownNameError
from ncbatch.ingest.files.layers import open_rows
from tests.ingest.files.formats import writers as w
from tests.ingest.files.formats.writers import make


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
