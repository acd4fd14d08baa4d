"""measure from stored states gives what it gives from the features, and says what it cannot give."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import ncbatch as nc
from ncbatch.engine.plans import memory_budget
from ncbatch.errors import CorruptionError, DataError, StoreError, UnknownNameError
from ncbatch.measurement import steps as pricing
from ncbatch.metrics import CATALOGUE
from ncbatch.states.decisions import Decisions
from ncbatch.states.moments import Moments
from ncbatch.states.rules import linear_rule, nearest_mean_rule
from ncbatch.store import FeatureStore
from tests.conftest import run_here
from tests.measurement.test_run import peak_of
from tests.strategies import REGIMES

ROWS_NEEDED = {"nc1_cdnv_directional_exact"}
ALL = list(CATALOGUE)


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


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return Pair(tmp_path)


def assert_equal(found, wanted, names=None) -> None:
    compared = 0
    for name in names or CATALOGUE:
        if name not in wanted:
            continue
        a, b = float(found[name][0, 0]), float(wanted[name][0, 0])
        assert a == pytest.approx(b, rel=1e-9, abs=1e-12, nan_ok=True), name
        compared += not np.isnan(b)
    assert compared >= (10 if names is None else len(names))


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


def test_features_win_and_states_fill_what_lacks_them(pair, tmp_path):
    mixed = FeatureStore.create(tmp_path / "mixed.zarr", pair.k)
    X, y = pair.splits["train"]
    mixed.set_state("train", "h", "moments", moments_of(X, y, pair.k))
    mixed.set_state("train", "g.10", "moments", moments_of(2 * X, y, pair.k))
    mixed.set_state("train", "g.9", "moments", moments_of(3 * X, y, pair.k))
    X_test, y_test = pair.splits["test"]
    with mixed.writer("test", layers={"h": X.shape[1]}, dtype="float64") as writer:
        writer.append({"h": X_test}, y_test)
    mixed.set_classifier("h", pair.W, pair.b)
    # A stale state beside features is not looked at.
    mixed.set_state("test", "h", "moments", moments_of(X_test + 9, y_test, pair.k))
    found = nc.measure(mixed)
    assert found.layer.values.tolist() == ["g.9", "g.10", "h"]
    wanted = nc.measure(pair.features)
    at_h = found.sel(layer=["h"])
    assert_equal(at_h, wanted, ["nc1_pinv", "nc4_agree", "nc4_ncc_accuracy", "nc3_dual_err"])
    assert json.loads(found.attrs["source"])["mixed.zarr"]["h"] == "train: states, test: features"
    tests = {"metrics": "nc1_test_to_train"}
    assert_equal(
        nc.measure(mixed, "h", **tests), nc.measure(pair.features, **tests), [tests["metrics"]]
    )


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


def test_the_fingerprint_follows_the_state(pair):
    def fingerprint(**options) -> str:
        ds = nc.measure(pair.states, metrics="nc1_quot", **options)
        return json.loads(ds.attrs["fingerprint"])["states.zarr"]["h"]

    before = fingerprint()
    assert fingerprint() == before
    assert fingerprint(classes=range(4)) != before
    arrays = moments_of(*pair.splits["train"], pair.k)
    pair.states.set_state("train", "h", "moments", {**arrays, "trace": arrays["trace"] * 2})
    assert fingerprint() != before


def test_class_means_in_files_give_the_same(pair, tmp_path, monkeypatch):
    wanted = nc.measure(pair.states)
    mode = pricing.Mode(2, stored=True)
    monkeypatch.setattr("ncbatch.measurement.run.choose_mode", lambda *_: mode)
    for _ in range(2):
        assert_equal(nc.measure(pair.states, state=tmp_path / "kept"), wanted)
    files = list((tmp_path / "kept").rglob("*.rows"))
    assert len([file for file in files if file.name.startswith("means-")]) == 2  # train and ood


def test_a_cluster_gives_the_same(pair):
    found = nc.measure(pair.states, cluster="threads:2", device="cpu")
    assert_equal(found, nc.measure(pair.states))


def test_plans_price_states(pair):
    plan = nc.plan(pair.states)
    steps = {price.step: price for price in plan.prices}
    k, d = pair.k, pair.W.shape[1]
    train = next(price for step, price in steps.items() if step.startswith("moments of"))
    assert train.bytes_read == k * (d * 8 + 24) + d * d * 8
    assert train.n_items == 0
    assert "FLOP" in str(plan)


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


def test_moments_and_classifier_of_other_widths_are_refused(pair):
    pair.states.delete_state("train", "h", "moments")
    narrow = moments_of(pair.splits["train"][0][:, :2], pair.splits["train"][1], pair.k)
    pair.states.set_state("train", "h", "moments", narrow)
    with pytest.raises(DataError, match="moments of layer 'h' with 2 features"):
        nc.measure(pair.states)


def test_a_lost_chunk_is_named_before_anything_is_measured(pair):
    Path(pair.states.path, "train/states/h/moments/mean/c/0/0").unlink()
    with pytest.raises(CorruptionError, match="mean/c/0/0"):
        nc.measure(pair.states)


def test_unknown_names_list_what_is_there(pair):
    with pytest.raises(UnknownNameError, match="one of: h"):
        nc.measure(pair.states, "hh")
    with pytest.raises(UnknownNameError, match="one of: ood, test, train"):
        nc.measure(pair.states, train="val")


def test_parts_of_several_processes_are_to_be_merged_first(tmp_path):
    store = FeatureStore.create(tmp_path / "s.zarr", 3)
    store.set_state("train", "h", "part-0", {"class": np.arange(2)}, {"holds": ["moments"]})
    with pytest.raises(StoreError, match=r"'ncbatch finalize .*s.zarr --split train' merges them"):
        nc.measure(store)


def test_the_command_line_measures_states(pair, tmp_path):
    answer = run_here("measure", "states.zarr", "--out", "r.csv", cwd=tmp_path)
    assert answer.code == 0
    assert "nc4_agree" in answer.out
    assert (tmp_path / "r.csv").read_text().startswith("store,layer,nc1_pinv")
    assert run_here("plan", "states.zarr", cwd=tmp_path).code == 0


@pytest.mark.slow
@pytest.mark.parametrize("budget", ["2GiB", "400MiB"])
def test_measured_peak_stays_below_the_planned(tmp_path, budget: str):
    k, d = 40_000, 256
    rng = np.random.default_rng(0)
    store = FeatureStore.create(tmp_path / "s.zarr", k)
    for split in ("train", "ood"):
        arrays = {
            "class": np.arange(k), "count": np.full(k, 5), "mean": rng.normal(size=(k, d)),
            "trace": rng.random(k), "scatter": np.eye(d) * k,
        }  # fmt: skip
        store.set_state(split, "h", "moments", arrays)
    metrics = ["nc1_pinv", "nc1_quot", "nc2_norm_mean", "nc5_ood_dev", "spec_rankme"]
    planned, peak, _, values = peak_of(stores=store.path, metrics=metrics, memory=budget)
    assert peak <= planned <= memory_budget(budget)
    assert values.keys() == set(metrics)
