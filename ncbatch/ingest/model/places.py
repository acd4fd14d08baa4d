"""Where in a model, and which rows of a batch: what a dump captures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from ncbatch.arrays.namespace import to_numpy
from ncbatch.errors import DataError, UsageError, unknown_name
from ncbatch.store.format import check_name

if TYPE_CHECKING:
    import torch


Pool: TypeAlias = Literal["flatten", "mean"]

_INPUT = ":input"


@dataclass(frozen=True)
class Place:
    """The output of the module at `path`, or its input."""

    path: str
    of_input: bool = False

    @classmethod
    def parse(cls, spec: str) -> Place:
        """Read ``path`` or ``path:input``."""
        return cls(spec.removesuffix(_INPUT), spec.endswith(_INPUT))

    def __str__(self) -> str:
        return self.path + _INPUT * self.of_input


def find_places(
    model: torch.nn.Module, layers: str | Sequence[str] | Mapping[str, str]
) -> dict[str, Place]:
    """Look up where to capture, by stored name.

    Raises
    ------
    UnknownNameError
        For a module that the model does not have, with the nearest that it has.
    UsageError
        When there is nothing to capture, or a name cannot be stored.
    """
    if isinstance(layers, str):
        layers = [layers]
    specs = layers if isinstance(layers, Mapping) else {spec: spec for spec in layers}
    if not specs:
        raise UsageError("no layer to capture", "at least one module of the model")
    places = {name: Place.parse(spec) for name, spec in specs.items()}
    for name, place in places.items():
        check_name("layer", name)
        find_module(model, place.path)
    return places


def find_module(model: torch.nn.Module, path: str) -> torch.nn.Module:
    """Look up the module at `path`; the error names the nearest one that exists."""
    modules = dict(model.named_modules())
    if path not in modules:
        raise unknown_name("module", path, filter(None, modules), type(model).__name__)
    return modules[path]


@dataclass(frozen=True)
class Batch:
    """The rows of one batch: which are samples, and which of those were stored before.

    Parameters
    ----------
    shape : tuple of int
        Shape of the labels, (B,) or (B, T): the leading dimensions of every feature.
    positions : array of int or None
        Where the rows to be stored are among all positions, flattened; None for all.
    labels : array of int
        Their labels.
    skipped : array of int
        Labels of the samples left out because they are stored.
    """

    shape: tuple[int, ...]
    positions: npt.NDArray[np.int64] | None
    labels: npt.NDArray[Any]
    skipped: npt.NDArray[Any]
    _copies: dict[Any, torch.Tensor] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(cls, labels: Any, to_skip: int) -> Batch:
        """Find the samples in `labels`, without the first `to_skip`."""
        array = to_numpy(labels) if hasattr(labels, "shape") else np.asarray(labels)
        if array.dtype.kind not in "iu" or array.ndim not in (1, 2):
            raise DataError(
                f"labels of shape {array.shape}, {array.dtype}", "integers, shape (B,) or (B, T)"
            )
        # Positions run over batch and sequence alike; the first samples may be stored already.
        flat = array.reshape(-1)
        samples = np.flatnonzero(flat >= 0)
        kept = samples[to_skip:]
        return cls(
            array.shape,
            None if kept.size == flat.size else kept,  # then nothing is gathered
            flat[kept],
            flat[samples[:to_skip]],
        )

    def rows(self, values: torch.Tensor, pool: Pool, place: Place) -> torch.Tensor:
        """Turn a feature into the rows (n, D) to be stored, never a view of it."""
        pooled = _pooled(values, self.shape, pool, place)
        rows = pooled.reshape(math.prod(self.shape), math.prod(pooled.shape[len(self.shape) :]))
        rows = self.select(rows)
        # A later module may work in place on what was captured.
        shared = rows.untyped_storage().data_ptr() == values.untyped_storage().data_ptr()
        return rows.clone() if shared else rows

    def select(self, rows: torch.Tensor) -> torch.Tensor:
        """Keep the rows to be stored, of one row per position."""
        import torch

        if self.positions is None:
            return rows
        if rows.device not in self._copies:  # once per device, not once per layer
            self._copies[rows.device] = torch.from_numpy(self.positions).to(rows.device)
        return rows.index_select(0, self._copies[rows.device])


def _pooled(values: torch.Tensor, shape: tuple[int, ...], pool: Pool, place: Place) -> torch.Tensor:
    """Average over what is neither a row nor a feature, as `dump` documents it."""
    n = len(shape)
    if tuple(values.shape[:n]) != shape or values.ndim == n:
        raise DataError(
            f"'{place}' has shape {tuple(values.shape)}",
            f"({', '.join(map(str, shape))}, ...), as the labels have shape {shape}",
            "give one label per position (negative where there is none), or capture another module",
        )
    # Sequences have their features last, images and volumes have them second.
    if pool == "flatten" or values.ndim == n + 1:
        return values
    if n == 1 and values.ndim == 3:
        return values.mean(1)
    if n == 1 and values.ndim in (4, 5):
        return values.mean(tuple(range(2, values.ndim)))
    raise DataError(
        f"'{place}' has shape {tuple(values.shape)} for labels of shape {shape}",
        "a shape that can be averaged: (B, T, D), (B, C, H, W) or (B, C, L, H, W) and labels (B,)",
        "use pool='flatten'",
    )
