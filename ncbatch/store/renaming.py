"""What is complete takes its name, and the place of what it replaces."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import zarr
from zarr.core.sync import sync
from zarr.storage import LocalStore

from ncbatch.errors import StoreError
from ncbatch.store.fetching import gathered
from ncbatch.store.finalizing import ARRAYS, record_arrays
from ncbatch.store.format import ATTRIBUTE, STAGED
from ncbatch.store.nodes import find_node, find_nodes, subgroups
from ncbatch.store.object_store import RemoteStore


def rename(group: zarr.Group, staged: str, name: str) -> None:
    """Give a node of `group` another name; a node that has it is deleted.

    Where nothing can be renamed the node is copied within the store, its own metadata last: until
    then no node of that name is seen, and what was written stays under its staged name.

    Raises
    ------
    StoreError
        When the store can do neither.
    """
    if isinstance(group.store, LocalStore):
        _rename_folder(Path(group.store.root) / group.path, staged, name)
    elif isinstance(group.store, RemoteStore):
        sync(_copy(group.store, f"{group.path}/{staged}", f"{group.path}/{name}"))
    else:
        raise StoreError(f"{group.store_path} cannot rename", "a folder or an object store")


def finish_renaming(split: zarr.Group) -> None:
    """Let layers and predictions take their names whose replacing was interrupted.

    Staged predictions are complete when a staged layer is, or when those that the split had are
    gone: both come after the last of them was stored.
    """
    if not isinstance(split.store, RemoteStore):
        return
    layers = find_node(split, "layers")
    groups = subgroups(layers) if isinstance(layers, zarr.Group) else ()
    complete = [
        name for name, group in groups if name.startswith(STAGED) and group.attrs.get("complete")
    ]
    known: Any = split.attrs.get(ATTRIBUTE, {})
    current, staged = find_nodes(split, ["prediction", f"{STAGED}prediction"])
    lost = "prediction" in known.get(ARRAYS, ()) and current is None
    if staged is not None and (complete or lost):
        rename(split, f"{STAGED}prediction", "prediction")
    for name in complete:
        rename(split, f"layers/{name}", f"layers/{name.removeprefix(STAGED)}")
    if complete or lost:
        record_arrays(split)


def delete_node(group: zarr.Group, name: str) -> None:
    """Delete a node of `group` with all below, even where its own metadata is gone already."""
    sync(group.store.delete_dir(f"{group.path}/{name}"))


def _rename_folder(root: Path, staged: str, name: str) -> None:
    replaced = root / f"{staged}{STAGED}replaced"
    if (root / name).exists():
        (root / name).rename(replaced)
    (root / staged).rename(root / name)
    shutil.rmtree(replaced, ignore_errors=True)


async def _copy(store: RemoteStore, staged: str, name: str) -> None:
    own = "/zarr.json"
    await store.delete(name + own)
    await store.delete_dir(name)
    keys = [key async for key in store.list_prefix(staged)]
    inner = [key.removeprefix(staged) for key in keys if key != staged + own]
    await gathered(store.copy(staged + key, name + key) for key in inner)
    await store.copy(staged + own, name + own)
    await store.delete_dir(staged)
