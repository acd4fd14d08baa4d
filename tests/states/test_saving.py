"""States as named arrays: round trips through arrays and files, and what is refused."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from ncbatch.errors import DataError
from ncbatch.states.decisions import Decisions
from ncbatch.states.moments import Moments
from ncbatch.states.pairs.stats import PairStats
from ncbatch.states.pairs.sweep import sweep_pairs
from ncbatch.states.rules import linear_rule, nearest_mean_rule
from tests.libraries import each_library

K, D = 5, 3
RNG = np.random.default_rng(8)
X = RNG.normal(size=(60, D)) + 3.0
Y = RNG.integers(0, K - 1, 60)  # the last class has no samples
W = RNG.normal(size=(K, D))


def moments(library, *, scatter=True) -> Moments:
    return Moments.from_block(library.put(X), library.put(Y), K, scatter=scatter)


def decisions(library) -> Decisions:
    rules = nearest_mean_rule(library.put(W)), linear_rule(library.put(W))
    return Decisions.from_block(library.put(X), library.put(Y), K, *rules)


def pairs() -> PairStats:
    return sweep_pairs(W, W.mean(0), np.ones(K))


def assert_same(one, other) -> None:
    """Check that two states are equal to the bit, down to what they are made of."""
    assert type(one) is type(other)
    for field in dataclasses.fields(one):
        mine, theirs = getattr(one, field.name), getattr(other, field.name)
        if dataclasses.is_dataclass(mine):
            assert_same(mine, theirs)
        elif mine is None or isinstance(mine, int | float):
            assert type(mine) is type(theirs)
            assert mine == theirs
        else:
            np.testing.assert_array_equal(mine, theirs)
            assert mine.dtype == theirs.dtype


def host(library, state):
    arrays = {name: library.host(v) for name, v in vars(state).items() if hasattr(v, "shape")}
    return dataclasses.replace(state, **arrays)


@each_library
@pytest.mark.parametrize("make", [moments, decisions])
def test_states_go_through_arrays(library, make):
    state = make(library)
    sent = state.to_arrays()
    assert all(type(array) is np.ndarray for array in sent.values())
    assert_same(type(state).from_arrays(sent), host(library, state))
    kept = state.to_arrays(host=False)
    for name, array in kept.items():
        assert array is getattr(state, name)  # neither copied nor moved
    again = type(state).from_arrays(kept)
    assert_same(host(library, again.merge(state)), host(library, state.merge(state)))


def test_moments_without_scatter():
    library = each_library.args[1][0]
    arrays = moments(library, scatter=False).to_arrays()
    assert sorted(arrays) == ["counts", "means", "traces"]
    assert Moments.from_arrays(arrays).scatter is None


@pytest.mark.parametrize("state", [pairs(), PairStats.zero()], ids=["pairs", "none"])
def test_pair_statistics_go_through_arrays_and_files(tmp_path, state):
    assert_same(PairStats.from_arrays(state.to_arrays()), state)
    state.save(tmp_path / "p.npz")
    again = PairStats.load(tmp_path / "p.npz")
    assert_same(again, state)
    assert_same(again.merge(PairStats.zero()), state)


@each_library
@pytest.mark.parametrize("make", [moments, decisions])
def test_states_go_through_files(tmp_path, library, make):
    state = make(library)
    state.save(tmp_path / "state")
    assert_same(type(state).load(tmp_path / "state"), host(library, state))
    state.merge(state).save(tmp_path / "state")  # replaces it
    assert_same(type(state).load(tmp_path / "state"), host(library, state.merge(state)))
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


def test_files_of_earlier_versions_are_read(tmp_path):
    arrays = {"counts": np.array([2, 0]), "means": np.ones((2, 3)), "traces": np.zeros(2)}
    np.savez(tmp_path / "old.npz", ncbatch_moments=np.int64(1), **arrays)
    state = Moments.load(tmp_path / "old.npz")
    assert state.scatter is None
    np.testing.assert_array_equal(state.counts, arrays["counts"])


@pytest.mark.parametrize("kind", [Moments, Decisions])
def test_rows_left_out_are_counted_and_saved(tmp_path, kind):
    state = dataclasses.replace(kind.zero(*((2, 3) if kind is Moments else (2,))), skipped=3)
    state.save(tmp_path / "state")
    assert type(kind.load(tmp_path / "state").skipped) is int
    assert kind.load(tmp_path / "state").merge(state).skipped == 6


def test_classes_are_saved(tmp_path):
    state = moments(each_library.args[1][0]).seen()
    state.save(tmp_path / "state")
    assert_same(Moments.load(tmp_path / "state"), state)


def test_a_failed_save_leaves_what_was_there(tmp_path, monkeypatch):
    state = Moments.zero(2, 2)
    state.save(tmp_path / "state")

    def full(file, **arrays):
        file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match="no space"):
        Moments.zero(3, 3).save(tmp_path / "state")
    assert Moments.load(tmp_path / "state").counts.shape == (2,)
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


def test_other_files_are_refused(tmp_path):
    Moments.zero(2, 2).save(tmp_path / "moments")
    PairStats.zero().save(tmp_path / "pairs")
    np.save(tmp_path / "array.npy", np.ones(3))
    np.savez(tmp_path / "other.npz", counts=np.ones(3))
    (tmp_path / "text").write_text("counts")
    (tmp_path / "empty").touch()
    for name in ("pairs", "array.npy", "other.npz", "text", "empty"):
        with pytest.raises(
            DataError, match=r"holds no moments; expected a file written by Moments"
        ):
            Moments.load(tmp_path / name)
    with pytest.raises(DataError, match="holds no decisions"):
        Decisions.load(tmp_path / "moments")
    with pytest.raises(DataError, match="holds no pair statistics"):
        PairStats.load(tmp_path / "moments")
    with pytest.raises(FileNotFoundError):
        Moments.load(tmp_path / "missing")
    data = bytearray((tmp_path / "moments").read_bytes())
    at = data.index(b"means.npy") + 150
    data[at] ^= 1
    (tmp_path / "moments").write_bytes(data)
    with pytest.raises(DataError, match="is damaged"):
        Moments.load(tmp_path / "moments")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"means": None}, "no array 'means' of a state"),
        ({"other": np.ones(2)}, r"arrays other; expected those that Moments\.to_arrays gives"),
        ({"counts": None, "samples": np.ones(2)}, "no array 'counts'"),
    ],
)
def test_other_arrays_are_refused(change, message):
    arrays = Moments.zero(2, 2).to_arrays() | change
    with pytest.raises(DataError, match=message):
        Moments.from_arrays({name: array for name, array in arrays.items() if array is not None})


def test_arrays_of_nested_states_are_missed_too():
    arrays = PairStats.zero().to_arrays()
    del arrays["cdnv.mean"]
    with pytest.raises(DataError, match=r"no array 'cdnv\.mean'"):
        PairStats.from_arrays(arrays)


@each_library
def test_labels_of_another_library_or_device_are_refused(library):
    if library.name == "numpy":
        pytest.skip("has no other device")
    with pytest.raises(DataError, match="arrays of one library"):
        Moments.from_block(library.put(X), Y, K)
    if library.name == "array_api_strict":
        strict = pytest.importorskip("array_api_strict")
        with pytest.raises(DataError, match=r"labels on .*; expected one device"):
            Moments.from_block(library.put(X), strict.asarray(Y), K)


@each_library
def test_predictions_must_be_one_per_label(library):
    near = nearest_mean_rule(library.put(W))
    with pytest.raises(DataError, match=r"predictions \(59,\) for labels \(60,\)"):
        Decisions.from_block(library.put(X), library.put(Y), K, near, library.put(Y[1:]))
