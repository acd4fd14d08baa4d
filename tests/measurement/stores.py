"""Stores to measure, of features and of states, and how results are compared."""

from __future__ import annotations

import copy
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ncbatch.metrics import CATALOGUE
from ncbatch.store import FeatureStore
from tests.strategies import REGIMES, Features


def make_store(
    path, data: Features, *, layer="h", dtype=None, splits=None, W=None, b=None, predictions=None
) -> FeatureStore:
    """Write a train split, and others, of one layer."""
    dtype = dtype or str(data.X.dtype)
    D = data.X.shape[1]
    store = FeatureStore.create(path, data.n_classes, {layer: D}, dtype)
    for name, (X, y) in {"train": (data.X, data.y), **(splits or {})}.items():
        given = (predictions or {}).get(name)
        with store.writer(name, head=None if given is None else layer) as writer:
            writer.append({layer: X}, y, given)
    if W is not None:
        store.set_classifier(layer, W, b)
    return store


def outside(data: Features, seed: int = 5):
    """Make a classifier, a test split and an OOD split to go with train."""
    rng = np.random.default_rng(seed)
    X = data.X.astype(np.float64)
    W, b = rng.normal(size=(data.n_classes, X.shape[1])), rng.normal(size=data.n_classes)
    rows = rng.permutation(len(X))[:200]
    test = (X[rows] + 0.1 * X.std() * rng.normal(size=(len(rows), X.shape[1]))).astype(data.X.dtype)
    ood = (X[rows[:50]] * -0.5 + 1.0).astype(data.X.dtype)
    return W, b, (test, data.y[rows]), (ood, rng.integers(0, min(3, data.n_classes), 50))


PAIRS_LOST_TO_ROUNDING = {"nc2g_riesz", "nc2g_riesz_mean"}


def assert_equals_oracle(ds, oracle: dict[str, float], rel: float = 1e-6, floor: float = 1e-9):
    compared = 0
    for name, value in oracle.items():
        if name == "n_coincident_pairs":
            assert int(ds[name][0, 0]) == value
        elif math.isnan(value):
            assert name not in ds or math.isnan(ds[name][0, 0]), name
        elif name in PAIRS_LOST_TO_ROUNDING and not 1e-300 < abs(value) < 1e300:
            continue
        else:
            assert float(ds[name][0, 0]) == pytest.approx(value, rel=rel, abs=floor), name
            compared += 1
    assert compared > 10


def assert_same(a, b, rel: float) -> None:
    assert set(a.data_vars) == set(b.data_vars)
    for name in a.data_vars:
        np.testing.assert_allclose(
            a[name].values.astype(float), b[name].values.astype(float),
            rtol=rel, atol=1e-12, equal_nan=True, err_msg=name,
        )  # fmt: skip


def moments_of(X, y, n_classes: int, *, scatter: bool = True) -> dict[str, np.ndarray]:
    """Sum rows up as docs/store.md says, class by class."""
    X = np.asarray(X, np.float64)
    seen = np.unique(y)
    means = np.stack([X[y == c].mean(axis=0) for c in seen])
    apart = X - means[np.searchsorted(seen, y)]
    found = {
        "class": seen.astype(np.int64), "count": np.bincount(y, minlength=n_classes)[seen],
        "mean": means, "trace": np.array([(apart[y == c] ** 2).sum() for c in seen]),
    }  # fmt: skip
    return {**found, "scatter": apart.T @ apart} if scatter else found


def decisions_of(X, y, means, classes, W, b, n_classes: int) -> dict[str, np.ndarray]:
    X = np.asarray(X, np.float64)
    near = classes[((X[:, None, :] - means[None]) ** 2).sum(axis=2).argmin(axis=1)]
    chosen = (X @ W.T + b).argmax(axis=1)
    marks = {"agreements": near == chosen, "ncc_hits": near == y, "clf_hits": chosen == y}
    counted = {name: np.bincount(y[mark], minlength=n_classes) for name, mark in marks.items()}
    return {"samples": np.bincount(y, minlength=n_classes), **counted}


class Pair:
    """The same data twice: a store of features, and one of states."""

    def __init__(self, folder: Path, regime: str = "k_less_d", seed: int = 3) -> None:
        data = REGIMES[regime](seed)
        rng = np.random.default_rng(seed)
        self.k, d = data.n_classes, data.X.shape[1]
        X, rows = data.X.astype(np.float64), rng.permutation(len(data.y))[:150]
        noise = 0.1 * X.std() * rng.normal(size=(len(rows), d))
        self.splits = {
            "train": (X, data.y), "test": (X[rows] + noise, data.y[rows]),
            "ood": (1.0 - 0.5 * X[rows[:40]], rng.integers(0, 3, 40)),
        }  # fmt: skip
        self.W, self.b = rng.normal(size=(self.k, d)), rng.normal(size=self.k)
        self.features = FeatureStore.create(folder / "features.zarr", self.k, {"h": d}, "float64")
        self.states = FeatureStore.create(folder / "states.zarr", self.k)
        for name, (rows_, labels) in self.splits.items():
            with self.features.writer(name) as writer:
                writer.append({"h": rows_}, labels)
            self.states.set_state(name, "h", "moments", moments_of(rows_, labels, self.k))
        for store in (self.features, self.states):
            store.set_classifier("h", self.W, self.b)
        self.store_decisions()

    def copy(self, folder: Path) -> Pair:
        """Copy both stores to a folder."""
        twin = copy.copy(self)
        for name in ("features", "states"):
            path = shutil.copytree(getattr(self, name).path, folder / f"{name}.zarr")
            setattr(twin, name, FeatureStore.open(path))
        return twin

    def store_decisions(self, split: str = "test", **about) -> None:
        train = moments_of(*self.splits["train"], self.k)
        arrays = decisions_of(
            *self.splits[split], train["mean"], train["class"], self.W, self.b, self.k
        )
        known = {
            "means_split": "train",
            "means_fingerprint": self.states.state_fingerprint("train", "h", "moments"),
            "classifier_fingerprint": self.states.classifier_fingerprint("h"),
        }
        self.states.set_state(split, "h", "decisions", arrays, known | about)


def assert_equal(found, wanted, names=None) -> None:
    compared = 0
    for name in names or CATALOGUE:
        if name not in wanted:
            continue
        a, b = float(found[name][0, 0]), float(wanted[name][0, 0])
        assert a == pytest.approx(b, rel=1e-9, abs=1e-12, nan_ok=True), name
        compared += not np.isnan(b)
    assert compared >= (10 if names is None else len(names))


def refuse_to_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_, **__):
        raise AssertionError("features were read")

    monkeypatch.setattr("ncbatch.store.split.Split.read", read)


_PEAK = """
import json, re, sys
import ncbatch as nc
arguments = json.loads(sys.argv[1])
plan = nc.plan(**arguments)
found = nc.measure(**arguments)
peak = int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
values = {name: float(found[name][0, 0]) for name in arguments.get("metrics", [])}
print(json.dumps([plan.peak_bytes, peak, max(p.n_reads for p in plan.prices), values]))
"""


def peak_of(**arguments) -> tuple[int, int, int, dict[str, float]]:
    """Measure in a process of its own; gives planned and own peak, number of reads, and values."""
    done = subprocess.run(
        [sys.executable, "-c", _PEAK, json.dumps(arguments)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return tuple(json.loads(done.stdout))
