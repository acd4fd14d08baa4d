"""What is really stored: which chunks exist, their checksums, and reads that name their faults."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.abc.store import SuffixByteRequest
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync

from ncbatch.errors import CorruptionError, StoreError
from ncbatch.store.fetching import gathered

_CHECKSUM_BYTES = 4


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
    present = np.zeros(-(-array.shape[0] // array.chunks[0]), np.bool_)
    found = stored_chunks(array)
    present[[index for index in found if index < present.size]] = True
    return present


def trim(array: zarr.Array[Any], rows: int) -> None:
    """Let an array end after `rows`, and delete the chunks beyond.

    ``zarr.Array.resize`` would go through every chunk that the old shape has room for, and room
    reserved for several writers can be millions of chunks that were never stored.
    """
    if array.shape[0] == rows:
        return
    beyond = [index for index in stored_chunks(array) if index * array.chunks[0] >= rows]
    sync(gathered(array.store.delete(chunk_key(array, index)) for index in sorted(beyond)))
    sync(array.async_array.resize((rows, *array.shape[1:]), delete_outside_chunks=False))


def stored_chunks(array: zarr.Array[Any]) -> list[int]:
    """List the numbers of the chunks of rows that exist, in any order.

    Unlike `present_chunks` it takes no memory for chunks that an array only has room for.
    """

    async def keys() -> list[str]:
        return [key async for key in array.store.list_prefix(f"{array.path}/c")]

    found = []
    for key in sync(keys()):
        number = key.removeprefix(f"{array.path}/c/").split("/")[0]
        if number.isdecimal() and key == chunk_key(array, int(number)):
            found.append(int(number))
    return found


def read_rows(array: zarr.Array[Any], start: int, stop: int) -> npt.NDArray[Any]:
    """Read rows [start, stop) and check their checksums.

    Raises
    ------
    CorruptionError
        Names the file and the rows of the first chunk that cannot be read.
    StoreError
        When the store does not answer.
    """
    try:
        return np.asarray(array[start:stop])
    except StoreError:
        raise
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
    except StoreError:
        raise
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

    async def tail(index: int) -> bytes:
        found = await array.store.get(
            chunk_key(array, index), prototype, SuffixByteRequest(_CHECKSUM_BYTES)
        )
        return b"missing" if found is None else found.to_bytes()

    digest = hashlib.sha256(repr((array.shape, array.chunks, str(array.dtype))).encode())
    for index, found in zip(indices, sync(gathered(map(tail, indices))), strict=True):
        digest.update(index.to_bytes(8, "little") + found)
    return digest.digest()
