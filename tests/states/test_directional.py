"""Exact directional variance equals loops over classes, samples and lines."""

import tracemalloc

import numpy as np
import pytest

from ncbatch.arrays.rows import StoredRows
from ncbatch.states import directional as module
from ncbatch.states.directional import DirectionalVariance
from ncbatch.states.pairs.sweep import PairTiles
from tests.libraries import Library, each_library


@each_library
def test_sums_equal_loops(library: Library, monkeypatch):
    monkeypatch.setattr(module, "_TILE_CLASSES", 4)
    rng = np.random.default_rng(0)
    K, D, n = 9, 5, 60
    y = rng.integers(0, K, n)
    X = rng.normal(size=(K, D))[y] + 0.5 * rng.normal(size=(n, D))
    means = np.stack([X[y == c].mean(axis=0) for c in range(K)])
    means[7] = means[2]  # coincident means are left out
    pairs = PairTiles(library.put(means), library.put(means.mean(axis=0)), quantities=[])
    put = library.put
    parts = [
        DirectionalVariance.from_block(put(X[p]), put(y[p]), pairs)
        for p in (slice(0, 25), slice(25, 25), slice(25, n))
    ]
    got = library.host(parts[0].merge(parts[1]).merge(parts[2]).sums)
    expected = np.zeros(K)
    for x, i in zip(X, y, strict=True):
        for j in range(K):
            line = means[j] - means[i]
            if line @ line > 0:
                expected[i] += ((x - means[i]) @ line) ** 2 / (line @ line) ** 2
    assert got == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("D", [3, 11])
def test_means_in_a_file_give_the_same_sums(tmp_path, D: int):
    rng = np.random.default_rng(0)
    y = rng.integers(0, 40, 90)
    X, means = rng.normal(size=(90, D)), rng.normal(size=(40, D))
    rows = StoredRows.create(tmp_path / "means", means.shape)
    rows[0:40] = means
    in_memory, stored = (
        DirectionalVariance.from_block(X, y, PairTiles(m, means[0], quantities=[]))
        for m in (means, rows)
    )
    assert in_memory.sums.max() > 0
    np.testing.assert_allclose(stored.sums, in_memory.sums, rtol=1e-13)


@pytest.mark.parametrize("stored", [False, True])
def test_a_block_holds_what_its_price_says(tmp_path, stored: bool):
    K, D, n = 6000, 128, 500
    means = np.random.default_rng(0).normal(size=(K, D))
    rows = StoredRows.create(tmp_path / "means", means.shape) if stored else means
    if stored:
        rows[0:K] = means
    pairs = PairTiles(rows, means[0], quantities=[])
    X, y = means[:n].astype(np.float32), np.arange(n)
    tracemalloc.start()
    DirectionalVariance.from_block(X, y, pairs)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < DirectionalVariance.peak_bytes(K, D, n)
