"""The cases: what is measured, planned, hashed and printed, as plain values for the records.

Only names of the public face are used here, and options only in `OPTIONS` and `CASES`; where that
face changes, this file changes with it and the records of numbers stay.
"""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import scipy.linalg  # noqa: F401  (its BLAS must be loaded before it can be held to one thread)
import xarray as xr
from threadpoolctl import threadpool_limits

import ncbatch as nc
from tests.conftest import Answer, run_here
from tests.golden import stores

# Metrics that need a read of their own, and so are measured only when they are named.
NAMED_ONLY = ("nc1_test_to_train", "nc1_cdnv_directional_exact")
OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "weighted": {"weighted": True},
    "dist-exp": {"dist_exp": 2.0},
    "min-count": {"min_count": 5},
    "max-count": {"max_count": 60, "null": True, "null_seed": 3},
    "classes": {"classes": [0, 2, 4, 5, 6, 8], "per_class": True},
    "ddof": {"ddof": 1, "class_ddof": 0, "divide_by_k": False},
    "fp32": {"precision": "fp32"},
    "metrics": {"metrics": ["nc1_pinv", "nc2_etf_err", "nc4_agree"]},
    "named-only": {"metrics": list(NAMED_ONLY)},
    "on-train": {"test": "train", "ood": "test"},
}
# Measured with so little memory that class means lie in a file; rows of NaN are left out.
LITTLE_MEMORY = {"metrics": ["nc1_quot", "nc2_norm_mean", "nc3_dual_err"], "memory": "302MiB"}
# Attributes that say where and when, not what.
VOLATILE = {"date", "cell_date", "ncbatch_version", "cell_version", "store_id", "store_path"}
RESIDENT_BYTES = 256 * 2**20


@contextmanager
def pinned() -> Iterator[None]:
    """Hold what differs between machines and runs: one thread, one processor, resident memory."""
    with pytest.MonkeyPatch.context() as patch, threadpool_limits(1, user_api="blas"):
        patch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)
        patch.setattr(os, "cpu_count", lambda: 1)
        resident = SimpleNamespace(rss=RESIDENT_BYTES)
        patch.setattr(psutil.Process, "memory_info", lambda _: resident)
        for name in ("FORCE_COLOR", "TERM", "COLUMNS"):
            patch.delenv(name, raising=False)
        yield


class Stores:
    """Makes each store once, in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.make = cache(self._make)

    def _make(self, name: str) -> Path:
        path = self.folder / name
        if name == "step-10.zarr":
            stores.make_run(path, 1)
        elif name == "step-200.zarr":
            stores.make_run(path, 2, writers=4)
        else:
            maker = {
                "summed": stores.make_summed, "many": stores.make_many, "wide": stores.make_wide
            }[name.removesuffix(".zarr")]  # fmt: skip
            maker(path)
        return path

    @property
    def runs(self) -> list[Path]:
        """The two stores of two layers."""
        return [self.make("step-10.zarr"), self.make("step-200.zarr")]


def of_dataset(found: xr.Dataset, *, whole: bool = True, described: bool = False) -> dict[str, Any]:
    """Give the variables, and the attributes that do not vary.

    Variables have the same description everywhere, so only one case records it; why a value is
    undefined depends on the data and is always recorded. Of results that are not taken whole only
    what has a value per store and layer is, and attributes that hold for all of them.
    """
    values, attributes, about = {}, {}, {}
    for name, value in found.attrs.items():
        nested = isinstance(value, str) and value.startswith("{")
        if name not in VOLATILE and (whole or not nested):
            attributes[str(name)] = json.loads(value) if nested else value
    for name, variable in found.variables.items():
        if whole or variable.dims in ((), ("store",), ("layer",), ("store", "layer")):
            values[str(name)] = variable.values
        if described:
            attrs = [f"{key}: {text}" for key, text in variable.attrs.items()]
            about[str(name)] = [str(variable.dims), *attrs]
        elif "undefined" in variable.attrs:
            about[str(name)] = variable.attrs["undefined"]
    return {**values, "about": about, "attributes": attributes}


def of_plan(plan: Any) -> dict[str, Any]:
    return {"text": str(plan).splitlines(), "peak_bytes": plan.peak_bytes, "items": plan.items}


def of_csv(text: str) -> dict[str, Any]:
    """Take the numbers, which round-trip, out of a CSV; the rest stays text."""
    number = r"(?<![\w.-])-?\d+\.\d*(?:e[+-]?\d+)?(?![\w.])"
    found = re.findall(number, text)
    assert all(repr(float(each)) == each for each in found)
    lines = re.sub(number, "#", text).splitlines()
    return {"lines": lines, "numbers": np.array([float(each) for each in found])}


def of_listing(text: str) -> list[str]:
    """Take the lines of a table of the terminal, without its rules and padding."""
    lines = (re.sub(r"[│┃]", "|", line).strip("| \n") for line in text.splitlines())
    return [re.sub(r"\s*\|\s*", " | ", line) for line in lines if not re.fullmatch(r"\W*", line)]


# ---------------------------------------------------------------------------------------- cases


def everything(made: Stores) -> dict[str, Any]:
    found = nc.measure(made.runs, null=True, per_class=True, device="cpu")
    return of_dataset(found, described=True)


def options(made: Stores) -> dict[str, Any]:
    """Measure each variant of options, of one store in one chunk."""
    return {
        name: of_dataset(
            nc.measure(made.runs[0], device="cpu", **given), whole="per_class" in given
        )
        for name, given in OPTIONS.items()
    }


def summed(made: Stores) -> dict[str, Any]:
    path = made.make("summed.zarr")
    found = {
        "all": nc.measure(path, per_class=True, device="cpu"),
        "filtered": nc.measure(path, min_count=5, device="cpu"),
    }
    return {name: of_dataset(each, whole=name == "all") for name, each in found.items()}


def many(made: Stores) -> dict[str, Any]:
    """Measure more classes than plain array code sweeps."""
    return of_dataset(nc.measure(made.make("many.zarr"), device="cpu"))


def wide(made: Stores) -> dict[str, Any]:
    path = made.make("wide.zarr")
    found = nc.measure(path, device="cpu", skip_nonfinite=True, **LITTLE_MEMORY)
    return of_dataset(found)


def plans(made: Stores) -> dict[str, Any]:
    found = {
        "runs": nc.plan(made.runs, null=True, per_class=True, memory="8GiB", device="cpu"),
        "named only": nc.plan(made.runs, metrics=NAMED_ONLY, memory="8GiB", device="cpu"),
        "summed": nc.plan(made.make("summed.zarr"), memory="8GiB", device="cpu"),
        "many": nc.plan(made.make("many.zarr"), memory="8GiB", device="cpu"),
        "wide": nc.plan(made.make("wide.zarr"), memory="8GiB", device="cpu"),
        "little memory": nc.plan(made.make("wide.zarr"), device="cpu", **LITTLE_MEMORY),
    }
    return {name: of_plan(each) for name, each in found.items()}


def fingerprints(made: Stores) -> dict[str, Any]:
    """Hash splits, layers and filters, classifiers, predictions and states."""
    found: dict[str, Any] = {}
    for path in made.runs:
        store = nc.FeatureStore.open(path)
        for name in store.splits:
            split = store.split(name)
            for layer in split.layers:
                found[f"{path.name}/{name}/{layer}"] = split.fingerprint(layer)
        for layer in store.classifiers:
            found[f"{path.name}/classifier/{layer}"] = store.classifier_fingerprint(layer)
        train, test = store.split("train"), store.split("test")
        found[f"{path.name}/train/h.0, filtered"] = train.fingerprint("h.0", "some classes")
        found[f"{path.name}/predictions"] = test.prediction_fingerprint()
    summed = nc.FeatureStore.open(made.make("summed.zarr"))
    for split, kind in (("train", "moments"), ("test", "moments"), ("test", "decisions")):
        found[f"summed.zarr/{split}/{kind}"] = summed.state_fingerprint(split, "h", kind)
    return found


def sweep(made: Stores) -> dict[str, Any]:
    """Measure and save, then update with another layer, then with changed and new stores.

    Before each update a thousand is added to what is saved of nc1_quot, so that a kept value tells
    how often it was kept.
    """
    folder = made.folder / "sweep"
    folder.mkdir()
    path, saved, kept = folder / "step-10.zarr", folder / "saved.zarr", folder / "kept"
    shared = {"metrics": ["nc1_quot", "nc1_cdnv", "nc2_etf_err"], "state": kept, "device": "cpu"}
    store = stores.make_run(path, 1)
    found = {"one layer": nc.measure(path, ["h.0"], **shared)}
    again = {**shared, "metrics": ["nc1_pinv", "nc2g_dist", "nc4_agree"]}
    found["other metrics, from kept states"] = nc.measure(path, ["h.0"], **again)

    def save(results: xr.Dataset) -> None:
        marked = results.assign(nc1_quot=results["nc1_quot"] + 1000)
        marked["nc1_quot"].attrs = results["nc1_quot"].attrs
        nc.save_results(marked, saved)
        xr.testing.assert_identical(nc.load_results(saved), marked)

    save(found["one layer"])
    found["two layers"] = nc.measure(path, ["h.0", "h.1"], update=saved, **shared)
    save(found["two layers"])
    split = store.split("train")
    X = stores.lattice(np.random.default_rng(61), split.n_rows, 5).astype(np.float16)
    with store.add_layers("train", {"h.1": 5}, "float16", overwrite=True) as adding:
        adding.append({"h.1": X})
    paths = [path, made.make("step-200.zarr")]
    found["a layer changed, a store added"] = nc.measure(paths, update=saved, **shared)
    return {name: of_dataset(each) for name, each in found.items()}


def moments(made: Stores) -> dict[str, Any]:
    """Sum blocks of each dtype up, merge and save; the last block is large enough for compiled code."""
    rng = np.random.default_rng(71)
    y, X = stores.labels(rng, 300), stores.lattice(rng, 300, 7) + 3
    found = {}
    for dtype in ("float16", "float32", "float64"):
        state = nc.Moments.zero(stores.N_CLASSES, 7)
        for part in (slice(0, 100), slice(100, 101), slice(101, 300)):
            block = nc.Moments.from_block(X[part].astype(dtype), y[part], stores.N_CLASSES)
            state = state.merge(block)
        found[dtype] = state
    fp32 = nc.Moments.from_block(X.astype("f4"), y, stores.N_CLASSES, precision="fp32")
    plain = nc.Moments.from_block(X, y, stores.N_CLASSES, scatter=False)
    found |= {"fp32": fp32, "without scatter": plain}
    for name, state in found.items():
        path = made.folder / f"moments {name}"
        state.save(path)
        found[name] = nc.Moments.load(path)
    values = {
        name: {
            "counts": state.counts, "means": state.means, "traces": state.traces,
            "scatter": state.scatter, "variances": state.variances,
        }
        for name, state in found.items()
    }  # fmt: skip
    large = nc.Moments.from_block(
        np.tile(stores.lattice(rng, 820, 1024), (5, 1)).astype("f2") * (1 + np.arange(4100)[:, None] % 3),
        np.arange(4100) % 5, 5,
    )  # fmt: skip
    sample = large.scatter[::97, ::89]
    return {
        **values,
        "large": {"means": large.means[:, ::64], "traces": large.traces, "scatter": sample},
    }


def functions(made: Stores) -> dict[str, Any]:
    """Call the functions of `ncbatch.metrics` that have the names of the field's reference."""
    rng = np.random.default_rng(81)
    M, W, V = stores.lattice(rng, 7, 9), stores.lattice(rng, 7, 9), rng.integers(1, 99, 7) / 64
    S, centre = stores.lattice(rng, 9, 9), stores.lattice(rng, 9) / 4
    S = np.einsum("ni,nj->ij", S, S)
    m = nc.metrics
    return {
        "covariance_ratio": [m.covariance_ratio(S, M, centre, how) for how in ("pinv", "svd", "quotient")],
        "variability_cdnv": [m.variability_cdnv(V, M), m.variability_cdnv(V, M, 2.0)],
        "mean_norms": m.mean_norms(M, centre),
        "interference_grid": m.interference_grid(M, centre),
        "similarities": [m.similarities(W, M, centre), m.similarities(W, M, centre, cos=True)],
        "distance_norms": [m.distance_norms(W, M, centre), m.distance_norms(W, M, norm=False)],
        "structure_error": m.structure_error(W, M),
        "simplex_etf_error": m.simplex_etf_error(M, centre),
        "self_duality_error": m.self_duality_error(W, M, centre),
        "orthogonality_deviation": m.orthogonality_deviation(M, centre),
        "class_dist_norm_vars": m.class_dist_norm_vars(V, M),
        "kernel_grid": m.kernel_grid(M, centre),
        "kernel_stats": [m.kernel_stats(M, centre, k) for k in (m.dist_kernel, m.log_kernel, m.riesz_kernel)],
    }  # fmt: skip


def commands(made: Stores) -> dict[str, Any]:
    """Run commands; of the tables of a measurement only the files are compared."""

    def run(*arguments: object) -> Answer:
        answer = run_here(*arguments, cwd=made.folder)
        assert (answer.code, answer.err) == (0, "")
        return answer

    names = [path.name for path in made.runs]
    run("measure", *names, "--device", "cpu", "--out", "all.csv", "--out", "all.json")
    said, nested = ((made.folder / f"all.{ending}").read_text() for ending in ("csv", "json"))
    found: dict[str, Any] = {"all.csv": of_csv(said), "all.json": nested.splitlines()[:3]}
    lines = [
        {"store": store, "layer": layer}
        | {name: "" if value is None else repr(value) for name, value in values.items()}
        for store, by_layer in json.loads(nested).items()
        for layer, values in by_layer.items()
    ]
    found["the JSON says what the CSV says"] = lines == list(csv.DictReader(said.splitlines()))
    for preset in ("papyan2020", "wu2024"):
        given = ("--layer", "h.0", "--preset", preset, "--device", "cpu", "--out", "preset.csv")
        run("measure", names[0], *given)
        found[preset] = of_csv((made.folder / "preset.csv").read_text())
    id_of = re.compile(r"\b[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\b")
    for name in (*names, made.make("summed.zarr").name):
        found[f"info {name}"] = of_listing(id_of.sub("ID", run("info", name).out))
    found["validate"] = of_listing(run("validate", names[1]).out)
    found["metrics"] = of_listing(run("metrics").out)
    return found


CASES: Mapping[str, Callable[[Stores], dict[str, Any]]] = {
    make.__name__: make
    for make in (
        everything, options, summed, many, wide, plans, fingerprints, sweep, moments, functions,
        commands,
    )
}  # fmt: skip
