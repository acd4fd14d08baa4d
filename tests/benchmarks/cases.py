"""Cases of moments, decisions, clusters and memory, each held against its limit."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import ncbatch as nc
from ncbatch.measurement.passes import MomentsPass
from ncbatch.states.decisions import Decisions
from ncbatch.states.moments import MomentsAccumulator
from ncbatch.states.rules import faiss_nearest_rule, linear_rule, nearest_mean_rule
from tests.benchmarks.case import Aim, Case, MissingError, Sample, Shape
from tests.benchmarks.data import (
    FULL,
    LAYER,
    QUARTER,
    QUICK,
    QUICK_QUARTER,
    class_means,
    feature_blocks,
    rows_of,
    run,
    stored,
)
from tests.benchmarks.fresh import fresh_sample
from tests.benchmarks.limits import feature_files, product, raw_read, read_and_sum, syrk
from tests.benchmarks.measuring import measured, timed
from tests.benchmarks.memory import forget_peak, peak_bytes
from tests.benchmarks.one_thread import one_thread_workers

_MOMENTS_METRICS = ("nc1_quot", "nc1_pinv", "nc2_etf_err")
_MEMORY = "4GiB"


# ------------------------------------------------------------------------------------- moments


def moments(shape: Shape, precision: Any) -> Sample:
    """Moments with scatter over the store in a plain loop, against products and a raw read."""
    store = stored(shape)
    dtype = np.float64 if precision == "exact" else np.float32
    files = feature_files(Path(store.path))

    def limit() -> dict[str, float]:
        return {"syrk": syrk(shape.n, shape.d, dtype), "raw read": raw_read(files)}

    return _moments(store, limit, scatter=True, precision=precision)


def moments_no_scatter(shape: Shape) -> Sample:
    """Moments without scatter, against reading, converting and summing the rows once."""
    store = stored(shape)
    array = store.split("train").feature(LAYER)
    return _moments(store, partial(read_and_sum, array), scatter=False, precision="exact")


def _moments(store: nc.FeatureStore, limit: Any, *, scatter: bool, precision: Any) -> Sample:
    source, n_classes = rows_of(store)
    work = MomentsPass(source, n_classes, scatter, precision)
    run(work, source.items[:1])  # loads what was compiled
    return measured(lambda: run(work, source.items), limit)


# ----------------------------------------------------------------------------------- decisions


def decisions(shape: Shape, ncc: str) -> Sample:
    """Decide rows by both rules, against the two products; the rules are made beforehand."""
    means = class_means(shape)
    labels = np.random.default_rng(4).integers(0, shape.k, shape.n)
    features = np.concatenate([rows for rows, _ in feature_blocks(shape, labels, "float16")])
    noise = np.random.default_rng(5).standard_normal(means.shape, dtype=np.float32)
    weight = means + np.float32(0.1) * noise
    bias = weight[:, 0].astype(np.float64)
    del noise
    nearest: Any = nearest_mean_rule
    if ncc == "faiss":
        try:
            faiss_nearest_rule(means[:2])
        except nc.NcbatchError as error:
            raise MissingError(str(error).splitlines()[0]) from error
        nearest = faiss_nearest_rule
    rules: list[Any] = []
    wide = means.astype(np.float64)
    making = timed(lambda: rules.extend((nearest(wide), linear_rule(weight, bias))))

    def decide(n: int) -> Decisions:
        return Decisions.from_block(features[:n], labels[:n], shape.k, *rules)

    decide(64)  # loads what was compiled
    rows = features.astype(np.float32)

    def limit() -> dict[str, float]:
        return {"product by means": product(rows, means), "by classifier": product(rows, weight)}

    return measured(lambda: decide(shape.n), limit, parts={"making the rules": making})


# ------------------------------------------------------------------------------------ clusters


def processes(shape: Shape, metrics: Any) -> Sample:
    """Measure on two workers of one thread, against one of them; the clusters are not timed."""
    store, seconds, peaks, parts = stored(shape), {}, {}, {}
    for n_workers in (1, 2):
        with one_thread_workers(n_workers) as client:
            client.run(_load_compiled, shape.d)
            client.get_task_stream()  # from now on the scheduler takes notes
            start = time.time()
            seconds[n_workers] = timed(lambda: nc.measure(store, metrics=metrics, cluster=client))
            peaks[n_workers] = max(client.run(peak_bytes).values())
            for kind, spent in _task_seconds(client, start).items():
                parts[f"on {n_workers}: {kind}"] = spent
    note = "each worker bound to a processor; the peak is that of a worker"
    return Sample(seconds[2], seconds[1], peaks[2], parts=parts, notes=[note])


def _task_seconds(client: Any, start: float) -> dict[str, float]:
    """Add up what the workers spent on each kind of task, and on transfers."""
    found: dict[str, float] = {}
    for task in client.get_task_stream(start=start):
        kind = task["key"].split("-")[1]  # see `ncbatch.engine.graph`
        for span in task["startstops"]:
            name = kind if span["action"] == "compute" else str(span["action"])
            found[name] = found.get(name, 0.0) + span["stop"] - span["start"]
    return {name: spent for name, spent in found.items() if spent > 0.01}


def _load_compiled(d: int) -> None:
    """Fold as many rows as let compiled code be loaded, which comes with its own time."""
    rows, labels = np.ones((16_384, d), np.float16), np.arange(16_384)
    accumulator = MomentsAccumulator(len(labels), d, like=rows[:0])
    accumulator.add(rows, labels)
    accumulator.add(rows, labels)
    accumulator.finish()


# -------------------------------------------------------------------------------------- memory


def peak_of_measure(shape: Shape, metrics: Any) -> Sample:
    """Measure in a process that did nothing before, and compare its peak with the plan's."""
    store = stored(shape)
    planned = nc.plan(store, metrics=metrics, memory=_MEMORY)
    forget_peak()
    seconds = timed(lambda: nc.measure(store, metrics=metrics, memory=_MEMORY))
    peak = peak_bytes()
    note = f"memory of {_MEMORY} allowed; the interpreter is included"
    return Sample(
        peak, planned.peak_bytes, None, parts={"seconds": seconds}, notes=[note]
    )  # fmt: skip


def growth_of_peak(_: Shape) -> Sample:
    """Compare the peaks over N and over N / 4 samples, of processes of their own."""
    more, fewer = (fresh_sample(name, quick=False) for name in ("peak-rss", "peak-rss-quarter"))
    return Sample(more["value"], fewer["value"], None)


# --------------------------------------------------------------------------------------- table

_SYRK = "{} syrk + raw read"
_ROWS, _QUICK_ROWS = Shape(n=4096, d=768, k=50_257), Shape(n=1024, d=384, k=4096)

CASES = [
    Case(
        "moments-exact", "moments with covariance, exact", _SYRK.format("float64"),
        partial(moments, precision="exact"), FULL, QUICK, Aim(at_most=1.3),
    ),
    Case(
        "moments-fp32", "moments with covariance, products in float32", _SYRK.format("float32"),
        partial(moments, precision="fp32"), FULL, QUICK, Aim(at_most=1.5),
    ),
    Case(
        "moments-no-scatter", "moments without covariance",
        "Zarr read with checksum + conversion + sum of float32 rows",
        moments_no_scatter, FULL, QUICK, Aim(at_most=1.5),
    ),
    Case(
        "decisions", "decisions by nearest mean and by classifier", "two float32 GEMMs",
        partial(decisions, ncc="exact"), _ROWS, _QUICK_ROWS, Aim(at_most=1.3),
    ),
    Case(
        "decisions-ncc-faiss", "the same decisions, nearest mean by FAISS", "two float32 GEMMs",
        partial(decisions, ncc="faiss"), _ROWS, _QUICK_ROWS,
    ),
    Case(
        "processes-2-against-1", f"measure {', '.join(_MOMENTS_METRICS)} on 2 workers of a thread",
        "the same on 1 worker", partial(processes, metrics=_MOMENTS_METRICS), FULL, QUICK,
        Aim(at_least=1.7), peer=True,
    ),
    Case(
        "peak-rss", f"peak of measure {', '.join(_MOMENTS_METRICS)}", "the plan's figure",
        partial(peak_of_measure, metrics=_MOMENTS_METRICS), FULL, QUICK, Aim(at_most=1.0),
        unit="MiB",
    ),
    Case(
        "peak-rss-quarter", "the same over a quarter of the samples", "the plan's figure",
        partial(peak_of_measure, metrics=_MOMENTS_METRICS), QUARTER, QUICK_QUARTER,
        Aim(at_most=1.0),
        unit="MiB",
    ),
    Case(
        "peak-rss-growth", "peak of measure", "peak over a quarter of the samples",
        growth_of_peak, FULL, None, Aim(at_most=1.1),
        unit="MiB", repeats=1,
    ),
    Case(
        "peak-rss-pairs", "peak of measure, all metrics that need no classifier",
        "the plan's figure", partial(peak_of_measure, metrics=None), FULL, None,
        Aim(at_most=1.0),
        unit="MiB", repeats=1,
    ),
]  # fmt: skip
