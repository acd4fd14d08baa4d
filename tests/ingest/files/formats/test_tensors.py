"""Tensors of checkpoints: nested names, views, indices, and code that is not run."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from ncbatch.errors import DataError, UnknownNameError
from ncbatch.ingest.files.layers import open_rows
from tests.ingest.files.formats import writers as w
from tests.ingest.files.formats.writers import make


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


def test_a_sharded_checkpoint_is_read_by_its_index(tmp_path):
    first = Path(
        w.save_safetensors(tmp_path / "model-1-of-2", make((5, 3), "bfloat16")).partition(":")[0]
    )
    index = {"weight_map": {"deep.name": first.name, "gone": "no.safetensors"}}
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps(index))
    (block,) = open_rows(f"{path}:deep.name").batches(9)
    assert block.tobytes() == make((5, 3), "bfloat16").tobytes()
    with pytest.raises(DataError, match=r"no\.safetensors"):
        open_rows(f"{path}:gone")
    with pytest.raises(UnknownNameError, match=r"expected one of: deep\.name, gone"):
        open_rows(f"{path}:name")


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


def test_safetensors_need_no_library(tmp_path, monkeypatch):
    source = w.save_safetensors(tmp_path / "x", make((4, 3), "bfloat16"))
    for name in ("safetensors", "torch"):
        monkeypatch.setitem(sys.modules, name, None)
    assert open_rows(source).n_rows == 4
