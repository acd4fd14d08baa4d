"""The pair sweep, against half the plain float32 product and against peers.

Peers do the work on the same means: scikit-learn's chunked pairwise distances (one statistic, the
mean distance), and the broadcast kernels that reference implementations use (all base statistics,
one after the other, in torch).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.benchmarks.case import Aim, Case, Sample, Shape
from tests.benchmarks.limits import half_product
from tests.benchmarks.measuring import measured, timed
from tests.benchmarks.peers import installed

_BASE = ("cdnv", "distance", "log", "riesz", "interference")
_ROWS, _SAMPLE = 16, 128

Arrays = tuple[npt.NDArray[Any], ...]


def make_means(k: int, d: int) -> Arrays:
    """Draw means (K, D), variances and counts (K,), and S_W (D, D)."""
    rng = np.random.default_rng(1)
    means = rng.standard_normal((k, d)) * np.exp(0.3 * rng.standard_normal((k, 1)))
    root = rng.standard_normal((d, d))
    return means, rng.uniform(0.5, 1.0, k), rng.integers(1, 99, k), root @ root.T / d


def sweep(shape: Shape, quantities: tuple[str, ...] | None) -> Sample:
    """Sweep all pairs, against half the product."""
    given = make_means(shape.k, shape.d)
    _sweep(*given, quantities, n=300)  # compiles, or loads what was compiled
    return measured(
        lambda: _sweep(*given, quantities),
        lambda: {"half product": half_product(shape.k, shape.d)},
        held=given[0].nbytes,
    )


def sklearn_distances(shape: Shape) -> Sample:
    """Sweep for all base statistics, against scikit-learn's mean distance."""
    metrics = installed("sklearn.metrics")
    given = make_means(shape.k, shape.d)
    means = given[0].astype(np.float32)

    def distances() -> None:
        blocks = metrics.pairwise_distances_chunked(means, working_memory=256)
        assert sum(float(block.sum()) for block in blocks) > 0

    return _against(distances, given, shape)


def broadcast_kernels(shape: Shape) -> Sample:
    """Sweep, against the base statistics as (rows, K, D) differences in torch."""
    torch = installed("torch")
    given = make_means(shape.k, shape.d)
    m, v = torch.from_numpy(given[0]).float(), torch.from_numpy(given[1]).float()
    u = m / m.norm(dim=-1, keepdim=True)

    def kernels() -> None:
        for i in range(0, _SAMPLE, _ROWS):
            part = slice(i, i + _ROWS)
            ((v[part, None] + v) / 2 / ((m[part, None] - m) ** 2).sum(-1)).sum()
            (u[part, None] - u).norm(dim=-1).sum()
            ((u[part, None] - u).norm(dim=-1) ** -1).log().sum()
            ((u[part, None] - u).norm(dim=-1) ** -(shape.d - 2)).sum()
            (m[part] @ m.T).sum()

    return _against(kernels, given, shape, scale=shape.k / _SAMPLE)


def _against(work: Any, given: Arrays, shape: Shape, scale: float = 1.0) -> Sample:
    """Time our sweep for the base statistics against a peer's work on the same means."""
    _sweep(*given, _BASE, n=300)  # compiles, or loads what was compiled
    limit = half_product(shape.k, shape.d)
    return measured(
        lambda: _sweep(*given, _BASE),
        lambda: {"peer": timed(work) * scale},
        held=given[0].nbytes,
        parts={"half product": limit},
        notes=[f"the peer on a share of 1/{scale:g} of the rows, scaled up"] if scale > 1 else [],
    )


def _sweep(
    means: npt.NDArray[Any],
    variances: npt.NDArray[Any],
    counts: npt.NDArray[Any],
    within: npt.NDArray[Any],
    quantities: tuple[str, ...] | None,
    n: int | None = None,
) -> None:
    from ncbatch.states.pairs.sweep import PairTiles

    means = means[:n]
    pairs = PairTiles(
        means, means.mean(axis=0), variances[:n], counts=counts[:n], within=within,
        quantities=quantities, compiled=True, products=np.float32,
    )  # fmt: skip
    pairs.fold(pairs.tiles())


_HALF = "half the float32 GEMM of K x K x D"
_BASE_WORK, _ALL_WORK = "pairs, base metrics together", "pairs, the whole catalogue"
_SMALL, _LARGE, _PEER = Shape(k=20_000, d=256), Shape(k=50_257, d=768), Shape(k=4000, d=512)
_BASE_SWEEP, _ALL_SWEEP = partial(sweep, quantities=_BASE), partial(sweep, quantities=None)

CASES = [
    Case(
        "pairs-K20000-D256-base", _BASE_WORK, _HALF, _BASE_SWEEP, _SMALL, _SMALL,
        Aim(at_most=6, peak_mib=600),
    ),
    Case("pairs-K20000-D256-all", _ALL_WORK, _HALF, _ALL_SWEEP, _SMALL),
    Case("pairs-K50257-D768-base", _BASE_WORK, _HALF, _BASE_SWEEP, _LARGE, aim=Aim(at_most=2.5)),
    Case("pairs-K50257-D768-all", _ALL_WORK, _HALF, _ALL_SWEEP, _LARGE, repeats=1),
    Case("pairs-K4000-D512-base", _BASE_WORK, _HALF, _BASE_SWEEP, _PEER, _PEER),
    Case(
        "pairs-against-scikit", _BASE_WORK,
        "scikit-learn pairwise_distances_chunked, mean distance only",
        sklearn_distances, _SMALL, None, Aim(at_least=1), peer=True,
    ),
    Case(
        "pairs-against-broadcast", _BASE_WORK, "broadcast kernels in torch, one after the other",
        broadcast_kernels, _PEER, None, Aim(at_least=300), peer=True,
    ),
]  # fmt: skip
