"""Row streams: files of arrays, or globs of shards of them, read in order without holding them."""

from __future__ import annotations

import glob
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr

from ncbatch.errors import DataError, unknown_name

_READ_BYTES = 32 * 2**20
Blocks = Iterator[npt.NDArray[Any]]


@dataclass(frozen=True)
class Shard:
    """One array of rows in a file.

    Attributes
    ----------
    path : str
        Where it is, as named by the user.
    shape : tuple of int
        Its shape; the first axis counts rows.
    dtype : numpy.dtype
        Its dtype.
    blocks : callable
        ``blocks(n)`` reads the rows in order, at most n at a time.
    """

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    blocks: Callable[[int], Blocks]


@dataclass(frozen=True)
class RowStream:
    """The rows of one or several shards, in order.

    Attributes
    ----------
    what : str
        What they are, for messages: ``features``, ``labels``.
    shards : tuple of Shard
        In natural order of their names.
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
    def shape(self) -> str:
        """Shape of the whole, for messages."""
        return str((self.n_rows, *self.row_shape))

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype that holds the values of every shard."""
        return np.result_type(*(shard.dtype for shard in self.shards))

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
        ``x.npy``, ``x.npz`` or ``x.npz:key``, the path of a Zarr array, or a glob of them.
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
        When an ``.npz`` has no member of that name.
    """
    path, key = _split_key(source)
    paths = [path] if Path(path).exists() else sorted(glob.glob(path), key=_natural)
    if not paths:
        raise DataError(f"no {what} at '{source}'", "an existing file, or a glob of shards")
    shards = tuple(_open_shard(found, key, what) for found in paths)
    widths = {shard.shape[1:] for shard in shards}
    if len(widths) > 1:
        odd = next(s for s in shards if s.shape[1:] != shards[0].shape[1:])
        raise DataError(
            f"shard '{odd.path}' with rows of shape {odd.shape[1:]}",
            f"{shards[0].shape[1:]}, as in '{shards[0].path}'",
        )
    return RowStream(what, shards)


def _split_key(source: str) -> tuple[str, str | None]:
    path, colon, key = source.rpartition(":")
    return (path, key) if colon and path.endswith(".npz") else (source, None)


def _natural(path: str) -> list[tuple[int, int | str]]:
    parts = re.split(r"(\d+)", path)
    return [(1, int(part)) if part.isdecimal() else (0, part) for part in parts]


@contextmanager
def _readable(path: str, what: str) -> Iterator[None]:
    """Turn what libraries raise for damaged files into an error of one line."""
    try:
        yield
    except DataError:
        raise
    except (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{what} '{path}' cannot be read: {reason}", "an intact file") from error


def _intact(shard: Shard, what: str, n: int) -> Blocks:
    """Read a shard block by block; damage is named."""
    blocks = shard.blocks(n)
    while True:
        with _readable(shard.path, what):
            block = next(blocks, None)
        if block is None:
            return
        yield block


def _open_shard(path: str, key: str | None, what: str) -> Shard:
    place = Path(path)
    with _readable(path, what):
        if place.is_dir():
            return _open_zarr(path, what)
        if place.suffix == ".npy":
            return _open_npy(path)
        if place.suffix == ".npz":
            return _open_npz(path, key, what)
    raise DataError(
        f"{what} '{path}' of an unknown kind",
        "a .npy file, a .npz file (path.npz:key) or a Zarr array",
    )


def _checked(path: str, shape: Sequence[int], dtype: np.dtype[Any]) -> None:
    if not len(shape):
        raise DataError(f"'{path}' holds a single value", "an array of rows")
    if dtype.kind not in "fiuV" or (dtype.kind == "V" and dtype.name != "bfloat16"):
        raise DataError(
            f"'{path}' holds values of type {dtype}",
            "numbers",
            "bfloat16 saved by numpy loses its name: save it as float32, or as a Zarr array"
            if dtype.kind == "V"
            else "",
        )


def _open_npy(path: str) -> Shard:
    with open(path, "rb") as file:  # np.load would take what is no array for a pickle
        shape, _, dtype = _npy_header(file)
    _checked(path, shape, dtype)
    array = np.load(path, mmap_mode="r", allow_pickle=False)

    def blocks(n: int) -> Blocks:
        for start in range(0, array.shape[0], n):
            # A fresh map per block lets the pages of earlier ones go.
            yield np.array(np.load(path, mmap_mode="r", allow_pickle=False)[start : start + n])

    return Shard(path, array.shape, array.dtype, blocks)


def _open_npz(path: str, key: str | None, what: str) -> Shard:
    with zipfile.ZipFile(path) as archive:
        members = [n.removesuffix(".npy") for n in archive.namelist() if n.endswith(".npy")]
        if not members:
            raise DataError(f"'{path}' holds no array", "an archive made by numpy.savez")
        if key is None:
            if len(members) != 1:
                raise DataError(
                    f"'{path}' holds arrays {', '.join(members)}",
                    "one of them to be named",
                    f"write '{path}:{members[0]}'",
                )
            key = members[0]
        if key not in members:
            raise unknown_name("array", key, members, f"'{path}'")
        with archive.open(f"{key}.npy") as file:
            shape, fortran, dtype = _npy_header(file)
    _checked(path, shape, dtype)
    if fortran and len(shape) > 1:
        raise DataError(
            f"'{path}:{key}' is stored by columns", "rows in order", "save it as .npy, or by rows"
        )

    def blocks(n: int) -> Blocks:
        width = int(np.prod(shape[1:], dtype=np.int64)) * dtype.itemsize
        with zipfile.ZipFile(path) as archive, archive.open(f"{key}.npy") as file:
            _npy_header(file)
            for start in range(0, shape[0], n):
                rows = min(n, shape[0] - start)
                data = file.read(rows * width)
                if len(data) != rows * width:
                    raise DataError(f"'{path}:{key}' ends in row {start}", f"{shape[0]} rows")
                yield np.frombuffer(data, dtype).reshape(rows, *shape[1:])

    return Shard(f"{path}:{key}", shape, dtype, blocks)


def _npy_header(file: Any) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    return np.lib.format.read_array_header_2_0(file)


def _open_zarr(path: str, what: str) -> Shard:
    try:
        node = zarr.open(path, mode="r")
    except (FileNotFoundError, KeyError) as error:
        raise DataError(f"{what} '{path}' is a folder", "a file, or a Zarr array") from error
    if isinstance(node, zarr.Group):
        arrays = [name for name, _ in node.arrays()]
        raise DataError(
            f"'{path}' is a Zarr group" + (f" of arrays {', '.join(arrays)}" if arrays else ""),
            f"a Zarr array of {what}",
            f"write '{path}/{arrays[0]}'" if arrays else "",
        )
    array = node
    dtype = np.dtype(array.dtype)
    _checked(path, array.shape, dtype)

    def blocks(n: int) -> Blocks:
        # Whole chunks, so that none is decoded twice.
        rows = max(n // array.chunks[0], 1) * array.chunks[0]
        for start in range(0, array.shape[0], rows):
            block = np.asarray(array[start : start + rows])
            for part in range(0, len(block), n):
                yield block[part : part + n]

    return Shard(path, tuple(array.shape), dtype, blocks)
