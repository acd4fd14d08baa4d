"""Decisions: how often the nearest class mean and the classifier agree, and are right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from array_api_compat import device

from ncbatch.arrays import (
    Array,
    Segments,
    add_at,
    as_float64,
    namespace,
    row_blocks,
    scalar,
    segment_sum,
    to_numpy,
)
from ncbatch.errors import DataError, UsageError
from ncbatch.stats.blocks import check_block

# Rows and classes of a tile of scores, and pairs rescored exactly at a time.
TILE_ROWS = 2048
TILE_CLASSES = 2048
_RESCORED_PAIRS = 2048


@dataclass(frozen=True)
class Decisions:
    """Per class of the sample: how many samples, and how many of each kind of decision.

    Attributes
    ----------
    samples : array (K,) of int64
        Samples by their true class.
    agreements : array (K,) of int64
        Samples whose nearest class mean is the class that the classifier chose.
    ncc_hits, clf_hits : array (K,) of int64
        Samples whose nearest class mean, and whose classifier decision, is the true class.
    """

    samples: Array
    agreements: Array
    ncc_hits: Array
    clf_hits: Array

    @classmethod
    def zero(cls, n_classes: int, *, xp: Any = np, device: Any = None) -> Decisions:
        """Make the state of no samples, neutral under `merge`."""
        return cls(*(xp.zeros((n_classes,), dtype=xp.int64, device=device) for _ in fields(cls)))

    @classmethod
    def from_block(
        cls,
        features: Array,
        labels: Array,
        n_classes: int,
        nearest_mean: Rule,
        classifier: Rule | Array,
    ) -> Decisions:
        """Decide one block of samples held in memory.

        Parameters
        ----------
        features : array (N, D)
            Floating-point features.
        labels : array (N,)
            True class ids below `n_classes`; rows with a negative label are not samples.
        n_classes : int
            K, all classes.
        nearest_mean : Rule
            From `nearest_mean_rule`.
        classifier : Rule or array (N,)
            From `linear_rule`, or the class ids the model itself predicted.
        """
        xp = namespace(features, labels)
        if not isinstance(classifier, Rule):
            classifier = xp.astype(classifier, xp.int64)[labels >= 0]
        features, labels = check_block(features, labels, n_classes)
        state = cls.zero(n_classes, xp=xp, device=device(features))
        if features.shape[0] == 0:
            return state
        near = nearest_mean.decide(features)
        chosen = classifier.decide(features) if isinstance(classifier, Rule) else classifier
        segments = Segments.of(labels)
        present = segments.mask(n_classes)
        add_at(state.samples, present, segments.counts)
        for target, yes in (
            (state.agreements, near == chosen),
            (state.ncc_hits, near == labels),
            (state.clf_hits, chosen == labels),
        ):
            sums = segment_sum(xp.astype(yes, xp.float64), segments)
            add_at(target, present, xp.astype(sums, xp.int64))
        return state

    def merge(self, other: Decisions) -> Decisions:
        """Combine with the state of other samples; neither operand changes.

        Raises
        ------
        DataError
            When the numbers of classes differ.
        """
        if self.samples.shape != other.samples.shape:
            raise DataError(
                f"decisions over {other.samples.shape[0]} and {self.samples.shape[0]} classes",
                "equal numbers of classes",
            )
        return Decisions(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def rate(self, kind: str, indices: Array | None = None, weighted: bool = True) -> float:
        """Give the share of samples with one kind of decision.

        Parameters
        ----------
        kind : {"agreements", "ncc_hits", "clf_hits"}
            What to count.
        indices : array (C,) of int, optional
            Only samples of these classes.
        weighted : bool, optional
            Weigh classes by their samples; otherwise the mean over classes that have samples.

        Returns
        -------
        float
            Between 0 and 1; NaN without samples.
        """
        if kind not in ("agreements", "ncc_hits", "clf_hits"):
            raise UsageError(f"no decisions '{kind}'", "agreements, ncc_hits or clf_hits")
        samples, hits = to_numpy(self.samples), to_numpy(getattr(self, kind))
        if indices is not None:
            chosen = to_numpy(indices) if hasattr(indices, "shape") else np.asarray(indices)
            samples, hits = samples[chosen], hits[chosen]
        if samples.sum() == 0:
            return float("nan")
        if weighted:
            return float(hits.sum() / samples.sum())
        seen = samples > 0
        return float((hits[seen] / samples[seen]).mean())


@dataclass(frozen=True)
class Rule:
    """Chooses the class of greatest score ``w_k . (x - origin) + b_k``, as exact arithmetic would.

    Attributes
    ----------
    weight : array (C, D)
        Score vectors, in the dtype the products run in.
    bias : array (C,) of float64
        Score offsets.
    origin : array (D,) of float64
        Subtracted from every row, so that a common offset costs no digits.
    classes : array (C,) of int64
        The class id of each score, ascending: equal scores go to the lowest.
    exact : callable
        ``exact(rows, k) -> (R,)`` scores row r for candidate k[r] in float64 on the host.
    """

    weight: Array
    bias: Array
    origin: Array
    classes: Array
    exact: Callable[[npt.NDArray[Any], npt.NDArray[Any]], npt.NDArray[Any]]

    @staticmethod
    def peak_bytes(n_classes: int, n_features: int, block_rows: int, itemsize: int = 4) -> int:
        """Price the rule and its decisions of a block: bytes at their peak."""
        rule = n_classes * (n_features * itemsize + 24)
        rows = min(block_rows, TILE_ROWS)
        tile = rows * min(n_classes, TILE_CLASSES) * (itemsize * 3 + 8)
        block = rows * n_features * (8 * 3 + itemsize) + block_rows * 64
        return rule + tile + block + _RESCORED_PAIRS * n_features * 8 * 4

    def decide(self, features: Array) -> Array:
        """Choose a class for each row of `features` (B, D); returns ids (B,) of int64.

        Notes
        -----
        Scores are computed tile by tile with a running best and runner-up. Rows whose runner-up
        lies within the rounding error of the products are decided again from float64 scores.
        """
        xp = namespace(features)
        blocks = [
            self._decide_tile(features[p, :]) for p in row_blocks(features.shape[0], TILE_ROWS)
        ]
        return xp.concat(blocks) if blocks else self.classes[:0]

    def _decide_tile(self, features: Array) -> Array:
        xp = namespace(features)
        rows = xp.astype(as_float64(features) - self.origin, self.weight.dtype)
        norms = xp.sqrt(xp.sum(as_float64(rows) ** 2, axis=1))
        error = self._relative_error() * (norms * self._reach + scalar(xp.max(xp.abs(self.bias))))
        best, second, at = self._sweep(rows)
        chosen = xp.take(self.classes, at, axis=0)
        close = as_float64(best) - as_float64(second) <= 2.0 * error
        if bool(xp.any(close)):
            floor = as_float64(best)[close] - 2.0 * error[close]
            chosen[close] = self._decide_exactly(features[close], rows[close], floor)
        return chosen

    def _relative_error(self) -> float:
        xp = namespace(self.weight)
        n_features: int = self.weight.shape[1]
        return (n_features + 8) * float(xp.finfo(self.weight.dtype).eps)

    @cached_property
    def _reach(self) -> float:
        """Length of the longest weight."""
        xp = namespace(self.weight)
        longest = 0.0
        for part in row_blocks(self.weight.shape[0]):
            squares = xp.sum(as_float64(self.weight[part, :]) ** 2, axis=1)
            longest = max(longest, scalar(xp.max(squares)))
        return float(longest**0.5)

    def _scores(self, rows: Array, part: slice) -> Array:
        xp = namespace(rows)
        products = xp.matmul(rows, xp.matrix_transpose(self.weight[part, :]))
        return products + xp.astype(self.bias[part], products.dtype)[None, :]

    def _sweep(self, rows: Array) -> tuple[Array, Array, Array]:
        xp = namespace(rows)
        place = {"device": device(rows)}
        best = xp.full((rows.shape[0],), -xp.inf, dtype=rows.dtype, **place)
        second, at = best, xp.zeros((rows.shape[0],), dtype=xp.int64, **place)
        for part in row_blocks(self.weight.shape[0], TILE_CLASSES):
            scores = self._scores(rows, part)
            top_at = xp.argmax(scores, axis=1)
            top = xp.max(scores, axis=1)
            columns = xp.arange(scores.shape[1], dtype=top_at.dtype, **place)
            others = xp.where(columns[None, :] == top_at[:, None], -xp.inf, scores)
            runner_up = xp.max(others, axis=1)
            second = xp.maximum(xp.minimum(best, top), xp.maximum(second, runner_up))
            better = top > best
            at = xp.where(better, xp.astype(top_at, xp.int64) + part.start, at)
            best = xp.where(better, top, best)
        return best, second, at

    def _decide_exactly(self, features: Array, rows: Array, floor: Array) -> Array:
        """Decide the few rows in doubt on the host, from every score that reaches `floor`."""
        xp = namespace(features)
        x = to_numpy(as_float64(features))
        best = np.full(len(x), -np.inf)
        at = np.zeros(len(x), np.int64)
        for part in row_blocks(self.weight.shape[0], TILE_CLASSES):
            near = as_float64(self._scores(rows, part)) >= floor[:, None]
            row, k = np.nonzero(to_numpy(near))
            for some in row_blocks(len(row), _RESCORED_PAIRS):
                scores = self.exact(x[row[some]], k[some] + part.start)
                # Last write wins: ascending score, then descending class.
                order = np.lexsort((-k[some], scores))
                i, s, c = row[some][order], scores[order], k[some][order] + part.start
                top, top_at = best.copy(), at.copy()
                top[i], top_at[i] = s, c
                better = top > best
                best, at = np.where(better, top, best), np.where(better, top_at, at)
        classes = to_numpy(self.classes)[at]
        return xp.asarray(classes, device=device(features))


def nearest_mean_rule(means: Array, classes: Array | None = None, *, dtype: Any = None) -> Rule:
    """Make the rule that chooses the nearest of the class means.

    Parameters
    ----------
    means : array (C, D)
        Class means.
    classes : array (C,) of int64, optional
        Their class ids, ascending; 0..C-1 by default.
    dtype : optional
        Dtype of the products; float32 by default, which near-ties do not depend on.
    """
    xp = namespace(means)
    means = as_float64(means)
    origin = xp.mean(means, axis=0)
    centred = means - origin
    host = to_numpy(means)

    def exact(rows: npt.NDArray[Any], k: npt.NDArray[Any]) -> npt.NDArray[Any]:
        apart = rows - host[k]
        scores: npt.NDArray[Any] = -np.sum(apart * apart, axis=1)
        return scores

    return Rule(
        weight=xp.astype(centred, dtype or xp.float32),
        bias=-0.5 * xp.sum(centred * centred, axis=1),
        origin=origin,
        classes=_ids(means, classes),
        exact=exact,
    )


def linear_rule(
    weight: Array, bias: Array | None = None, origin: Array | None = None, *, dtype: Any = None
) -> Rule:
    """Make the rule of a linear classifier, ``argmax(W x + b)`` over all its rows.

    Parameters
    ----------
    weight : array (K, D)
        Classifier rows W.
    bias : array (K,), optional
        b; zeros by default.
    origin : array (D,), optional
        A point near the features, such as their mean, around which products run.
    dtype : optional
        Dtype of the products; float32 by default, which near-ties do not depend on.
    """
    xp = namespace(weight)
    n_classes, n_features = weight.shape
    place = {"device": device(weight)}
    if origin is None:
        origin = xp.zeros((n_features,), dtype=xp.float64, **place)
    offsets = xp.zeros((n_classes,), dtype=xp.float64, **place)
    if bias is not None:
        offsets = offsets + as_float64(bias)
    host_w, host_b = to_numpy(weight), to_numpy(offsets).copy()
    for part in row_blocks(n_classes):
        products = xp.matmul(as_float64(weight[part, :]), origin[:, None])
        offsets[part] = offsets[part] + products[:, 0]

    def exact(rows: npt.NDArray[Any], k: npt.NDArray[Any]) -> npt.NDArray[Any]:
        products = rows * host_w[k].astype(np.float64)
        scores: npt.NDArray[Any] = np.sum(products, axis=1) + host_b[k]
        return scores

    return Rule(
        weight=xp.astype(weight, dtype or xp.float32),
        bias=offsets,
        origin=origin,
        classes=_ids(weight, None),
        exact=exact,
    )


def _ids(rows: Array, classes: Array | None) -> Array:
    xp = namespace(rows)
    if classes is None:
        return xp.arange(rows.shape[0], dtype=xp.int64, device=device(rows))
    return xp.asarray(classes, dtype=xp.int64, device=device(rows))
