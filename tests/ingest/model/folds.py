"""Dumps of moments, by one process and by several, and what their states must be."""

from __future__ import annotations

import numpy as np
import pytest

import ncbatch as nc
from ncbatch.ingest.model import states
from tests.ingest.model.models import WIDE_LAYERS, Mlp, mlp_batches, rows_of, seeded

SPLIT = "train"


N = 556  # samples of `fold_batches`


def fold_batches():
    """600 positions in 6 batches, some of them ignored."""
    batches = mlp_batches(600, 100)
    for number, (_, labels) in enumerate(batches):
        labels[number::14] = -1
    return batches


def other_batches():
    """Give other samples than those of the train split."""
    return [(x * 0.9 + 0.1, y) for x, y in mlp_batches(300, 90)]


def fold(path, batches=None, split=SPLIT, **options):
    return nc.dump(
        seeded(Mlp, 32), fold_batches() if batches is None else batches, path, split,
        WIDE_LAYERS, moments=True, **options,
    )  # fmt: skip


def store_rows(path, batches=None, split=SPLIT, **options):
    return nc.dump(
        seeded(Mlp, 32), fold_batches() if batches is None else batches, path, split,
        WIDE_LAYERS, dtype="float32", **options,
    )  # fmt: skip


def fold_rank(path, rank, world_size, batches=None, split=SPLIT, **options):
    given = fold_batches() if batches is None else batches
    return fold(path, given[rank::world_size], split, rank=rank, world_size=world_size, **options)


def naive_moments(store, layer, split=SPLIT):
    """Compute the arrays of the state from stored rows, in float64, class by class."""
    x, y = rows_of(store, layer, split).astype(np.float64), store.split(split).labels()
    classes = np.unique(y)
    parts = [x[y == c] for c in classes]
    residuals = [part - part.mean(0) for part in parts]
    return {
        "class": classes,
        "count": np.array([len(part) for part in parts]),
        "mean": np.stack([part.mean(0) for part in parts]),
        "trace": np.array([(r**2).sum() for r in residuals]),
        "scatter": sum(r.T @ r for r in residuals),
    }


def assert_moments(store, expected, layer, split=SPLIT, kind="moments"):
    arrays, about = store.state(split, layer, kind)
    assert arrays.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(arrays[name], values, rtol=1e-10, atol=1e-10, err_msg=name)
    assert about["n_samples"] == expected["count"].sum()


def assert_same_states(one, other, split=SPLIT):
    """Check that two stores hold the same states, bit by bit."""
    assert one.state_kinds(split) == other.state_kinds(split)
    for layer, kind in one.state_kinds(split):
        (mine, about), (theirs, other_about) = (s.state(split, layer, kind) for s in (one, other))
        assert mine.keys() == theirs.keys()
        for name, values in mine.items():
            np.testing.assert_array_equal(values, theirs[name], err_msg=f"{layer} {kind} {name}")
        assert about == other_about


def assert_close_states(one, other, split=SPLIT):
    assert one.state_kinds(split) == other.state_kinds(split)
    for layer, kind in one.state_kinds(split):
        (mine, about), (theirs, other_about) = (s.state(split, layer, kind) for s in (one, other))
        for name, values in mine.items():
            np.testing.assert_allclose(values, theirs[name], rtol=1e-9, atol=1e-9)
        assert about["n_samples"] == other_about["n_samples"]


def save_often(monkeypatch):
    monkeypatch.setattr(states, "_SAVE_BYTES", 1)
    monkeypatch.setattr(states, "_SAVE_RATIO", 0)


def interrupt_fold(path, after, batches=None, **options):
    """Stop a fold after some batches; running states are stored after each."""

    def some():
        yield from (fold_batches() if batches is None else batches)[:after]
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        save_often(patch)
        with pytest.raises(KeyboardInterrupt):
            fold(path, some(), **options)
