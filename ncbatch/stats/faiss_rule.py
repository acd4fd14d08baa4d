"""The nearest class mean by FAISS: its exact search, with the decisions of the built-in rule."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property
from importlib import import_module
from typing import Any, Literal

import array_api_compat.numpy
import numpy as np
from array_api_compat import is_cupy_array, is_numpy_array, is_torch_array

from ncbatch.arrays import Array, CentredRows, block_rows, namespace, row_blocks
from ncbatch.errors import UsageError
from ncbatch.stats.leading_scores import Leaders
from ncbatch.stats.rule import Rule
from ncbatch.stats.rules import nearest_mean_rule

# Neighbours asked for: as many are decided by float64 distances where they lie close.
_NEIGHBOURS = 4


@dataclass(frozen=True)
class FaissRule(Rule):
    """The rule of the nearest class mean, whose leaders an exact FAISS search finds.

    Attributes
    ----------
    place : {"cpu", "cuda"}
        Where FAISS searches.

    Notes
    -----
    FAISS expands squared distances of float32 rows, ``|x|^2 + |w|^2 - 2 w . x``, so they err by at
    most ``gamma_{D+8} (|x| + |w|)^2``, rounding of x and w included (see `Rule.decide`). Means
    within twice that of the nearest are decided from float64 distances; a row whose last
    neighbour still lies within it is decided by the built-in rule.
    """

    place: Literal["cpu", "cuda"] = "cpu"

    @cached_property
    def _built_in(self) -> Rule:
        return Rule(**_fields_of(self))

    @cached_property
    def _faiss(self) -> Any:
        return _import_faiss(self.place)

    def _leaders(self, rows: Array) -> Leaders:
        kept = min(_NEIGHBOURS, self.weight.shape[0])
        if self.place == "cuda":
            squares, at = self._search_gpu(rows, kept)
        else:
            squares, at = self._faiss.knn(rows, self.weight, kept)
        return Leaders(-0.5 * squares, at)

    def _search_gpu(self, rows: Array, kept: int) -> tuple[Array, Array]:
        if is_numpy_array(rows):
            found: tuple[Array, Array] = self._faiss.knn_gpu(
                self._resources, rows, self.weight, kept
            )
            return found
        # FAISS takes tensors of torch, which share the memory of CuPy's arrays.
        torch = import_module("torch")
        import_module("faiss.contrib.torch_utils")
        tensors = (torch.from_dlpack(rows), torch.from_dlpack(self.weight))
        squares, at = self._faiss.knn_gpu(self._resources, *tensors, kept)
        torch.cuda.current_stream().synchronize()
        xp = namespace(rows)
        return xp.from_dlpack(squares), xp.from_dlpack(at)

    @cached_property
    def _resources(self) -> Any:
        return self._faiss.StandardGpuResources()

    def _error(self, norms: Array) -> Array:
        info = np.finfo(np.float32)
        n_units = (self.weight.shape[1] + 8) * float(info.eps) / 2
        length = norms + self._reach
        underflow = (self.weight.shape[1] + 8) * float(info.smallest_normal)
        return 0.5 * (n_units / (1.0 - n_units)) * length * length + underflow * (1.0 + length)

    def _decide_unlisted(self, features: Array, rows: Array, floor: Array) -> Array:
        return self._built_in.decide(features)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what FAISS holds, which stays in its process."""
        return {k: v for k, v in vars(self).items() if k not in ("_faiss", "_resources")}


def faiss_nearest_rule(
    means: Array,
    classes: Array | None = None,
    device: Literal["cpu", "cuda"] = "cpu",
    **how: Any,
) -> FaissRule:
    """Make the rule that chooses the nearest of the class means, by FAISS.

    Parameters
    ----------
    means : array (C, D) or view
        Class means; a centred float32 copy is held, of means in a file too.
    classes : array (C,) of int64, optional
        Their class ids, ascending; 0..C-1 by default.
    device : {"cpu", "cuda"}, optional
        Where FAISS searches. On the GPU, features and means are NumPy arrays, or CuPy arrays or
        torch tensors of its memory, which need torch.
    **how
        ``sweep_rows``, the rows searched for at a time, and what `nearest_mean_rule` takes.

    Raises
    ------
    UsageError
        When FAISS is not installed, or not for the GPU.
    """
    _import_faiss(device)
    if device == "cpu" and namespace(means) is not array_api_compat.numpy:
        raise UsageError("class means that FAISS on the CPU cannot read", "NumPy arrays")
    if is_cupy_array(means) or is_torch_array(means):
        _import_torch()
    rule = nearest_mean_rule(means, classes, dtype=namespace(means).float32, **how)
    if isinstance(rule.weight, CentredRows):
        rule = replace(rule, weight=_held(rule.weight))
    return FaissRule(**_fields_of(rule), place=device)


def _fields_of(rule: Rule) -> dict[str, Any]:
    return {field.name: getattr(rule, field.name) for field in fields(Rule)}


def _held(rows: CentredRows) -> Array:
    held = np.empty(rows.shape, np.float32)
    for part in row_blocks(rows.shape[0], block_rows(rows.shape[1])):
        held[part] = rows[part]
    return held


def _import_faiss(device: str) -> Any:
    if device not in ("cpu", "cuda"):
        raise UsageError(f"FAISS on '{device}'", "cpu or cuda")
    never_both = "never both in one environment"
    try:
        faiss = import_module("faiss")
    except ImportError as error:
        raise UsageError(
            "FAISS is not installed",
            "faiss for the nearest class mean by FAISS",
            "install it with: pip install 'ncbatch[faiss]', or for a GPU: "
            f"pip install faiss-gpu-cu12; {never_both}",
        ) from error
    if device == "cuda" and not hasattr(faiss, "StandardGpuResources"):
        raise UsageError(
            "FAISS is installed without its GPU part",
            "faiss-gpu-cu12",
            "install it with: pip uninstall faiss-cpu; pip install faiss-gpu-cu12; " + never_both,
        )
    return faiss


def _import_torch() -> None:
    try:
        import_module("torch")
    except ImportError as error:
        raise UsageError(
            "torch is not installed",
            "torch, through which FAISS takes arrays on the GPU",
            "install it with: pip install 'ncbatch[torch]'",
        ) from error
