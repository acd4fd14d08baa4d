"""The pure functions: equal to naive grids, to known answers, and in every array library."""

import inspect
import math

import numpy as np
import pytest

from ncbatch import metrics as m
from ncbatch.errors import DataError, UsageError
from ncbatch.states.decisions import Decisions
from ncbatch.states.moments import Moments
from tests import oracles
from tests.libraries import NUMPY, Library, each_library
from tests.strategies import random_rotation


def random_means(K: int, D: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    M, W, V = rng.normal(size=(K, D)) + 2.0, rng.normal(size=(K, D)), rng.uniform(0.5, 1, K)
    A = rng.normal(size=(D, D))
    return M, W, V, A @ A.T / D


SHAPES = [(2, 5), (5, 3), (6, 5), (7, 5), (12, 30), (40, 6)]


@each_library
@pytest.mark.parametrize(("K", "D"), SHAPES)
def test_structure_and_duality_errors_equal_dense_grids(library: Library, K: int, D: int):
    M, W, _, _ = random_means(K, D)
    center = M.mean(axis=0)
    put = library.put
    assert m.simplex_etf_error(put(M), put(center)) == pytest.approx(
        oracles.structure_error(M - center, M - center), rel=1e-12
    )
    assert m.self_duality_error(put(W), put(M), put(center)) == pytest.approx(
        oracles.structure_error(W, M - center), rel=1e-12
    )


@each_library
@pytest.mark.parametrize(("K", "D"), SHAPES)
def test_covariance_ratios_equal_pinv(library: Library, K: int, D: int):
    M, _, _, S = random_means(K, D)
    center = M.mean(axis=0)
    S_B = (M - center).T @ (M - center) / K
    expected = np.trace(np.linalg.pinv(S_B, hermitian=True) @ S) / K
    put = library.put
    for metric in ("pinv", "svd"):
        got = m.covariance_ratio(put(S), put(M), put(center), metric)
        assert got == pytest.approx(expected, rel=1e-9)
    got = m.covariance_ratio(put(S), put(M), put(center), "quotient")
    assert got == pytest.approx(np.trace(S) / np.trace(S_B), rel=1e-12)


def test_ill_conditioned_between_covariance_keeps_its_digits():
    rng = np.random.default_rng(0)
    Q = random_rotation(12, 0)
    scales = np.logspace(0, -4.6, 12)  # condition of S_B: 1.6e9
    M = (rng.normal(size=(300, 12)) * scales) @ Q
    S = Q.T @ np.diag(scales**2 * rng.uniform(0.5, 1, 12)) @ Q
    center = M.mean(axis=0)
    Mc = (M - center).astype(np.longdouble) @ Q.T.astype(np.longdouble)
    S_B = (Mc / scales).T @ (Mc / scales) / 300  # well conditioned after scaling back
    S_scaled = (Q @ S @ Q.T) / np.outer(scales, scales)
    exact = np.trace(np.linalg.solve(S_B.astype(float), S_scaled.astype(float))) / 300
    assert m.covariance_ratio(S, M, center) == pytest.approx(exact, rel=1e-6)


@each_library
@pytest.mark.parametrize("tile", [None, 3])
def test_kernels_equal_grids_of_differences(library: Library, tile: int | None):
    M, _, V, _ = random_means(11, 4)
    center = M.mean(axis=0)
    u = (M - center) / np.linalg.norm(M - center, axis=1, keepdims=True)
    r = np.linalg.norm(u[:, None] - u, axis=-1)
    off = ~np.eye(11, dtype=bool)
    put, host = library.put, library.host
    upper = np.triu_indices(11, 1)
    for kernel, grid in (
        (m.dist_kernel, lambda r: r),
        (m.log_kernel, lambda r: -np.log(r)),
        (m.riesz_kernel, lambda r: r**-2.0),
    ):
        got = host(m.kernel_grid(put(M), put(center), kernel, tile))
        np.testing.assert_allclose(got[off], grid(r[off]), rtol=1e-12)
        mean, var = m.kernel_stats(put(M), put(center), kernel, tile)
        assert mean == pytest.approx(grid(r[upper]).mean(), rel=1e-12)
        assert var == pytest.approx(grid(r[upper]).var(), rel=1e-12)
    d2 = np.sum((M[:, None] - M) ** 2, axis=-1)
    cdnv = (V[:, None] + V)[off] / 2 / d2[off] ** 1.5
    got = host(m.class_dist_norm_vars(put(V), put(M), 1.5, tile))
    np.testing.assert_allclose(got[off], cdnv, rtol=1e-12)
    assert np.all(np.isinf(np.diag(got)))
    assert m.variability_cdnv(put(V), put(M), 1.5, tile) == pytest.approx(cdnv.mean(), rel=1e-12)
    np.testing.assert_allclose(
        host(m.interference_grid(put(M), put(center))), (M - center) @ (M - center).T, atol=1e-12
    )


def test_kernel_exponents_and_diagonals():
    M = np.array([[0.0, 0.0, 0.0], [3.0, 4.0, 0.0]])
    assert m.log_kernel(M, 2)[0, 1] == pytest.approx(2 * math.log(5))
    assert m.log_kernel(M)[0, 0] == math.inf
    assert m.log_kernel(M, 1)[0, 0] == -math.inf
    assert m.riesz_kernel(M)[0].tolist() == [math.inf, pytest.approx(0.2)]
    assert m.riesz_kernel(M[:, :2]).tolist() == [[0, 0], [0, 0]]
    assert m.riesz_kernel(np.array([[0.0], [2.0]])).tolist() == [[0, -2], [-2, 0]]


def test_kernel_stats_takes_any_kernel():
    M, *_ = random_means(6, 4)

    def squares(data, tile_size=None):
        return m.dist_kernel(data, tile_size=tile_size) ** 2

    grid = m.kernel_grid(M, 0, squares)[np.triu_indices(6, 1)]
    assert m.kernel_stats(M, 0, squares) == pytest.approx((grid.mean(), grid.var()))


@each_library
def test_per_class_functions(library: Library):
    M, W, _, _ = random_means(6, 4)
    center = M.mean(axis=0)
    Mc = M - center
    put, host = library.put, library.host
    unit = lambda a: a / np.linalg.norm(a, axis=1, keepdims=True)  # noqa: E731
    args = put(W), put(M), put(center)
    np.testing.assert_allclose(host(m.similarities(*args)), np.sum(W * Mc, 1), rtol=1e-12)
    np.testing.assert_allclose(
        host(m.similarities(*args, cos=True)), np.sum(unit(W) * unit(Mc), 1), rtol=1e-12
    )
    np.testing.assert_allclose(
        host(m.distance_norms(*args)), np.linalg.norm(unit(W) - unit(Mc), axis=1), rtol=1e-12
    )
    np.testing.assert_allclose(
        host(m.distance_norms(*args, norm=False)), np.linalg.norm(W - Mc, axis=1), rtol=1e-12
    )
    norms = np.linalg.norm(Mc, axis=1)
    np.testing.assert_allclose(host(m.mean_norms(put(M), put(center))), norms, rtol=1e-12)
    doubled = m.mean_norms(put(M), put(center), (lambda v: v * 2.0, lambda v: v + 1.0))
    np.testing.assert_allclose(host(doubled), 2 * norms + 1, rtol=1e-12)
    ood = np.arange(4.0)
    expected = np.mean(np.abs(unit(M) @ ood / np.linalg.norm(ood)))
    assert m.orthogonality_deviation(put(M), put(ood)) == pytest.approx(expected, rel=1e-12)


@each_library
def test_float32_and_float16_inputs_are_exact_numbers(library: Library):
    M, _, _, S = random_means(6, 4)
    M32, S32 = M.astype(np.float32), S.astype(np.float32)
    got = m.covariance_ratio(library.put(S32), library.put(M32))
    assert got == pytest.approx(m.covariance_ratio(S32.astype(float), M32.astype(float)), rel=1e-14)


def test_zero_vectors_and_bad_arguments():
    zero = np.zeros((3, 2))
    assert math.isnan(m.structure_error(zero, zero))
    assert math.isnan(m.structure_error(np.zeros((9, 2)), np.zeros((9, 2))))
    assert math.isnan(m.covariance_ratio(np.eye(2), zero))
    assert math.isnan(m.covariance_ratio(np.eye(2), zero, metric="quotient"))
    assert math.isnan(m.variability_cdnv(np.ones(3), zero))
    assert all(math.isnan(v) for v in m.kernel_stats(zero))
    assert m.similarities(np.ones((3, 2)), zero, cos=True).tolist() == [0, 0, 0]
    with pytest.raises(UsageError, match="pinv, svd or quotient"):
        m.covariance_ratio(np.eye(2), zero, metric="inverse")
    with pytest.raises(DataError, match="equal shapes"):
        m.structure_error(zero, np.zeros((2, 2)))


def test_agreement_by_class_and_weight():
    d = Decisions(*(np.array(v) for v in ([4, 1], [2, 1], [0, 0], [0, 0])))
    assert m.clf_ncc_agreement(d) == 0.6
    assert m.clf_ncc_agreement(d, [0]) == 0.5
    assert m.clf_ncc_agreement(d, weighted=False) == 0.75


def test_signatures_are_those_of_the_reference_package():
    import inspect

    expected = {
        "covariance_ratio": "(V_intra, M, m_G=0, metric='pinv')",
        "variability_cdnv": "(V_norms, M, dist_exp=1.0, tile_size=None)",
        "mean_norms": "(M, m_G=0, post_funcs=())",
        "interference_grid": "(M, m_G=0)",
        "similarities": "(W, M, m_G=0, cos=False)",
        "distance_norms": "(W, M, m_G=0, norm=True)",
        "structure_error": "(A, B)",
        "simplex_etf_error": "(M, m_G=0)",
        "self_duality_error": "(W, M, m_G=0)",
        "clf_ncc_agreement": "(decisions, indices=None, weighted=True)",
        "orthogonality_deviation": "(M, m_G_ood=0)",
        "class_dist_norm_vars": "(V_norms, M, dist_exp=1.0, tile_size=None)",
        "dist_kernel": "(data, tile_size=None)",
        "log_kernel": "(data, exponent=-1, tile_size=None)",
        "riesz_kernel": "(data, tile_size=None)",
        "kernel_grid": "(M, m_G=0, kernel=dist_kernel, tile_size=None)",
        "kernel_stats": "(M, m_G=0, kernel=dist_kernel, tile_size=None)",
    }
    for name, text in expected.items():
        parts = []
        for p in inspect.signature(getattr(m, name)).parameters.values():
            default = p.default.__name__ if callable(p.default) else repr(p.default)
            parts.append(
                p.name
                if p.default is p.empty or p.default is inspect._empty
                else f"{p.name}={default}"
            )
        assert f"({', '.join(parts)})" == text, name


# ---------------------------------------------------------------- moments in the place of arrays


def some_moments(library: Library):
    """Return moments of 12 classes, of which 3 and 7 have no samples, and those of the others."""
    rng = np.random.default_rng(0)
    X = rng.normal(size=(300, 6)) + 2.0
    y = rng.integers(0, 12, 300)
    seen = np.setdiff1d(np.arange(12), [3, 7])
    inside = np.isin(y, seen)
    y = np.where(inside, y, -1)
    means, variances, within = class_means(X[inside], y[inside], seen)
    return Moments.from_block(library.put(X), library.put(y), 12), seen, means, variances, within


def class_means(X, y, seen):
    means = np.stack([X[y == c].mean(axis=0) for c in seen])
    residuals = X - means[np.searchsorted(seen, y)]
    variances = np.array([np.mean(np.sum(residuals[y == c] ** 2, axis=1)) for c in seen])
    return means, variances, residuals.T @ residuals / len(X)


@each_library
def test_moments_give_the_classes_that_have_samples(library: Library):
    state, seen, M, V, S = some_moments(library)
    W = np.random.default_rng(1).normal(size=(12, 6))
    m_G = M.mean(axis=0)
    of_moments = {
        m.covariance_ratio: [(), {"metric": "svd"}, {"metric": "quotient"}],
        m.simplex_etf_error: [()],
        m.mean_norms: [()],
        m.interference_grid: [()],
        m.kernel_grid: [(), {"kernel": m.log_kernel}],
        m.kernel_stats: [(), {"kernel": m.log_kernel}],
        m.variability_cdnv: [(), {"dist_exp": 2.0}],
        m.class_dist_norm_vars: [(), {"dist_exp": 2.0}],
        m.self_duality_error: [(W,)],
        m.similarities: [(W,), (W, m_G)],
        m.distance_norms: [(W,)],
        m.orthogonality_deviation: [(np.ones(6),)],
    }
    arrays = {"M": M, "V_norms": V, "V_intra": S, "m_G": m_G, "W": W[seen], "m_G_ood": np.ones(6)}
    for function, calls in of_moments.items():
        names = inspect.signature(function).parameters
        known = {name: value for name, value in arrays.items() if name in names}
        for call in calls:
            options = call if isinstance(call, dict) else {}
            given = () if isinstance(call, dict) else map(library.put, call)
            got = function(state, *given, **options)
            for value, expected in zip(
                np.atleast_1d(library.host(got) if hasattr(got, "shape") else got),
                np.atleast_1d(function(**known, **options)),
                strict=True,
            ):
                np.testing.assert_allclose(value, expected, rtol=1e-9)


def test_the_mean_of_outside_data_may_be_moments_too():
    state, _, M, _, _ = some_moments(NUMPY)
    outside = Moments.from_block(np.ones((4, 6)), np.array([0, 0, 2, 2]), 3)
    assert m.orthogonality_deviation(state, outside) == m.orthogonality_deviation(M, np.ones(6))


def test_moments_leave_no_room_for_means():
    state, *_ = some_moments(NUMPY)
    with pytest.raises(UsageError, match="2 arguments beside moments; expected m_G"):
        m.simplex_etf_error(state, 0, 0)


@pytest.mark.parametrize("swap", [False, True])
def test_arrays_of_two_libraries_are_refused(swap):
    torch = pytest.importorskip("torch")
    arrays = [np.ones((3, 4)), torch.ones((3, 4))]
    W, M = arrays[::-1] if swap else arrays
    for call in (
        lambda: m.self_duality_error(W, M),
        lambda: m.similarities(W, M),
        lambda: m.simplex_etf_error(M, W[0]),
        lambda: m.covariance_ratio(W.T @ W, M),
        lambda: m.variability_cdnv(W[:, 0], M),
        lambda: m.structure_error(W, M),
    ):
        with pytest.raises(DataError, match="expected arrays of one library"):
            call()
