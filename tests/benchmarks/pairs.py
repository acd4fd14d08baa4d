"""Benchmark of the pair sweep against half the plain float32 product, measured in the same run.

Run it from the project's root::

    python -m tests.benchmarks.pairs [CASE...] [--quick] [--repeats N] [--json FILE]

Each case runs in a process of its own, so that its peak of resident memory is its own. Peers do the
work on the same means: scikit-learn's chunked pairwise distances (one statistic, the mean distance),
and the broadcast kernels that reference implementations use (all base statistics, one after the
other, in torch).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np

BASE = ("cdnv", "distance", "log", "riesz", "interference")
CASES = {
    "K20000-D256-base": (20_000, 256, "base"),
    "K20000-D256-all": (20_000, 256, "all"),
    "K50257-D768-base": (50_257, 768, "base"),
    "K50257-D768-all": (50_257, 768, "all"),
    "K20000-D256-sklearn": (20_000, 256, "sklearn"),
    "K4000-D512-base": (4_000, 512, "base"),
    "K4000-D512-broadcast": (4_000, 512, "broadcast"),
}
QUICK = ("K20000-D256-base", "K20000-D256-all", "K20000-D256-sklearn", "K4000-D512-base")


def resident_peak() -> int:
    """Read this process's own peak of resident memory, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmHWM")


def half_product(k: int, d: int) -> float:
    """Time half of the float32 product of two distinct (K, D) arrays, on a sample of its rows."""
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((min(k, 16_384), d), dtype=np.float32) for _ in range(2))
    a[:2048] @ b.T[:, :2048]
    start = time.perf_counter()
    for i in range(0, len(a), 2048):
        a[i : i + 2048] @ b.T
    return (time.perf_counter() - start) * (k / len(a)) ** 2 / 2


def make_means(k: int, d: int) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(1)
    means = rng.standard_normal((k, d)) * np.exp(0.3 * rng.standard_normal((k, 1)))
    root = rng.standard_normal((d, d))
    return means, rng.uniform(0.5, 1.0, k), rng.integers(1, 99, k), root @ root.T / d


def sweep(k: int, d: int, which: str) -> float:
    from ncbatch.engine import run
    from ncbatch.passes import PairPass
    from ncbatch.stats import PairTiles

    means, variances, counts, within = make_means(k, d)
    quantities = BASE if which == "base" else None

    def once(means: np.ndarray) -> None:
        n = len(means)
        pairs = PairTiles(
            means, means.mean(axis=0), variances[:n], counts=counts[:n], within=within,
            quantities=quantities, compiled=True, products=np.float32,
        )  # fmt: skip
        run(PairPass(pairs, "benchmark"))

    once(means[:300])  # compiles, or loads what was compiled
    start = time.perf_counter()
    once(means)
    return time.perf_counter() - start


def sklearn_distances(k: int, d: int) -> float:
    from sklearn.metrics import pairwise_distances_chunked

    means = make_means(k, d)[0].astype(np.float32)
    start = time.perf_counter()
    total = sum(
        float(block.sum()) for block in pairwise_distances_chunked(means, working_memory=256)
    )
    assert total > 0
    return time.perf_counter() - start


def broadcast_kernels(k: int, d: int) -> float:
    """Time the base statistics as (rows, K, D) differences in torch, on a sample of the rows."""
    import torch

    means, variances, *_ = make_means(k, d)
    m, v = torch.from_numpy(means).float(), torch.from_numpy(variances).float()
    u = m / m.norm(dim=-1, keepdim=True)
    rows, sample = 16, 128
    start = time.perf_counter()
    for i in range(0, sample, rows):
        part = slice(i, i + rows)
        ((v[part, None] + v) / 2 / ((m[part, None] - m) ** 2).sum(-1)).sum()
        (u[part, None] - u).norm(dim=-1).sum()
        ((u[part, None] - u).norm(dim=-1) ** -1).log().sum()
        ((u[part, None] - u).norm(dim=-1) ** -(d - 2)).sum()
        (m[part] @ m.T).sum()
    return (time.perf_counter() - start) * k / sample


def run_case(name: str) -> dict[str, float]:
    k, d, what = CASES[name]
    base = resident_peak()
    before = half_product(k, d)
    work = {"sklearn": sklearn_distances, "broadcast": broadcast_kernels}.get(what)
    seconds = work(k, d) if work else sweep(k, d, what)
    limit = (before + half_product(k, d)) / 2
    return {
        "seconds": seconds,
        "limit_seconds": limit,
        "peak_bytes": resident_peak() - base - k * d * 8,
    }


def measure(name: str, repeats: int) -> dict[str, float]:
    """Run a case some times, each in a fresh process, and take medians."""
    command = [sys.executable, "-m", "tests.benchmarks.pairs", "--case", name]
    runs = [
        json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        for _ in range(repeats)
    ]
    found = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    found["ratio"] = statistics.median(run["seconds"] / run["limit_seconds"] for run in runs)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", choices=[*CASES, []], help="all by default")
    parser.add_argument("--quick", action="store_true", help="the small cases, once")
    parser.add_argument("--repeats", type=int, default=3, help="medians of so many runs")
    parser.add_argument("--json", help="also write the figures to this file")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(run_case(options.case)))
        return
    about = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        "versions": {n: version(n) for n in ("ncbatch", "numpy", "numba", "scikit-learn", "torch")},
    }
    print(json.dumps(about))
    print(f"{'case':<24}{'seconds':>10}{'limit':>10}{'ratio':>8}{'peak MiB':>10}")
    results = {}
    for name in options.cases or (QUICK if options.quick else CASES):
        found = results[name] = measure(name, 1 if options.quick else options.repeats)
        print(
            f"{name:<24}{found['seconds']:>10.2f}{found['limit_seconds']:>10.2f}"
            f"{found['ratio']:>8.2f}{found['peak_bytes'] / 2**20:>10.0f}",
            flush=True,
        )
    if options.json:
        Path(options.json).write_text(json.dumps({**about, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
