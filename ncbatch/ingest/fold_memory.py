"""What folding the layers of a dump takes of memory, known before the first row is folded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import psutil

from ncbatch.engine import format_bytes
from ncbatch.errors import BudgetError
from ncbatch.stats import MomentsAccumulator, Rule


@dataclass(frozen=True)
class FoldPrice:
    """Bytes that folding one layer takes.

    Attributes
    ----------
    held : int
        From the first row to the last: running state, class means, classifier.
    passing : int
        Beside them while a block is folded or a state is stored; one layer at a time, in memory
        that all share.
    """

    held: int
    passing: int

    @classmethod
    def of(
        cls,
        n_classes: int,
        n_features: int,
        n_rows: int,
        *,
        n_samples: int | None,
        wide: bool,
        moments: bool,
        n_means: int,
        n_weights: int,
    ) -> Self:
        """Price a layer.

        Parameters
        ----------
        n_classes, n_features, n_rows : int
            Classes with samples at most, D, and the rows of a batch.
        n_samples : int or None
            Samples at most, where known.
        wide : bool
            Whether features are float64.
        moments : bool
            Whether moments are folded.
        n_means, n_weights : int
            Class means that decide, and rows of a classifier that does; 0 for none.
        """
        held = passing = 0
        itemsize = 8 if wide else 4
        if moments:
            held = MomentsAccumulator.state_bytes(n_classes, n_features, itemsize=itemsize)
            peak = MomentsAccumulator.peak_bytes(
                n_classes, n_features, n_rows, scatter=True, n_rows=n_samples, itemsize=itemsize
            )
            # `held` again: the rows of the classes seen are copied when a state is stored.
            passing = max(peak - held, held + MomentsAccumulator.scratch_bytes(n_features))
            passing += n_rows * n_features * itemsize  # rows, brought here and to this dtype
        for n in (n_means, n_weights):
            if n:  # what is given in float64, and what the rule makes of it
                rule = Rule.peak_bytes(n, n_features, n_rows, itemsize)
                lasting = n * (24 + n_features * itemsize)
                held += n * n_features * 8 + lasting
                passing = max(passing, rule - lasting)
        return cls(held, passing)


def choose_place(prices: Mapping[str, FoldPrice], devices: Mapping[str, Any]) -> bool:
    """Say whether layers are folded on the host, and not on the GPUs where the features are.

    On GPUs they are folded where all fit beside the model.

    Parameters
    ----------
    prices : mapping of str to FoldPrice
        Of every layer.
    devices : mapping of str to torch.device
        Where the features of every layer are.

    Raises
    ------
    BudgetError
        When they fit nowhere; names what is needed and how many layers fit.
    """
    needed = _needed(list(prices.values()))
    if all(map(_fits_on, *_by_device(prices, devices))):
        return False
    free = int(psutil.virtual_memory().available)
    if needed <= free:
        return True
    ordered = sorted(prices.values(), key=lambda price: price.held)
    fitting = 0
    while _needed(ordered[: fitting + 1]) <= free:
        fitting += 1
    remedy = f"fold fewer layers in a call: {fitting} fit; others can be added to the split by further calls"
    if not fitting:
        remedy = "give n_samples= if there are fewer samples than classes, or store the rows (moments=False) and measure those"
    raise BudgetError(
        f"the moments of {len(prices)} layers need {format_bytes(needed)}",
        f"at most {format_bytes(free)}, the memory that is left beside the model",
        remedy,
    )


def _needed(prices: list[FoldPrice]) -> int:
    passing = max((price.passing for price in prices), default=0)
    return sum(price.held for price in prices) + passing


def _by_device(
    prices: Mapping[str, FoldPrice], devices: Mapping[str, Any]
) -> tuple[list[Any], list[list[FoldPrice]]]:
    found = list(dict.fromkeys(devices.values()))
    return found, [[p for name, p in prices.items() if devices[name] == d] for d in found]


def _fits_on(device: Any, prices: list[FoldPrice]) -> bool:
    return device.type == "cuda" and _needed(prices) <= _free_on(device)


def _free_on(device: Any) -> int:
    """Count the free bytes of a GPU, those that torch keeps for reuse included."""
    import torch

    free, _ = torch.cuda.mem_get_info(device)
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(free + kept)
