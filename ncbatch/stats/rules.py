"""Rules: the nearest class mean and the linear classifier."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from array_api_compat import device

from ncbatch.arrays import (
    Array,
    CentredRows,
    as_float64,
    float64_blocks,
    mean_of_rows,
    namespace,
    scalar,
    to_numpy,
)
from ncbatch.stats.blocks import detached
from ncbatch.stats.near_ties import score_vectors
from ncbatch.stats.rule import FLOAT64_ROUNDOFF, Rule, in_memory, longest_row


@dataclass(frozen=True)
class _NearnessScores:
    """Minus the squared distance to class means."""

    means: Array

    def __call__(self, rows: npt.NDArray[Any], k: npt.NDArray[Any]) -> npt.NDArray[Any]:
        apart = rows - score_vectors(self.means, k)
        scores: npt.NDArray[Any] = -np.sum(apart * apart, axis=1)
        return scores


@dataclass(frozen=True)
class _LinearScores:
    """Outputs of a linear classifier."""

    weight: Array
    bias: npt.NDArray[np.float64]

    def __call__(self, rows: npt.NDArray[Any], k: npt.NDArray[Any]) -> npt.NDArray[Any]:
        products = rows * score_vectors(self.weight, k)
        scores: npt.NDArray[Any] = np.sum(products, axis=1) + self.bias[k]
        return scores


def nearest_mean_rule(
    means: Array, classes: Array | None = None, *, dtype: Any = None, **how: Any
) -> Rule:
    """Make the rule that chooses the nearest of the class means.

    Parameters
    ----------
    means : array (C, D), StoredRows or a view of either
        Class means. Of an array in memory a centred copy in `dtype` is held; what is in a file is
        read tile by tile.
    classes : array (C,) of int64, optional
        Their class ids, ascending; 0..C-1 by default.
    dtype : optional
        Dtype of the products; float32 by default, which near-ties do not depend on.
    **how
        ``compiled``, ``tile_rows``, ``tile_classes``, ``sweep_rows``, ``operand_roundoff``: as
        for `Rule`.
    """
    means = detached(means)
    xp = namespace(means)
    dtype = dtype or xp.float32
    origin = mean_of_rows(means)
    weight: Array = CentredRows(means, origin, dtype)
    bias = xp.empty((means.shape[0],), dtype=xp.float64, device=device(means))
    held = None
    if not _in_file(means):
        held = xp.empty(tuple(means.shape), dtype=dtype, device=device(means))
    for part, block in float64_blocks(means):
        centred = block - origin
        bias[part] = -0.5 * xp.sum(centred * centred, axis=1)
        if held is not None:
            held[part, :] = xp.astype(centred, dtype)
    return Rule(
        weight=weight if held is None else held,
        bias=bias,
        origin=origin,
        classes=_ids(means, classes),
        exact=_NearnessScores(means),
        dtype=dtype,
        **how,
    )


def linear_rule(
    weight: Array,
    bias: Array | None = None,
    origin: Array | None = None,
    *,
    dtype: Any = None,
    **how: Any,
) -> Rule:
    """Make the rule of a linear classifier, ``argmax(W x + b)`` over all its rows.

    Parameters
    ----------
    weight : array (K, D), StoredRows or a view of either
        Classifier rows W. An array of `dtype` is used as it is; half precision and rows in a file
        are converted tile by tile; of a wider array a copy in `dtype` is held.
    bias : array (K,), optional
        b; zeros by default.
    origin : array (D,), optional
        A point near the features, such as their mean, around which products run.
    dtype : optional
        Dtype of the products; float32 by default, which near-ties do not depend on.
    **how
        As for `nearest_mean_rule`.
    """
    weight, bias = detached(weight), detached(bias)
    xp = namespace(weight)
    n_classes, n_features = weight.shape
    dtype, place = dtype or xp.float32, {"device": device(weight)}
    if origin is None:
        origin = xp.zeros((n_features,), dtype=xp.float64, **place)
    origin = xp.asarray(origin, dtype=xp.float64, **place)
    offsets = xp.zeros((n_classes,), dtype=xp.float64, **place)
    if bias is not None:
        offsets = offsets + as_float64(bias)
    host_bias = to_numpy(offsets).copy()
    for part, block in float64_blocks(weight):
        offsets[part] = offsets[part] + xp.matmul(block, origin[:, None])[:, 0]
    length = scalar(xp.sqrt(xp.sum(origin * origin)))
    halves = in_memory(weight) and weight.dtype not in (xp.float32, xp.float64)
    held = weight if halves or _in_file(weight) else xp.astype(weight[:, :], dtype, copy=False)
    return Rule(
        weight=held,
        bias=offsets,
        origin=origin,
        classes=_ids(weight, None),
        exact=_LinearScores(weight, host_bias),
        dtype=dtype,
        bias_error=(n_features + 8) * FLOAT64_ROUNDOFF * longest_row(weight) * length,
        **how,
    )


def _in_file(rows: Array) -> bool:
    while hasattr(rows, "rows"):
        rows = rows.rows
    return not in_memory(rows)


def _ids(rows: Array, classes: Array | None) -> Array:
    xp = namespace(rows)
    if classes is None:
        return xp.arange(rows.shape[0], dtype=xp.int64, device=device(rows))
    return xp.asarray(classes, dtype=xp.int64, device=device(rows))
