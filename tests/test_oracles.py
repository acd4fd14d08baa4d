"""The oracle and the strategies themselves: reference values, known answers, valid draws."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from itertools import combinations
from statistics import fmean, pvariance, variance

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from tests import oracles
from tests.oracles import Array, base_metrics, class_moments, orthogonal_frame, select, simplex_etf
from tests.strategies import (
    DTYPES,
    LABELS,
    REGIMES,
    Features,
    feature_sets,
    labels,
    partitions,
    random_rotation,
)

SEEDS = (0, 1)
NAMES = {
    *("nc1_pinv", "nc1_svd", "nc1_quot", "nc1_cdnv", "n_coincident_pairs", "nc2_etf_err"),
    *("nc2g_dist", "nc2g_dist_mean", "nc2g_log", "nc2g_log_mean", "nc2g_riesz", "nc2g_riesz_mean"),
    *("nc2_norm_mean", "nc2_norm_var", "nc2_lognorm_mean", "nc2_lognorm_var"),
    *("nc2_interference_mean", "nc2_interference_var", "nc3_dual_err", "nc3u_uni_dual"),
    *("nc3_dot_mean", "nc3_dot_var", "nc3_cos_mean", "nc3_cos_var"),
    *("nc3_distance_mean", "nc3_distance_var", "nc4_agree", "nc5_ood_dev"),
}
DIGITS = {
    "nc1_pinv": 0.8656647848724994,
    "nc1_svd": 0.8656647848724998,
    "nc1_quot": 1.3281601811091446,
    "nc1_cdnv": 0.6855153555797731,
    "nc2_etf_err": 0.6592166556010262,
    "nc2g_dist": 0.028360986876439804,
    "nc2g_dist_mean": 1.4780203527676754,
    "nc2g_log": 0.01387614148093627,
    "nc2g_log_mean": -0.38393517337124666,
    "nc2_norm_mean": 1.4001909261493257,
    "nc2_norm_var": 0.2500313589776197**2,
    "nc3_dual_err": 0.7632872846265862,
    "nc3u_uni_dual": 0.20588404232600582,
    "nc5_ood_dev": 0.4428052385421952,
}


@cache
def _digits() -> dict[str, Array]:
    """Return the inputs of METRICS section 6."""
    X, y = load_digits(return_X_y=True)
    X = X / 16
    W = np.array([X[:1297][y[:1297] == c][:50].mean(axis=0) for c in range(10)])
    return {
        **{"X": X[:1297], "y": y[:1297], "X_test": X[1297:], "y_test": y[1297:]},
        **{"X_ood": 1 - X[1297:], "W": W, "b": -(W**2).sum(axis=1) / 2},
    }


def _both(regime: str, seed: int) -> tuple[Features, dict[str, float]]:
    """Return a regime's features and its metrics, with a random classifier."""
    data = REGIMES[regime](seed)
    W = np.random.default_rng(seed).standard_normal((data.n_classes, data.X.shape[1]))
    return data, base_metrics(data.X, data.y, data.n_classes, W=W, X_ood=_ood(data))


def _ood(data: Features) -> Array:
    """Return out-of-distribution samples for a feature set, in float64."""
    return 1 - data.X.astype(np.float64)


# ---------------------------------------------------------------------------- reference values


def test_digits_reference_values() -> None:
    """The oracle agrees with the field's reference implementation, and returns every name."""
    values = base_metrics(**_digits(), n_classes=10)
    assert values.keys() == NAMES
    assert {name: values[name] for name in DIGITS} == pytest.approx(DIGITS, rel=1e-9)
    assert values["n_coincident_pairs"] == 0


def test_digits_cdnv_exponent() -> None:
    """`dist_exp` is the power of the squared distance."""
    values = base_metrics(**_digits(), n_classes=10, dist_exp=2)
    assert values["nc1_cdnv"] == pytest.approx(0.20100903389319938, rel=1e-9)
    assert values["nc1_quot"] == pytest.approx(DIGITS["nc1_quot"], rel=1e-12)


def test_digits_decisions() -> None:
    """Agreement with and without bias, and both accuracies, are exact."""
    inputs = _digits()
    said = oracles.classifier_decisions(inputs["X_test"], inputs["W"], inputs["b"])
    assert base_metrics(**inputs, n_classes=10)["nc4_agree"] == 0.892
    assert base_metrics(**{**inputs, "b": None}, n_classes=10)["nc4_agree"] == 0.83
    assert base_metrics(**inputs, n_classes=10, predictions=said)["nc4_agree"] == 0.892
    truth = inputs["y_test"]
    assert base_metrics(**inputs, n_classes=10, predictions=truth)["nc4_agree"] == 0.87
    assert (said == truth).mean() == 0.808


# ------------------------------------------------------------------------------- known answers


@pytest.mark.parametrize("dist_exp", [1.0, 2.0])
@pytest.mark.parametrize(
    ("build", "K", "D"),
    [
        *[(simplex_etf, K, D) for K, D in [(2, 1), (2, 2), (3, 2), (5, 4), (7, 12), (20, 40)]],
        *[(orthogonal_frame, K, D) for K, D in [(2, 2), (3, 3), (6, 9), (10, 30)]],
    ],
)
def test_exact_frames(build: Callable, K: int, D: int, dist_exp: float) -> None:
    """A simplex and an orthogonal frame have the closed-form answers of METRICS section 4."""
    X, y, expected = build(K, D, 1.7, 0.3, 2, dist_exp=dist_exp)
    values = base_metrics(X, y, K, dist_exp=dist_exp)
    assert values == pytest.approx(expected, rel=1e-12, abs=1e-13)


def test_means_and_variances_by_plain_loops() -> None:
    """Pairs have ddof 0 and classes ddof 1: the standard library says the same."""
    rng = np.random.default_rng(0)
    M, W = rng.standard_normal((5, 4)), rng.standard_normal((5, 4))
    values = base_metrics(M, np.arange(5), 5, W=W)
    Mc = M - sum(M) / 5
    u, w = ([row / math.hypot(*row) for row in rows] for rows in (Mc, W))
    over_pairs = {
        "nc2_interference": [float(a @ b) for a, b in combinations(Mc, 2)],
        "nc2g_riesz": [math.dist(a, b) ** -2 for a, b in combinations(u, 2)],
    }
    over_classes = {
        "nc2_lognorm": [math.log(math.hypot(*row)) for row in Mc],
        "nc3_dot": [float(a @ b) for a, b in zip(W, Mc, strict=True)],
        "nc3_cos": [float(a @ b) for a, b in zip(w, u, strict=True)],
        "nc3_distance": [math.dist(a, b) for a, b in zip(w, u, strict=True)],
    }
    for name, numbers in (over_pairs | over_classes).items():
        spread = pvariance(numbers) if name in over_pairs else variance(numbers)
        variance_name = name if name.startswith("nc2g") else f"{name}_var"
        found = (values[f"{name}_mean"], values[variance_name])
        assert found == pytest.approx((fmean(numbers), spread), rel=1e-12)


def test_self_dual_frame() -> None:
    """A classifier equal to the means of a simplex is dual to them and decides as they do."""
    X, y, _ = simplex_etf(6, 8, 2.0, 0.1)
    means = class_moments(X, y, 6).means
    values = base_metrics(X, y, 6, W=3 * means, X_ood=X - 10, y_ood=y)
    expected = {"nc3_dot_mean": 12.0, "nc3_cos_mean": 1.0, "nc3_distance_mean": 0.0}
    expected |= {"nc3_dual_err": 0.0, "nc3u_uni_dual": 0.0, "nc4_agree": 1.0}
    assert {name: values[name] for name in expected} == pytest.approx(expected, abs=1e-14)
    cosines = means @ np.full(8, -1 / np.sqrt(8)) / 2
    assert values["nc5_ood_dev"] == pytest.approx(np.abs(cosines).mean(), rel=1e-13)


def test_cross_covariance_is_exact() -> None:
    """The builders' samples have covariance sigma^2 I in every class."""
    X, y, _ = orthogonal_frame(4, 6, 2.0, 0.5, 3)
    moments = class_moments(X, y, 4)
    np.testing.assert_array_equal(moments.counts, 36)
    np.testing.assert_allclose(moments.means, 2 * np.eye(4, 6), atol=1e-15)
    np.testing.assert_allclose(moments.variances, 6 * 0.25, rtol=1e-14)
    np.testing.assert_allclose(moments.within, 0.25 * np.eye(6), atol=1e-15)


def test_random_means_follow_their_expectation() -> None:
    """METRICS 4 (iii): Gaussian means, unit noise without a sampling error."""
    rng, K, D = np.random.default_rng(0), 400, 32
    X, y = oracles._crosses(rng.standard_normal((K, D)), 1.0, 1)
    values = base_metrics(X[y >= 0], y, K)
    assert values["nc1_pinv"] == pytest.approx(D / (K - D - 2), rel=0.02)
    assert values["nc1_cdnv"] == pytest.approx(D / (2 * (D - 2)), rel=0.02)
    assert values["nc2_etf_err"] == pytest.approx(np.sqrt(2 - 2 * np.sqrt(D / (D + K))), rel=0.02)


# ------------------------------------------------------------------------------- conventions


def test_moments_by_hand() -> None:
    """Negative labels are no samples, an unseen class has no mean, a singleton no variance."""
    X = np.array([[0.0], [2.0], [99.0], [7.0]])
    moments = class_moments(X, np.array([0, 0, -1, 2]), 3)
    np.testing.assert_array_equal(moments.counts, [2, 0, 1])
    np.testing.assert_array_equal(moments.means, [[1], [np.nan], [7]])
    np.testing.assert_array_equal(moments.variances, [1, np.nan, 0])
    np.testing.assert_allclose(moments.within, [[2 / 3]], rtol=1e-15)


def test_select() -> None:
    """Counts and the list restrict together; an unseen class never counts."""
    y = np.array([0, 0, 0, 1, 1, 2, -1])
    assert select(y, 4).tolist() == [0, 1, 2]
    assert select(y, 4, min_count=2).tolist() == [0, 1]
    assert select(y, 4, max_count=2).tolist() == [1, 2]
    assert select(y, 4, min_count=0, classes=[3, 2, 0]).tolist() == [0, 2]


def test_filter_equals_removal() -> None:
    """A filter on train is the same as never having had the other classes."""
    data = REGIMES["zipf"](0)
    W = np.random.default_rng(0).standard_normal((60, 16))
    kept = select(data.y, 60, min_count=20, max_count=200)
    rows = np.isin(data.y, kept)
    filtered = base_metrics(data.X, data.y, 60, W=W, min_count=20, max_count=200)
    listed = base_metrics(data.X, data.y, 60, W=W, classes=kept)
    removed = base_metrics(data.X[rows], data.y[rows], 60, W=W)
    assert 2 < len(kept) < len(select(data.y, 60))
    assert filtered == listed == removed


def test_agreement_population() -> None:
    """Test samples of unseen classes count without a filter and not with one."""
    X, y = np.array([[0.0], [1.0], [2.0]]), np.array([0, 1, 3])
    W, b = np.array([[0.0], [1.0], [5.0], [2.0]]), np.array([0.0, -0.5, -90.0, -2.0])
    test = {"X_test": np.array([[0.4], [1.2], [5.0], [5.0]]), "y_test": np.array([0, 2, 3, -1])}
    assert base_metrics(X, y, 4, W=W, b=b, **test)["nc4_agree"] == 1.0
    W[2], b[2] = 5, 0
    assert base_metrics(X, y, 4, W=W, b=b, **test)["nc4_agree"] == 0.0
    said = np.array([0, 3, 1, 0])
    assert base_metrics(X, y, 4, predictions=said, **test)["nc4_agree"] == pytest.approx(1 / 3)
    listed = base_metrics(X, y, 4, predictions=said, classes=[0, 1, 3], **test)
    assert listed["nc4_agree"] == 0.5


def test_ties_go_to_the_lowest_class() -> None:
    """A sample between two means belongs to the lower one, and so do equal scores."""
    X = np.array([[1.0], [-1.0], [0.0]])
    nearest = oracles.nearest_means(X, np.array([[1.0], [-1.0]]), np.array([2, 5]))
    assert nearest.tolist() == [2, 5, 2]
    assert oracles.classifier_decisions(X, np.ones((6, 1))).tolist() == [0, 0, 0]


def test_weighted_moves_only_the_global_mean() -> None:
    """CDNV and the within part stay; the norms are taken from the mean of the samples."""
    data = REGIMES["zipf"](0)
    X = data.X.astype(np.float64)
    plain, weighted = (base_metrics(X, data.y, 60, weighted=w) for w in (False, True))
    assert plain["nc1_cdnv"] == weighted["nc1_cdnv"]
    seen = select(data.y, 60)
    Mc = class_moments(X, data.y, 60).means[seen] - X.mean(axis=0)
    assert weighted["nc2_norm_mean"] == pytest.approx(np.linalg.norm(Mc, axis=1).mean(), rel=1e-12)
    S_B, S_W = Mc.T @ Mc / len(Mc), class_moments(X, data.y, 60).within
    assert weighted["nc1_quot"] == pytest.approx(np.trace(S_W) / np.trace(S_B), rel=1e-12)
    assert weighted["nc1_pinv"] == pytest.approx(
        np.trace(np.linalg.pinv(S_B) @ S_W) / len(Mc), rel=1e-9
    )


def test_coincident_means_are_left_out() -> None:
    """Two means at one point: no ratio, no log, but a distance of 0."""
    X, y, _ = simplex_etf(4, 3, 1.0, 0.2)
    X, y = np.concatenate([X, X[y == 0]]), np.concatenate([y, np.full(6, 4)])
    values = base_metrics(X, y, 5)
    assert values["n_coincident_pairs"] == 1
    assert values["nc1_cdnv"] == pytest.approx(3 * 0.04 * 3 / 8, rel=1e-12)
    assert np.isfinite([values["nc2g_log"], values["nc2g_riesz"]]).all()
    units = oracles.unit_rows(oracles.geometry(X, y, select(y, 5)).centred)
    kernels = oracles.sphere_kernels(units)
    assert [len(kernels[name]) for name in ("nc2g_dist", "nc2g_log", "nc2g_riesz")] == [10, 9, 9]


def test_mean_at_the_global_mean_has_no_direction() -> None:
    """It stays in norms and dots and leaves cosines, kernels and logs."""
    X = np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0]])
    values = base_metrics(X, np.arange(3), 3, W=np.array([[1.0, 0.0], [-1.0, 0.0], [5.0, 5.0]]))
    assert values["nc2_norm_mean"] == pytest.approx(2 / 3)
    assert values["nc3_dot_mean"] == pytest.approx(2 / 3)
    assert (values["nc2_lognorm_mean"], values["nc3_cos_mean"]) == (0, 1)
    assert (values["nc2g_dist_mean"], values["nc2g_riesz_mean"]) == (2, 0)


def test_all_means_equal_leaves_cells_empty() -> None:
    """S_B = 0: ratios are NaN and nothing warns."""
    X = np.tile(np.array([[0.1, 0.7, 1e4]]), (9, 1))
    values = base_metrics(X, np.arange(9) % 3, 3, W=np.ones((3, 3)))
    empty = {name for name, value in values.items() if np.isnan(value)}
    assert {"nc1_pinv", "nc1_svd", "nc1_quot", "nc1_cdnv", "nc2_etf_err", "nc2g_log"} <= empty
    assert (values["n_coincident_pairs"], values["nc2_norm_mean"]) == (3, 0)


def test_too_few_classes() -> None:
    """One class has no between-class part."""
    with pytest.raises(ValueError, match="found 1 chosen classes"):
        base_metrics(np.ones((3, 2)), np.zeros(3, dtype=int), 1)


@pytest.mark.parametrize("regime", ["offset", "zipf", "k_greater_d", "constant_columns"])
def test_rotation_and_relabelling(regime: str) -> None:
    """No metric of the oracle depends on the axes or on the names of the classes."""
    data, values = _both(regime, 0)
    K, D = data.n_classes, data.X.shape[1]
    rng = np.random.default_rng(0)
    W, names, Q = rng.standard_normal((K, D)), rng.permutation(K), random_rotation(D, 3)
    X, W_new = data.X.astype(np.float64) @ Q, np.empty((K, D))
    W_new[names] = W @ Q
    turned = base_metrics(X, names[data.y], K, W=W_new, X_ood=_ood(data) @ Q)
    assert turned == pytest.approx(values, rel=1e-9, abs=1e-12)


# --------------------------------------------------------------------------------- strategies


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=feature_sets())
def test_feature_sets_are_valid(data: Features) -> None:
    """Shapes, types and ranges hold, two classes are seen, and the oracle takes every draw."""
    n, D = data.X.shape
    assert 2 <= n <= 200
    assert 1 <= D <= 12
    assert 2 <= data.n_classes <= 15
    assert data.y.shape == (n,)
    assert data.y.min() >= -1
    assert data.y.max() < data.n_classes
    assert data.X.dtype in DTYPES
    assert np.isfinite(data.X.astype(np.float64)).all()
    assert len(select(data.y, data.n_classes)) >= 2
    W = np.ones((data.n_classes, D))
    values = base_metrics(data.X, data.y, data.n_classes, W=W, X_ood=data.X)
    assert values.keys() == NAMES
    assert not np.isinf(list(values.values())).any()


@settings(max_examples=20, deadline=None)
@given(data=feature_sets(dtypes=["float32"], distributions=["sorted", "unseen"]))
def test_feature_sets_obey_their_parameters(data: Features) -> None:
    """The dtype and the label distribution can be pinned."""
    assert data.X.dtype == np.float32
    unseen = len(select(data.y, data.n_classes)) < data.n_classes
    assert unseen or data.n_classes == 2 or (np.diff(data.y) >= 0).all()


@pytest.mark.parametrize("name", LABELS)
def test_labels_are_as_named(name: str) -> None:
    """Each label distribution shows what it is named after."""
    y = labels(name, 0, 150, 10)
    counts = np.bincount(y[y >= 0], minlength=10)
    shown = {
        "uniform": counts.min() > 0,
        "zipf": counts[0] > 3 * counts[9],
        "sorted": (np.diff(y) >= 0).all(),
        "unseen": (counts == 0).sum() >= 4,
        "singletons": (counts == 1).sum() == 9,
        "negative": 10 < (y < 0).sum() < 75,
    }
    assert shown[name]
    assert len(np.unique(labels(name, 1, 2, 10))) == 2


@settings(max_examples=50, deadline=None)
@given(data=st.data(), n=st.integers(0, 30))
def test_partitions_cover_all_rows(data: st.DataObject, n: int) -> None:
    """The blocks, put together again, are the rows in order."""
    blocks = np.split(np.arange(n), data.draw(partitions(n)))
    np.testing.assert_array_equal(np.concatenate(blocks), np.arange(n))


@pytest.mark.parametrize("D", [1, 2, 9])
def test_random_rotation(D: int) -> None:
    """Orthogonal, orientation kept, reproducible."""
    Q = random_rotation(D, 5)
    np.testing.assert_allclose(Q @ Q.T, np.eye(D), atol=1e-14)
    assert np.linalg.det(Q) == pytest.approx(1)
    np.testing.assert_array_equal(Q, random_rotation(D, 5))


# ------------------------------------------------------------------------------------- regimes


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("regime", REGIMES)
def test_regimes_have_finite_metrics(regime: str, seed: int) -> None:
    """Every regime is of moderate size and leaves no metric undefined."""
    data, values = _both(regime, seed)
    n, D = data.X.shape
    assert 400 <= n <= 2000
    assert 8 <= D <= 32
    assert np.isfinite(list(values.values())).all()
    assert (values["n_coincident_pairs"] > 0) == (regime == "exactly_coincident")


def _spectrum(data: Features) -> Array:
    """Return the eigenvalues of S_B as ratios to the largest, in descending order."""
    train = oracles.geometry(data.X, data.y, select(data.y, data.n_classes))
    squares = np.linalg.svd(train.centred.astype(np.float64), compute_uv=False) ** 2
    return squares / squares[0]


@pytest.mark.parametrize("regime", REGIMES)
def test_regimes_stay_clear_of_the_rank_cutoff(regime: str) -> None:
    """No eigenvalue of S_B is so near the pseudo-inverse cut-off that rounding decides."""
    ratios = _spectrum(REGIMES[regime](0))
    assert not ((ratios > 1e-24) & (ratios < 1e-11)).any()


@pytest.mark.parametrize("seed", SEEDS)
def test_regimes_are_as_named(seed: int) -> None:
    """The numbers that name a regime hold."""
    sets = {name: make(seed) for name, make in REGIMES.items()}
    moments = {name: class_moments(d.X, d.y, d.n_classes) for name, d in sets.items()}
    m = moments["collapsed"]
    share = np.sqrt(m.variances / (m.means**2).sum(axis=1))
    assert 2e-7 < share.min() < share.max() < 5e-6
    m = moments["offset"]
    assert np.linalg.norm(m.means.mean(axis=0)) == pytest.approx(4e4, rel=1e-3)
    m = moments["near_coincident"]
    gap = np.linalg.norm(m.means[0] - m.means[1]) / np.linalg.norm(m.means[0])
    assert gap == pytest.approx(1e-7, rel=1e-6)
    m = moments["exactly_coincident"]
    np.testing.assert_array_equal(m.means[[0, 2]], m.means[[1, 3]])
    assert (moments["singletons"].counts == 1).sum() == 10
    assert (moments["zipf"].counts == 0).sum() >= 5
    assert 3e8 < 1 / _spectrum(sets["layernorm"])[-1] < 1e10
    outliers = moments["pilot_outlier"].variances * moments["pilot_outlier"].counts
    assert (np.sqrt(outliers) > 1e4).all()
    assert (_spectrum(sets["constant_columns"])[-3:] < 1e-24).all()
