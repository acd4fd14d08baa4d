"""Compile the kernels that tests use, once for all workers: ``python -m tests.compiled FLAG``.

Numba keeps what it compiled beside the sources. Workers that met the kernels at the same time would
each compile them; instead they wait for the file FLAG, which says that all is there.
"""

from __future__ import annotations

import sys
from pathlib import Path

import ml_dtypes
import numpy as np

from ncbatch.states.moments import MomentsAccumulator
from ncbatch.states.pairs.sweep import sweep_pairs
from ncbatch.states.rules import nearest_mean_rule


def compile_kernels() -> None:
    """Use every kernel with every dtype that it has code of its own for."""
    rng = np.random.default_rng(0)
    n_classes = 2100  # above 2,048 the CPU's way is the compiled one
    for n_features in (8, n_classes + 8):  # products in float32, and in float64
        means = rng.normal(size=(n_classes, n_features))
        few = n_features < n_classes
        sweep_pairs(
            means,
            means.mean(axis=0),
            rng.uniform(size=n_classes),
            counts=rng.integers(1, 5, n_classes),
            within=np.eye(n_features) if few else None,
        )
        nearest_mean_rule(means).decide(means[:8].astype(np.float32))
    # Blocks of fewer numbers are not worth compiled code.
    labels = rng.integers(0, n_classes, 2**16)
    for dtype in (np.float16, ml_dtypes.bfloat16, np.float32, np.float64):
        block = rng.normal(size=(len(labels), 65)).astype(dtype)
        MomentsAccumulator(n_classes, 65, like=block[:0]).add(block, labels)


if __name__ == "__main__":
    try:
        compile_kernels()
    finally:
        Path(sys.argv[1]).touch()
