"""Exact directional variance equals loops over classes, samples and lines."""

import numpy as np
import pytest

from ncbatch.stats import DirectionalVariance, PairTiles
from ncbatch.stats import directional as module
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
