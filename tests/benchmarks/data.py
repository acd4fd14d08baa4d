"""Features of the benchmark: made once, in a folder of the system's temporary files."""

from __future__ import annotations

import shutil
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ncbatch import FeatureStore
from ncbatch.engine.jobs import Item, Job, Pass, Sweep
from ncbatch.engine.loop import run_jobs
from ncbatch.measurement.options import Options
from ncbatch.measurement.samples import Samples, count_labels, select_classes
from tests.benchmarks.case import Shape
from tests.benchmarks.limits import feature_files, raw_read

LAYER = "features"
# The setting that the aims speak of, a smaller one for --quick, and a quarter of the samples.
FULL, QUICK = Shape(n=500_000, d=768, k=50_257), Shape(n=32_768, d=384, k=4096)
QUARTER, QUICK_QUARTER = Shape(n=125_000, d=768, k=50_257), Shape(n=8192, d=384, k=4096)
TRAIN, QUICK_TRAIN = Shape(n=200_000, d=384, k=4000), Shape(n=20_000, d=384, k=4000)

_BLOCK_ROWS = 8192
_NOISE = 0.5
# Changed when the same shape shall hold other numbers, or the store's format changes.
_VERSION = 1


def class_means(shape: Shape) -> npt.NDArray[np.float32]:
    """Draw the class means (K, D) that features scatter around."""
    rng = np.random.default_rng(1)
    scale = np.exp(0.3 * rng.standard_normal((shape.k, 1), dtype=np.float32))
    return rng.standard_normal((shape.k, shape.d), dtype=np.float32) * scale


def zipf_labels(shape: Shape) -> npt.NDArray[np.int64]:
    """Draw N labels, class k in proportion to 1/(k + 1), every class at least once."""
    rng = np.random.default_rng(2)
    weight = 1.0 / np.arange(1, shape.k + 1)
    drawn = rng.choice(shape.k, size=shape.n - shape.k, p=weight / weight.sum())
    return rng.permutation(np.concatenate([np.arange(shape.k), drawn]))


def feature_blocks(
    shape: Shape, labels: npt.NDArray[np.int64], dtype: str
) -> Iterator[tuple[npt.NDArray[np.floating], npt.NDArray[np.int64]]]:
    """Make the features of labelled samples, block by block."""
    means, rng = class_means(shape), np.random.default_rng(3)
    for start in range(0, len(labels), _BLOCK_ROWS):
        y = labels[start : start + _BLOCK_ROWS]
        rows = rng.standard_normal((len(y), shape.d), dtype=np.float32)
        rows *= _NOISE
        rows += means[y]
        yield rows.astype(dtype), y


def stored(shape: Shape, dtype: str = "float16") -> FeatureStore:
    """Open the store of a shape, in the page cache; it is made where it is not there yet."""
    folder = Path(tempfile.gettempdir()) / "ncbatch-benchmarks"
    path = folder / f"{shape.n}-{shape.d}-{shape.k}-{dtype}-{_VERSION}.zarr"
    if not path.exists():
        _make(path, shape, dtype)
    raw_read(feature_files(path))
    return FeatureStore.open(path)


def _make(path: Path, shape: Shape, dtype: str) -> None:
    """Make a store under another name first: one that was interrupted is never taken for whole."""
    path.parent.mkdir(exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        store = FeatureStore.create(partial, shape.k, {LAYER: shape.d}, dtype)
        with store.writer("train", n_samples=shape.n) as writer:
            for rows, labels in feature_blocks(shape, zipf_labels(shape), dtype):
                writer.append({LAYER: rows}, labels)
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def rows_of(store: FeatureStore) -> tuple[Samples, int]:
    """Give the rows of a store as passes read them, and how many classes are used."""
    split = store.split("train")
    selection = select_classes(count_labels(split), Options())
    return Samples(split, LAYER, selection.index), len(selection.classes)


def run(work: Pass[Any, Any], items: Sequence[Item]) -> Any:
    """Run a pass over items in a plain loop; returns its state."""
    return run_jobs([Job("job", (Sweep("pass", "pass", lambda: work, items),))])[0]


def in_memory(store: FeatureStore) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Read a whole store, as float32 (N, D), with its labels (N,)."""
    split = store.split("train")
    features = np.empty((split.n_rows, split.spec(LAYER).n_features), np.float32)
    for start in range(0, len(features), _BLOCK_ROWS):
        stop = min(start + _BLOCK_ROWS, len(features))
        features[start:stop] = split.read(LAYER, start, stop)
    return features, split.labels().astype(np.int64)
