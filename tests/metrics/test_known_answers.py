"""Closed forms of the literature, through states and the table of metrics."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import polygamma, psi

from ncbatch.metrics import CATALOGUE, Statistics, Undefined, find_metrics
from ncbatch.states.moments import Moments
from ncbatch.states.pairs.sweep import sweep_pairs
from tests import oracles
from tests.strategies import feature_sets, random_rotation


def statistics(X, y, K, W=None, weighted=False) -> Statistics:
    moments = Moments.from_block(X, y, K)
    moments = moments.select(np.flatnonzero(moments.counts))
    weight = None if W is None else W[np.unique(y[y >= 0])]
    s = Statistics(moments, weighted=weighted, weight=weight)
    return replace(
        s,
        pairs=sweep_pairs(
            moments.means,
            s.global_mean,
            moments.variances,
            counts=moments.counts,
            within=None if moments.scatter is None else moments.within_covariance,
        ),
    )


def values(s: Statistics) -> dict[str, float]:
    found = {}
    for name, metric in CATALOGUE.items():
        if metric.reads & {"decisions", "ood"} or (
            s.weight is None and "classifier" in metric.reads
        ):
            continue
        try:
            found[name] = metric.compute(s)
        except Undefined:
            found[name] = math.nan
    return found


@pytest.mark.parametrize("make", [oracles.simplex_etf, oracles.orthogonal_frame])
@pytest.mark.parametrize(("K", "D"), [(2, 4), (5, 8), (10, 12)])
@pytest.mark.parametrize("sigma", [1e-6, 0.3])
def test_frames_have_their_closed_forms(make, K, D, sigma):
    X, y, expected = make(K, D, 2.0, sigma)
    got = values(statistics(X, y, K))
    compared = expected.keys() & got.keys()
    assert len(compared) > 5
    for name in compared:
        assert got[name] == pytest.approx(expected[name], rel=1e-6, abs=1e-9), name


def test_etf_closed_forms_written_out():
    K, D, s, sigma = 7, 11, 3.0, 0.25
    X, y, _ = oracles.simplex_etf(K, D, s, sigma)
    got = values(statistics(X, y, K))
    assert got["nc1_pinv"] == pytest.approx(sigma**2 * (K - 1) ** 2 / (K * s**2))
    assert got["nc1_quot"] == pytest.approx(D * sigma**2 / s**2)
    assert got["nc1_cdnv"] == pytest.approx(D * sigma**2 * (K - 1) / (2 * K * s**2))
    assert got["nc2_etf_err"] == pytest.approx(0, abs=1e-12)
    assert got["nc2g_dist_mean"] == pytest.approx(math.sqrt(2 * K / (K - 1)))
    assert got["nc2g_log_mean"] == pytest.approx(-math.log(2 * K / (K - 1)) / 2)
    assert got["nc2g_log"] == pytest.approx(0, abs=1e-24)


def test_uncentred_orthogonal_frame():
    from ncbatch.metrics import simplex_etf_error

    assert simplex_etf_error(np.eye(10, 20)) == pytest.approx(0.320364, abs=1e-6)
    assert simplex_etf_error(np.eye(10)) == pytest.approx(
        math.sqrt(2 - 2 * math.sqrt(9 / 10)), rel=1e-12
    )


def test_gaussian_means_have_their_expectations():
    rng = np.random.default_rng(0)
    K, D, tau, sigma = 1000, 64, 1.0, 0.5
    means = tau * rng.normal(size=(K, D))
    moments = Moments(
        np.full(K, 10), means, np.full(K, 10 * D * sigma**2), np.eye(D) * sigma**2 * 10 * K
    )
    s = Statistics(moments)
    s = replace(s, pairs=sweep_pairs(means, s.global_mean, moments.variances))
    got = values(s)
    a = (D - 1) / 2
    assert got["nc1_pinv"] == pytest.approx(sigma**2 * D / (tau**2 * (K - D - 2)), rel=0.02)
    assert got["nc1_cdnv"] == pytest.approx(sigma**2 * D / (2 * tau**2 * (D - 2)), rel=0.02)
    assert got["nc2_etf_err"] == pytest.approx(math.sqrt(2 - 2 * math.sqrt(D / (D + K))), rel=0.01)
    log_mean = -(math.log(4) + psi(a) - psi(2 * a)) / 2
    log_var = (polygamma(1, a) - polygamma(1, 2 * a)) / 4
    assert got["nc2g_log_mean"] == pytest.approx(log_mean, abs=2e-3)
    assert got["nc2g_log"] == pytest.approx(log_var, rel=0.05)


def test_labels_at_random_give_the_null_values():
    rng = np.random.default_rng(1)
    K, D, n = 300, 20, 15
    X, y = rng.normal(size=(K * n, D)), np.repeat(np.arange(K), n)
    got = values(statistics(X, y, K))
    assert got["nc1_pinv"] == pytest.approx((n - 1) * D / (K - D - 2), rel=0.05)
    assert got["nc1_quot"] == pytest.approx((n - 1) * K / (K - 1), rel=0.05)
    assert got["nc1_cdnv"] == pytest.approx((n - 1) * D / (2 * (D - 2)), rel=0.05)


@settings(max_examples=25)
@given(feature_sets(dtypes=(np.dtype(np.float64),)), st.integers(0, 99))
def test_rotation_relabelling_and_translation_change_nothing(data, seed):
    rng = np.random.default_rng(seed)
    X, y, K = data.X, data.y, data.n_classes
    D = X.shape[1]
    W = rng.normal(size=(K, D))
    base = values(statistics(X, y, K, W))
    Q, order = random_rotation(D, seed), rng.permutation(K)
    relabelled = np.where(y >= 0, order[y], y)
    W_relabelled = np.empty_like(W)
    W_relabelled[order] = W
    scale = np.abs(X[y >= 0]).max()
    for X2, y2, W2 in (
        (X @ Q, y, W @ Q),
        (X, relabelled, W_relabelled),
        (X + scale * rng.normal(size=D), y, W),
    ):
        changed = values(statistics(X2, y2, K, W2))
        moved = X2 is not X and W2 is W
        for name, value in base.items():
            if moved and name in {"nc3_bias", "spec_rankme"}:
                continue  # of uncentred features
            tolerance = 1e-6 if name not in ("nc1_pinv", "nc1_svd") else 1e-4
            assert changed[name] == pytest.approx(value, rel=tolerance, abs=1e-9, nan_ok=True), name


def test_all_means_equal_leaves_ratios_undefined_with_a_reason():
    X = np.array([[1.0, 2.0], [3.0, 4.0], [1.0, 2.0], [3.0, 4.0]])
    s = statistics(X, np.array([0, 0, 1, 1]), 2)
    for name in ("nc1_pinv", "nc1_quot", "nc2_etf_err", "nc1_cdnv", "nc2g_log_mean"):
        with pytest.raises(Undefined, match=r"zero|coincide"):
            CATALOGUE[name].compute(s)
    assert CATALOGUE["nc2_norm_mean"].compute(s) == 0.0


def test_riesz_beyond_float64_says_so_and_its_logarithm_holds():
    rng = np.random.default_rng(0)
    means = rng.normal(size=(5, 5000))
    moments = Moments(np.full(5, 2), means, np.ones(5))
    s = Statistics(moments)
    s = replace(s, pairs=sweep_pairs(means, s.global_mean, moments.variances))
    with pytest.raises(Undefined, match="_log metrics"):
        CATALOGUE["nc2g_riesz"].compute(s)
    assert math.isfinite(CATALOGUE["nc2g_riesz_log"].compute(s))
    assert CATALOGUE["nc2g_riesz_log_mean"].compute(s) < -1000


def test_every_metric_says_what_it_is():
    for name, metric in CATALOGUE.items():
        assert metric.name == name
        assert metric.place in {"NC1", "NC2", "NC3", "NC4", "NC5", "spectrum"}
        for text in (metric.long_name, metric.formula, metric.source, metric.units):
            assert text
    assert [m.name for m in CATALOGUE.values() if m not in find_metrics()] == [
        "nc1_cdnv_directional_exact",
        "nc1_test_to_train",
    ]


@pytest.mark.parametrize("K", [10, 40])
def test_vci_of_normalised_layers_does_not_hang_on_rounding_errors(K: int):
    """In the direction (1, ..., 1) layer normalisation leaves rounding errors of float32 alone."""
    D, n = 16, 20
    rng = np.random.default_rng(0)
    y = np.repeat(np.arange(K), n)
    X = 0.5 * rng.normal(size=(K, D))[y] + rng.normal(size=(K * n, D))
    X = (X - X.mean(axis=1, keepdims=True)).astype(np.float32)
    X = (X / X.std(axis=1, keepdims=True)).astype(np.float64)

    def index(X, blocks: int) -> float:
        means = X.reshape(K, n, -1).mean(axis=1)
        apart = X - means[y]
        scatter = sum(part.T @ part for part in np.array_split(apart, blocks))
        traces = (apart**2).reshape(K, -1).sum(axis=1)
        return CATALOGUE["nc1_vci"].compute(
            Statistics(Moments(np.full(K, n), means, traces, scatter))
        )

    values = [index(X, blocks) for blocks in (1, 7, K, K * n)]
    assert values == pytest.approx([values[0]] * 4, rel=1e-7, abs=0)
    # The other D - 1 dimensions hold all there is; S_B has rank min(K, D) - 1 in both.
    others = np.linalg.qr(np.eye(D) - 1 / D)[0][:, : D - 1]
    full = min(D, K - 1)
    left = full - min(D - 1, K - 1) * (1 - index(X @ others, 1))
    assert values[0] == pytest.approx(left / full, rel=1e-4)
