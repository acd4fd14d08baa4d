"""Sums by class agree with a loop, in every library."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ncbatch.arrays.segments import Segments, add_at, segment_sum
from tests.libraries import Library, each_library


@each_library
@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (200, 4)])
@pytest.mark.parametrize("ndim", [1, 2])
def test_segment_sum_equals_a_loop(library: Library, shape: tuple[int, int], ndim: int):
    rng = np.random.default_rng(0)
    y = rng.integers(0, 9, shape[0])
    X = rng.normal(size=shape if ndim == 2 else shape[0])
    segments = Segments.of(library.put(y))
    sums = library.host(segment_sum(library.put(X), segments))
    present = sorted(set(y.tolist()))
    assert library.host(segments.present).tolist() == present
    assert library.host(segments.counts).tolist() == [int(np.sum(y == c)) for c in present]
    expected = np.stack([X[y == c].sum(axis=0) for c in present])
    np.testing.assert_allclose(sums, expected, rtol=1e-13, atol=1e-13)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=60))
def test_pairwise_and_sparse_sums_agree_on_integers(labels: list[int]):
    from ncbatch.arrays.segments import _pairwise_segment_sum

    y = np.array(labels)
    X = np.arange(2.0 * len(y)).reshape(-1, 2)
    segments = Segments.of(y)
    pairwise = _pairwise_segment_sum(X, segments.index, len(segments.present))
    np.testing.assert_array_equal(pairwise, segment_sum(X, segments))


@each_library
def test_mask_and_add_at_touch_present_classes_only(library: Library):
    segments = Segments.of(library.put(np.array([5, 2, 5])))
    mask = segments.mask(7)
    assert np.flatnonzero(library.host(mask)).tolist() == [2, 5]
    target = library.put(np.ones((7, 2)))
    add_at(target, mask, library.put(np.array([[1.0, 1.0], [2.0, 2.0]])))
    assert library.host(target)[:, 0].tolist() == [1, 1, 2, 1, 1, 3, 1]
