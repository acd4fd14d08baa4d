"""Decisions: those of exact arithmetic, whatever dtype the products run in."""

import functools
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from ncbatch.errors import DataError, UsageError
from ncbatch.states import rules as module
from ncbatch.states.decisions import Decisions
from ncbatch.states.rules import linear_rule, nearest_mean_rule
from tests.libraries import Library, each_library
from tests.oracles import classifier_decisions, nearest_means
from tests.strategies import REGIMES, each_regime, partitions


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "TILE_ROWS", 60)
    monkeypatch.setattr(module, "TILE_CLASSES", 5)
    monkeypatch.setattr(module, "pair_rows", lambda n_features: 30)
    monkeypatch.setattr(module, "LISTED_SCORES", 100)


def rules(means, W, b, put=lambda a: a, **how):
    return nearest_mean_rule(put(means), **how), linear_rule(
        put(W), None if b is None else put(b), put(means.mean(axis=0)), **how
    )


@each_regime
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_float32_products_give_the_oracles_decisions(regime: str, offset: float, small_tiles):
    data = REGIMES[regime](0)
    X = data.X.astype(np.float64) + offset
    ids = np.unique(data.y[data.y >= 0])
    means = np.stack([X[data.y == c].mean(axis=0) for c in ids])
    rng = np.random.default_rng(1)
    W, b = rng.normal(size=(data.n_classes, X.shape[1])), rng.normal(size=data.n_classes)
    near = nearest_mean_rule(means, ids).decide(X)
    chosen = linear_rule(W, b, means.mean(axis=0)).decide(X)
    np.testing.assert_array_equal(near, nearest_means(X, means, ids))
    np.testing.assert_array_equal(chosen, classifier_decisions(X, W, b))


@each_library
def test_every_library_decides_alike(library: Library, small_tiles):
    rng = np.random.default_rng(0)
    X, means = rng.normal(size=(40, 5)), rng.normal(size=(7, 5))
    means[4] = means[2]  # an exact tie for whoever is nearest to it
    W, b = rng.normal(size=(7, 5)), rng.normal(size=7)
    near, chosen = rules(means, W, b, library.put)
    y = rng.integers(-1, 7, 40)
    state = Decisions.from_block(library.put(X), library.put(y), 7, near, chosen)
    want_near, want = nearest_means(X, means, np.arange(7)), classifier_decisions(X, W, b)
    kept = y >= 0
    for got, hits in (
        (state.samples, kept),
        (state.agreements, kept & (want_near == want)),
        (state.ncc_hits, kept & (want_near == y)),
        (state.clf_hits, kept & (want == y)),
    ):
        assert library.host(got).tolist() == np.bincount(y[hits], minlength=7).tolist()
    assert 4 not in library.host(near.decide(library.put(X)))


def test_exact_ties_go_to_the_lowest_class(small_tiles):
    means = np.repeat([[1.0, 0.0], [0.0, 1.0]], 5, axis=0)
    X = np.array([[0.9, 0.0], [0.0, 0.9], [0.5, 0.5]])
    ids = np.arange(10) * 2
    assert nearest_mean_rule(means, ids).decide(X).tolist() == [0, 10, 0]
    assert linear_rule(means).decide(X).tolist() == [0, 5, 0]


def test_differences_below_float32_are_decided(small_tiles):
    means = np.array([[1.0, 0.0], [1.0 + 1e-9, 0.0], [5.0, 5.0]])
    X = np.array([[1.0 + 0.8e-9, 0.0], [1.0 + 0.2e-9, 0.0]])
    assert nearest_mean_rule(means).decide(X).tolist() == [1, 0]
    W = np.array([[1.0, 1.0], [1.0, 1.0 + 1e-12]])
    assert linear_rule(W).decide(np.array([[1.0, 1.0], [1.0, -1.0]])).tolist() == [1, 0]


def test_half_squared_norm_bias_agrees_exactly():
    rng = np.random.default_rng(0)
    X, means = rng.normal(size=(500, 8)), rng.normal(size=(30, 8))
    near, chosen = rules(means, 2 * means, -np.sum(means**2, axis=1))
    state = Decisions.from_block(X, rng.integers(0, 30, 500), 30, near, chosen)
    assert state.rate("agreements") == 1.0


def test_two_gaussians_err_as_the_normal_distribution_says():
    rng = np.random.default_rng(0)
    n, sigma, d = 50_000, 1.0, 2.0
    y = np.arange(n) % 2
    X = rng.normal(size=(n, 2)) * sigma
    X[:, 0] += d * y
    near, chosen = rules(np.array([[0.0, 0.0], [d, 0.0]]), np.eye(2), None)
    state = Decisions.from_block(X, y, 2, near, chosen)
    error = norm.cdf(-d / (2 * sigma))
    assert abs((1 - state.rate("ncc_hits")) - error) < 4 * np.sqrt(error / n)


@settings(max_examples=40)
@given(st.data())
def test_any_partition_gives_the_same_state(data):
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    X, y = rng.normal(size=(60, 4)), rng.integers(-1, 6, 60)
    near, chosen = rules(rng.normal(size=(6, 4)), rng.normal(size=(6, 4)), None)
    predictions = rng.integers(0, 6, 60)
    for by in (chosen, predictions):

        def state(part: slice, by=by):
            some = by if by is chosen else by[part]
            return Decisions.from_block(X[part], y[part], 6, near, some)

        cuts = [0, *data.draw(partitions(60)), 60]
        parts = [state(slice(a, b)) for a, b in itertools.pairwise(cuts)]
        total = functools.reduce(Decisions.merge, parts, Decisions.zero(6))
        for name in ("samples", "agreements", "ncc_hits", "clf_hits"):
            np.testing.assert_array_equal(getattr(total, name), getattr(state(slice(None)), name))


def test_rates_by_class_and_weight():
    state = Decisions(
        np.array([8, 2, 0]), np.array([4, 2, 0]), np.array([8, 0, 0]), np.zeros(3, int)
    )
    assert state.rate("agreements") == 0.6
    assert state.rate("agreements", weighted=False) == 0.75
    assert state.rate("agreements", indices=[0]) == 0.5
    assert state.rate("ncc_hits") == 0.8
    assert np.isnan(state.rate("ncc_hits", indices=[2]))
    with pytest.raises(UsageError):
        state.rate("hits")
    with pytest.raises(DataError):
        state.merge(Decisions.zero(4))
