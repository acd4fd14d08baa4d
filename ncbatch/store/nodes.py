"""Groups and arrays of a store: made so that several processes can make the same ones at once."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import zarr
from zarr.abc.store import Store
from zarr.codecs import Crc32cCodec
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.errors import ContainsArrayError

from ncbatch.errors import CorruptionError, StoreError
from ncbatch.store.bfloat16 import BFloat16
from ncbatch.store.fetching import gathered

# Not part of the stored metadata: an array that is opened again must be told again.
_CONFIG: Any = {"write_empty_chunks": True}


def found_group(
    parent: zarr.Group, name: str, attributes: Mapping[str, Any] | None = None
) -> zarr.Group:
    """Make a group, or find the one that is there.

    Parameters
    ----------
    parent : zarr.Group
        Where it is or will be.
    name : str
        Its name.
    attributes : mapping, optional
        Its attributes, if this call makes it.

    Returns
    -------
    zarr.Group
        Of several processes that make it at once exactly one succeeds; all get its group, with its
        attributes.

    Raises
    ------
    StoreError
        When an array has that name.
    """
    if name not in parent:
        path = "/".join(part for part in (parent.path, name) if part)
        make_group(parent.store, path, attributes or {})
    group = parent[name]
    if not isinstance(group, zarr.Group):
        raise StoreError(f"'{parent.path}/{name}' is an array", "a group")
    return group


def make_group(store: Store, path: str, attributes: Mapping[str, Any]) -> None:
    """Make a group unless it is there; of several processes exactly one makes it.

    That holds for folders, and for object stores that write on condition (S3's ``If-None-Match``).
    """
    metadata = {"attributes": dict(attributes), "zarr_format": 3, "node_type": "group"}
    content = default_buffer_prototype().buffer.from_bytes(json.dumps(metadata).encode())
    key = f"{path}/zarr.json" if path else "zarr.json"
    sync(store.set_if_not_exists(key, content))


def subgroups(group: zarr.Group) -> Iterator[tuple[str, zarr.Group]]:
    """Give the groups in a group by name, sorted.

    A folder that another process has begun to make, or left behind when it was killed, is passed
    over; ``zarr.Group.groups`` would warn of it.
    """

    async def names() -> list[str]:
        found = [name async for name in group.store.list_dir(group.path)]
        return sorted(name for name in found if name != "zarr.json")

    inside = sync(names())
    for name, found in zip(inside, find_nodes(group, inside), strict=True):
        if isinstance(found, zarr.Group):
            yield name, found


def find_node(group: zarr.Group, name: str) -> zarr.Array[Any] | zarr.Group | None:
    """Open what has that name in a group; None for nothing.

    Raises
    ------
    CorruptionError
        When its metadata is damaged.
    """
    return find_nodes(group, [name])[0]


def find_nodes(
    group: zarr.Group, names: Sequence[str]
) -> list[zarr.Array[Any] | zarr.Group | None]:
    """Open several as `find_node` does, asking for all at once."""
    asked = zarr.AsyncGroup(metadata=group.metadata, store_path=group.store_path)

    async def node(name: str) -> Any:
        try:
            return await asked.get(name)
        except (ValueError, TypeError) as error:
            key = "/".join(part for part in (group.path, name, "zarr.json") if part)
            raise CorruptionError(f"metadata '{key}' cannot be read", "", "restore it") from error

    found = sync(gathered(node(name) for name in names))
    return [
        None if node is None else zarr.Array(node) if isinstance(node, zarr.AsyncArray)
        else zarr.Group(node)
        for node in found
    ]  # fmt: skip


def create_array(
    group: zarr.Group,
    name: str,
    *,
    shape: tuple[int, ...],
    chunks: tuple[int, ...],
    dtype: str,
    dimensions: tuple[str, ...],
    attributes: Mapping[str, Any] | None = None,
) -> zarr.Array[Any]:
    """Make an uncompressed array whose chunks carry a checksum, or find it as it would be made.

    Missing chunks read as -1 (integers) or NaN (floats), never as plausible zeros. Processes that
    make the same array at once write the same metadata, each in one step.

    Raises
    ------
    StoreError
        When an array is there that differs.
    """
    is_integer = dtype.startswith("int")
    try:
        return group.create_array(
            name,
            shape=shape,
            chunks=chunks,
            dtype=BFloat16() if dtype == "bfloat16" else dtype,
            filters=None,
            compressors=[Crc32cCodec()],
            fill_value=-1 if is_integer else float("nan"),
            dimension_names=dimensions,
            attributes=dict(attributes or {}),
            config=_CONFIG,
        )
    except ContainsArrayError:
        found = open_array(group, name)
    if (found.shape, found.chunks, str(found.dtype)) != (shape, chunks, dtype):
        raise StoreError(
            f"array '{found.path}' of shape {found.shape}, chunks {found.chunks}, {found.dtype}",
            f"shape {shape}, chunks {chunks}, {dtype}",
            "delete the split and write it anew",
        )
    return found


def create_label(group: zarr.Group, capacity: int, block: int) -> zarr.Array[Any]:
    """Make a split's array of labels, with room for `capacity` rows."""
    return create_array(
        group, "label", shape=(capacity,), chunks=(block,), dtype="int32", dimensions=("sample",)
    )


def create_prediction(
    group: zarr.Group, capacity: int, block: int, head: str | None, name: str = "prediction"
) -> zarr.Array[Any]:
    """Make a split's array of predictions, which stand for the classifier of layer `head`."""
    return create_array(
        group, name, shape=(capacity,), chunks=(block,), dtype="int32",
        dimensions=("sample",), attributes={"head": head},
    )  # fmt: skip


def open_array(group: zarr.Group, name: str, rows: int | None = None) -> zarr.Array[Any]:
    """Open an array for writing, or its first `rows` rows for reading.

    Parameters
    ----------
    group : zarr.Group
        Where it is.
    name : str
        Its name in there.
    rows : int, optional
        Let the array end there; what is stored keeps its shape.
    """
    array = find_node(group, name)
    if not isinstance(array, zarr.Array):
        raise KeyError(f"{group.path}/{name}")
    return _opened(array, rows)


def open_arrays(
    group: zarr.Group, names: Sequence[str], rows: int | None = None
) -> list[zarr.Array[Any] | None]:
    """Open several arrays as `open_array` does; None for one that is not there."""
    return [
        _opened(node, rows) if isinstance(node, zarr.Array) else None
        for node in find_nodes(group, names)
    ]


def _opened(array: zarr.Array[Any], rows: int | None) -> zarr.Array[Any]:
    metadata: Any = array.metadata
    if rows is not None and rows != array.shape[0]:
        metadata = metadata.update_shape((rows, *array.shape[1:]))
    return zarr.Array(
        zarr.AsyncArray(metadata=metadata, store_path=array.store_path, config=_CONFIG)
    )
