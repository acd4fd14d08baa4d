"""FAISS decides like the built-in rule, near-ties and exact ties included."""

import pickle
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from ncbatch.arrays.rows import StoredRows
from ncbatch.errors import NcbatchError
from ncbatch.states.decisions import Decisions
from ncbatch.states.rules import faiss_nearest_rule, nearest_mean_rule
from tests.oracles import nearest_means
from tests.strategies import REGIMES, each_regime


@pytest.fixture(autouse=True)
def _faiss():
    pytest.importorskip("faiss")


@pytest.mark.parametrize("offset", [0.0, 1e4])
@each_regime
def test_decisions_are_the_oracles(regime: str, offset: float):
    data = REGIMES[regime](0)
    X = data.X.astype(np.float64) + offset
    ids = np.unique(data.y[data.y >= 0])
    means = np.stack([X[data.y == c].mean(axis=0) for c in ids])
    near = faiss_nearest_rule(means, ids).decide(X)
    np.testing.assert_array_equal(near, nearest_means(X, means, ids))


@pytest.mark.parametrize("kind", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
@pytest.mark.parametrize("n", [5, 300])  # FAISS computes few rows another way
def test_every_dtype_and_all_sorts_of_ties(kind, n: int):
    rng = np.random.default_rng(0)
    means = rng.normal(size=(400, 12))
    means[300] = means[100] + 1e-10
    means[200:220] = means[200]  # more than FAISS is asked for
    X = rng.normal(size=(n, 12)).astype(kind)
    X[:2], X[2:4] = means[200].astype(kind), means[100].astype(kind)
    near = faiss_nearest_rule(means).decide(X)
    np.testing.assert_array_equal(near, nearest_means(X, means, np.arange(400)))
    np.testing.assert_array_equal(near, nearest_mean_rule(means).decide(X))
    assert near[:2].tolist() == [200, 200]


def test_integer_grids_full_of_ties():
    rng = np.random.default_rng(0)
    X, means = rng.integers(-2, 3, size=(200, 3)), rng.integers(-2, 3, size=(150, 3))
    near = faiss_nearest_rule(means.astype(float)).decide(X.astype(float))
    np.testing.assert_array_equal(near, nearest_means(X, means, np.arange(150)))


def test_means_in_a_file_and_in_other_processes(tmp_path: Path):
    rng = np.random.default_rng(0)
    X, means = rng.normal(size=(60, 7)), rng.normal(size=(90, 7))
    file = StoredRows.create(tmp_path / "means", means.shape)
    file[0:90] = means
    rule = faiss_nearest_rule(file)
    want = nearest_means(X, means, np.arange(90))
    np.testing.assert_array_equal(rule.decide(X), want)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(rule)).decide(X), want)
    y = rng.integers(0, 90, 60)
    state = Decisions.from_block(X, y, 90, rule, nearest_mean_rule(means))
    assert state.rate("agreements") == 1.0
    assert state.rate("ncc_hits") == np.mean(want == y)


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch):
    import faiss

    means = np.eye(3)
    with pytest.raises(NcbatchError, match="'gpu'"):
        faiss_nearest_rule(means, device="gpu")
    if not hasattr(faiss, "StandardGpuResources"):
        with pytest.raises(NcbatchError, match="faiss-gpu-cu12"):
            faiss_nearest_rule(means, device="cuda")
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(NcbatchError, match=r"ncbatch\[faiss\]"):
        faiss_nearest_rule(means)
