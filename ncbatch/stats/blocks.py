"""Blocks of labelled samples, as states take them."""

from __future__ import annotations

from array_api_compat import device, is_torch_array

from ncbatch.arrays import Array, namespace
from ncbatch.errors import DataError


def detached(values: Array) -> Array:
    """Give a torch tensor without its history; a state would keep all that it was computed from."""
    return values.detach() if is_torch_array(values) else values


def check_block(features: Array, labels: Array, n_classes: int) -> tuple[Array, Array]:
    """Check a block's shapes and labels and drop rows that are no samples.

    Raises
    ------
    DataError
        When shapes, libraries or devices do not fit, or a label is not below `n_classes`; names the row.
    """
    if len(features.shape) != 2 or tuple(labels.shape) != (features.shape[0],):
        raise DataError(
            f"features {tuple(features.shape)} with labels {tuple(labels.shape)}",
            "features (N, D) with labels (N,)",
        )
    features = detached(features)
    try:
        xp = namespace(features, labels)
    except TypeError as error:
        kinds = " with ".join(
            f"{type(x).__module__}.{type(x).__name__}" for x in (features, labels)
        )
        raise DataError(f"features and labels of {kinds}", "arrays of one library") from error
    if device(features) != device(labels):
        raise DataError(
            f"features on {device(features)} with labels on {device(labels)}", "one device"
        )
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
