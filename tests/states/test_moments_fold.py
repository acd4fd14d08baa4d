"""Folding in any library: rows of unseen classes stay out; scratch is shared by name."""

from __future__ import annotations

import numpy as np
import pytest

from ncbatch.states.moments import MomentsAccumulator
from ncbatch.states.moments_fold import Scratch
from tests.libraries import Library, each_library


def accumulated(X, y, n_classes: int, scatter: bool = True) -> MomentsAccumulator:
    accumulator = MomentsAccumulator(n_classes, X.shape[1], like=X, scatter=scatter)
    half = y.shape[0] // 2
    for part in (slice(half), slice(half, None)):
        accumulator.add(X[part, :], y[part])
    return accumulator


@each_library
@pytest.mark.parametrize("scatter", [True, False])
@pytest.mark.parametrize("classes", [[], [3], [0, 2, 7, 8], [1, 2, 4, 5, 6, 9], range(10)])
def test_finishing_the_classes_seen_leaves_out_the_others(library: Library, scatter, classes):
    rng = np.random.default_rng(0)
    y = rng.choice(np.array(classes, np.int64), 100 if classes else 0)
    X = 50.0 + y[:, None] + rng.normal(size=(len(y), 3))
    with pytest.MonkeyPatch.context() as patch:  # row by row, as if there were many classes
        patch.setattr(
            "ncbatch.states.moments_fold.row_blocks", lambda n: (slice(i, i + 1) for i in range(n))
        )
        state = accumulated(library.put(X), library.put(y), 10, scatter).seal()
    assert library.host(state.classes).tolist() == list(classes)
    assert (state.scatter is None) is not scatter
    want = accumulated(X, y, 10, scatter).finish().seen()
    for name in ("counts", "means", "traces", "scatter")[: 4 if scatter else 3]:
        np.testing.assert_allclose(
            library.host(getattr(state, name)), getattr(want, name), rtol=1e-12, atol=1e-9
        )


def test_scratch_is_the_same_memory_until_more_or_another_dtype_is_wanted():
    scratch = Scratch()
    first = scratch.take("a", (3, 4), np.float64)
    assert np.shares_memory(scratch.take("a", (2, 5), np.float64), first)
    assert not np.shares_memory(scratch.take("b", (3, 4), np.float64), first)
    assert scratch.take("a", (3, 5), np.float64).shape == (3, 5)
    assert scratch.take("a", (2,), np.int32, fill=-1).tolist() == [-1, -1]
