"""What a store is made of: groups, arrays and chunks, made, found, and read with faults named.

What is made here may be made by several processes at once, and what is asked of a store that is far
away is asked for several things at once.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
import zarr
from zarr.abc.store import Store, SuffixByteRequest
from zarr.codecs import Crc32cCodec
from zarr.core.buffer import default_buffer_prototype
from zarr.core.common import concurrent_map
from zarr.core.sync import collect_aiterator, sync
from zarr.errors import ContainsArrayError
from zarr.storage import LocalStore, StorePath

from ncbatch.errors import CorruptionError, StoreError
from ncbatch.store.format import ARRAYS, ATTRIBUTE, STAGED, BFloat16, LayerSpec, read_attributes

Node: TypeAlias = zarr.Array[Any] | zarr.Group
Task = TypeVar("Task")
Result = TypeVar("Result")

# Metadata and checksums: what an object store takes in hand at once, for all of a round trip.
SMALL_REQUESTS = 64
# One connection to an object store gives a part of what the line does, and each chunk costs memory.
_CHUNKS_AT_ONCE = 4
_CHECKSUM_BYTES = 4
# Not part of the stored metadata: an array that is opened again must be told again.
_CONFIG: Any = {"write_empty_chunks": True}


def chunks_at_once(store: Store) -> int:
    """Say how many chunks are read at once: one from a disk, which reads ahead by itself."""
    return 1 if isinstance(store, LocalStore) else _CHUNKS_AT_ONCE


def map_ahead(
    function: Callable[[Task], Result], tasks: Iterable[Task], at_once: int
) -> Iterator[Result]:
    """Apply a function that waits to tasks, several at once; results come in their order.

    `at_once` calls are made, or wait to be taken.
    """
    # As on a disk, which reads ahead by itself: threads would gain nothing.
    if at_once == 1:
        yield from map(function, tasks)
        return
    pending: deque[Future[Result]] = deque()
    pool = ThreadPoolExecutor(at_once)
    try:
        # Tasks are taken in the caller's thread, no further ahead than needed.
        for task in tasks:
            pending.append(pool.submit(function, task))
            if len(pending) == at_once:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def require_group(
    parent: zarr.Group, name: str, attributes: Mapping[str, Any] | None = None
) -> zarr.Group:
    """Make a group with these attributes, or find the one that is there with its own.

    Of several processes that make it at once exactly one succeeds; all get its group.

    Raises
    ------
    StoreError
        When an array has that name.
    """
    if name not in parent:
        make_group(parent.store_path / name, attributes or {})
    group = parent[name]
    if not isinstance(group, zarr.Group):
        raise StoreError(f"'{parent.path}/{name}' is an array", "a group")
    return group


def make_group(place: StorePath, attributes: Mapping[str, Any]) -> None:
    """Make a group unless it is there; of several processes exactly one makes it."""
    # zarr would look first and then write. This is one step in folders, and in object stores that
    # write on condition (S3's ``If-None-Match``).
    metadata = {"attributes": dict(attributes), "zarr_format": 3, "node_type": "group"}
    content = default_buffer_prototype().buffer.from_bytes(json.dumps(metadata).encode())
    sync((place / "zarr.json").set_if_not_exists(content))


def subgroups(parent: zarr.Group, name: str = "") -> Iterator[tuple[str, zarr.Group]]:
    """Yield the groups in a group, or in the one of that name in it, by name, sorted."""
    group = find_node(parent, name) if name else parent
    if not isinstance(group, zarr.Group):
        return
    # `zarr.Group.groups` would warn of a folder that another process has begun to make, or has left
    # behind when it was killed; here it is passed over.
    names = sorted({*collect_aiterator(group.store.list_dir(group.path))} - {"zarr.json"})
    for name, node in zip(names, find_nodes(group, names), strict=True):
        if isinstance(node, zarr.Group):
            yield name, node


def find_node(group: zarr.Group, name: str) -> Node | None:
    """Open what has that name in a group; None for nothing.

    Raises
    ------
    CorruptionError
        When its metadata is damaged.
    """
    return find_nodes(group, [name])[0]


def find_nodes(group: zarr.Group, names: Sequence[str]) -> list[Node | None]:
    """Open several as `find_node` does, asking for all at once."""
    asked = zarr.AsyncGroup(metadata=group.metadata, store_path=group.store_path)

    async def node(name: str) -> Any:
        try:
            return await asked.get(name)
        except (ValueError, TypeError) as error:
            key = (group.store_path / name / "zarr.json").path
            raise CorruptionError(f"metadata '{key}' cannot be read", "", "restore it") from error

    kinds: dict[type, Any] = {zarr.AsyncArray: zarr.Array, zarr.AsyncGroup: zarr.Group}
    nodes = sync(concurrent_map([(name,) for name in names], node, SMALL_REQUESTS))
    return [None if node is None else kinds[type(node)](node) for node in nodes]


def create_array(
    group: zarr.Group,
    name: str,
    shape: tuple[int, ...],
    chunks: tuple[int, ...],
    dtype: str,
    dimensions: tuple[str, ...],
    attributes: Mapping[str, Any] | None = None,
) -> zarr.Array[Any]:
    """Make an uncompressed array whose chunks carry a checksum, or find it as it would be made.

    Raises
    ------
    StoreError
        When an array is there that differs.
    """
    try:
        return group.create_array(
            name,
            shape=shape,
            chunks=chunks,
            dtype=BFloat16() if dtype == "bfloat16" else dtype,
            filters=None,
            compressors=[Crc32cCodec()],
            # Missing chunks never read as plausible zeros.
            fill_value=-1 if dtype.startswith("int") else float("nan"),
            dimension_names=dimensions,
            attributes=dict(attributes or {}),
            config=_CONFIG,
        )
    except ContainsArrayError:
        # Processes that make it at once write the same metadata, each in one step.
        array = open_array(group, name)
    if (array.shape, array.chunks, str(array.dtype)) != (shape, chunks, dtype):
        raise StoreError(
            f"array '{array.path}' of shape {array.shape}, chunks {array.chunks}, {array.dtype}",
            f"shape {shape}, chunks {chunks}, {dtype}",
            "delete the split and write it anew",
        )
    return array


def store_array(
    group: zarr.Group, name: str, values: npt.NDArray[Any], dimensions: tuple[str, ...], limit: int
) -> None:
    """Make an array of what is in memory, in chunks of whole rows, of `limit` bytes at most."""
    # A chunk has a row at least, however long, and whatever the array lacks.
    rows = max(1, min(len(values), limit // max(values[:1].nbytes, 1)))
    chunk = (rows, *(max(n, 1) for n in values.shape[1:]))
    array = create_array(group, name, values.shape, chunk, str(values.dtype), dimensions)
    # Of no classes there is nothing to write.
    if values.size:
        array[...] = values


def create_feature(
    group: zarr.Group,
    layer: str,
    spec: LayerSpec,
    order: int,
    capacity: int,
    chunk: int,
    *,
    complete: bool = True,
) -> zarr.Array[Any]:
    """Make a layer's array in a split's `group`, with room for `capacity` rows."""
    attributes = {"complete": complete, "order": order}
    home = require_group(require_group(group, "layers"), layer, attributes)
    shape, chunks = ((rows, spec.n_features) for rows in (capacity, chunk))
    return create_array(home, "feature", shape, chunks, spec.dtype, ("sample", "unit"))


def create_ids(
    group: zarr.Group, name: str, capacity: int, block: int, **attributes: Any
) -> zarr.Array[Any]:
    """Make a split's array of labels or predictions, with room for `capacity` rows."""
    return create_array(group, name, (capacity,), (block,), "int32", ("sample",), attributes)


def open_array(group: zarr.Group, name: str, rows: int | None = None) -> zarr.Array[Any]:
    """Open an array for writing, or its first `rows` rows for reading."""
    array = open_arrays(group, [name], rows)[0]
    if array is None:
        raise KeyError(f"{group.path}/{name}")
    return array


def open_arrays(
    group: zarr.Group, names: Sequence[str], rows: int | None = None
) -> list[zarr.Array[Any] | None]:
    """Open several arrays as `open_array` does; None for one that is not there."""
    arrays: list[zarr.Array[Any] | None] = []
    for node in find_nodes(group, names):
        if not isinstance(node, zarr.Array):
            arrays.append(None)
            continue
        # Only this view of the array ends after `rows`; what is stored keeps its shape.
        metadata: Any = node.metadata
        if rows is not None:
            metadata = metadata.update_shape((rows, *node.shape[1:]))
        array = zarr.AsyncArray(metadata=metadata, store_path=node.store_path, config=_CONFIG)
        arrays.append(zarr.Array(array))
    return arrays


def record_arrays(group: zarr.Group) -> None:
    """Record which arrays a complete split has, so that the loss of a whole one is noticed."""
    attributes = read_attributes(group)
    names = list(dict.fromkeys([*attributes.get(ARRAYS, []), *array_names(group)]))
    group.update_attributes({ATTRIBUTE: attributes | {ARRAYS: names}})


def array_names(group: zarr.Group) -> list[str]:
    """Name the arrays as `Split.arrays` does."""
    ids = (name for name in ("label", "prediction") if name in group)
    return [*ids, *(f"layers/{name}" for name, _ in complete_layers(group))]


def complete_layers(split: zarr.Group) -> Iterator[tuple[str, zarr.Group]]:
    """Yield the groups of the layers whose writing has ended, under their own names."""
    for name, layer in subgroups(split, "layers"):
        if not name.startswith(STAGED) and layer.attrs.get("complete"):
            yield name, layer


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
            remedy="restore that file or dump the split anew; "
            "'ncbatch validate' lists every bad chunk",
        )


def chunk_key(array: zarr.Array[Any], index: int) -> str:
    """Return the key, relative to the store's root, of the chunk of rows number `index`."""
    place = (index,) + (0,) * (array.ndim - 1)
    return f"{array.path}/{array.metadata.encode_chunk_key(place)}"


def chunk_range(array: zarr.Array[Any], index: int) -> tuple[int, int]:
    """Return the first row of the chunk of rows number `index`, and the one after its last."""
    rows = array.chunks[0]
    return index * rows, min((index + 1) * rows, array.shape[0])


def chunk_fault(array: zarr.Array[Any], index: int, what: str) -> Fault:
    """Describe a fault of the chunk of rows number `index`."""
    return Fault(chunk_key(array, index), *chunk_range(array, index), what)


def present_chunks(array: zarr.Array[Any]) -> npt.NDArray[np.bool_]:
    """Mark which chunks of rows exist, from one listing of the store."""
    present = np.zeros(-(-array.shape[0] // array.chunks[0]), np.bool_)
    present[[index for index in stored_chunks(array) if index < present.size]] = True
    return present


def check_present(array: zarr.Array[Any], expected: npt.NDArray[np.bool_] | None = None) -> None:
    """Refuse an array of which a chunk, or one of those marked, is missing.

    Raises
    ------
    CorruptionError
        Names the first such chunk.
    """
    missing = ~present_chunks(array)
    for index in np.flatnonzero(missing if expected is None else missing & expected)[:1].tolist():
        raise chunk_fault(array, index, "chunk is missing").error()


def trim(array: zarr.Array[Any], rows: int) -> None:
    """Let an array end after `rows`, and delete the chunks beyond."""
    if array.shape[0] == rows:
        return
    # `zarr.Array.resize` would go through every chunk that the old shape has room for, and room
    # reserved for several writers can be millions of chunks that were never stored.
    beyond = [index for index in stored_chunks(array) if index * array.chunks[0] >= rows]
    keys = [(chunk_key(array, index),) for index in sorted(beyond)]
    sync(concurrent_map(keys, array.store.delete, SMALL_REQUESTS))
    sync(array.async_array.resize((rows, *array.shape[1:]), delete_outside_chunks=False))


def stored_chunks(array: zarr.Array[Any]) -> list[int]:
    """List the numbers of the chunks of rows that exist, in any order."""
    # No mask: that would take memory for all chunks that the array only has room for.
    prefix = f"{array.path}/c"
    keys = collect_aiterator(array.store.list_prefix(prefix))
    numbers = ((key, key.removeprefix(f"{prefix}/").split("/")[0]) for key in keys)
    return [
        int(number)
        for key, number in numbers
        if number.isdecimal() and key == chunk_key(array, int(number))
    ]


def read_rows(
    array: zarr.Array[Any], start: int, stop: int, *, widened: bool = False
) -> npt.NDArray[Any]:
    """Read rows [start, stop) and check their checksums; bfloat16 as float32 if `widened`.

    Raises
    ------
    CorruptionError
        Names the file and the rows of the first chunk that cannot be read.
    StoreError
        When the store does not answer.
    """
    try:
        rows = np.asarray(array[start:stop])
    except StoreError:
        raise
    # Codecs and stores raise what they like; which chunk it was has to be found out.
    except Exception as error:
        height = array.chunks[0]
        for index in range(start // height, -(-stop // height)):
            if fault := read_fault(array, index):
                raise fault.error() from error
        raise
    return rows.astype(np.float32) if widened and rows.dtype.name == "bfloat16" else rows


def read_fault(array: zarr.Array[Any], index: int) -> Fault | None:
    """Read one chunk and say what is wrong with it, if anything is."""
    try:
        array[slice(*chunk_range(array, index))]
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
    # crc32c is the last codec, so its four bytes end every chunk.
    indices = range(-(-array.shape[0] // array.chunks[0]))
    prototype = default_buffer_prototype()
    tail = SuffixByteRequest(_CHECKSUM_BYTES)
    reads = [(chunk_key(array, index), prototype, tail) for index in indices]
    tails = sync(concurrent_map(reads, array.store.get, SMALL_REQUESTS))
    digest = hashlib.sha256(repr((array.shape, array.chunks, str(array.dtype))).encode())
    for index, content in zip(indices, tails, strict=True):
        digest.update(index.to_bytes(8, "little"))
        digest.update(b"missing" if content is None else content.to_bytes())
    return digest.digest()
