"""What is really stored: which chunks exist, their checksums, and reads that name their faults."""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.abc.store import SuffixByteRequest
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync

from ncbatch.errors import CorruptionError

_CHECKSUM_BYTES = 4
_CONCURRENT_REQUESTS = 64


@dataclass(frozen=True)
class Fault:
    """A bad chunk: which file, which rows of the split, and what is wrong with it."""

    file: str
    start: int
    stop: int
    what: str

    def __str__(self) -> str:
        return f"{self.file} (rows {self.start}..{self.stop - 1}): {self.what}"

    def error(self) -> CorruptionError:
        """Make the error that a reader raises."""
        return CorruptionError(
            f"bad chunk {self}",
            remedy="restore that file or dump the split anew; 'ncbatch validate' lists every bad chunk",
        )


def chunk_key(array: zarr.Array[Any], index: int) -> str:
    """Give the key, relative to the store's root, of the chunk of rows number `index`."""
    place = (index,) + (0,) * (array.ndim - 1)
    return f"{array.path}/{array.metadata.encode_chunk_key(place)}"


def chunk_fault(array: zarr.Array[Any], index: int, what: str) -> Fault:
    """Describe a fault of the chunk of rows number `index`."""
    rows = array.chunks[0]
    stop = min((index + 1) * rows, array.shape[0])
    return Fault(chunk_key(array, index), index * rows, stop, what)


def present_chunks(array: zarr.Array[Any]) -> npt.NDArray[np.bool_]:
    """Mark which chunks of rows exist, from one listing of the store."""
    n_chunks = -(-array.shape[0] // array.chunks[0])
    present = np.zeros(n_chunks, np.bool_)
    keys = {chunk_key(array, i): i for i in range(n_chunks)}

    async def look() -> None:
        async for key in array.store.list_prefix(f"{array.path}/c"):
            index = keys.get(key)
            if index is not None:
                present[index] = True

    sync(look())
    return present


def read_rows(array: zarr.Array[Any], start: int, stop: int) -> npt.NDArray[Any]:
    """Read rows [start, stop) and check their checksums.

    Raises
    ------
    CorruptionError
        Names the file and the rows of the first chunk that cannot be read.
    """
    try:
        return np.asarray(array[start:stop])
    except Exception as error:
        rows = array.chunks[0]
        for index in range(start // rows, -(-stop // rows)):
            if fault := read_fault(array, index):
                raise fault.error() from error
        raise


def read_fault(array: zarr.Array[Any], index: int) -> Fault | None:
    """Read one chunk and say what is wrong with it, if anything is."""
    rows = array.chunks[0]
    try:
        array[index * rows : min((index + 1) * rows, array.shape[0])]
    except Exception as error:
        kind = "checksum does not match its bytes" if "checksum" in str(error) else str(error)
        return chunk_fault(array, index, kind)
    return None


def checksums(array: zarr.Array[Any]) -> bytes:
    """Hash the stored checksums of all chunks, without reading the chunks.

    Returns
    -------
    bytes
        A SHA-256 digest over (chunk number, last four bytes); missing chunks enter as missing.
    """
    indices = range(-(-array.shape[0] // array.chunks[0]))
    prototype = default_buffer_prototype()

    async def tail(index: int, gate: asyncio.Semaphore) -> bytes:
        async with gate:
            found = await array.store.get(
                chunk_key(array, index), prototype, SuffixByteRequest(_CHECKSUM_BYTES)
            )
        return b"missing" if found is None else found.to_bytes()

    async def tails() -> list[bytes]:
        gate = asyncio.Semaphore(_CONCURRENT_REQUESTS)
        return await asyncio.gather(*(tail(i, gate) for i in indices))

    digest = hashlib.sha256(repr((array.shape, array.chunks, str(array.dtype))).encode())
    for index, found in zip(indices, sync(tails()), strict=True):
        digest.update(index.to_bytes(8, "little") + found)
    return digest.digest()
