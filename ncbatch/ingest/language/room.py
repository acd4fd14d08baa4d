"""What a dump takes on a disk, and whether that is free."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dask.utils import format_bytes

from ncbatch.errors import OutputError
from ncbatch.store import FeatureStore
from ncbatch.store.format import LayerSpec
from ncbatch.store.opening import is_remote

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
