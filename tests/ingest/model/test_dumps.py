"""nc.dump: its options, batches and progress."""

from __future__ import annotations

import subprocess
import sys

import pytest

import ncbatch as nc
from ncbatch.errors import DataError, UsageError
from tests.ingest.model.models import (
    K,
    Mlp,
    hooks_of,
    mlp_batches,
    seeded,
)

torch = pytest.importorskip("torch")
nn = torch.nn


def test_progress_counts_rows(tmp_path):
    class Bar:
        rows = 0

        def advance(self, n_rows):
            self.rows += n_rows

    bar = Bar()
    nc.dump(seeded(Mlp), mlp_batches(100), tmp_path / "s.zarr", "train", ["fc1"], progress=bar)
    assert bar.rows == 100


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pool": "max"}, "pool 'max'"),
        ({"dtype": "int8"}, "dtype 'int8'"),
        ({"layers": []}, "no layer to capture"),
        ({"layers": {"a/b": "fc1"}}, "layer name 'a/b'"),
        ({"split": "a/b"}, "split name 'a/b'"),
        ({"head": False}, "no number of classes"),
        ({"resume": True, "overwrite": True}, "both resume and overwrite"),
    ],
)
def test_bad_options(tmp_path, options, message):
    model = seeded(Mlp)
    given = {"split": "train", "layers": ["fc1"]} | options
    split, layers = given.pop("split"), given.pop("layers")
    with pytest.raises(UsageError, match=message):
        nc.dump(model, mlp_batches(), tmp_path / "s.zarr", split, layers, **given)
    assert model.passes == 0


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "no sample in any batch"),
        ([(torch.zeros(2, 8), torch.tensor([-1, -1]))], "no sample in any batch"),
        ([torch.zeros(2, 8)], r"batch 0 is a Tensor; expected a pair"),
        ([(torch.zeros(2, 8), torch.zeros(2))], "labels of shape .2,., float32"),
        ([(torch.zeros(2, 8), torch.tensor([0, 1, 2]))], r"'fc1' has shape \(2, 16\)"),
        ([(torch.zeros(2, 8), torch.zeros((2, 16), dtype=int))], r"'fc1' has shape \(2, 16\)"),
        ([(torch.zeros(2, 8), torch.tensor([0, K]))], "label 5 in row 1"),
    ],
)
def test_bad_batches(tmp_path, batches, message):
    model = seeded(Mlp)
    with pytest.raises(DataError, match=message):
        nc.dump(model, batches, tmp_path / "s.zarr", "train", ["fc1"])
    assert hooks_of(model) == 0


@pytest.mark.slow
def test_importing_ingest_loads_no_torch():
    script = "import sys, ncbatch.ingest; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
