"""Finished states measure as features do, and say what they cannot give."""

from __future__ import annotations

import json

import numpy as np
import pytest

import ncbatch as nc
from ncbatch.errors import DataError
from ncbatch.measurement.samples import Mode
from ncbatch.metrics import CATALOGUE
from ncbatch.states.decisions import Decisions
from ncbatch.states.moments import Moments
from ncbatch.states.rules import linear_rule, nearest_mean_rule
from ncbatch.store import FeatureStore
from tests.measurement.stores import (
    Pair,
    assert_equal,
    moments_of,
)

ROWS_NEEDED = {"nc1_cdnv_directional_exact"}


ALL = list(CATALOGUE)


@pytest.mark.parametrize("regime", ["k_less_d", "k_greater_d", "zipf", "singletons"])
def test_states_measure_as_features_do(tmp_path, regime: str):
    pair = Pair(tmp_path, regime)
    names = [name for name in ALL if name not in ROWS_NEEDED]
    wanted = nc.measure(pair.features, metrics=names, per_class=True)
    found = nc.measure(pair.states, metrics=names, per_class=True)
    assert_equal(found, wanted)
    for name in ("n_samples", "n_classes", "n_classes_unseen", "n_decided", "rank"):
        assert int(found[name][0, 0]) == int(wanted[name][0, 0]), name
    for name in ("class_variance", "class_agreement", "decile_norm", "cosine_histogram"):
        np.testing.assert_allclose(found[name], wanted[name], rtol=1e-9, err_msg=name)
    assert json.loads(found.attrs["source"]) == {"states.zarr": {"h": "states"}}
    assert json.loads(wanted.attrs["source"]) == {"features.zarr": {"h": "features"}}


@pytest.mark.parametrize("options", [{"weighted": True}, {"dist_exp": 2.0}], ids=str)
def test_conventions_hold_for_states(pair, options):
    assert_equal(nc.measure(pair.states, **options), nc.measure(pair.features, **options))


def test_what_needs_rows_is_left_out_with_its_reason(pair):
    found = nc.measure(pair.states, null=True)
    assert not [name for name in found if str(name).endswith("_null")]
    assert "only their moments for layer h: labels at random left out" in found.attrs["notes"]
    with pytest.raises(DataError, match="directional_exact' cannot be measured: no samples"):
        nc.measure(pair.states, metrics="nc1_cdnv_directional_exact")


@pytest.mark.parametrize("options", [{"min_count": 25}, {"classes": range(4)}], ids=str)
def test_a_filter_takes_a_subset_of_the_classes(tmp_path, options):
    pair = Pair(tmp_path, "zipf")
    wanted, found = nc.measure(pair.features, **options), nc.measure(pair.states, **options)
    kept = int(wanted.n_classes[0, 0])
    assert 1 < kept < len(np.unique(pair.splits["train"][1]))
    assert int(found.n_classes[0, 0]) == kept
    names = ["nc1_quot", "nc1_cdnv", "nc2_etf_err", "nc3_dual_err", "nc5_ood_dev", "nc2_cos_mean"]
    assert_equal(found, wanted, names)
    tests = {"metrics": "nc1_test_to_train", **options}
    assert_equal(
        nc.measure(pair.states, **tests), nc.measure(pair.features, **tests), [tests["metrics"]]
    )
    assert "nc1_pinv" not in found
    assert "nc4_agree" not in found
    assert "pooled scatter of some classes cannot be had" in found.attrs["notes"]
    assert "decisions of split 'test' are among all classes" in found.attrs["notes"]
    with pytest.raises(DataError, match="pooled scatter of some classes"):
        nc.measure(pair.states, metrics="nc1_pinv", **options)


def test_a_filter_that_drops_no_class_loses_nothing(pair):
    options = {"min_count": 2}
    wanted = nc.measure(pair.features, **options)
    assert int(wanted.n_classes_filtered[0, 0]) == 0
    assert_equal(nc.measure(pair.states, **options), wanted)


def test_decisions_count_only_if_these_means_decided(pair):
    pair.store_decisions(means_fingerprint="0" * 32)
    found = nc.measure(pair.states)
    assert "nc4_agree" not in found
    assert "decisions of split 'test' are by other class means for layer h" in found.attrs["notes"]
    pair.store_decisions()
    assert "nc4_agree" in nc.measure(pair.states)
    changed = moments_of(*pair.splits["train"], pair.k)
    changed["mean"][0] += 1e-3
    pair.states.set_state("train", "h", "moments", changed)
    assert "nc4_agree" not in nc.measure(pair.states)


def test_decisions_count_only_if_this_classifier_decided(pair):
    pair.states.set_classifier("h", 2 * pair.W, pair.b)
    assert "by another classifier" in nc.measure(pair.states).attrs["notes"]


def test_without_decisions_nc4_is_left_out(pair):
    pair.states.delete_state("test", "h", "decisions")
    notes = nc.measure(pair.states).attrs["notes"]
    assert "no samples and no decisions of split 'test' for layer h: NC4 left out" in notes


def test_without_scatter_what_reads_it_is_left_out(pair):
    arrays = moments_of(*pair.splits["train"], pair.k, scatter=False)
    pair.states.set_state("train", "h", "moments", arrays)
    found = nc.measure(pair.states)
    assert "nc1_pinv" not in found
    assert "no scatter in the moments of split 'train'" in found.attrs["notes"]
    assert_equal(found, nc.measure(pair.features), ["nc1_quot", "nc1_cdnv", "nc3_dual_err"])


def test_moments_of_the_package_are_what_is_stored(pair):
    X, y = pair.splits["train"]
    seen = Moments.from_block(X, y, pair.k).seen()
    wanted = moments_of(X, y, pair.k)
    np.testing.assert_array_equal(seen.classes, wanted["class"])
    np.testing.assert_allclose(seen.scatter, wanted["scatter"], rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(seen.traces, wanted["trace"], rtol=1e-9)
    rules = (
        nearest_mean_rule(wanted["mean"], wanted["class"], dtype=np.float64),
        linear_rule(pair.W, pair.b, wanted["mean"].mean(axis=0), dtype=np.float64),
    )
    found = Decisions.from_block(*pair.splits["test"], pair.k, *rules)
    stored = pair.states.state("test", "h", "decisions")[0]
    for name, values in found.to_arrays().items():
        np.testing.assert_array_equal(values, stored[name], err_msg=name)


def test_class_means_in_files_give_the_same(pair, tmp_path, monkeypatch):
    wanted = nc.measure(pair.states)
    mode = Mode(2, stored=True)
    monkeypatch.setattr("ncbatch.measurement.run.choose_mode", lambda *_: mode)
    for _ in range(2):
        assert_equal(nc.measure(pair.states, state=tmp_path / "kept"), wanted)
    files = list((tmp_path / "kept").rglob("*.rows"))
    assert len([file for file in files if file.name.startswith("means-")]) == 2  # train and ood


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"class": np.array([3, 1, 2])}, "ascending classes"),
        ({"class": np.array([0, 1, 999])}, "ascending classes"),
        ({"count": np.array([1, 0, 2])}, "each with samples"),
        ({"count": np.array([1, 2])}, "one per class"),
        ({"trace": np.array([1.0, np.nan, 2.0])}, "'trace' is not finite"),
        ({"mean": np.full((3, 2), np.inf)}, "'mean' is not finite"),
        ({"scatter": np.eye(3)}, r"'scatter' of shape \(3, 3\)"),
        ({"mean": None}, "no array 'mean'"),
    ],
    ids=str,
)
def test_bad_moments_are_named(tmp_path, change, match: str):
    store = FeatureStore.create(tmp_path / "s.zarr", 5)
    good = moments_of(np.random.default_rng(0).normal(size=(30, 2)), np.arange(30) % 3, 5)
    arrays = {name: array for name, array in {**good, **change}.items() if array is not None}
    store.set_state("train", "h", "moments", arrays)
    with pytest.raises(DataError, match=rf"(?s)moments of split 'train', layer 'h'.*{match}"):
        nc.measure(store, device="cpu")
