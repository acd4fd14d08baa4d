"""Folds: what blocks are folded into by engines and dumps, and how they go on after a break."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from ncbatch.states.decisions import Decisions
from ncbatch.states.directional import DirectionalVariance
from ncbatch.states.fold import Fold, StateFold
from ncbatch.states.moments import Moments, MomentsAccumulator
from ncbatch.states.pairs.stats import PairStats
from ncbatch.states.pairs.sweep import PairTiles
from ncbatch.states.rules import linear_rule, nearest_mean_rule
from tests.libraries import each_library
from tests.states.test_saving import assert_same

K, D = 5, 3
RNG = np.random.default_rng(3)
X = RNG.normal(size=(60, D)) + 3.0
Y = RNG.integers(0, K - 1, 60)  # the last class has no samples
W = RNG.normal(size=(K, D))
BLOCKS = [(X[part], Y[part]) for part in (slice(0, 7), slice(7, 8), slice(8, 40), slice(40, 60))]


def moments_fold() -> Fold[Moments]:
    return MomentsAccumulator(K, D, like=X)


def decisions_fold() -> Fold[Decisions]:
    rules = {"nearest_mean": nearest_mean_rule(W), "classifier": linear_rule(W)}
    return StateFold(Decisions.zero(K), partial(Decisions.from_block, n_classes=K, **rules))


def directional_fold() -> Fold[DirectionalVariance]:
    of_block = partial(DirectionalVariance.from_block, pairs=PairTiles(W, quantities=[]))
    return StateFold(DirectionalVariance.zero(K), of_block)


FOLDS = [moments_fold, decisions_fold, directional_fold]


@pytest.mark.parametrize("make", FOLDS)
def test_a_fold_goes_on_to_the_same_bits(make):
    whole = make()
    for block in BLOCKS:
        whole.add(*block)
    want = whole.seal()
    for stop in range(len(BLOCKS) + 1):
        first, again = make(), make()
        for block in BLOCKS[:stop]:
            first.add(*block)
        again.restore({name: array.copy() for name, array in first.arrays().items()})
        for block in BLOCKS[stop:]:
            again.add(*block)
        assert_same(again.seal(), want)


@pytest.mark.parametrize("make", FOLDS)
def test_states_of_parts_merge_to_the_whole(make):
    whole, first, last = make(), make(), make()
    for i, block in enumerate(BLOCKS):
        whole.add(*block)
        (first if i < 2 else last).add(*block)
    want, got = whole.seal(), first.seal().merge(last.seal())
    for name, values in want.to_arrays().items():
        np.testing.assert_allclose(got.to_arrays()[name], values, rtol=1e-12, atol=1e-12)


def test_pairs_are_folded_tile_by_tile():
    pairs = PairTiles(W, W.mean(0), np.ones(K))
    tiles = list(pairs.tiles(2))
    fold = StateFold(PairStats.zero(), pairs.fold)
    for tile in tiles:
        fold.add([tile])
    assert_same(fold.seal(), pairs.fold(tiles))


@each_library
def test_states_of_blocks_come_to_the_host(library):
    rules = {"nearest_mean": nearest_mean_rule(library.put(W)), "classifier": library.put(Y)}
    fold = StateFold(Decisions.zero(K), partial(Decisions.from_block, n_classes=K, **rules))
    fold.add(library.put(X), library.put(Y))
    fold.skip(4)
    assert type(fold.seal().samples) is np.ndarray
    assert fold.seal().skipped == 4
    assert fold.seal().clf_hits.tolist() == np.bincount(Y, minlength=K).tolist()
