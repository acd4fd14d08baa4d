"""The stores that golden results are measured on.

All features are multiples of 1/256, drawn as integers, so that no library's rounding enters them
and fingerprints are equal everywhere.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import ncbatch as nc

Array = npt.NDArray[Any]

N_CLASSES = 12
WIDTHS = {"h.0": 14, "h.1": 5}  # more features than classes, and fewer
DTYPES = {"h.0": "float32", "h.1": "float16"}
MANY_CLASSES = 2100  # beyond 2,048 the pair sweep and decisions are compiled


def lattice(rng: np.random.Generator, *shape: int) -> Array:
    """Draw numbers that look normal, of about unit variance: sums of four uniform integers."""
    return rng.integers(-220, 221, size=(4, *shape)).sum(axis=0) / 256


def labels(rng: np.random.Generator, n: int) -> Array:
    """Draw labels: classes 3 and 9 unseen, 1 and 7 once, the rest ever rarer, some rows no samples."""
    common = np.setdiff1d(np.arange(N_CLASSES), [1, 3, 7, 9])
    y = common[np.minimum(rng.integers(8, size=n), rng.integers(8, size=n))]
    y[[5, n - 3]] = [1, 7]
    y[[0, 17, n // 2]] = -1
    return y


def make_run(path: Path, seed: int, *, writers: int = 1) -> nc.FeatureStore:
    """Write a store of two layers with splits train, test and ood.

    Layer h.0 has a classifier. Layer h.1 has one too, and the predictions of the test split are
    its own. With several writers the train split has several chunks.
    """
    rng = np.random.default_rng(seed)
    means = {layer: lattice(rng, N_CLASSES, width) for layer, width in WIDTHS.items()}
    store = nc.FeatureStore.create(path, N_CLASSES, {"h.0": WIDTHS["h.0"]}, DTYPES["h.0"])

    def features(layer: str, y: Array, spread: float) -> Array:
        noise = lattice(rng, len(y), WIDTHS[layer])
        return (means[layer][y] + spread * noise).astype(DTYPES[layer])

    y, y_test, y_ood = labels(rng, 400), labels(rng, 150), rng.integers(4, size=60)
    first = features("h.0", y, 0.5)
    parts = np.array_split(np.arange(len(y)), writers)
    for rank, part in enumerate(parts):
        sharing = {"rank": rank, "world_size": writers, "n_samples": len(y)} if writers > 1 else {}
        with store.writer("train", **sharing) as writer:
            writer.append({"h.0": first[part]}, y[part])
    if writers > 1:
        store.finalize("train")
    with store.add_layers("train", {"h.1": WIDTHS["h.1"]}, DTYPES["h.1"]) as adding:
        n = store.split("train").n_rows  # blocks that a writer did not fill end in holes
        second = np.zeros((n, WIDTHS["h.1"]), DTYPES["h.1"])
        stored = np.asarray(store.split("train").labels(0, n))
        second[:] = features("h.1", np.where(stored < 0, 0, stored), 0.25)
        adding.append({"h.1": second})
    test = features("h.1", y_test, 0.5)
    guesses = np.where(rng.random(len(y_test)) < 0.25, rng.integers(12, size=len(y_test)), y_test)
    with store.writer("test", layers={"h.1": 5}, dtype="float16", head="h.1") as writer:
        writer.append({"h.1": test}, y_test, np.maximum(guesses, 0))
    with store.add_layers("test", {"h.0": 14}, "float32") as adding:
        adding.append({"h.0": features("h.0", y_test, 0.75)})
    with store.writer("ood") as writer:
        writer.append({"h.0": features("h.0", y_ood, 1.0)}, y_ood)
    with store.add_layers("ood", {"h.1": 5}, "float16") as adding:
        adding.append({"h.1": features("h.1", y_ood, 1.0)})
    store.set_classifier("h.0", means["h.0"] + lattice(rng, N_CLASSES, 14) / 4)
    weight = (means["h.1"] + lattice(rng, N_CLASSES, 5) / 4).astype(np.float32)
    store.set_classifier("h.1", weight, lattice(rng, N_CLASSES))
    store.describe(model="golden", layers={"h.0": {"depth": 0.0}, "h.1": {"depth": 0.5}})
    return store


def make_summed(path: Path) -> nc.FeatureStore:
    """Write a store of states: moments of train, test and ood, and decisions of test.

    Samples lie in pairs around their class means, so that means, traces and scatter are exact.
    """
    rng = np.random.default_rng(31)
    k, width = 9, 11
    centres = lattice(rng, k, width)
    store = nc.FeatureStore.create(path, k)
    for split, seen, shift in (("train", 8, 0.0), ("test", 6, 0.25), ("ood", 3, 2.0)):
        classes = np.sort(rng.permutation(k)[:seen])
        pairs = rng.integers(1, 9, size=seen)
        apart = lattice(rng, int(pairs.sum()), width) / 2
        squares = np.zeros(seen)
        np.add.at(squares, np.repeat(np.arange(seen), pairs), (apart**2).sum(axis=1))
        arrays = {
            "class": classes.astype(np.int64), "count": (2 * pairs).astype(np.int64),
            "mean": centres[classes] + shift, "trace": 2 * squares,
            "scatter": 2 * np.einsum("ni,nj->ij", apart, apart),
        }  # fmt: skip
        store.set_state(split, "h", "moments", arrays)
    store.set_classifier("h", centres + lattice(rng, k, width) / 8, lattice(rng, k))
    samples = rng.integers(0, 9, size=k)
    hits = {name: rng.integers(0, samples + 1) for name in ("agreements", "ncc_hits", "clf_hits")}
    known = {
        "means_split": "train",
        "means_fingerprint": store.state_fingerprint("train", "h", "moments"),
        "classifier_fingerprint": store.classifier_fingerprint("h"),
    }
    store.set_state("test", "h", "decisions", {"samples": samples, **hits}, known)
    return store


def make_many(path: Path) -> nc.FeatureStore:
    """Write a store of very many classes of few samples, with a classifier."""
    rng = np.random.default_rng(41)
    means = lattice(rng, MANY_CLASSES, 6)
    y = rng.permutation(
        np.concatenate([np.arange(MANY_CLASSES), rng.integers(MANY_CLASSES, size=2900)])
    )
    y = y[y % 50 != 7]  # some classes are never seen
    store = nc.FeatureStore.create(path, MANY_CLASSES, {"h": 6}, "float32")
    with store.writer("train") as writer:
        writer.append({"h": (means[y] + lattice(rng, len(y), 6) / 8).astype(np.float32)}, y)
    store.set_classifier(
        "h", means + lattice(rng, MANY_CLASSES, 6) / 16, lattice(rng, MANY_CLASSES)
    )
    return store


def make_wide(path: Path) -> nc.FeatureStore:
    """Write a store whose class means can be too large for a small memory, with a row of NaN."""
    rng = np.random.default_rng(51)
    k, width = 600, 400
    means = lattice(rng, k, width)
    y = rng.permutation(np.arange(1500) % k)
    X = (means[y] + lattice(rng, len(y), width)).astype(np.float16)
    X[100, 7] = np.nan
    store = nc.FeatureStore.create(path, k, {"h": width}, "float16")
    with store.writer("train") as writer:
        writer.append({"h": X}, y)
    store.set_classifier("h", means.astype(np.float32))
    return store
