"""Rules over many classes: compiled and tiled, from memory or a file, near-ties and exact ties."""

import pickle
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ncbatch.arrays.rows import ChosenRows, StoredRows
from ncbatch.arrays.threads import thread_limit
from ncbatch.states import rules
from ncbatch.states.decisions import Decisions
from ncbatch.states.rules import (
    COMPILED_CLASSES,
    COMPILER_BYTES,
    Rule,
    Tiling,
    linear_rule,
    nearest_mean_rule,
)
from tests.libraries import Library, each_library
from tests.oracles import classifier_decisions, nearest_means
from tests.strategies import REGIMES, each_regime


def tiles(compiled: bool, rows: int = 16, classes: int = 70, sweep_rows: int = 40) -> dict:
    """Tiles that neither the rows nor the classes are multiples of."""
    return {"tiling": Tiling(sweep_rows if compiled else rows, rows, classes, compiled)}


def large_tiles(compiled: bool) -> dict:
    return tiles(compiled, 1024 if compiled else 2048, 2048, 8192)


both_ways = pytest.mark.parametrize("compiled", [False, True], ids=["arrays", "compiled"])


def stored(rows: np.ndarray, folder: Path) -> StoredRows:
    found = StoredRows.create(folder / "rows", rows.shape)
    found[0 : len(rows)] = rows
    return found


def gaussian(n: int = 90, k: int = 333, d: int = 9, seed: int = 0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)), rng.normal(size=(k, d)), rng.normal(size=k)


def decided_in_doubt(rule: Rule, X: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> int:
    """Count the rows that float64 scores decided, equal ones once."""
    seen: list[int] = []
    candidates = rules.candidates

    def counted(rows, *others):
        seen.append(rows.shape[0])
        return candidates(rows, *others)

    with monkeypatch.context() as patch:
        patch.setattr(rules, "candidates", counted)
        rule.decide(X)
    return sum(seen)


@both_ways
@pytest.mark.parametrize("offset", [0.0, 1e4])
@each_regime
def test_decisions_are_the_oracles(regime: str, offset: float, compiled: bool):
    data = REGIMES[regime](0)
    X = data.X.astype(np.float64) + offset
    ids = np.unique(data.y[data.y >= 0])
    means = np.stack([X[data.y == c].mean(axis=0) for c in ids])
    rng = np.random.default_rng(1)
    W, b = rng.normal(size=(data.n_classes, X.shape[1])), rng.normal(size=data.n_classes)
    how = tiles(compiled, 16, 5, 8192)
    near = nearest_mean_rule(means, ids, **how).decide(X)
    chosen = linear_rule(W, b, means.mean(axis=0), **how).decide(X)
    np.testing.assert_array_equal(near, nearest_means(X, means, ids))
    np.testing.assert_array_equal(chosen, classifier_decisions(X, W, b))


@both_ways
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_many_classes_and_every_dtype(kind, dtype, compiled: bool):
    X, means, b = gaussian()
    X, W = X.astype(kind), means.astype(kind)
    how = {**tiles(compiled), "dtype": dtype}
    near = nearest_mean_rule(means, **how).decide(X)
    chosen = linear_rule(W, b, **how).decide(X)
    np.testing.assert_array_equal(near, nearest_means(X, means, np.arange(333)))
    np.testing.assert_array_equal(chosen, classifier_decisions(X, W, b))


@settings(max_examples=50)
@given(st.data())
def test_equal_scores_go_to_the_lowest_class(data):
    """On a small grid of integers, where float64 is exact, most rows have several equal scores."""
    n, k, d = (data.draw(st.integers(1, top)) for top in (12, 160, 3))
    rng = np.random.default_rng(data.draw(st.integers(0, 999)))
    X, W = (rng.integers(-1, 2, size=(m, d)).astype(float) for m in (n, k))
    b = rng.integers(-1, 2, size=k).astype(float)
    sizes = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 160))
    how = tiles(data.draw(st.booleans()), *sizes, 8192)
    near = nearest_mean_rule(W, **how).decide(X)
    np.testing.assert_array_equal(near, nearest_means(X, W, np.arange(k)))
    np.testing.assert_array_equal(linear_rule(W, b, **how).decide(X), classifier_decisions(X, W, b))


@both_ways
def test_ties_across_tiles_and_of_many_classes(compiled: bool):
    X, means, _ = gaussian(k=300)
    means[[69, 70, 139, 140, 299]] = means[69]  # at the borders of tiles of 70
    means[100:120] = means[100]
    X[:5], X[5:10] = means[69], means[100]
    near = nearest_mean_rule(means, **tiles(compiled)).decide(X)
    assert near[:5].tolist() == [69] * 5
    assert near[5:10].tolist() == [100] * 5
    np.testing.assert_array_equal(near, nearest_means(X, means, np.arange(300)))


@each_library
def test_rows_that_tie_with_every_class_are_scored_once(library: Library, monkeypatch):
    X, means, _b = gaussian()
    X[3:30] = 0.0
    rule = linear_rule(library.put(means), **tiles(False, 32, 70))
    assert decided_in_doubt(rule, library.put(X), monkeypatch) <= 4
    chosen = library.host(rule.decide(library.put(X)))
    np.testing.assert_array_equal(chosen, classifier_decisions(X, means))
    assert (chosen[3:30] == 0).all()


@both_ways
def test_differences_below_float32_among_many(compiled: bool):
    X, means, _b = gaussian()
    means[200] = means[100] + 1e-10
    X[:50] = means[100] + np.linspace(0, 1e-10, 50)[:, None]
    near = nearest_mean_rule(means, **tiles(compiled)).decide(X)
    np.testing.assert_array_equal(near, nearest_means(X, means, np.arange(333)))
    assert {100, 200} <= set(near[:50].tolist())


@both_ways
def test_what_float32_cannot_hold_is_decided_in_float64(compiled: bool):
    X, means, b = gaussian(n=20, k=80)
    X[3] *= 1e26
    W, b = means * 1e12, b * 1e36  # beside such scores these biases are little, but not nothing
    how = tiles(compiled)
    np.testing.assert_array_equal(linear_rule(W, b, **how).decide(X), classifier_decisions(X, W, b))
    tiny = linear_rule(means * 1e-25, **how).decide(X * 1e-25)
    np.testing.assert_array_equal(tiny, classifier_decisions(X, means))


@both_ways
def test_a_class_of_bias_minus_infinity_is_never_chosen(compiled: bool, monkeypatch):
    X, W, b = gaussian()
    b[::2] = -np.inf
    rule = linear_rule(W, b, **tiles(compiled))
    np.testing.assert_array_equal(rule.decide(X), classifier_decisions(X, W, b))
    assert decided_in_doubt(rule, X, monkeypatch) < len(X) // 10


def test_few_rows_are_in_doubt(monkeypatch):
    X, means, _ = gaussian(n=500, k=3000, d=64)
    for compiled in (False, True):
        rule = nearest_mean_rule(means, **large_tiles(compiled))
        assert decided_in_doubt(rule, X, monkeypatch) <= 10


@both_ways
def test_the_bound_covers_the_errors_of_products(compiled: bool):
    """Each score of the products lies within the bound of the float64 score."""
    X, means, _ = gaussian(n=40, k=200, d=300)
    X, means = 1e3 + np.abs(X), 1e3 + np.abs(means)  # all products positive: the worst case
    b = np.linspace(-1e5, 1e5, 200)
    rule = linear_rule(means, b, **large_tiles(compiled))
    rows, norms, wide = rule._centred(X)
    values = rule._leaders(rows).best.astype(np.float64)
    want = (X.astype(np.longdouble) @ means.T.astype(np.longdouble) + b).max(axis=1)
    assert not wide.any()
    assert np.all(np.abs(values - want) <= rule._error(norms))
    assert np.abs(values - want).max() > 0


def test_leaders_are_the_two_best_and_the_lowest_class():
    rng = np.random.default_rng(0)
    rows, W = (rng.integers(-2, 3, size=(m, 3)).astype(np.float32) for m in (50, 200))
    bias = rng.integers(-2, 3, size=200).astype(np.float64)
    scores = rows @ W.T + bias
    ranked = np.sort(scores, axis=1)
    for tile in (1, 7, 64, 65, 200):
        leaders = rules.sweep_compiled(rows, W, bias, 16, tile)
        np.testing.assert_array_equal(leaders.at, scores.argmax(axis=1))
        np.testing.assert_array_equal(leaders.best, ranked[:, -1])
        np.testing.assert_array_equal(leaders.second, ranked[:, -2])


@each_library
def test_every_library_over_tiles(library: Library, monkeypatch):
    monkeypatch.setattr(rules, "LISTED_SCORES", 500)
    X, means, b = gaussian()
    means[200] = means[100]
    X[:7] = means[100]
    how = tiles(False, 32, 100)
    near = nearest_mean_rule(library.put(means), **how).decide(library.put(X))
    half = library.put(means.astype(np.float32))
    chosen = linear_rule(half, library.put(b), **how).decide(library.put(X))
    want = classifier_decisions(X, means.astype(np.float32), b)
    np.testing.assert_array_equal(library.host(near), nearest_means(X, means, np.arange(333)))
    np.testing.assert_array_equal(library.host(chosen), want)


@both_ways
def test_rows_in_a_file_decide_like_rows_in_memory(compiled: bool, tmp_path: Path):
    X, means, b = gaussian()
    means[200] = means[100]
    X[:7] = means[100]
    file = stored(means, tmp_path)
    # All rows share a sweep, whatever memory holds is cut into.
    how = tiles(compiled, 16, 70, len(X))
    for mine, other in (
        (nearest_mean_rule(file, **how), nearest_mean_rule(means, **how)),
        (linear_rule(file, b, **how), linear_rule(means, b, **how)),
    ):
        np.testing.assert_array_equal(mine.decide(X), other.decide(X))
        assert not isinstance(mine.weight, np.ndarray)
    some = ChosenRows(file, np.arange(0, 333, 3))
    near = nearest_mean_rule(some, np.arange(0, 333, 3), **how).decide(X)
    np.testing.assert_array_equal(near, nearest_means(X, means[::3], np.arange(0, 333, 3)))


def test_half_precision_weights_are_not_copied():
    W = gaussian()[1].astype(np.float16)
    assert linear_rule(W).weight is W
    single = W.astype(np.float32)
    assert np.shares_memory(linear_rule(single).weight, single)


def test_threads_do_not_matter():
    X, means, b = gaussian(n=200)
    rule = linear_rule(means, b, **tiles(True, 16, 70, 8192))
    rows, _, _ = rule._centred(X)
    found = []
    for threads in (1, 3):
        with thread_limit(threads):
            found.append(rule._leaders(rows))
    for one, three in zip(*found, strict=True):
        np.testing.assert_array_equal(one, three)
    with ThreadPoolExecutor(4) as pool:
        several = list(pool.map(rule.decide, [X] * 8))
    assert all((some == several[0]).all() for some in several)


def test_rules_go_to_other_processes(tmp_path: Path):
    X, means, b = gaussian()
    for rule in (
        nearest_mean_rule(means), linear_rule(means, b), nearest_mean_rule(stored(means, tmp_path))
    ):  # fmt: skip
        again = pickle.loads(pickle.dumps(rule))
        np.testing.assert_array_equal(again.decide(X), rule.decide(X))


def test_no_rows_and_one_class():
    X, means, _ = gaussian(k=1)
    rule = nearest_mean_rule(means, np.array([5]))
    assert rule.decide(X[:0]).shape == (0,)
    assert rule.decide(X).tolist() == [5] * len(X)
    compiled = nearest_mean_rule(means, np.array([5]), **large_tiles(True))
    assert compiled.decide(X).tolist() == [5] * len(X)


@each_library
def test_counts_by_class(library: Library):
    X, means, _b = gaussian(n=300, k=40)
    y = np.random.default_rng(1).integers(-1, 30, 300)
    near, chosen = nearest_mean_rule(library.put(means)), linear_rule(library.put(means))
    state = Decisions.from_block(library.put(X), library.put(y), 40, near, chosen)
    want = nearest_means(X, means, np.arange(40)), classifier_decisions(X, means)
    for got, yes in (
        (state.samples, y >= 0), (state.agreements, want[0] == want[1]),
        (state.ncc_hits, want[0] == y), (state.clf_hits, want[1] == y),
    ):  # fmt: skip
        counts = np.bincount(y[yes & (y >= 0)], minlength=40)
        assert library.host(got).dtype == np.int64
        assert library.host(got).tolist() == counts.tolist()


@pytest.mark.parametrize("place", ["memory", "file"])
@pytest.mark.parametrize(
    ("n", "k", "d"),
    [
        pytest.param(3000, 4000, 96, marks=pytest.mark.slow),
        (500, 2100, 700),
        pytest.param(4000, 900, 128, marks=pytest.mark.slow),
    ],
)
def test_memory_is_what_the_price_says(place: str, n: int, k: int, d: int, tmp_path: Path):
    X, means, _ = gaussian(n, k, d)
    X[:40] = means[:40] * (1 + 1e-9)
    X[40:80] = 0.0
    rows = means if place == "memory" else stored(means, tmp_path)
    nearest_mean_rule(rows).decide(X[:2])  # compiled, or loaded, by now
    tracemalloc.start()
    rule = nearest_mean_rule(rows)
    rule.decide(X)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    price = Rule.peak_bytes(k, d, n, stored=place == "file")
    assert peak <= price - (COMPILER_BYTES if k > COMPILED_CLASSES else 0)
    held = 0 if place == "file" else k * d * 4
    assert peak > held
