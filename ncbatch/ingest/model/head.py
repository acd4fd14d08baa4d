"""The linear module that classifies: what it reads and what it decides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal

import numpy.typing as npt

from ncbatch.arrays.namespace import to_numpy
from ncbatch.errors import DataError, UsageError
from ncbatch.ingest.model.places import Batch, Place, find_module

if TYPE_CHECKING:
    import torch


@dataclass(eq=False)
class Head:
    """Watches the linear module that classifies: what it reads and what it decides.

    Without a name it is the last ``torch.nn.Linear`` of the model, in the order of
    ``named_modules``, that runs for the first batch; that batch settles it.

    Parameters
    ----------
    candidates : mapping of str to module
        Linear modules by path, in order.
    n_classes : int, optional
        K: decisions are among the first K outputs.
    named : bool, optional
        Whether the user named it: then it must run.
    decides : bool, optional
        Whether its decisions are needed even if no captured layer is its input.
    outside : tensor, optional
        A bias that the model adds to the outputs of the module named.

    Attributes
    ----------
    layer : str or None
        The captured layer that the head reads, once `settle` has found it.
    decisions : tensor or None
        Its arg-max, one per row of the batch.
    calls : int
        How often it ran in a forward pass.
    """

    candidates: Mapping[str, torch.nn.Linear]
    n_classes: int | None = None
    named: bool = False
    decides: bool = False
    outside: torch.Tensor | None = None
    layer: str | None = field(default=None, init=False)
    decisions: torch.Tensor | None = field(default=None, init=False)
    calls: int = field(default=0, init=False)
    # Of the candidate that is the head, as far as known.
    _order: int = field(default=-1, init=False)
    _settled: bool = field(default=False, init=False)
    _inputs: torch.Tensor | None = field(default=None, init=False)

    @classmethod
    def find(
        cls,
        model: torch.nn.Module,
        head: str | Literal[False] | None,
        n_classes: int | None,
        *,
        decides: bool = False,
        outside: torch.Tensor | None = None,
    ) -> Head:
        """Look up the head, or everything that may be it.

        Raises
        ------
        DataError
            When the module named is not linear or has fewer outputs than classes.
        UsageError
            When decisions are needed and there shall be no head.
        """
        import torch

        if head is False:
            if decides:
                raise UsageError("argmax_labels with head=False", "the module that decides")
            return cls({}, n_classes)
        if head is None:
            linear = {p: m for p, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
            return cls(linear, n_classes, decides=decides)
        module = find_module(model, head)
        if not isinstance(module, torch.nn.Linear):
            raise DataError(f"head '{head}' is a {type(module).__name__}", "a torch.nn.Linear")
        if outside is not None and tuple(outside.shape) != (module.out_features,):
            raise DataError(
                f"a bias of shape {tuple(outside.shape)} for head '{head}'",
                f"({module.out_features},), one per output",
            )
        watch = cls({head: module}, n_classes, named=True, decides=decides, outside=outside)
        watch._order = 0
        watch.check_outputs(n_classes)
        return watch

    @property
    def path(self) -> str | None:
        """Path of the module; None as long as none has run."""
        return None if self._order < 0 else list(self.candidates)[self._order]

    @property
    def module(self) -> torch.nn.Linear | None:
        """The module; None as long as none has run."""
        return None if self.path is None else self.candidates[self.path]

    @property
    def needed(self) -> bool:
        """Whether what it decides is kept, so that it must run once in every pass."""
        return self.decides or self.layer is not None

    def classifier(self, n_classes: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any] | None]:
        """Return weight and bias of the first K outputs, on the host.

        The bias is what is added inside the module and outside of it; None without any.
        """
        assert self.module is not None
        bias = self.module.bias
        if self.outside is not None:
            bias = self.outside if bias is None else bias + self.outside.to(bias.device)
        weight = to_numpy(self.module.weight[:n_classes])
        return weight, None if bias is None else to_numpy(bias[:n_classes])

    def check_outputs(self, n_classes: int | None) -> None:
        """Refuse a head that has fewer outputs than there are classes."""
        if self.module is not None and self.module.out_features < (n_classes or 0):
            raise DataError(
                f"head '{self.path}' has {self.module.out_features} outputs",
                f"{n_classes} or more, one per class",
                "name the module that classifies with head=, or use head=False",
            )

    def see(
        self, order: int, batch: Batch, inputs: torch.Tensor | None, logits: torch.Tensor | None
    ) -> None:
        """Take note of a call of the candidate number `order`."""
        # The last candidate that runs is the head; once that is settled only its calls matter.
        if order < self._order or (self._settled and order > self._order):
            return
        if order > self._order:
            self._order = order
            self.calls = 0
        self.calls += 1
        if self._settled and not self.needed:
            return
        self.decisions = self._inputs = None
        if inputs is None or logits is None or tuple(logits.shape[:-1]) != batch.shape:
            return  # it classifies something else than the rows
        if self.outside is not None:
            logits = logits + self.outside.to(logits.device)
        # A padded vocabulary has more outputs than there are classes.
        top = logits[..., : self.n_classes].argmax(-1)
        self.decisions = batch.select(top.reshape(-1))
        if not self._settled:
            self._inputs = batch.rows(inputs, "flatten", Place(str(self.path), of_input=True))

    def settle(self, features: Mapping[str, torch.Tensor], places: Mapping[str, Place]) -> None:
        """After the first batch: find the captured layer that equals the head's input."""
        if self.calls == 1 and self._inputs is not None:
            # What was captured as the head's input needs no comparing; of others several may be
            # equal (an activation and the head's input are one tensor).
            place = Place(str(self.path), of_input=True)
            named = (name for name in features if places[name] == place)
            equal = (
                name for name in reversed(list(features)) if _equal(features[name], self._inputs)
            )
            self.layer = next(chain(named, equal), None)
        self._settled = True
        self._inputs = None  # as large as a layer's rows, and not needed any more
        if self.decides and self.decisions is None:
            head = "no torch.nn.Linear ran" if self.path is None else f"head '{self.path}'"
            raise DataError(
                f"{head}: no decisions at the positions of the labels",
                "a linear module with one output row per label, for argmax_labels",
                "name it with head=",
            )


def _equal(rows: torch.Tensor, others: torch.Tensor) -> bool:
    import torch

    same = rows.dtype == others.dtype and rows.device == others.device
    if not same or rows.shape != others.shape:
        return False
    # The first needs no memory; to the second NaN equals NaN.
    same = torch.equal(rows, others) or torch.allclose(rows, others, 0.0, 0.0, equal_nan=True)
    return bool(same)
