"""What is complete takes its name, and the place of what it replaces."""

from __future__ import annotations

import shutil
from pathlib import Path

import zarr
from zarr.core.sync import sync
from zarr.storage import LocalStore

from ncbatch.errors import StoreError
from ncbatch.store.fetching import gathered
from ncbatch.store.format import STAGED
from ncbatch.store.nodes import subgroups
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
    """Let layers take their names whose replacing was interrupted, in the group of a split."""
    layers = split.get("layers")
    if not isinstance(layers, zarr.Group) or not isinstance(layers.store, RemoteStore):
        return
    for name, layer in list(subgroups(layers)):
        if name.startswith(STAGED) and layer.attrs.get("complete"):
            rename(layers, name, name.removeprefix(STAGED))


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
