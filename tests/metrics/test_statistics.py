"""Class means in a file: every metric has the value it has in memory, and none holds K x D."""

import math
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest

from ncbatch.arrays.rows import CentredRows, StoredRows
from ncbatch.metrics import CATALOGUE, ClassView, Statistics, Undefined, structure_error
from ncbatch.metrics.geometry import symmetric_sum
from ncbatch.states.decisions import Decisions
from ncbatch.states.directional import DirectionalVariance
from ncbatch.states.moments import Moments
from ncbatch.states.pairs.stats import Nearest, PairStats, Tally
from ncbatch.states.pairs.sweep import PairTiles
from tests.strategies import REGIMES, Features


def equal_means(seed: int) -> Features:
    """All class means are one but for rounding: S_B is zero."""
    rng = np.random.default_rng(seed)
    block = rng.normal(size=(10, 6)) + 100.0
    X = np.concatenate([rng.permutation(block) for _ in range(4)])
    return Features(X, np.repeat(np.arange(4), 10), 4)


CASES = {**REGIMES, "equal_means": equal_means}


def in_file(tmp_path, name: str, values: np.ndarray) -> StoredRows:
    rows = StoredRows.create(tmp_path / name, values.shape)
    rows[0 : len(values)] = values
    return rows


def statistics(data: Features, weighted: bool = False, place=lambda name, values: values):
    """Everything that metrics read, with every K x D array put where `place` says."""
    rng = np.random.default_rng(0)
    X, y, K = data.X.astype(np.float64), data.y, data.n_classes
    D = X.shape[1]
    moments = Moments.from_block(X, y, K)
    classes = np.flatnonzero(moments.counts)
    index = np.full(K, -1)
    index[classes] = np.arange(len(classes))
    moments = moments.select(classes)
    some = rng.random(len(y)) < 0.3
    test = Moments.from_block(X[some] + 0.1, index[y[some]], len(classes))
    moments = replace(moments, means=place("means", moments.means))
    found = Statistics(
        moments,
        weighted=weighted,
        weight=place("weight", rng.normal(size=(K, D))),
        bias=rng.normal(size=K),
        classes=classes,
        decisions=Decisions(*(np.full(K, n) for n in (4, 3, 2, 1))),
        ood_mean=rng.normal(size=D),
        test=replace(test, means=place("test", test.means)),
    )
    pairs = PairTiles(
        moments.means, found.global_mean, moments.variances,
        counts=moments.counts, within=moments.within_covariance,
    )  # fmt: skip
    return replace(
        found,
        pairs=pairs.fold(pairs.tiles(7)),
        directional=DirectionalVariance.from_block(X, index[y], pairs),
    )


def values(s: Statistics) -> dict[str, float | str]:
    found: dict[str, float | str] = {}
    for metric in CATALOGUE.values():
        try:
            found[metric.name] = metric.compute(s)
        except Undefined as reason:
            found[metric.name] = str(reason)
    return found


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_every_metric_over_stored_rows_is_what_it_is_in_memory(tmp_path, case: str, weighted: bool):
    data = CASES[case](3)
    s = statistics(data, weighted)
    stored = statistics(data, weighted, lambda name, array: in_file(tmp_path, name, array))
    assert isinstance(stored.moments.means, StoredRows)
    expected, got = values(s), values(stored)
    assert sum(isinstance(value, float) for value in expected.values()) > 20
    for name, value in expected.items():
        if isinstance(value, str):
            assert got[name] == value, name
        else:
            assert got[name] == pytest.approx(value, rel=1e-12, abs=0, nan_ok=True), name
    ids = np.flatnonzero(np.isin(np.arange(data.n_classes), data.y))
    views = [ClassView(x, ids, data.n_classes) for x in (s, stored)]
    for kind in ("classes", "deciles", "bins", "tops"):
        mine, theirs = (getattr(view, kind)() for view in views)
        assert mine.keys() == theirs.keys()
        for name in mine:
            np.testing.assert_allclose(theirs[name], mine[name], rtol=1e-12, err_msg=name)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_rows_of_the_classifier_are_chosen_as_they_are_read(dtype):
    data = REGIMES["zipf"](1)
    s = statistics(data)
    weight = s.weight.astype(dtype)
    chosen = replace(s, weight=weight[s.classes], bias=s.bias[s.classes], classes=None)
    assert len(s.classes) < data.n_classes
    assert values(replace(s, weight=weight)) == values(chosen)


def test_duality_in_terms_of_directions_equals_the_formula():
    s = statistics(REGIMES["k_less_d"](2))
    Mc = s.moments.means - s.moments.means.mean(axis=0)
    W = Mc * 3.0 + 1e-7 * np.random.default_rng(0).normal(size=Mc.shape)
    W[2] = 0.0
    aligned = replace(s, weight=W, classes=None)
    apart = W / np.linalg.norm(W) - Mc / np.linalg.norm(Mc)
    assert values(aligned)["nc3_papyan"] == pytest.approx(np.sum(apart**2), rel=1e-9)
    near = replace(s, weight=Mc * 3.0 + 1e-7 * Mc[::-1], classes=None)
    W = near.weight.astype(np.longdouble)
    apart = W / np.sqrt((W**2).sum()) - Mc / np.sqrt((Mc.astype(np.longdouble) ** 2).sum())
    assert values(near)["nc3_papyan"] == pytest.approx(float(np.sum(apart**2)), rel=1e-6, abs=0)


def dense_error(A: np.ndarray, B: np.ndarray) -> float:
    G, K = A @ B.T, len(A)
    ideal = (np.eye(K) - 1 / K) / math.sqrt(K - 1)
    return float(np.linalg.norm(G / np.linalg.norm(G) - ideal))


@pytest.mark.parametrize(("K", "D"), [(600, 700), (700, 30), (4200, 8)])
def test_errors_summed_in_blocks_equal_dense_grids(tmp_path, K: int, D: int):
    rng = np.random.default_rng(0)
    A, B = rng.normal(size=(2, K, D)) + 0.3
    expected = dense_error(A, B)
    kinds = (A, B), (in_file(tmp_path, "a", A), B), (A, in_file(tmp_path, "b", B))
    for a, b in kinds:
        assert structure_error(a, b) == pytest.approx(expected, rel=1e-11)
    view = CentredRows(in_file(tmp_path, "c", A), B[0])
    assert structure_error(view, view) == pytest.approx(dense_error(A - B[0], A - B[0]), rel=1e-11)
    weights = rng.uniform(size=K)
    np.testing.assert_allclose(
        symmetric_sum(view, weights), (A - B[0]).T @ ((A - B[0]) * weights[:, None]), rtol=1e-10
    )


def tall(K: int, D: int, place=lambda name, values: values) -> Statistics:
    """Statistics of so many classes, with made-up pairs."""
    rng = np.random.default_rng(0)
    some = Tally.of(rng.uniform(1, 2, 100))
    pairs = PairStats(
        *[some] * 10, n_pairs=K * (K - 1) // 2,
        nearest=Nearest(rng.integers(0, K, K), np.ones(K), np.full(K, 0.5)),
    )  # fmt: skip
    counts = np.full(K, 3)
    traces, scatter = np.ones(K), np.eye(D)

    def rows(name: str):
        return place(name, rng.normal(size=(K, D)))

    return Statistics(
        Moments(counts, rows("means"), traces, scatter), pairs=pairs, weight=rows("weight"),
        bias=np.zeros(K), classes=np.arange(K), ood_mean=np.ones(D), weighted=True,
        decisions=Decisions(*[counts] * 4), test=Moments(counts, rows("test"), traces, None),
        directional=DirectionalVariance(np.ones(K)),
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["memory", "memory16", "stored"])
def traced_peak(compute) -> int:
    tracemalloc.start()
    compute()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


@pytest.mark.parametrize(
    ("K", "D", "kind"),
    [
        pytest.param(K, D, kind, marks=[] if (K, kind) == (32_768, "memory") else pytest.mark.slow)
        for K, D in [(32_768, 256), (6000, 1500)]
        for kind in ["memory", "float16", "stored"]
    ],
)
def test_no_formula_holds_an_array_of_classes_by_features(tmp_path, kind: str, K: int, D: int):
    s = tall(K, D, lambda n, a: in_file(tmp_path, n, a) if kind == "stored" else a)
    if kind == "float16":
        s = replace(s, weight=s.weight.astype(np.float16), classes=np.arange(K)[::-1].copy())
    found = {}
    peak = traced_peak(lambda: found.update(values(s)))
    assert all(isinstance(value, float) and math.isfinite(value) for value in found.values())
    if K > 100 * D:
        assert peak < 0.25 * K * D * 8
    assert peak < Statistics.peak_bytes(K, D, scatter=True)


@pytest.mark.slow
def test_no_error_of_few_classes_holds_an_array_of_classes_by_features():
    K = D = 3072
    s = tall(K, D)
    few = ["nc2_etf_err", "nc3_dual_err", "nc3_papyan", "nc1_cdnv_nearest", "nc5_ood_dev"]
    found: list[float] = []
    peak = traced_peak(lambda: found.extend(CATALOGUE[name].compute(s) for name in few))
    assert all(math.isfinite(value) for value in found)
    assert peak < 0.35 * K * D * 8
    assert peak < Statistics.peak_bytes(K, D, scatter=False)
