"""What the moments of a dump take on a disk, and whether that is free."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from dask.utils import format_bytes

from ncbatch.errors import OutputError
from ncbatch.stats import MomentsAccumulator
from ncbatch.store import FeatureStore
from ncbatch.store.opening import is_remote


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


def _bytes_under(folder: Path) -> int:
    total = 0
    for file in folder.rglob("*"):
        with suppress(FileNotFoundError):  # another process may be writing
            total += file.stat().st_size
    return total
