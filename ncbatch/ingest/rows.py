"""Row streams: files of arrays, or globs of shards of them, read in order without holding them."""

from __future__ import annotations

import glob
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ncbatch.errors import DataError
from ncbatch.ingest.formats import Blocks, Shard, open_shard, readable
from ncbatch.store.names import natural_key

_READ_BYTES = 32 * 2**20


@dataclass(frozen=True)
class RowStream:
    """The rows of one or several shards, in order.

    Attributes
    ----------
    what : str
        What they are, for messages: ``features``, ``labels``.
    shards : tuple of Shard
        In natural order of their names; the first axis of each counts rows.
    """

    what: str
    shards: tuple[Shard, ...]

    @property
    def n_rows(self) -> int:
        """Rows of all shards."""
        return sum(shard.shape[0] for shard in self.shards)

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of one row."""
        return self.shards[0].shape[1:]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return math.prod(self.row_shape) * self.dtype.itemsize

    @property
    def shape(self) -> str:
        """Shape of the whole, for messages."""
        return str((self.n_rows, *self.row_shape))

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype that holds the values of every shard."""
        return np.result_type(*{shard.dtype for shard in self.shards})

    def row_of(self, row: int) -> str:
        """Name an input row, and its shard where there are several."""
        if len(self.shards) == 1:
            return f"row {row}"
        start = 0
        for shard in self.shards:
            if row < start + shard.shape[0]:
                return f"row {row} (row {row - start} of '{shard.path}')"
            start += shard.shape[0]
        return f"row {row}"

    def batches(self, n: int) -> Blocks:
        """Read all rows in order, exactly `n` at a time but for the last."""
        held: list[npt.NDArray[Any]] = []
        count = 0
        for shard in self.shards:
            for block in _intact(shard, self.what, n):
                held.append(block)
                count += len(block)
                while count >= n:
                    whole = held[0] if len(held) == 1 else np.concatenate(held)
                    yield whole[:n]
                    held, count = [whole[n:]], count - n
        if count:
            yield np.concatenate(held)


def read_rows_of(n_bytes: int) -> int:
    """Choose how many rows of `n_bytes` to read at a time."""
    return max(1, _READ_BYTES // max(n_bytes, 1))


def open_rows(source: str, what: str = "features") -> RowStream:
    """Open a file, or a glob of shards, of rows.

    Parameters
    ----------
    source : str
        ``x.npy``, ``x.safetensors:key`` or another form of ``docs/import.md``, or a glob of them.
    what : str, optional
        What the rows are, for messages.

    Returns
    -------
    RowStream
        The shards, in natural order (``x2`` before ``x10``).

    Raises
    ------
    DataError
        When nothing is there, a file cannot be read, or shards do not fit together.
    UnknownNameError
        When a file has no array of that name.
    """
    return join_shards(open_shards(source, what), what)


def open_shards(source: str, what: str) -> tuple[Shard, ...]:
    """Open the arrays that `source` names, whatever their axes."""
    paths, key = find_paths(source, what)
    try:
        return tuple(open_shard(path, key, what) for path in paths)
    except DataError as error:
        if key is not None or len(paths) == 1:
            raise
        # What to write is the glob, not the file that it found first.
        remedy = error.remedy.replace(f"'{paths[0]}:", f"'{source}:")
        raise DataError(error.found, error.expected, remedy) from error


def join_shards(shards: Iterable[Shard], what: str) -> RowStream:
    """Make one stream of shards whose rows have one shape."""
    found = tuple(shards)
    odd = next((s for s in found if s.shape[1:] != found[0].shape[1:]), None)
    if odd is not None:
        raise DataError(
            f"shard '{odd.path}' with rows of shape {odd.shape[1:]}",
            f"{found[0].shape[1:]}, as in '{found[0].path}'",
        )
    return RowStream(what, found)


def find_paths(source: str, what: str) -> tuple[list[str], str | None]:
    """Part a source into the paths that are there and the name of an array in them.

    Parameters
    ----------
    source : str
        A path or a glob; after a colon the array's name.
    what : str
        What is there, for messages.

    Returns
    -------
    tuple of list of str and str or None
        The paths, in natural order.

    Raises
    ------
    DataError
        When nothing is there.
    """
    colons = [at.start() for at in re.finditer(":", source)]
    for end in [len(source), *colons]:
        path, key = source[:end], source[end + 1 :] or None
        if path and Path(path).exists():
            return [path], key
    for end in [*colons, len(source)]:
        paths = sorted(glob.glob(source[:end]), key=natural_key)
        if paths:
            return paths, source[end + 1 :] or None
    raise DataError(f"no {what} at '{source}'", "an existing file, or a glob of shards")


def _intact(shard: Shard, what: str, n: int) -> Blocks:
    """Read a shard block by block; damage is named."""
    blocks = shard.blocks(n)
    while True:
        with readable(shard.path, what):
            block = next(blocks, None)
        if block is None:
            return
        yield block
