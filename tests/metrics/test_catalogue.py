"""Every metric of the table equals the oracle, under every convention; none is without a formula there."""

import math

import numpy as np
import pytest

import ncbatch as nc
from ncbatch.metrics import CATALOGUE
from tests import oracles
from tests.measurement.stores import make_store, outside
from tests.strategies import REGIMES, Features, each_regime, random_rotation

# Metrics of uncentred features: what a translation of them changes.
UNCENTRED = {"nc3_bias", "nc4_agree", "nc4_clf_accuracy", "nc5_ood_dev", "spec_rankme"}


def measured(tmp_path, data: Features, options: dict) -> tuple[dict[str, float], dict[str, float]]:
    """Measure every metric, through a store and by the oracle."""
    W, b, (X_test, y_test), (X_ood, y_ood) = outside(data)
    splits = {"test": (X_test, y_test), "ood": (X_ood, y_ood)}
    store = make_store(tmp_path / "s.zarr", data, splits=splits, W=W, b=b)
    ds = nc.measure(store, metrics=list(CATALOGUE), **options)
    oracle = oracles.every_metric(
        data.X, data.y, data.n_classes, W=W, b=b,
        X_test=X_test, y_test=y_test, X_ood=X_ood, y_ood=y_ood, **options,
    )  # fmt: skip
    return {name: float(ds[name][0, 0]) for name in CATALOGUE}, oracle


def assert_every_metric_equals(got: dict[str, float], oracle: dict[str, float]):
    assert not set(CATALOGUE) - set(oracle), "metrics without a formula in tests/oracles.py"
    assert differing(got, oracle) == {}


def differing(got: dict[str, float], expected: dict[str, float], rel: float = 1e-6) -> dict:
    """Give what differs; no absolute difference is allowed, however small the value."""
    return {
        name: (value, expected[name])
        for name, value in got.items()
        if value != pytest.approx(expected[name], rel=rel, abs=0.0, nan_ok=True)
    }


@each_regime
def test_every_metric_equals_the_oracle(tmp_path, regime: str):
    got, oracle = measured(tmp_path, REGIMES[regime](13), {})
    assert sum(map(math.isfinite, got.values())) >= len(CATALOGUE) - 2
    assert_every_metric_equals(got, oracle)


CONVENTIONS = [
    {"ddof": 1},
    {"ddof": 1, "min_count": 2, "dist_exp": 2.0},
    {"class_ddof": 0},
    {"divide_by_k": False},
    {"weighted": True, "ddof": 1, "class_ddof": 0, "divide_by_k": False, "dist_exp": 1.5},
]


@pytest.mark.parametrize("options", CONVENTIONS, ids=str)
@pytest.mark.parametrize(
    "regime", ["zipf", "singletons", pytest.param("exactly_coincident", marks=pytest.mark.slow)]
)
def test_every_convention_equals_the_oracle(tmp_path, regime: str, options: dict):
    got, oracle = measured(tmp_path, REGIMES[regime](13), options)
    assert_every_metric_equals(got, oracle)


def every_metric(path, X, y, K, W, b, test, ood) -> dict[str, float]:
    store = make_store(
        path, Features(X, y, K), dtype="float64", splits={"test": test, "ood": ood}, W=W, b=b
    )
    ds = nc.measure(store, metrics=list(CATALOGUE))
    return {name: float(ds[name][0, 0]) for name in CATALOGUE}


@pytest.mark.slow
@pytest.mark.parametrize("regime", ["zipf", "k_less_d", "offset"])
def test_rotation_relabelling_and_translation_change_nothing(tmp_path, regime: str):
    data = REGIMES[regime](3)
    K, D = data.n_classes, data.X.shape[1]
    W, b, *splits = outside(data)
    X, *parts = (x.astype(np.float64) for x in (data.X, *(rows for rows, _ in splits)))
    y, *labels = data.y, *(of for _, of in splits)
    rng = np.random.default_rng(0)
    Q, order = random_rotation(D, 5), rng.permutation(K)
    shift = np.abs(X).max() * rng.normal(size=D)
    base = every_metric(tmp_path / "base", X, y, K, W, b, *zip(parts, labels, strict=True))
    turned = [(x @ Q, of) for x, of in zip(parts, labels, strict=True)]
    got = every_metric(tmp_path / "turned", X @ Q, y, K, W @ Q, b, *turned)
    assert differing(got, base) == {}
    renamed = [(x, np.where(of >= 0, order[of], of)) for x, of in zip(parts, labels, strict=True)]
    W2, b2 = np.empty_like(W), np.empty_like(b)
    W2[order], b2[order] = W, b
    got = every_metric(tmp_path / "renamed", X, order[y], K, W2, b2, *renamed)
    assert differing(got, base) == {}
    moved = [(x + shift, of) for x, of in zip(parts, labels, strict=True)]
    got = every_metric(tmp_path / "moved", X + shift, y, K, W, b, *moved)
    assert set(differing(got, base)) == UNCENTRED & set(differing(got, base))
    assert "nc3_bias" in differing(got, base)
