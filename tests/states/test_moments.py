"""Moments: equal to the oracle in every regime, and a lawful state."""

import functools

import numpy as np
import pytest
from array_api_compat import device
from hypothesis import given, settings
from hypothesis import strategies as st

from ncbatch.arrays.named_arrays import pack
from ncbatch.arrays.namespace import namespace
from ncbatch.errors import DataError
from ncbatch.states.decisions import Decisions
from ncbatch.states.moments import Moments, MomentsAccumulator
from ncbatch.states.rules import nearest_mean_rule
from tests.libraries import Library, each_library
from tests.oracles import class_moments
from tests.strategies import REGIMES, Features, each_regime, feature_sets, partitions


def assert_equal_to_oracle(state: Moments, data: Features, rtol: float = 1e-9) -> None:
    oracle = class_moments(data.X, data.y, data.n_classes)
    seen = oracle.counts > 0
    spread = np.sqrt(oracle.variances[seen].max())
    np.testing.assert_array_equal(state.counts, oracle.counts)
    np.testing.assert_allclose(
        state.means[seen], oracle.means[seen], rtol=1e-13, atol=1e-9 * spread
    )
    np.testing.assert_allclose(
        state.variances[seen], oracle.variances[seen], rtol=rtol, atol=rtol * spread**2
    )
    scale = np.abs(oracle.within).max()
    np.testing.assert_allclose(state.within_covariance, oracle.within, rtol=rtol, atol=rtol * scale)


def on_host(state: Moments, library: Library) -> Moments:
    return Moments(
        *(library.host(v) for v in (state.counts, state.means, state.traces, state.scatter))
    )


def assert_same(a: Moments, b: Moments, rtol: float = 1e-9) -> None:
    scale = max(np.abs(b.scatter).max(), np.abs(b.means).max() * 1e-12)
    np.testing.assert_array_equal(a.counts, b.counts)
    np.testing.assert_allclose(a.means, b.means, rtol=1e-12, atol=1e-12 * np.abs(b.means).max())
    np.testing.assert_allclose(a.traces, b.traces, rtol=rtol, atol=rtol * scale)
    np.testing.assert_allclose(a.scatter, b.scatter, rtol=rtol, atol=rtol * scale)


def merged(data: Features, cuts: list[int]) -> Moments:
    parts = zip(np.split(data.X, cuts), np.split(data.y, cuts), strict=True)
    states = [Moments.from_block(X, y, data.n_classes) for X, y in parts]
    return functools.reduce(Moments.merge, states)


def streamed(data: Features, cuts: list[int], precision: str = "exact") -> Moments:
    accumulator = MomentsAccumulator(
        data.n_classes, data.X.shape[1], like=data.X, precision=precision
    )
    for X, y in zip(np.split(data.X, cuts), np.split(data.y, cuts), strict=True):
        accumulator.add(X[y >= 0], y[y >= 0])
    return accumulator.finish()


@each_regime
@pytest.mark.parametrize("way", [merged, streamed])
def test_every_regime_equals_the_oracle(regime: str, way):
    data = REGIMES[regime](0)
    n = len(data.y)
    for cuts in ([], [1, n // 3, n // 2], list(range(10, n, 10))):
        assert_equal_to_oracle(way(data, cuts), data)


@settings(max_examples=50)
@given(st.data())
def test_any_partition_gives_the_same_state(data):
    features = data.draw(feature_sets())
    cuts = data.draw(partitions(len(features.y)))
    whole = Moments.from_block(features.X, features.y, features.n_classes)
    assert_equal_to_oracle(whole, features, rtol=1e-7)
    assert_same(merged(features, cuts), whole, rtol=1e-7)
    assert_same(streamed(features, cuts), whole, rtol=1e-7)


@each_library
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_library_gives_the_same_state(library: Library, dtype: str):
    data = REGIMES["zipf"](1)
    X = data.X.astype(dtype)
    half = len(X) // 2
    parts = [
        Moments.from_block(library.put(X[part]), library.put(data.y[part]), data.n_classes)
        for part in (slice(half), slice(half, None))
    ]
    state = on_host(parts[0].merge(parts[1]), library)
    assert_equal_to_oracle(state, Features(X, data.y, data.n_classes))


def test_zero_is_neutral_and_operands_stay():
    data = REGIMES["offset"](2)
    state = Moments.from_block(data.X, data.y, data.n_classes)
    before = [np.copy(v) for v in (state.counts, state.means, state.traces, state.scatter)]
    zero = Moments.zero(data.n_classes, data.X.shape[1])
    for result in (state.merge(zero), zero.merge(state)):
        for name in ("counts", "means", "traces", "scatter"):
            np.testing.assert_array_equal(getattr(result, name), getattr(state, name))
    state.merge(state)
    for value, old in zip(
        (state.counts, state.means, state.traces, state.scatter), before, strict=True
    ):
        np.testing.assert_array_equal(value, old)


@each_library
def test_zero_takes_library_and_device(library: Library):
    X = library.put(np.ones((2, 3)))
    zero = Moments.zero(4, 3, xp=namespace(X), device=device(X))
    state = zero.merge(Moments.from_block(X, library.put(np.array([0, 2])), 4))
    assert library.host(state.counts).tolist() == [1, 0, 1, 0]


def test_fp32_keeps_traces_to_1e_6_in_every_regime():
    for name, make in REGIMES.items():
        data = make(3)
        cuts = list(range(50, len(data.y), 50))
        exact, fast = streamed(data, cuts), streamed(data, cuts, "fp32")
        total = exact.traces.sum()
        assert abs(fast.traces.sum() - total) <= 1e-6 * total, name
        assert abs(np.trace(fast.scatter) - np.trace(exact.scatter)) <= 1e-6 * total, name


def test_singletons_have_no_variance_at_all():
    data = REGIMES["singletons"](0)
    state = streamed(data, list(range(7, len(data.y), 7)))
    assert np.all(state.traces[state.counts == 1] == 0.0)


def test_without_scatter_everything_else_is_equal():
    data = REGIMES["zipf"](0)
    with_, without = (
        Moments.from_block(data.X, data.y, data.n_classes, scatter=s) for s in (True, False)
    )
    np.testing.assert_array_equal(with_.means, without.means)
    np.testing.assert_array_equal(with_.traces, without.traces)
    with pytest.raises(DataError, match="no scatter"):
        without.within_covariance  # noqa: B018
    with pytest.raises(DataError, match="merged"):
        with_.merge(without)


def test_select_refuses_the_scatter_of_a_subset():
    data = REGIMES["k_less_d"](0)
    state = Moments.from_block(data.X, data.y, data.n_classes + 1)
    kept = np.arange(data.n_classes)
    np.testing.assert_array_equal(state.select(kept).scatter, state.scatter)
    with pytest.raises(DataError, match="when the features are read"):
        state.select(kept[1:])
    plain = Moments.from_block(data.X, data.y, data.n_classes, scatter=False)
    np.testing.assert_array_equal(plain.select(kept[1:]).means, plain.means[1:])


def test_save_and_load_round_trip(tmp_path):
    data = REGIMES["zipf"](0)
    for scatter in (True, False):
        state = Moments.from_block(data.X, data.y, data.n_classes, scatter=scatter)
        state.save(tmp_path / "state.moments")
        again = Moments.load(tmp_path / "state.moments")
        assert (again.scatter is None) is not scatter
        np.testing.assert_array_equal(again.means, state.means)
        np.testing.assert_array_equal(again.counts, state.counts)
    assert [p.name for p in tmp_path.iterdir()] == ["state.moments"]
    np.savez(tmp_path / "other.npz", a=np.ones(3))
    with pytest.raises(DataError, match="holds no moments"):
        Moments.load(tmp_path / "other.npz")


@pytest.mark.parametrize(
    ("X", "y", "said"),
    [
        (np.ones((3, 2)), np.array([0, 1, 5]), "label 5 in row 2"),
        (np.ones((3, 2)), np.array([0, 1]), "features \\(3, 2\\) with labels \\(2,\\)"),
        (np.ones(3), np.array([0, 1, 1]), "features \\(3,\\)"),
    ],
)
def test_bad_blocks_are_refused(X, y, said):
    with pytest.raises(DataError, match=said):
        Moments.from_block(X, y, 3)


def _from_block(X, y):
    return Moments.from_block(X, y, 3)


def _accumulated(X, y):
    accumulator = MomentsAccumulator(3, X.shape[1], like=X)
    accumulator.add(X, y)
    return accumulator.finish()


def _decided(X, y):
    rule = nearest_mean_rule(np.eye(3))
    return Decisions.from_block(X, y, 3, rule, rule)


STATES = pytest.mark.parametrize("state_of", [_from_block, _accumulated, _decided])


@STATES
@pytest.mark.parametrize(
    "dtype", ["int8", "int16", "int32", "uint8", "uint16", "uint32", "uint64", "float32", "float64"]
)
def test_labels_of_any_type_are_the_same_labels(state_of, dtype):
    X = np.random.default_rng(0).normal(size=(40, 3))
    y = np.arange(40) % 3
    for got, expected in zip(
        pack(state_of(X, y.astype(dtype))).values(), pack(state_of(X, y)).values(), strict=True
    ):
        np.testing.assert_array_equal(got, expected)


@STATES
def test_rows_with_negative_labels_are_no_samples(state_of):
    X = np.random.default_rng(0).normal(size=(40, 3))
    y = np.where(np.arange(40) < 7, -1, np.arange(40) % 3)
    kept = pack(state_of(X[7:], y[7:]))
    for name, value in pack(state_of(X, y)).items():
        np.testing.assert_array_equal(value, kept[name])


@STATES
@pytest.mark.parametrize(
    ("y", "said"),
    [
        (np.array([0, 0.5, 1]), "label 0.5 in row 1; expected integers"),
        (np.array([0, np.nan, 1]), "label nan in row 1; expected integers"),
        (np.array([0, 1, np.inf]), "label inf in row 2; expected integers"),
        (np.array([0, 1, 3], np.uint8), "label 3 in row 2; expected labels below 3"),
        (
            np.array([2**64 - 1, 1, 2], np.uint64),
            f"label {2**64 - 1} in row 0; expected labels bel",
        ),
        (np.array([0j, 1, 2]), "labels of complex128"),
    ],
)
def test_labels_that_are_none_are_refused(state_of, y, said):
    with pytest.raises(DataError, match=said):
        state_of(np.ones((3, 3)), y)


def test_an_accumulator_refuses_other_widths():
    accumulator = MomentsAccumulator(3, 4, like=np.ones(1))
    with pytest.raises(DataError, match=r"features \(2, 3\); expected \(B, 4\)"):
        accumulator.add(np.ones((2, 3)), np.array([0, 1]))


def test_different_shapes_do_not_merge():
    with pytest.raises(DataError, match="cannot be merged"):
        Moments.zero(3, 2).merge(Moments.zero(4, 2))
