"""Decisions: how often the nearest class mean and the classifier agree, and are right."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from array_api_compat import device, is_numpy_array

from ncbatch.arrays.named_arrays import NamedArrays
from ncbatch.arrays.namespace import Array, namespace, to_numpy
from ncbatch.arrays.segments import Segments, segment_sum
from ncbatch.errors import DataError, UsageError
from ncbatch.states.fold import check_block, check_ids
from ncbatch.states.rules import Rule


@dataclass(frozen=True)
class Decisions(NamedArrays):
    """Per class of the sample: how many samples, and how many of each kind of decision.

    Attributes
    ----------
    samples : array (K,) of int64
        Samples by their true class.
    agreements : array (K,) of int64
        Samples whose nearest class mean is the class that the classifier chose.
    ncc_hits, clf_hits : array (K,) of int64
        Samples whose nearest class mean, and whose classifier decision, is the true class.
    skipped : int
        Rows that were left out, such as those that are not finite.
    """

    samples: Array
    agreements: Array
    ncc_hits: Array
    clf_hits: Array
    skipped: int = 0
    called = "decisions"
    later = frozenset({"skipped"})

    @classmethod
    def zero(cls, n_classes: int, *, xp: Any = np, device: Any = None) -> Decisions:
        """Make the state of no samples, neutral under `merge`."""
        return cls(*(xp.zeros((n_classes,), dtype=xp.int64, device=device) for _ in DECISIONS))

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

        Raises
        ------
        DataError
            When shapes, libraries or devices do not fit, or a label or prediction is no whole
            number below `n_classes`.
        """
        all_labels = labels
        features, labels = check_block(features, labels, n_classes)
        xp = namespace(features)
        if not isinstance(classifier, Rule):
            if classifier.shape != all_labels.shape:
                raise DataError(
                    f"predictions {tuple(classifier.shape)} for labels {tuple(all_labels.shape)}",
                    "one per label",
                )
            # Whatever stands for a row that is no sample.
            decided = xp.where(all_labels >= 0, classifier, xp.zeros_like(classifier))
            classifier = check_ids(decided, n_classes, "prediction")[all_labels >= 0]
        if features.shape[0] == 0:
            return cls.zero(n_classes, xp=xp, device=device(features))
        near = nearest_mean.decide(features)
        # The model's own predictions stand for the classifier where they are stored.
        chosen = classifier.decide(features) if isinstance(classifier, Rule) else classifier
        return cls(
            *_count_by_class(labels, (near == chosen, near == labels, chosen == labels), n_classes)
        )

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
        """Compute the share of samples with one kind of decision.

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
        samples = to_numpy(self.samples)
        hits = to_numpy(getattr(self, kind))
        if indices is not None:
            chosen = to_numpy(indices)
            samples = samples[chosen]
            hits = hits[chosen]
        if samples.sum() == 0:
            return float("nan")
        if weighted:
            return float(hits.sum() / samples.sum())
        seen = samples > 0
        return float((hits[seen] / samples[seen]).mean())


# What a decisions state is stored as.
DECISIONS = ("samples", "agreements", "ncc_hits", "clf_hits")


def _count_by_class(labels: Array, marks: tuple[Array, ...], n_classes: int) -> Iterator[Array]:
    """Count the rows of each class, then those that each of `marks` (N,) is true for."""
    xp = namespace(labels)
    if is_numpy_array(labels):
        yield np.bincount(labels, minlength=n_classes)
        for mark in marks:
            yield np.bincount(labels[mark], minlength=n_classes)
        return
    segments = Segments.of(labels)
    ones = xp.ones(labels.shape, dtype=xp.float64, device=device(labels))
    columns = xp.stack([ones, *(xp.astype(mark, xp.float64) for mark in marks)], axis=1)
    counts = xp.zeros((n_classes, columns.shape[1]), dtype=xp.int64, device=device(labels))
    counts[segments.mask(n_classes)] = xp.astype(segment_sum(columns, segments), xp.int64)
    for column in range(columns.shape[1]):
        yield counts[:, column]
