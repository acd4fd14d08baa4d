"""The room that a dump takes on a disk and in memory, known before the first row is kept."""

from __future__ import annotations

import os
import shutil
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

import psutil
from dask.utils import format_bytes

from ncbatch.errors import BudgetError, OutputError
from ncbatch.states.moments import MomentsAccumulator
from ncbatch.states.rules import Rule
from ncbatch.store.feature_store import FeatureStore
from ncbatch.store.format import LayerSpec
from ncbatch.store.place import is_remote

if TYPE_CHECKING:
    import torch


_CODE_BYTES = 4  # a label or a prediction


def rows_room(
    store: FeatureStore | str | os.PathLike[str],
    split: str,
    widths: Mapping[str, int],
    dtype: str,
    n_rows: int,
    overwrite: bool,
) -> str:
    """Say what the rows of a dump take, those of all ranks.

    Raises
    ------
    OutputError
        When that is not free; says what is needed and what is free.
    """
    n_features = sum(widths.values())
    needed = n_rows * (LayerSpec(n_features, dtype).row_bytes + 2 * _CODE_BYTES)
    return _check_free(
        store,
        needed,
        f"{n_rows:,} rows of {len(widths)} layers, {n_features:,} features in all, "
        f"take {format_bytes(needed)} as {dtype}",
        # Of an interrupted dump some are there already; what is replaced is deleted first.
        [split] if overwrite else [f"{split}/layers/{name}" for name in widths],
        "take fewer layers (--layer), tokens (--max-tokens) or rows per class "
        "(--per-class-cap), or keep moments only (--moments)",
    )


def states_bytes(widths: Mapping[str, int], n_seen: int, n_samples: int, world_size: int) -> int:
    """Price the states of a dump at its largest, running states and those replaced included.

    Parameters
    ----------
    widths : mapping of str to int
        D of every layer.
    n_seen, n_samples : int
        Classes with samples, and samples, at most; of all ranks.
    world_size : int
        How many ranks store a part each, until the last one merges them.
    """
    # Each rank sees its share of the samples, and no more classes than samples.
    most = min(n_seen, -(-n_samples // world_size))
    state_bytes = MomentsAccumulator.state_bytes  # a running state; a finished one is smaller
    parts = sum(world_size * state_bytes(most, d, itemsize=4) for d in widths.values())
    largest = state_bytes(n_seen, max(widths.values()), itemsize=4)
    return parts + largest  # which replaces one that is there, or that others are merged into


def states_room(
    store: FeatureStore | str | os.PathLike[str],
    split: str,
    widths: Mapping[str, int],
    n_seen: int,
    n_samples: int,
    world_size: int,
) -> str:
    """Say what the states of a dump take; the parameters after `split` are those of `states_bytes`.

    Raises
    ------
    OutputError
        When that is not free; says what is needed and what is free.
    """
    needed = states_bytes(widths, n_seen, n_samples, world_size)
    return _check_free(
        store,
        needed,
        f"moments of {len(widths)} layers, {min(n_seen, n_samples):,} classes of "
        f"{sum(widths.values()):,} features in all, take at most {format_bytes(needed)}",
        [f"{split}/states/{name}" for name in widths],
        "take fewer layers (--layer), in several calls with stores on several disks",
    )


def _check_free(
    store: FeatureStore | str | os.PathLike[str],
    needed: int,
    text: str,
    reused: Iterable[str],
    remedy: str,
) -> str:
    """Complete `text` by what is free; the folders `reused` of the store count as free too."""
    where = store.path if isinstance(store, FeatureStore) else os.fspath(store)
    if is_remote(where):  # object stores do not tell
        return text
    home = Path(where).absolute()
    existing = next(folder for folder in (home, *home.parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    text += f"; {format_bytes(free)} are free"
    if needed - sum(_bytes_under(home / folder) for folder in reused) > free:
        raise OutputError(f"{text} at '{existing}'", "", remedy)
    return text


def _bytes_under(folder: Path) -> int:
    total = 0
    for place, _, files in os.walk(folder):
        for file in files:
            with suppress(FileNotFoundError):  # another process may be writing
                total += os.path.getsize(os.path.join(place, file))
    return total


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
        batch: Sequence[int],
        *,
        itemsize: int,
        n_samples: int | None,
        moments: bool,
        decided_by: Iterable[int] = (),
    ) -> Self:
        """Price a layer.

        Parameters
        ----------
        n_classes : int
            K.
        batch : (int, int)
            Rows of a batch, and D.
        itemsize : int
            Bytes of a feature as it is folded, 4 or 8.
        n_samples : int or None
            Samples at most, where known.
        moments : bool
            Whether moments are folded.
        decided_by : iterable of int, optional
            Class means that decide, and rows of a classifier that does; 0 for none.
        """
        n_rows, n_features = batch
        held = passing = 0
        if moments:
            if n_samples is not None:  # there are no more classes with samples than samples
                n_classes = min(n_classes, max(n_samples, 1))
            held = MomentsAccumulator.state_bytes(n_classes, n_features, itemsize=itemsize)
            peak = MomentsAccumulator.peak_bytes(
                n_classes, n_features, n_rows, scatter=True, n_rows=n_samples, itemsize=itemsize
            )
            # `held` again: the rows of the classes seen are copied when a state is stored.
            passing = max(peak - held, held + MomentsAccumulator.scratch_bytes(n_features))
            passing += n_rows * n_features * itemsize  # rows, brought here and to this dtype
        for n in decided_by:
            if n:  # what is given in float64, and what the rule makes of it
                rule = Rule.peak_bytes(n, n_features, n_rows, itemsize)
                lasting = n * (24 + n_features * itemsize)
                held += n * n_features * 8 + lasting
                passing = max(passing, rule - lasting)
        return cls(held, passing)


def choose_place(prices: Mapping[str, FoldPrice], devices: Mapping[str, torch.device]) -> bool:
    """Decide whether layers are folded on the host, and not on the GPUs where the features are.

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
    by_device: dict[torch.device, list[FoldPrice]] = defaultdict(list)
    for name, price in prices.items():
        by_device[devices[name]].append(price)
    if all(
        device.type == "cuda" and _sum(group) <= _free_on(device)
        for device, group in by_device.items()
    ):
        return False
    needed = _sum(prices.values())
    free = int(psutil.virtual_memory().available)
    if needed <= free:
        return True
    # The smallest first: as many layers as can be had by leaving others out.
    ordered = sorted(prices.values(), key=lambda price: price.held)
    fitting = sum(_sum(ordered[: n + 1]) <= free for n in range(len(ordered)))
    raise BudgetError(
        f"the moments of {len(prices)} layers need {format_bytes(needed)}",
        f"at most {format_bytes(free)}, the memory that is left beside the model",
        f"fold fewer layers in a call: {fitting} fit; others can be added to the split by further "
        "calls"
        if fitting
        else "give n_samples= if there are fewer samples than classes, or store the rows "
        "(moments=False) and measure those",
    )


def _sum(prices: Iterable[FoldPrice]) -> int:
    """Add up what layers hold; what passes, passes one layer at a time."""
    prices = list(prices)
    return sum(price.held for price in prices) + max(price.passing for price in prices)


def _free_on(device: torch.device) -> int:
    import torch

    free, _ = torch.cuda.mem_get_info(device)
    # Memory that torch keeps for reuse is free too.
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(free + kept)
