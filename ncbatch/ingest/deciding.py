"""Who decides the samples of a layer that is folded: class means of a stored split, and the head."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from ncbatch.arrays import Array, mean_of_rows, to_numpy
from ncbatch.errors import unknown_name
from ncbatch.ingest.head import Head
from ncbatch.stats import Rule, linear_rule, nearest_mean_rule
from ncbatch.store import FeatureStore


@dataclass(frozen=True)
class Decider:
    """Who decides the samples of a layer.

    Attributes
    ----------
    nearest : Rule
        The nearest class mean.
    classifier : Rule or None
        The classifier; None where the model's own decisions are its.
    about : dict
        Which means and which classifier, by the names that stored decisions have.
    """

    nearest: Rule
    classifier: Rule | None
    about: dict[str, Any]


@dataclass(frozen=True)
class Deciding:
    """The layers that can be decided.

    Attributes
    ----------
    store : FeatureStore
        The store.
    means : str
        The split whose moments decide.
    classifiers : dict of str to (weight, bias) or None
        Who classifies; None where the model's own decisions do.
    """

    store: FeatureStore
    means: str
    classifiers: dict[str, tuple[Any, Any] | None]

    @classmethod
    def find(
        cls,
        store: FeatureStore,
        means: str,
        layers: Iterable[str],
        head: Head,
        predicted: str | None,
    ) -> Self:
        """Find who classifies each layer.

        Parameters
        ----------
        store, means
            As the attributes.
        layers : iterable of str
            The layers of the dump.
        head : Head
            The model's head, once it is settled.
        predicted : str or None
            The layer for which the model's own decisions count.

        Raises
        ------
        UnknownNameError
            When no class means of such a layer are stored.
        """
        found: dict[str, tuple[Any, Any] | None] = {}
        k, module = store.n_classes, head.module
        for name in layers:
            if name == predicted:
                found[name] = None
            elif name == head.layer and module is not None:
                # Not from the store: of several ranks one stores it, perhaps later.
                bias = None if head.bias is None else to_numpy(head.bias[:k])
                found[name] = (to_numpy(module.weight[:k]), bias)
            elif (stored := store.classifier(name)) is not None:
                found[name] = stored
        known = store.state_layers(means, "moments")
        for name in found:
            if name not in known:
                raise unknown_name("layer", name, known, f"the moments of split '{means}'")
        return cls(store, means, found)

    def n_rows(self, name: str) -> tuple[int, int]:
        """Give the class means and the rows of a classifier that decide a layer; 0 for none."""
        arrays = self.store.state_arrays(self.means, name, "moments") or {}
        given = self.classifiers[name]
        return int(arrays["class"].shape[0]), 0 if given is None else len(given[0])

    def decider(self, name: str, like: Array, operand_roundoff: float) -> Decider:
        """Make the rules of a layer.

        Parameters
        ----------
        name : str
            The layer.
        like : array
            An array of the library, device and dtype of the features.
        operand_roundoff : float
            As for `Rule`.
        """
        arrays, _ = self.store.state(self.means, name, "moments") or ({}, {})
        how: Any = {"dtype": like.dtype, "operand_roundoff": operand_roundoff}
        means = beside(like, arrays["mean"])
        nearest = nearest_mean_rule(means, beside(like, arrays["class"]), **how)
        classifier = None
        given = self.classifiers[name]
        if given is not None:
            weight, bias = (None if part is None else beside(like, part) for part in given)
            classifier = linear_rule(weight, bias, mean_of_rows(means), **how)
        return Decider(nearest, classifier, self._about(name))

    def _about(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = {
            "means_split": self.means,
            "means_fingerprint": self.store.state_fingerprint(self.means, name, "moments"),
        }
        if name in self.store.classifiers:
            found["classifier_fingerprint"] = self.store.classifier_fingerprint(name)
        return found


def beside(like: Array, values: Any) -> Array:
    """Bring an array of the host to the library and device of another array."""
    if hasattr(like, "untyped_storage"):
        import torch

        return torch.as_tensor(values, device=like.device)
    return values


class BatchLabels:
    """Labels of a batch, brought to every device of its features once."""

    def __init__(self, values: npt.NDArray[np.int64]) -> None:
        self.values = values
        self._copies: dict[Any, Array] = {}

    def beside(self, rows: Array) -> Array:
        """Give them in the library and on the device of `rows`."""
        place = (type(rows), getattr(rows, "device", None))
        if place not in self._copies:
            self._copies[place] = beside(rows, self.values)
        return self._copies[place]


def float32_roundoff() -> float:
    """Give the unit of rounding of the operands of torch's float32 products on a GPU."""
    import torch

    return {"highest": 0.0, "high": 2.0**-11}.get(torch.get_float32_matmul_precision(), 2.0**-8)
