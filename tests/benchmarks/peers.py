"""Peers: what other tools take for the same work on the same data, held against ncbatch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from hashlib import sha256
from importlib import import_module
from typing import Any

import numpy as np
import numpy.typing as npt

from ncbatch.measurement.passes import MomentsPass
from ncbatch.states.moments import Moments, MomentsAccumulator
from ncbatch.states.rules import nearest_mean_rule
from tests.benchmarks.case import Aim, Case, MissingError, Sample, Shape
from tests.benchmarks.data import (
    FULL,
    QUICK,
    QUICK_TRAIN,
    TRAIN,
    class_means,
    in_memory,
    rows_of,
    run,
    stored,
)
from tests.benchmarks.measuring import measured, timed

# As the loaders of reference implementations give them.
_BATCH = 128
_BLOCK_ROWS = 8192

Features = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]


def installed(name: str) -> Any:
    """Import a peer.

    Raises
    ------
    MissingError
        When it is not installed.
    """
    try:
        return import_module(name)
    except ImportError as error:
        raise MissingError(f"{name.split('.')[0]} is not installed") from error


# --------------------------------------------------------------------------- the loop in torch


def torch_loop(features: Features, labels: Labels, k: int, share: float = 1.0) -> float:
    """Time train statistics as reference implementations get them, on a share of the batches.

    Three accumulators over the batches, two of them in need of the first one's means: sums, by a
    product with the batch's dense one-hot (K, B); the pooled covariance of residuals (D, D); and
    the variances of classes, again by a product with the one-hot. Each counts samples by a one-hot
    of its own. Checks of theirs, such as a hash of the means at every batch, are left out.
    """
    torch = installed("torch")
    x, y = torch.from_numpy(features), torch.from_numpy(labels)
    starts = list(range(0, len(y), _BATCH))
    chosen = starts[: max(1, round(len(starts) * share))]
    classes, d = torch.arange(k), x.shape[1]

    def batches() -> Iterator[tuple[Any, Any, Any]]:
        counts = torch.zeros(k, dtype=torch.int32)
        for i in chosen:
            rows, ids = x[i : i + _BATCH], y[i : i + _BATCH]
            one_hot = ids[:, None] == classes
            counts += one_hot.sum(dim=0, dtype=torch.int32)
            yield rows, ids, one_hot

    start = time.perf_counter()
    sums, counts = torch.zeros(k, d), torch.bincount(y, minlength=k)
    for rows, _, one_hot in batches():
        sums += one_hot.mT.to(torch.float32) @ rows
    means = sums / counts.clamp(min=1)[:, None]
    covariance = torch.zeros(d, d)
    for rows, ids, _ in batches():
        residuals = rows - means[ids]
        covariance += residuals.mT @ residuals
    covariance /= len(y)
    variances = torch.zeros(k)
    for rows, ids, one_hot in batches():
        variances += (one_hot.mT.to(torch.float32) @ (rows - means[ids]) ** 2).sum(dim=1)
    variances /= counts.clamp(min=1)
    return (time.perf_counter() - start) * len(starts) / len(chosen)


def train_statistics(shape: Shape, *, from_store: bool, precision: Any = "exact") -> Sample:
    """Moments with scatter, against the torch loop over the same features in memory."""
    store = stored(shape, "float32")
    features, labels = in_memory(store)
    source, n_classes = rows_of(store)
    whole = MomentsPass(source, n_classes, True, precision)

    def work() -> None:
        if from_store:
            run(whole, source.items)
        else:
            _moments(features, labels, shape.k, scatter=True, precision=precision)

    work()  # loads what was compiled
    # Half of the loop runs before and half of it after.
    share = 0.5 if shape == TRAIN else 0.1
    note = f"torch in float32, in batches of {_BATCH}, on a share of {share:g} of them, scaled up"
    hashes = 2 * len(labels) / _BATCH * _hash_seconds(shape)
    return measured(
        work,
        lambda: {"torch loop": torch_loop(features, labels, shape.k, share)},
        held=features.nbytes,
        parts={"a hash of the means at every batch, not counted": hashes},
        notes=[note],
    )


def _hash_seconds(shape: Shape) -> float:
    """Time a SHA-256 of class means, by which one implementation checks them at every batch."""
    means = class_means(shape)
    return min(timed(lambda: sha256(means.tobytes()).hexdigest()) for _ in range(5))


# ------------------------------------------------------------------------------ means by class


def scikit_centroids(shape: Shape) -> Sample:
    """``NearestCentroid.fit``: the means of classes, one mask over all samples per class."""
    neighbours = installed("sklearn.neighbors")
    # It makes two more arrays of the features' size.
    features, labels = _loaded(shape, copies=4)
    return _peer(
        lambda: neighbours.NearestCentroid().fit(features, labels), features, labels, shape
    )


def scikit_one_hot(shape: Shape) -> Sample:
    """``LabelBinarizer``, sparse: sums of classes as a product of SciPy's CSR one-hot."""
    preprocessing = installed("sklearn.preprocessing")
    features, labels = _loaded(shape, copies=2)

    def means() -> None:
        binarizer = preprocessing.LabelBinarizer(sparse_output=True).fit(np.arange(shape.k))
        one_hot = binarizer.transform(labels).T.tocsr().astype(np.float32)
        one_hot @ features / np.maximum(np.bincount(labels, minlength=shape.k), 1)[:, None]

    return _peer(means, features, labels, shape)


def flox_means(shape: Shape) -> Sample:
    """``flox.groupby_reduce`` of means over the sample axis."""
    flox = installed("flox")
    features, labels = _loaded(shape, copies=4)
    wide = features.T  # it reduces the last axes

    def means() -> None:
        flox.groupby_reduce(wide, labels, func="mean", expected_groups=np.arange(shape.k))

    return _peer(means, features, labels, shape)


def _loaded(shape: Shape, copies: int) -> tuple[Features, Labels]:
    """Read the features, if there is room for copies of them that a peer makes."""
    import psutil

    needed = copies * shape.n * shape.d * 4
    if psutil.virtual_memory().available < needed:
        raise MissingError(f"{needed / 2**30:.0f} GiB of free memory")
    return in_memory(stored(shape))


def _peer(work: Callable[[], Any], features: Features, labels: Labels, shape: Shape) -> Sample:
    """Time our means and variances against a peer's work on the same arrays in memory."""
    ours = partial(_moments, features, labels, shape.k, scatter=False)
    ours()  # loads what was compiled
    return measured(ours, lambda: {"peer": timed(work)}, held=features.nbytes)


def _moments(
    features: Features, labels: Labels, k: int, *, scatter: bool, precision: Any = "exact"
) -> Moments:
    accumulator = MomentsAccumulator(
        k, features.shape[1], like=features[:0], scatter=scatter, precision=precision
    )
    for rows, ids in _blocks(features, labels):
        accumulator.add(rows, ids)
    return accumulator.finish()


def _blocks(features: Features, labels: Labels) -> Iterator[tuple[Features, Labels]]:
    for start in range(0, len(labels), _BLOCK_ROWS):
        part = slice(start, start + _BLOCK_ROWS)
        yield features[part], labels[part]


# ------------------------------------------------------------------------------- nearest means


def faiss_nearest(shape: Shape) -> Sample:
    """``faiss.knn`` of one neighbour, expanded in float32, against our exact nearest mean."""
    faiss = installed("faiss")
    means, rng = class_means(shape), np.random.default_rng(4)
    rows = means[rng.integers(0, shape.k, shape.n)]
    rows += np.float32(0.5) * rng.standard_normal(rows.shape, dtype=np.float32)
    rule = nearest_mean_rule(means.astype(np.float64))
    rule.decide(rows[:64])  # loads what was compiled
    faiss.knn(rows[:64], means, 1)
    return measured(
        lambda: rule.decide(rows), lambda: {"peer": timed(lambda: faiss.knn(rows, means, 1))}
    )


_ROWS, _QUICK_ROWS = Shape(n=4096, d=768, k=50_257), Shape(n=1024, d=384, k=4096)
_LOOP = "torch loop with a dense one-hot, in memory"
_MEANS = "means and variances of classes, exact, in memory"

CASES = [
    Case(
        "train-statistics", "means, variances and covariance, exact, over a store of float32",
        _LOOP, partial(train_statistics, from_store=True), TRAIN, QUICK_TRAIN, Aim(at_least=40),
        peer=True,
    ),
    Case(
        "train-statistics-in-memory", "the same from an array in memory", _LOOP,
        partial(train_statistics, from_store=False), TRAIN, None, Aim(at_least=40), peer=True,
    ),
    Case(
        "train-statistics-fp32", "the same from memory, products in float32 as the loop's", _LOOP,
        partial(train_statistics, from_store=False, precision="fp32"), TRAIN, None,
        Aim(at_least=40), peer=True,
    ),
    Case(
        "peer-scikit-centroids", _MEANS, "scikit-learn NearestCentroid.fit",
        scikit_centroids, FULL, QUICK, peer=True, repeats=1,
    ),
    Case(
        "peer-scikit-one-hot", _MEANS,
        "scikit-learn LabelBinarizer and its sparse product, means only",
        scikit_one_hot, FULL, QUICK, peer=True,
    ),
    Case(
        "peer-flox", _MEANS, "flox groupby_reduce, means only",
        flox_means, FULL, QUICK, peer=True, repeats=1,
    ),
    Case(
        "peer-faiss-knn", "nearest mean, exact", "faiss.knn of one neighbour, float32",
        faiss_nearest, _ROWS, _QUICK_ROWS, peer=True,
    ),
]  # fmt: skip
