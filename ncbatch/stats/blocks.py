"""Blocks of labelled samples, as states take them."""

from __future__ import annotations

from ncbatch.arrays import Array, namespace
from ncbatch.errors import DataError


def check_block(features: Array, labels: Array, n_classes: int) -> tuple[Array, Array]:
    """Check a block's shapes and labels and drop rows that are no samples.

    Raises
    ------
    DataError
        When shapes do not fit or a label is not below `n_classes`; names the row.
    """
    if len(features.shape) != 2 or tuple(labels.shape) != (features.shape[0],):
        raise DataError(
            f"features {tuple(features.shape)} with labels {tuple(labels.shape)}",
            "features (N, D) with labels (N,)",
        )
    xp = namespace(features, labels)
    labels = xp.astype(labels, xp.int64, copy=False)
    if labels.shape[0] and int(xp.max(labels)) >= n_classes:
        row = int(xp.argmax(labels))
        raise DataError(
            f"label {int(labels[row])} in row {row}", f"labels below {n_classes}, the classes"
        )
    samples = labels >= 0
    if bool(xp.all(samples)):
        return features, labels
    return features[samples], labels[samples]
