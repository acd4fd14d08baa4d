"""Where the hidden states of a language model are: its stack of blocks, and its head's input."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ncbatch.errors import DataError
from ncbatch.ingest.language.model import LanguageModel
from ncbatch.ingest.model.capture import capturing
from ncbatch.ingest.model.places import Batch, Place, find_places

if TYPE_CHECKING:
    import torch


logger = logging.getLogger("ncbatch")


@dataclass(frozen=True)
class Blocks:
    """The stack of blocks of a model.

    Attributes
    ----------
    path : str
        Path of the list that holds them.
    n : int
        L, how many; 0 where there is no such list.
    """

    path: str
    n: int

    def depth(self, place: Place) -> float | None:
        """Compute the share of blocks before a place: a block, its input or part of it.

        Examples
        --------
        >>> blocks = Blocks("model.layers", 4)
        >>> [blocks.depth(Place.parse("model.layers." + x)) for x in ("0:input", "0", "3", "3.mlp")]
        [0.0, 0.25, 1.0, 0.75]
        """
        if not place.path.startswith(f"{self.path}."):
            return None
        number, _, part = place.path.removeprefix(f"{self.path}.").partition(".")
        before = int(number) + (not part and not place.of_input)
        return before / self.n


def find_blocks(model: LanguageModel) -> Blocks:
    """Find the stack: of the lists as long as the model is deep, the one with most weights.

    The experts of a block may be as many as there are blocks.
    """
    import torch

    n = getattr(model.config, "num_hidden_layers", None)
    # Architectures name their blocks as they like: h, layer, layers, blocks.
    stacks = {
        path: sum(value.numel() for value in module.parameters())
        for path, module in model.module.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == n
    }
    return Blocks(max(stacks, key=stacks.__getitem__), int(n)) if n and stacks else Blocks("", 0)


def choose_places(model: LanguageModel, layers: Sequence[str] | None) -> dict[str, Place]:
    """Look up the layers asked for; else choose every block, its input and that of the head.

    Parameters
    ----------
    model : LanguageModel
        The model.
    layers : sequence of str or None
        Modules by path, with ``:input`` for what they take.

    Returns
    -------
    dict of str to Place
        By the names that they are stored under.

    Raises
    ------
    UnknownNameError
        For a module that the model does not have, with the nearest that it has.
    DataError
        When there is no stack of blocks and no layer is asked for.
    """
    if layers is not None:
        return find_places(model.module, layers)
    blocks = find_blocks(model)
    if not blocks.n:
        raise DataError(
            f"no list of {getattr(model.config, 'num_hidden_layers', 'several')} blocks in "
            f"{type(model.module).__name__}",
            "",
            "name the modules to store (--layer, layers=)",
        )
    names = [f"{blocks.path}.0:input", *(f"{blocks.path}.{i}" for i in range(blocks.n))]
    if model.head is not None:
        names.append(f"{model.head}:input")
    return find_places(model.module, names)


def probe(
    model: LanguageModel, places: Mapping[str, Place], inputs: Mapping[str, Any], device: Any
) -> tuple[dict[str, int], dict[str, dict[str, Any]]]:
    """Run a few tokens through the model and see what is where.

    Parameters
    ----------
    model : LanguageModel
        The model.
    places : mapping of str to Place
        Its layers by name.
    inputs : mapping of str to array (B, T)
        As the model takes them.
    device : torch.device or str
        Where the model is.

    Returns
    -------
    widths : dict of str to int
        D of every layer.
    notes : dict of str to dict
        ``depth`` and ``hidden_state`` of every layer, as `FeatureStore.layer_notes` has them. The
        index of a hidden state is measured: that which equals the layer bit for bit, None where
        none does.

    Raises
    ------
    DataError
        When a module does not run exactly once, or gives no row per token.
    """
    states: list[tuple[Any, ...]] = []

    def see(_: Any, __: Any, out: Any) -> None:
        states.append(tuple(getattr(out, "hidden_states", None) or ()))

    shape = np.shape(inputs["input_ids"])
    batch = Batch.of(np.zeros(shape, np.int64), 0)
    with capturing(model.module, places) as capture, model.module.register_forward_hook(see):
        rows = capture.run({**inputs, "output_hidden_states": True}, batch, device)
    blocks = find_blocks(model)
    notes: dict[str, dict[str, Any]] = {}
    for name, place in places.items():
        depth = 1.0 if str(place) == f"{model.head}:input" else blocks.depth(place)
        # Blocks that change nothing give several equal states: the nearest to the layer's depth.
        expected = (depth or 0.0) * blocks.n
        index = min(
            _equal_states(rows[name], states[-1]), key=lambda i: abs(i - expected), default=None
        )
        if depth is None and index is not None and blocks.n:
            depth = min(index / blocks.n, 1.0)
        known = {} if depth is None else {"depth": depth}
        notes[name] = {**known, "hidden_state": index}
    return {name: int(values.shape[1]) for name, values in rows.items()}, notes


def _equal_states(rows: torch.Tensor, states: Sequence[torch.Tensor]) -> list[int]:
    """Find the hidden states that equal `rows`, bit for bit."""
    import torch

    flat = [state.reshape(-1, state.shape[-1]) for state in states]
    return [
        i
        for i, state in enumerate(flat)
        if state.dtype == rows.dtype and torch.equal(state.to(rows.device), rows)
    ]
