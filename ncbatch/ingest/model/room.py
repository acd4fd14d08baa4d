"""What folding the layers of a dump takes of memory, known before the first row is folded."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import psutil
from dask.utils import format_bytes

from ncbatch.errors import BudgetError, OutputError
from ncbatch.states.moments import MomentsAccumulator
from ncbatch.states.rules import Rule
from ncbatch.store.feature_store import FeatureStore
from ncbatch.store.format import LayerSpec
from ncbatch.store.place import is_remote

# What a dump takes on a disk, and whether that is free.


_CODE_BYTES = 4  # a label or a prediction


@dataclass(frozen=True)
class Room:
    """What a dump takes on a disk, and what is free there.

    Attributes
    ----------
    folder : str
        A folder of the file system; empty for a store that is not on one.
    n_rows, n_layers, n_features : int
        Rows of all ranks, layers, and the sum of their D.
    dtype : str
        How they are stored.
    n_bytes : int
        What all of it takes.
    there : int
        What of it is there already, or will be deleted first.
    free : int
        What the file system has left.
    """

    folder: str
    n_rows: int
    n_layers: int
    n_features: int
    dtype: str
    n_bytes: int
    there: int
    free: int

    @classmethod
    def needed(
        cls,
        store: FeatureStore | str | os.PathLike[str],
        split: str,
        widths: Mapping[str, int],
        dtype: str,
        n_rows: int,
        overwrite: bool,
    ) -> Room:
        """Add up what `n_rows` of layers of these widths take."""
        where = store.path if isinstance(store, FeatureStore) else os.fspath(store)
        total = sum(widths.values())
        row = LayerSpec(total, dtype).row_bytes + 2 * _CODE_BYTES
        folder, there, free = "", 0, 0
        if not is_remote(where):
            home = Path(where).absolute() / split
            parts = [home] if overwrite else [home / "layers" / name for name in widths]
            there = sum(map(_bytes_under, parts))
            existing = next(place for place in (home, *home.parents) if place.exists())
            folder, free = str(existing), shutil.disk_usage(existing).free
        return cls(folder, n_rows, len(widths), total, dtype, n_rows * row, there, free)

    def __str__(self) -> str:
        text = (
            f"{self.n_rows:,} rows of {self.n_layers} layers, {self.n_features:,} features in all, "
            f"take {format_bytes(self.n_bytes)} as {self.dtype}"
        )
        return text + f"; {format_bytes(self.free)} are free" * bool(self.folder)

    def check(self) -> None:
        """Refuse what does not fit.

        Raises
        ------
        OutputError
            Says what is needed and what is free.
        """
        if self.folder and self.n_bytes - self.there > self.free:
            raise OutputError(
                f"{self} at '{self.folder}'",
                "",
                "take fewer layers (--layer), tokens (--max-tokens) or rows per class "
                "(--per-class-cap), or keep moments only (--moments)",
            )


def _bytes_under(folder: Path) -> int:
    """Add up the files under a folder, which another process may be writing."""
    total = 0
    for place, _, files in os.walk(folder):
        for file in files:
            try:
                total += os.stat(os.path.join(place, file)).st_size
            except FileNotFoundError:
                continue
    return total


# What the moments of a dump take on a disk, and whether that is free.


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
    most = min(n_seen, -(-n_samples // world_size))
    state_bytes = MomentsAccumulator.state_bytes  # a running state; a finished one is smaller
    parts = sum(world_size * state_bytes(most, d, itemsize=4) for d in widths.values())
    largest = state_bytes(n_seen, max(widths.values()), itemsize=4)
    return parts + largest  # which replaces one that is there, or that others are merged into


def check_states_room(
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
    where = store.path if isinstance(store, FeatureStore) else os.fspath(store)
    needed = states_bytes(widths, n_seen, n_samples, world_size)
    text = (
        f"moments of {len(widths)} layers, {min(n_seen, n_samples):,} classes of "
        f"{sum(widths.values()):,} features in all, take at most {format_bytes(needed)}"
    )
    if is_remote(where):
        return text
    home = Path(where).absolute() / split / "states"
    existing = next(place for place in (home, *home.parents) if place.exists())
    free = shutil.disk_usage(existing).free
    text += f"; {format_bytes(free)} are free"
    if needed - sum(_bytes_under(home / name) for name in widths) > free:
        raise OutputError(
            f"{text} at '{existing}'", "",
            "take fewer layers (--layer), in several calls with stores on several disks",
        )  # fmt: skip
    return text


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
