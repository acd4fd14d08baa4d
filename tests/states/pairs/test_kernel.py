"""The kernel's own logarithm and exponential, and the places that it keeps for the greatest."""

from __future__ import annotations

import numpy as np

from ncbatch.states.pairs.kernel import exponentials, keep_top, logarithms


def test_logarithms_are_numpys():
    x = np.concatenate([np.geomspace(1e-300, 1e300, 3001), [1.0, 2.0, 0.5, np.sqrt(2.0)]])
    want, out, spent = np.log(x), np.empty_like(x), x.copy()
    logarithms(spent, spent.view(np.int64), out)
    np.testing.assert_allclose(out, want, rtol=1e-15, atol=1e-16)


def test_exponentials_are_numpys_and_end_at_the_smallest():
    x = np.concatenate([-np.geomspace(1e-18, 699.0, 3001), [0.0, -701.0, -1e9, -np.inf]])
    got, whole, scale = x.copy(), np.empty_like(x), np.empty_like(x)
    exponentials(got, whole, whole.view(np.int64), scale, scale.view(np.int64))
    # The series ends at r^11 / 11!, so that at |r| = ln 2 / 2 the next term, 7e-15, is missing.
    np.testing.assert_allclose(got[:-3], np.exp(x[:-3]), rtol=1e-14)
    assert np.all((got[-3:] > 0.0) & (got[-3:] < 1e-303))


def test_the_greatest_usable_values_are_kept():
    rng = np.random.default_rng(0)
    values, usable = rng.normal(size=50), np.where(np.arange(50) % 3, 1.0, -1.0)
    top, top_at = np.full(4, -np.inf), np.zeros((4, 2), np.int64)
    keep_top(values[:30], usable[:30], 7, 100, top, top_at)
    keep_top(values[30:], usable[30:], 7, 130, top, top_at)
    best = np.flatnonzero(usable > 0)[np.argsort(-values[usable > 0])[:4]]
    np.testing.assert_array_equal(np.sort(top)[::-1], values[best])
    assert set(map(tuple, top_at.tolist())) == {(7, 100 + int(t)) for t in best}
