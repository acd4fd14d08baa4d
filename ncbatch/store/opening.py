"""Where stores are: local folders and object stores; making, opening and deleting them there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import zarr
import zarr.errors
from zarr.abc.store import Store
from zarr.core.sync import sync

from ncbatch.errors import StoreError, UsageError
from ncbatch.store.format import ATTRIBUTE, check_metadata
from ncbatch.store.nodes import make_group
from ncbatch.store.object_store import SCHEMES, connect


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a URL."""
    return "://" in os.fspath(path)


def as_text(path: str | os.PathLike[str]) -> str:
    """Give a path as it is, and a URL without slashes at its end."""
    where = os.fspath(path)
    return where.rstrip("/") if is_remote(where) else where


def tidy(path: str) -> str:
    """Give a local path without what does not matter (``./``, ``//``), and a URL as it is."""
    return path if is_remote(path) else str(Path(path))


def is_there(
    path: str | os.PathLike[str], storage_options: Mapping[str, Any] | None = None
) -> bool:
    """Whether anything is at the place of a store; an empty folder is free.

    Raises
    ------
    StoreError
        When an object store cannot be asked.
    """
    where = os.fspath(path)
    if not is_remote(where):
        _refuse_options(storage_options)
        return Path(where).exists() and not _is_empty_folder(Path(where))
    place = _place(where, storage_options)
    return not (isinstance(place, Store) and sync(place.is_empty("")))


def check_writable(where: str) -> None:
    """Refuse places that stores can be read from only.

    Raises
    ------
    UsageError
        For a URL that is no object store's.
    """
    if is_remote(where) and not _is_object_store(where):
        raise UsageError(f"a new store at '{where}'", f"a folder, or a URL of {_schemes()}")


def make_root(
    where: str, header: Mapping[str, Any], storage_options: Mapping[str, Any] | None = None
) -> zarr.Group:
    """Make the group of a store at a place that is free.

    Raises
    ------
    StoreError
        When nothing can be written there, or another process has made a store meanwhile.
    """
    place = _place(where, storage_options)
    attributes = {ATTRIBUTE: dict(header)}
    if isinstance(place, Store):
        make_group(place, "", attributes)
        root = zarr.open_group(place, mode="r+", zarr_format=3)
        if root.attrs.get(ATTRIBUTE) != attributes[ATTRIBUTE]:
            raise StoreError(f"'{where}' exists", "a path that is free", "choose another")
        return root
    try:
        return zarr.create_group(place, zarr_format=3, attributes=attributes)
    except OSError as error:
        raise StoreError(
            f"no store can be made at '{where}': {error.strerror}", "a folder to write to"
        ) from error


def open_root(where: str, storage_options: Mapping[str, Any] | None = None) -> zarr.Group:
    """Open the group of a store.

    Raises
    ------
    StoreError
        When nothing is there, or no Zarr v3 group.
    """
    remote = is_remote(where)
    if not remote and not Path(where).exists():
        raise StoreError(f"no store at '{where}': nothing is there", "the path of a store")
    if not remote and not Path(where).is_dir():
        raise StoreError(f"'{where}' is a file", "the directory of a store")
    place = _place(where, storage_options)
    if remote and isinstance(place, str):
        return _read_only(place)
    try:
        return zarr.open_group(place, mode="r+", zarr_format=3)
    except StoreError:
        raise
    except (zarr.errors.BaseZarrError, FileNotFoundError, KeyError, ValueError) as error:
        if isinstance(place, Store) and sync(place.is_empty("")):
            raise StoreError(
                f"no store at '{where}': nothing is there", "the URL of a store"
            ) from error
        raise StoreError(
            f"'{where}' is no store: no Zarr v3 group can be read there",
            remedy="make one with 'ncbatch import' or nc.FeatureStore.create",
        ) from error


def _read_only(url: str) -> zarr.Group:
    """Open a URL that is no object store's as zarr does."""
    try:
        return zarr.open_group(url, mode="r", zarr_format=3)
    except Exception as error:  # of any library of file systems
        why = str(error).strip().partition("\n")[0]
        raise StoreError(
            f"'{url}' cannot be opened: {why}", f"a store, in a folder or at a URL of {_schemes()}"
        ) from error


def check_root(root: zarr.Group, where: str) -> None:
    """Refuse a store of which a metadata file is damaged.

    Raises
    ------
    CorruptionError
        Names the file.
    """
    if not is_remote(where):
        check_metadata(Path(where))


def delete_store(where: str, storage_options: Mapping[str, Any] | None = None) -> None:
    """Delete all that is at a place; the caller knows that it is a store."""
    place = _place(where, storage_options)
    if isinstance(place, Store):
        sync(place.delete_dir(""))
    else:
        shutil.rmtree(place)


def _place(where: str, storage_options: Mapping[str, Any] | None) -> Store | str:
    """Give what zarr opens: a store, or the path or URL of one.

    A local path is made absolute: when zarr (3.1.6) lists keys it cuts the store's path out
    wherever it occurs, so that a store at ``s`` would lose the end of ``layers/`` in every key.
    """
    if _is_object_store(where):
        return connect(where, storage_options)
    _refuse_options(storage_options)
    return where if is_remote(where) else os.path.abspath(where)


def _is_empty_folder(place: Path) -> bool:
    return place.is_dir() and next(place.iterdir(), None) is None


def _refuse_options(storage_options: Mapping[str, Any] | None) -> None:
    if storage_options:
        raise UsageError("storage_options for a local path", f"a URL of {_schemes()}")


def _schemes() -> str:
    return "s3://, gs:// or az://"


def _is_object_store(where: str) -> bool:
    return is_remote(where) and where.partition("://")[0] in SCHEMES
