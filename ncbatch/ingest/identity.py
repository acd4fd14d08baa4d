"""What a dump was begun with, so that going on with something else is refused."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ncbatch.errors import StoreError

if TYPE_CHECKING:
    import torch

Identity = Mapping[str, str | int]

_VALUES = 64  # of every parameter: all of them change in training


def weights_hash(model: torch.nn.Module) -> str:
    """Hash the names, shapes and first values of all parameters; 12 hexadecimal digits.

    It tells models and checkpoints apart without reading all weights.
    """
    import torch

    digest = hashlib.sha256()
    for name, values in model.named_parameters():
        digest.update(f"{name} {tuple(values.shape)} {values.dtype}".encode())
        if values.device.type != "meta" and values.numel():
            first = values.detach().reshape(-1)[:_VALUES].cpu().contiguous()
            digest.update(first.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]


def check_same(begun: Identity, asked: Identity, named: str) -> None:
    """Refuse to go on with something else than what was begun with.

    Raises
    ------
    StoreError
        Names the first thing that differs; what only one of both says does not count.
    """
    for what, value in asked.items():
        if what in begun and begun[what] != value:
            raise StoreError(
                f"{named} was begun with {what} {begun[what]}",
                f"{value}, as this dump was asked for",
                "go on with the same model, texts and options, or delete the split first (ncbatch delete)",
            )
