"""Moments of some classes: the laws of a state, over any sets of classes."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ncbatch.arrays.threads import thread_limit
from ncbatch.errors import DataError
from ncbatch.states.moments import Moments
from tests.libraries import Library, each_library
from tests.oracles import class_moments
from tests.states.test_moments import assert_same
from tests.strategies import REGIMES, Features, each_regime, feature_sets, partitions

FIELDS = ("counts", "means", "traces", "scatter")


@pytest.fixture(autouse=True, params=["plain", "compiled"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Merge in both ways, compiled code with products of few rows."""
    if request.param == "compiled":
        monkeypatch.setattr("ncbatch.states.moments._COMPILED_VALUES", 0)
        monkeypatch.setattr("ncbatch.states.moments_kernel._PRODUCT_ROWS", 5)
    return request.param


def parts(data: Features, cuts: list[int], scatter: bool = True) -> list[Moments]:
    pieces = zip(np.split(data.X, cuts), np.split(data.y, cuts), strict=True)
    return [Moments.from_block(X, y, data.n_classes, scatter=scatter) for X, y in pieces]


def assert_same_bits(a: Moments, b: Moments):
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)


@settings(max_examples=40)  # in two ways
@given(st.data())
def test_expanding_undoes_leaving_out(data):
    features = data.draw(feature_sets())
    state = Moments.from_block(features.X, features.y, features.n_classes)
    found = state.seen()
    assert np.all(found.counts > 0)
    assert found.classes.tolist() == np.unique(features.y[features.y >= 0]).tolist()
    assert found.n_samples == state.n_samples
    assert_same_bits(found.expand(features.n_classes), state)


@settings(max_examples=40)
@given(st.data())
def test_merging_commutes_with_expanding(data):
    features = data.draw(feature_sets())
    cuts = data.draw(partitions(len(features.y)))
    a, b, *rest = parts(features, [*cuts[:1], len(features.y) // 2] if cuts else [1])
    merged = a.seen().merge(b.seen())
    expanded, want = merged.expand(features.n_classes), a.merge(b)
    for name in FIELDS[:2]:
        np.testing.assert_array_equal(getattr(expanded, name), getattr(want, name))
    np.testing.assert_allclose(expanded.traces, want.traces, rtol=1e-12)
    assert_same(expanded, want)
    for other in map(Moments.seen, rest):
        merged, want = merged.merge(other), want.merge(other.expand(features.n_classes))
    assert_same(merged.expand(features.n_classes), want)


@each_regime
def test_a_tree_of_merges_equals_the_oracle(regime: str, monkeypatch: pytest.MonkeyPatch):
    data = REGIMES[regime](2)
    n = len(data.y)
    monkeypatch.setattr(
        "ncbatch.states.moments.row_blocks",
        lambda rows, _=0: (slice(i, min(i + 7, rows)) for i in range(0, rows, 7)),
    )
    states = [part.seen() for part in parts(data, [n // 5, n // 3, n // 2])]
    whole = states[0].merge(states[1]).merge(states[2].merge(states[3])).expand(data.n_classes)
    oracle = class_moments(data.X, data.y, data.n_classes)
    seen = oracle.counts > 0
    np.testing.assert_array_equal(whole.counts, oracle.counts)
    np.testing.assert_allclose(whole.means[seen], oracle.means[seen], rtol=1e-12, atol=1e-12)
    scale = np.abs(oracle.within).max()
    np.testing.assert_allclose(whole.within_covariance, oracle.within, rtol=1e-9, atol=1e-9 * scale)
    np.testing.assert_allclose(
        whole.variances[seen], oracle.variances[seen], rtol=1e-9, atol=1e-9 * scale
    )


def test_zero_is_neutral_and_operands_stay():
    data = REGIMES["zipf"](0)
    state = parts(data, [50])[0].seen()
    before = [np.copy(getattr(state, name)) for name in FIELDS]
    zero = Moments.zero(0, data.X.shape[1]).seen()
    for result in (state.merge(zero), zero.merge(state)):
        np.testing.assert_array_equal(result.classes, state.classes)
        assert_same_bits(result, state)
    state.merge(state)
    for name, old in zip(FIELDS, before, strict=True):
        np.testing.assert_array_equal(getattr(state, name), old)
    assert zero.merge(zero).n_samples == 0
    assert_same_bits(zero.expand(4), Moments.zero(4, data.X.shape[1]))


@each_library
@pytest.mark.parametrize("scatter", [True, False])
def test_every_library_merges(library: Library, scatter: bool):
    data = REGIMES["zipf"](1)
    X, n = data.X.astype(np.float64), len(data.y)
    data = Features(X, data.y, data.n_classes)
    states = [
        Moments.from_block(
            library.put(X[p]), library.put(data.y[p]), data.n_classes, scatter=scatter
        )
        for p in (slice(100), slice(100, n))
    ]
    got = states[0].seen().merge(states[1].seen()).expand(data.n_classes)
    a, b = parts(data, [100], scatter)
    want = a.merge(b)
    assert (got.scatter is None) is not scatter
    for name in FIELDS[: 4 if scatter else 3]:
        value = library.host(getattr(got, name))
        np.testing.assert_allclose(value, getattr(want, name), rtol=1e-10, atol=1e-9)


def state_of(n: int, n_classes: int, seed: int) -> Moments:
    rng = np.random.default_rng(seed)
    y = (n_classes * rng.random(n) ** 3).astype(np.int64)
    return Moments.from_block(1e3 + rng.normal(size=(n, 6)), y, n_classes).seen()


def test_products_of_any_size_and_any_threads_merge_alike(way: str, monkeypatch):
    if way == "plain":
        pytest.skip("plain code has no threads")
    a, b = state_of(300, 400, 0), state_of(500, 400, 1)
    found = []
    with thread_limit(1):  # the BLAS has an order of its own with other numbers of threads
        for threads in (1, 2, 3):
            monkeypatch.setattr("ncbatch.states.moments_kernel.cpu_count", lambda n=threads: n)
            found.append(a.merge(b))
    assert len(np.intersect1d(a.classes, b.classes)) > 50
    for other in found[1:]:
        assert_same_bits(other, found[0])
    for rows in (1, 1000):
        monkeypatch.setattr("ncbatch.states.moments_kernel._PRODUCT_ROWS", rows)
        other = a.merge(b)
        np.testing.assert_array_equal(other.means, found[0].means)
        np.testing.assert_array_equal(other.traces, found[0].traces)
        np.testing.assert_allclose(other.scatter, found[0].scatter, rtol=1e-12, atol=1e-9)


def test_layouts_and_what_cannot_be_written_merge_to_the_same_bits():
    a, b = state_of(300, 100, 0), state_of(200, 100, 1)
    want = a.merge(b)
    frozen = a.means.copy()
    frozen.flags.writeable = False
    wide = np.repeat(a.means, 2, axis=1)[:, ::2]
    for means in (frozen, np.asfortranarray(frozen), wide):
        other = dataclasses.replace(a, means=means)
        assert_same_bits(other.merge(b), want)


def test_a_side_whose_means_are_too_few_is_not_read_beyond_them():
    a, b = state_of(300, 100, 0), state_of(200, 100, 1)
    short = dataclasses.replace(a, means=a.means[:-3])
    with pytest.raises((ValueError, IndexError)):
        short.merge(b)


def test_what_does_not_fit_is_refused():
    state = Moments.from_block(np.ones((2, 3)), np.array([4, 7]), 9).seen()
    with pytest.raises(DataError, match="class 7"):
        state.expand(7)
    for other in (Moments.zero(0, 4).seen(), Moments.zero(0, 3, scatter=False).seen()):
        with pytest.raises(DataError, match="cannot be merged"):
            state.merge(other)


def test_it_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Moments.zero(0, 2).classes = None  # type: ignore[misc]
