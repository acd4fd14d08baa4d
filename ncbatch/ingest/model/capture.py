"""Running a model with hooks in place, and leaving it as it was."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from ncbatch.errors import DataError
from ncbatch.ingest.model.head import Head
from ncbatch.ingest.model.places import Batch, Place, Pool
from ncbatch.store.format import DTYPES

if TYPE_CHECKING:
    import torch


Receive: TypeAlias = "Callable[[str, torch.Tensor], Any]"


@dataclasses.dataclass(eq=False)
class Capture:
    """Runs a model with hooks in place and returns the rows they took; made by `capturing`."""

    head: Head
    _model: torch.nn.Module
    _places: Mapping[str, Place]
    _pool: Pool
    # Of the pass that runs: the rows wanted, who takes them, what was taken, who ran how often.
    _batch: Batch | None = None
    _receive: Receive | None = None
    _rows: dict[str, Any] = dataclasses.field(default_factory=dict)
    _calls: Counter[str] = dataclasses.field(default_factory=Counter)

    def attach(self, hooks: ExitStack) -> None:
        """Register the hooks; they go when `hooks` is closed."""
        for name, place in self._places.items():
            module = self._model.get_submodule(place.path)
            # With keywords: blocks of transformers are called by those.
            register = module.register_forward_hook
            if place.of_input:
                register = module.register_forward_pre_hook
            hooks.callback(register(partial(self._take, name), with_kwargs=True).remove)
        for order, module in enumerate(self.head.candidates.values()):
            handle = module.register_forward_hook(partial(self._see, order), with_kwargs=True)
            hooks.callback(handle.remove)

    def run(
        self, inputs: Any, batch: Batch, device: Any, receive: Receive | None = None
    ) -> dict[str, Any]:
        """Run the model on one batch.

        Parameters
        ----------
        inputs : tensor, sequence or mapping
            As the model takes them.
        batch : Batch
            Which rows are wanted.
        device : torch.device or str
            Where inputs are moved to.
        receive : callable, optional
            Given the name and the rows of each layer while the model still runs; what it returns
            is kept in their place.

        Returns
        -------
        dict of str to tensor (n, D)
            Rows of every layer, on the module's device and in its dtype; or what `receive` made
            of them.

        Raises
        ------
        DataError
            When a module did not run exactly once.
        """
        import torch

        self._batch = batch
        self._receive = receive
        self._calls.clear()
        self.head.calls = 0
        self.head.decisions = None
        args, kwargs = _arguments(inputs, device)
        try:
            # Not inference_mode: what a module keeps from this pass must serve in training too.
            with torch.no_grad():
                self._model(*args, **kwargs)
        finally:
            self._batch = None
        for name, place in self._places.items():
            _check_once(f"module '{place.path}'", self._calls[name])
        # Of a head that was guessed nothing may be wanted: then it may run as it likes.
        if self.head.named or (self.head.needed and self.head.path is not None):
            _check_once(f"head '{self.head.path}'", self.head.calls)
        rows = {name: self._rows[name] for name in self._places}
        self._rows = {}  # or they would be held until the next pass has made as many
        return rows

    def _take(self, name: str, _: torch.nn.Module, *passed: Any) -> None:
        place = self._places[name]
        self._calls[name] += 1
        # Of a second call nothing is kept, it is only counted: `run` refuses it.
        if self._batch is None or self._calls[name] > 1:
            return
        # Hooks are told (args, kwargs) before the module runs, and its output too afterwards.
        tensor = _first_tensor(passed if place.of_input else passed[2])
        if tensor is None:
            raise DataError(f"'{place}' holds no tensor", "a tensor, or a tuple of tensors")
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype not in DTYPES:  # token ids and masks are tensors too, and no features
            raise DataError(f"'{place}' has dtype {dtype}", "one of: " + ", ".join(DTYPES))
        rows = self._batch.rows(tensor, self._pool, place)
        self._rows[name] = rows if self._receive is None else self._receive(name, rows)

    def _see(self, order: int, _: torch.nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        if self._batch is not None:
            self.head.see(order, self._batch, _first_tensor((args, kwargs)), _first_tensor(out))


@contextmanager
def capturing(
    model: torch.nn.Module,
    places: Mapping[str, Place],
    pool: Pool = "flatten",
    head: Head | None = None,
) -> Iterator[Capture]:
    """Hold a model in eval mode with hooks; afterwards it is as it was, module by module."""
    capture = Capture(head or Head({}), model, places, pool)
    with ExitStack() as undo:
        # model.train() would set every module alike: a frozen batch norm would wake up.
        for module in model.modules():
            undo.callback(setattr, module, "training", module.training)
        # Dropout would make features random, and batch norm would learn from the dump.
        model.eval()
        capture.attach(undo)
        yield capture


def device_of(model: torch.nn.Module) -> torch.device | str:
    """Return the device of a model's parameters, or of its buffers; the CPU without any."""
    first = next(chain(model.parameters(), model.buffers()), None)
    return "cpu" if first is None else first.device


def _arguments(inputs: Any, device: Any) -> tuple[list[Any], dict[str, Any]]:
    """Move inputs to `device`, and sort them by how the model takes them."""
    import torch

    def move(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            value = torch.as_tensor(value)
        return value.to(device) if isinstance(value, torch.Tensor) else value

    if isinstance(inputs, Mapping):
        return [], {name: move(value) for name, value in inputs.items()}
    several = isinstance(inputs, tuple | list)
    return [move(value) for value in (inputs if several else [inputs])], {}


def _first_tensor(value: Any) -> torch.Tensor | None:
    """Find the first tensor in nested tuples, lists, mappings and dataclasses."""
    # Of what a block returns the hidden states come first; caches and attention follow.
    import torch

    if isinstance(value, torch.Tensor):
        return value
    parts: Any = ()
    if isinstance(value, Mapping):
        parts = value.values()
    elif isinstance(value, tuple | list):
        parts = value
    elif dataclasses.is_dataclass(value):
        parts = [getattr(value, field.name) for field in dataclasses.fields(value)]
    return next((t for t in map(_first_tensor, parts) if t is not None), None)


def _check_once(what: str, calls: int) -> None:
    if calls == 1:
        return
    often = "did not run" if calls == 0 else f"ran {calls} times"
    raise DataError(
        f"{what} {often} in a forward pass",
        "once",
        "name a module that runs once, such as the one around it",
    )
