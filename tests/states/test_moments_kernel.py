"""Compiled moments: equal to the oracle in every regime and dtype, whatever the threads."""

import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ncbatch.arrays.threads import thread_limit
from ncbatch.errors import DataError
from ncbatch.states import moments
from ncbatch.states.moments import MomentsAccumulator
from ncbatch.states.moments_kernel import Groups, group_rows
from tests.states.test_moments import assert_equal_to_oracle, assert_same, streamed
from tests.strategies import DTYPES, REGIMES, Features, each_regime, feature_sets, partitions

FIELDS = ("counts", "means", "traces", "scatter")
LIMIT = moments._COMPILED_VALUES


@pytest.fixture(autouse=True)
def compiled(monkeypatch: pytest.MonkeyPatch):
    """Compile from the first row on, and cut blocks into many pieces."""
    monkeypatch.setattr(moments, "_COMPILED_VALUES", 0)
    monkeypatch.setattr(moments, "_PIECE_ROWS", 300)


def assert_same_bits(a, b):
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)


def plain(data: Features, cuts: list[int], precision: str = "exact"):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moments, "_COMPILED_VALUES", 2**60)
        return streamed(data, cuts, precision)


@each_regime
def test_every_regime_equals_the_oracle(regime: str):
    data = REGIMES[regime](0)
    n = len(data.y)
    for cuts in ([], [1, n // 3, n // 2], list(range(10, n, 10))):
        assert_equal_to_oracle(streamed(data, cuts), data)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("precision", ["exact", "fp32"])
def test_every_dtype_equals_the_plain_path(dtype, precision: str):
    data = REGIMES["zipf"](4)
    data = Features(data.X.astype(dtype), data.y, data.n_classes)
    got = streamed(data, [7, 500, 501], precision)
    want = plain(data, [7, 500, 501])
    if precision == "exact":
        assert_equal_to_oracle(got, data)
        assert_same(got, want, rtol=1e-12)
    else:  # only products lose digits
        np.testing.assert_allclose(got.means, want.means, rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(got.traces, want.traces, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(got.scatter, want.scatter, atol=1e-6 * want.scatter.max())


@settings(max_examples=40)
@given(st.data())
def test_any_partition_equals_the_oracle(data):
    features = data.draw(feature_sets())
    cuts = data.draw(partitions(len(features.y)))
    assert_equal_to_oracle(streamed(features, cuts), features, rtol=1e-7)


def test_every_float16_is_converted_exactly():
    bits = np.arange(2**16, dtype=np.uint16)
    X = bits.view(np.float16)[np.isfinite(bits.view(np.float16))][:, None]
    state = streamed(Features(X, np.arange(len(X)), len(X)), [])
    np.testing.assert_array_equal(state.means, X.astype(np.float64))
    # In a second block every class has a pilot, and rows are residuals to it.
    twice = Features(np.concatenate([X, X[::-1]]), np.tile(np.arange(len(X)), 2), len(X))
    state = streamed(twice, [len(X)])
    np.testing.assert_array_equal(state.means, (X + X[::-1].astype(np.float64)) / 2)


def test_nonfinite_features_are_not_swallowed():
    X = np.zeros((4, 2), np.float16)
    X[1, 0], X[2, 1] = np.inf, np.nan
    with np.errstate(invalid="ignore"):
        state = streamed(Features(X, np.array([0, 0, 1, 1]), 2), [])
    assert not np.isfinite(state.means[0, 0])
    assert np.isnan(state.means[1, 1])
    assert np.isfinite(state.means[0, 1])


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
    states = []
    for scatter in (True, False):
        accumulator = MomentsAccumulator(
            data.n_classes, data.X.shape[1], like=data.X, scatter=scatter
        )
        accumulator.add(data.X, data.y)
        states.append(accumulator.finish())
    assert states[1].scatter is None
    for name in FIELDS[:3]:
        np.testing.assert_array_equal(getattr(states[0], name), getattr(states[1], name))


def test_threads_do_not_change_a_bit(monkeypatch: pytest.MonkeyPatch):
    rng = np.random.default_rng(0)
    monkeypatch.setattr(moments, "_PIECE_ROWS", 1000)
    y = (400 * rng.random(3000) ** 4).astype(np.int64)
    data = Features(rng.normal(size=(3000, 200)).astype(np.float16), y, 400)
    found = []
    for threads in (1, 2, 3):
        monkeypatch.setattr("ncbatch.states.moments_kernel.cpu_count", lambda n=threads: n)
        with thread_limit(1):  # the BLAS has an order of its own with other numbers of threads
            found.append(streamed(data, [1500]))
    assert_same_bits(found[1], found[0])
    assert_same_bits(found[2], found[0])
    assert_equal_to_oracle(found[0], data)


def accumulated(classes, scatter: bool = True) -> MomentsAccumulator:
    """Accumulate 2000 samples of some of 1000 classes, with many more than a product takes."""
    rng = np.random.default_rng(1)
    y = rng.permutation(np.concatenate([classes, rng.choice(classes, 2000 - len(classes))]))
    X = (3.0 + y[:, None] % 7 + rng.normal(size=(2000, 16))).astype(np.float32)
    accumulator = MomentsAccumulator(1000, 16, like=X, scatter=scatter)
    for part in np.array_split(np.arange(2000), 5):
        accumulator.add(X[part], y[part])
    return accumulator


@pytest.mark.parametrize("share", [0.01, 0.4, 0.8, 1.0])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("scatter", [True, False])
def test_finishing_the_classes_seen_gives_the_bits_of_all(monkeypatch, share, threads, scatter):
    classes = np.flatnonzero(np.random.default_rng(0).random(1000) < share)
    monkeypatch.setattr("ncbatch.states.moments_kernel.cpu_count", lambda: threads)
    with thread_limit(1):
        state = accumulated(classes, scatter=scatter).seal()
        want = accumulated(classes, scatter=scatter).finish().seen()
    np.testing.assert_array_equal(state.classes, classes)
    np.testing.assert_array_equal(want.classes, classes)
    for name in FIELDS[: 4 if scatter else 3]:
        np.testing.assert_array_equal(getattr(state, name), getattr(want, name))


@pytest.mark.parametrize("scatter", [True, False])
def test_finishing_leaves_rows_of_other_classes_untouched(scatter: bool):
    classes = np.arange(0, 1000, 3)
    accumulator = accumulated(classes, scatter=scatter)
    others = np.setdiff1d(np.arange(1000), classes)
    sums = accumulator._running.sums
    sums[others] = np.nan
    state = accumulator.seal()
    assert np.all(np.isnan(sums[others]))
    assert not np.shares_memory(state.means, sums)  # or it would keep the memory of all classes
    assert np.all(np.isfinite(state.means))


@pytest.mark.parametrize("share", [0.8, 1.0])
def test_finishing_nearly_all_classes_takes_no_more_memory(share: float):
    classes = np.flatnonzero(np.random.default_rng(0).random(1000) < share)
    accumulator = accumulated(classes)
    state = accumulator.seal()
    assert np.shares_memory(state.means, accumulator._running.sums)


def test_layouts_and_labels_of_any_integer_give_the_same_bits():
    data = REGIMES["zipf"](0)
    X = np.asarray(data.X, np.float32)
    want = streamed(Features(X, data.y, data.n_classes), [])
    frozen = X.copy()
    frozen.flags.writeable = False
    for other in (np.asfortranarray(X), np.repeat(X, 2, axis=0)[::2], X.astype(">f4"), frozen):
        got = streamed(Features(other, data.y.astype(np.int32), data.n_classes), [])
        assert_same_bits(got, want)


@pytest.mark.parametrize(
    ("D", "labels", "said"),
    [
        (2, [0, 3], "label 3 in row 1; expected labels below 3"),
        (3, [0, 1], r"\(B, 2\)"),
        (2, [0], r"with labels \(1,\)"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_changed(D: int, labels, said: str):
    accumulator = MomentsAccumulator(3, 2, like=np.empty((0, 2)))
    with pytest.raises(DataError, match=said):
        accumulator.add(np.ones((2, D)), np.array(labels))
    assert not any(np.any(value) for value in accumulator.arrays().values())


def test_rows_with_negative_labels_are_no_samples():
    data = REGIMES["k_greater_d"](0)
    y = np.where(np.arange(len(data.y)) % 3 == 0, -1, data.y)
    want = streamed(Features(data.X[y >= 0], data.y[y >= 0], data.n_classes), [])
    assert_same_bits(streamed(Features(data.X, y, data.n_classes), []), want)


def test_groups_are_the_classes_with_first_and_only_samples_last():
    labels, counts = np.array([5, 3, 5, 1, 0]), np.array([0, 4, 0, 0, 9, 0])
    slots = np.full(6, -1, np.int32)
    groups = Groups(*(np.empty(size, np.int64) for size in (5, 6, 5)))
    n, several = group_rows(labels, counts, slots, groups)
    order, starts, present = groups
    assert (n, several) == (4, 2)
    assert present[:n].tolist() == [5, 1, 3, 0]
    assert starts[: n + 1].tolist() == [0, 2, 3, 4, 5]
    assert order.tolist() == [0, 2, 3, 1, 4]
    assert np.all(slots == -1)


@pytest.mark.parametrize("limit", [0, 6000, 2**60])
@pytest.mark.parametrize("precision", ["exact", "fp32"])
@pytest.mark.parametrize("scatter", [True, False])
def test_restored_state_continues_to_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, limit: int, precision: str, scatter: bool
):
    monkeypatch.setattr(moments, "_COMPILED_VALUES", limit)
    data = REGIMES["zipf"](0)
    options = {"like": data.X, "scatter": scatter, "precision": precision}
    blocks = list(zip(np.split(data.X, 20), np.split(data.y, 20), strict=True))

    def accumulator() -> MomentsAccumulator:
        return MomentsAccumulator(data.n_classes, data.X.shape[1], **options)

    whole = accumulator()
    for block in blocks:
        whole.add(*block)
    for stop in (0, 1, 7, 20):
        first = accumulator()
        for block in blocks[:stop]:
            first.add(*block)
        saved = {name: value.copy() for name, value in first.arrays().items()}
        first.add(*blocks[0])  # what was saved is of its time
        again = accumulator()
        again.restore(saved)
        for block in blocks[stop:]:
            again.add(*block)
        for name, value in again.arrays().items():
            np.testing.assert_array_equal(value, whole.arrays()[name])
    got, want = again.finish(), whole.finish()
    for name in FIELDS[: 4 if scatter else 3]:
        np.testing.assert_array_equal(getattr(got, name), getattr(want, name))


def test_states_of_another_accumulator_are_refused():
    accumulator = MomentsAccumulator(3, 2, like=np.empty((0, 2)))
    accumulator.add(np.ones((2, 2)), np.array([0, 2]))
    state = accumulator.arrays()
    assert state["class"].tolist() == [0, 2]
    for other in (
        MomentsAccumulator(2, 2, like=np.empty((0, 2))),
        MomentsAccumulator(3, 4, like=np.empty((0, 4))),
        MomentsAccumulator(3, 2, like=np.empty((0, 2)), scatter=False),
    ):
        with pytest.raises(DataError, match="a running state"):
            other.restore(state)


def test_few_numbers_are_priced_without_a_compiler(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(moments, "_COMPILED_VALUES", LIMIT)
    few, many, unknown = (
        MomentsAccumulator.peak_bytes(10, 64, 512, scatter=True, n_rows=n)
        for n in (1000, 10**6, None)
    )
    assert many - few >= moments._COMPILER_BYTES / 2
    assert unknown == many


PEAK = """
import sys
from pathlib import Path
import numpy as np
from ncbatch.states.moments import MomentsAccumulator

def status(key):
    line = next(l for l in Path("/proc/self/status").read_text().splitlines() if key in l)
    return int(line.split()[1]) * 1024

n, rows, d, k = (int(v) for v in sys.argv[1:5])
dtype, precision, scatter = sys.argv[5], sys.argv[6], sys.argv[7] == "1"
rng = np.random.default_rng(0)
X = rng.normal(size=(rows, d)).astype(dtype)
# Pages of code that the first fold brings in are the interpreter's, which a plan counts apart.
first = MomentsAccumulator(2, d, like=X[:0], scatter=scatter, precision=precision)
first.add(X[:4], np.arange(4) % 2)
first.seal()
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
accumulator = MomentsAccumulator(k, d, like=X, scatter=scatter, precision=precision)
for start in range(0, n, rows):
    accumulator.add(X, rng.integers(0, k, rows))
state = accumulator.seal()
print(before, status("VmHWM"))
"""


@pytest.mark.slow
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize(
    ("n", "rows", "d", "k", "dtype", "precision", "scatter"),
    [
        (40_000, 8192, 768, 20_000, "float16", "exact", True),
        (40_000, 8192, 768, 20_000, "float16", "fp32", True),
        (30_000, 1024, 2048, 100, "float32", "exact", True),
        (30_000, 4096, 256, 50_000, "float64", "exact", False),
        (6_000, 2048, 64, 1000, "float32", "exact", True),
    ],
)
def test_measured_peak_stays_below_the_price(
    tmp_path, monkeypatch, cached, n, rows, d, k, dtype, precision, scatter
):
    monkeypatch.setattr(moments, "_COMPILED_VALUES", LIMIT)
    monkeypatch.setattr(moments, "_PIECE_ROWS", 8192)
    if not cached:
        monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    command = [sys.executable, "-c", PEAK, *map(str, (n, rows, d, k, dtype, precision))]
    run = subprocess.run([*command, str(int(scatter))], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    before, peak = map(int, run.stdout.split())
    priced = MomentsAccumulator.peak_bytes(
        k, d, rows, scatter=scatter, n_rows=n, itemsize=np.dtype(dtype).itemsize
    )
    print(f"{(peak - before) / 2**20:.0f} of {priced / 2**20:.0f} MiB")
    assert peak - before <= priced


def test_bfloat16_blocks_need_no_float64_pilots():
    like = np.empty((0, 2), ml_dtypes.bfloat16)
    assert MomentsAccumulator(3, 2, like=like).arrays()["pilots"].dtype == np.float32
