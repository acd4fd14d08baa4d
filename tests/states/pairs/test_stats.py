"""What pairs are summed up in merges in any order, whatever the scale."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ncbatch.states.pairs.stats import TOP_PAIRS, Nearest, Tally, TopPairs


@given(st.lists(st.lists(st.floats(-1e6, 1e6), max_size=6), min_size=1, max_size=6), st.randoms())
def test_tallies_merge_in_any_order(parts, random):
    values = np.array([v for part in parts for v in part])
    tallies = [Tally.of(np.array(part)) for part in parts]
    random.shuffle(tallies)
    total = functools.reduce(Tally.merge, tallies, Tally())
    assert total.n == len(values)
    if len(values):
        scale = max(np.abs(values).max(), 1e-300)
        assert total.mean == pytest.approx(values.mean(), abs=1e-12 * scale)
        assert total.variance == pytest.approx(values.var(), abs=1e-10 * scale**2)


def test_tallies_of_different_scales_merge():
    a, b = Tally.of(np.array([1.0, 2.0]), 0.0), Tally.of(np.array([3.0, 5.0]), math.log(10.0))
    values = np.array([1.0, 2.0, 30.0, 50.0])
    for total in (a.merge(b), b.merge(a)):
        assert math.exp(total.log_abs_mean) == pytest.approx(values.mean())
        assert math.exp(total.log_variance) == pytest.approx(values.var())


def test_the_nearest_is_the_lowest_of_equally_near_ones():
    a = Nearest(np.array([3, 4, -1]), np.array([1.0, 2.0, np.inf]), np.array([1.0, 5.0, 6.0]))
    b = Nearest(np.array([2, 5, 1]), np.array([1.0, 1.0, 4.0]), np.array([2.0, 4.0, 7.0]))
    for merged in (a.merge(b), b.merge(a)):
        assert merged.index.tolist() == [2, 5, 1]
        assert merged.square.tolist() == [1.0, 1.0, 4.0]
        assert merged.direction_square.tolist() == [1.0, 4.0, 6.0]
    none = Nearest.none(3)
    assert none.merge(a).index.tolist() == a.merge(none).index.tolist() == [3, 4, -1]


def test_the_greatest_pairs_of_both_are_kept():
    rng = np.random.default_rng(0)
    values = rng.integers(0, 9, 40).astype(float)  # with ties, which go by classes
    classes = np.stack([np.arange(40), np.arange(40) + 1], axis=1)
    parts = [TopPairs(values[part], classes[part]) for part in (slice(25), slice(25, 40))]
    order = np.lexsort((classes[:, 0], -values))[:TOP_PAIRS]
    for merged in (parts[0].merge(parts[1]), parts[1].merge(parts[0])):
        np.testing.assert_array_equal(merged.classes, classes[order])
        np.testing.assert_array_equal(merged.values, values[order])
