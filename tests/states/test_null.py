"""The null: labels that depend on the row only, and moments under them with their scatter."""

from __future__ import annotations

import numpy as np
import pytest

from ncbatch.errors import DataError
from ncbatch.states.moments import Moments
from ncbatch.states.null import null_labels, null_scatter
from tests.libraries import Library, each_library


def test_null_labels_follow_the_distribution_and_the_row_only():
    counts = np.array([700, 0, 200, 100])
    rows = np.arange(50_000)
    labels = null_labels(rows, counts, seed=3)
    shares = np.bincount(labels, minlength=4) / len(rows)
    np.testing.assert_allclose(shares, counts / 1000, atol=0.01)
    assert shares[1] == 0
    order = np.random.default_rng(0).permutation(len(rows))
    np.testing.assert_array_equal(null_labels(rows[order], counts, 3), labels[order])
    other = null_labels(rows, counts, seed=4)
    assert np.mean(other == labels) == pytest.approx(np.sum((counts / 1000) ** 2), abs=0.01)


@each_library
def test_scatter_under_null_labels_follows_from_that_under_their_own(library: Library):
    rng = np.random.default_rng(0)
    y = rng.integers(0, 6, 400)
    X = library.put(10.0 + y[:, None] + rng.normal(size=(400, 5)))
    drawn = library.put(null_labels(np.arange(400), np.bincount(y)))
    moments = Moments.from_block(X, library.put(y), 6)
    null = null_scatter(moments, Moments.from_block(X, drawn, 6, scatter=False))
    want = Moments.from_block(X, drawn, 6)
    np.testing.assert_array_equal(library.host(null.counts), library.host(want.counts))
    np.testing.assert_allclose(
        library.host(null.scatter), library.host(want.scatter), rtol=1e-9, atol=1e-8
    )


def test_moments_of_other_samples_are_refused():
    X, y = np.ones((4, 2)), np.array([0, 0, 1, 1])
    moments = Moments.from_block(X, y, 2)
    with pytest.raises(DataError, match="different samples"):
        null_scatter(moments, Moments.from_block(X[:3], y[:3], 2, scatter=False))
    with pytest.raises(DataError, match="without scatter"):
        null_scatter(Moments.from_block(X, y, 2, scatter=False), moments)
