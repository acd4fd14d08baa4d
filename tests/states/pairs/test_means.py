"""Distances of class means to full accuracy, in memory and in a file, whatever asks for them."""

from __future__ import annotations

import numpy as np
import pytest

from ncbatch.states.pairs.sweep import PairTiles
from tests.states.pairs.test_sweep import awkward_means, in_file


@pytest.mark.parametrize("stored", [False, True])
def test_a_tile_gives_its_distances_whatever_asks_for_it(tmp_path, stored: bool):
    means = awkward_means(30, 4)
    rows = in_file(tmp_path / "means", means) if stored else means
    pairs = PairTiles(rows, means.mean(axis=0), quantities=[])
    d2 = np.sum((means[:, None] - means).astype(np.longdouble) ** 2, axis=-1).astype(float)
    some = np.array([3, 29, 7])
    for columns in (slice(0, 10), slice(5, 30)):
        for x in (some, pairs.block(some)):
            for y in (columns, pairs.block(columns)):
                squares = pairs.square_distances(x, y)
                np.testing.assert_allclose(squares, d2[some, columns], rtol=1e-6, atol=1e-20)
                np.testing.assert_array_equal(pairs.apart(x, y, squares), d2[some, columns] > 1e-20)
