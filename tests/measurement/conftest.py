"""Stores that the tests of this room share: written once, and copied for each test."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from ncbatch.measurement import samples
from ncbatch.store import FeatureStore
from ncbatch.store import format as store_format
from tests.measurement.stores import Pair, make_store, outside
from tests.strategies import REGIMES


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch):
    """Make many chunks and blocks of little data."""
    monkeypatch.setattr(store_format, "CHUNK_BYTES", 6144)
    monkeypatch.setattr(samples, "BLOCK_BYTES", 2048)


@pytest.fixture(scope="session")
def written(tmp_path_factory) -> Path:
    """Write two stores of different regimes, with all splits, one of them with two layers."""
    folder = tmp_path_factory.mktemp("written")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store_format, "CHUNK_BYTES", 8192)
        for name, regime in (("a", "zipf"), ("b", "k_less_d")):
            data = REGIMES[regime](3)
            W, b, test, ood = outside(data)
            splits = {"test": test, "ood": ood}
            store = make_store(folder / f"{name}.zarr", data, splits=splits, W=W, b=b)
        with store.add_layers("train", {"twice": data.X.shape[1]}, "float64") as writer:
            writer.append({"twice": 2.0 * data.X.astype(np.float64)})
    return folder


@pytest.fixture
def stores(tmp_path, written, small_chunks) -> list[FeatureStore]:
    """Copy the two stores, to be measured or changed."""
    paths = [tmp_path / name for name in ("a.zarr", "b.zarr")]
    return [FeatureStore.open(shutil.copytree(written / path.name, path)) for path in paths]


@pytest.fixture(scope="session")
def written_pair(tmp_path_factory) -> Pair:
    return Pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture
def pair(tmp_path: Path, written_pair: Pair) -> Pair:
    return written_pair.copy(tmp_path)
