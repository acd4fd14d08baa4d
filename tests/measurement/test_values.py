"""Values: every base metric equals the oracle, in every regime, through a store."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ncbatch as nc
from ncbatch.errors import DataError
from ncbatch.store import format as store_format
from tests.measurement.stores import assert_equals_oracle, make_store, outside
from tests.oracles import base_metrics
from tests.strategies import REGIMES, Features, each_regime, feature_sets


@each_regime
def test_every_regime_equals_the_oracle(tmp_path, regime: str, small_chunks):
    data = REGIMES[regime](7)
    W, b, (X_test, y_test), (X_ood, y_ood) = outside(data)
    splits = {"test": (X_test, y_test), "ood": (X_ood, y_ood)}
    store = make_store(tmp_path / "s.zarr", data, splits=splits, W=W, b=b)
    assert store.split("train").feature("h").nchunks > 3
    oracle = base_metrics(
        data.X, data.y, data.n_classes, W=W, b=b,
        X_test=X_test, y_test=y_test, X_ood=X_ood, y_ood=y_ood,
    )  # fmt: skip
    assert_equals_oracle(nc.measure(store), oracle)


OPTIONS = [
    {"weighted": True},
    {"min_count": 5},
    {"max_count": 20, "min_count": 2},
    {"dist_exp": 2.0},
    {"classes": range(0, 40, 2), "weighted": True},
]


@pytest.fixture(scope="module", params=["zipf", "singletons", "k_less_d"])
def with_options(request, tmp_path_factory):
    """Write a store of a regime, which each of the options measures."""
    data = REGIMES[request.param](3)
    W, b, test, ood = outside(data)
    path = tmp_path_factory.mktemp(request.param) / "s.zarr"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store_format, "CHUNK_BYTES", 8192)
        store = make_store(path, data, splits={"test": test, "ood": ood}, W=W, b=b)
    return store, data, W, b, test, ood


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options_equal_the_oracle(with_options, options, small_chunks):
    store, data, W, b, test, ood = with_options
    if "classes" in options:
        options = {**options, "classes": [c for c in options["classes"] if c < data.n_classes]}
    try:
        oracle = base_metrics(
            data.X, data.y, data.n_classes, W=W, b=b, X_test=test[0], y_test=test[1],
            X_ood=ood[0], y_ood=ood[1], **options,
        )  # fmt: skip
    except ValueError:  # the filter leaves fewer than two classes
        with pytest.raises(DataError, match="at least 2"):
            nc.measure(store, **options)
        return
    assert_equals_oracle(nc.measure(store, **options), oracle)


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(feature_sets(), st.integers(0, 9))
def test_any_features_equal_the_oracle(tmp_path_factory, data: Features, seed: int):
    path = tmp_path_factory.mktemp("any") / "s.zarr"
    rng = np.random.default_rng(seed)
    W = rng.normal(size=(data.n_classes, data.X.shape[1]))
    store = make_store(path, data, W=W)
    oracle = base_metrics(data.X.astype(np.float64), data.y, data.n_classes, W=W)
    assert_equals_oracle(nc.measure(store), oracle)


def test_what_was_left_out_is_counted(tmp_path):
    data = REGIMES["exactly_coincident"](0)
    store = make_store(tmp_path / "s.zarr", Features(data.X, data.y, data.n_classes + 3))
    ds = nc.measure(store, min_count=2)
    counts = np.bincount(data.y, minlength=data.n_classes + 3)
    assert int(ds.n_classes_unseen[0, 0]) == np.sum(counts == 0)
    assert int(ds.n_classes_filtered[0, 0]) == np.sum(counts == 1)
    assert int(ds.n_classes[0, 0]) == np.sum(counts >= 2)
    assert int(ds.n_samples[0, 0]) == counts[counts >= 2].sum()
    assert int(ds.n_coincident_pairs[0, 0]) > 0
    assert np.isfinite(ds.nc1_cdnv[0, 0])


def test_degenerate_outside_data_and_equal_means_have_reasons(tmp_path):
    X = np.array([[1.0, 2.0], [3.0, 4.0], [1.5, 2.5], [2.5, 3.5]]) + 0.1
    ood = np.full((3, 2), np.nan)
    data = Features(X, np.array([0, 0, 1, 1]), 2)
    store = make_store(
        tmp_path / "s.zarr", data, splits={"ood": (ood, np.zeros(3, int))}, W=np.eye(2)
    )
    ds = nc.measure(store, skip_nonfinite=True)
    assert "no out-of-distribution row" in ds.nc5_ood_dev.attrs["undefined"]
    for name in ("nc3_dual_err", "nc2_norm_cv", "nc1_pinv", "nc2_etf_err"):
        assert np.isnan(ds[name][0, 0]), name
        assert ds[name].attrs["undefined"]
    assert float(ds.nc2_norm_mean[0, 0]) == 0.0
    one = nc.measure(store, layers="h", metrics="nc1_trace_share", skip_nonfinite=True)
    assert float(one.nc1_trace_share[0, 0]) == 1.0


def test_a_zero_mean_has_no_angle_to_outside_data(tmp_path):
    X = np.array([[1.0, 0.5], [-1.0, -0.5], [2.0, 1.0], [2.2, 1.4]])
    data = Features(X, np.array([0, 0, 1, 1]), 2)
    ood = (np.array([[1.0, 0.0]]), np.zeros(1, int))
    ds = nc.measure(make_store(tmp_path / "s.zarr", data, splits={"ood": ood}))
    oracle = base_metrics(X, data.y, 2, X_ood=ood[0])
    assert float(ds.nc5_ood_dev[0, 0]) == pytest.approx(oracle["nc5_ood_dev"])
