"""What an import leaves when it fails: the store as it was."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ncbatch.store import FeatureStore
from ncbatch.store.opening import delete_store, is_remote, is_there


@contextmanager
def undone_on_failure(path: str, split: str | None, overwrite: bool) -> Iterator[None]:
    """Delete what the import made when it fails: the new store with its folders, or the new split.

    An interrupted split that is to be replaced is moved beside the store until the new one is in,
    where the store is a folder; it comes back when the import fails.

    Parameters
    ----------
    path : str
        The store, which need not exist.
    split : str or None
        The split that is written anew; None where layers are added to a complete one.
    overwrite : bool
        Whether the split may be there.
    """
    if is_remote(path):
        with _undone_remotely(path, split):
            yield
        return
    store = Path(path).absolute()
    created = [place for place in (store, *store.parents) if not place.exists()]
    home = store / split if split is not None else None
    aside = store.with_name(f".{store.name}.{split}.{os.getpid()}")
    began = home is not None and home.exists()
    if home is not None and began and overwrite:
        home.rename(aside)
    try:
        yield
    except BaseException:
        if created:
            shutil.rmtree(store, ignore_errors=True)
            with suppress(OSError):  # a folder that is not there, or that another process uses
                for folder in created[1:]:
                    folder.rmdir()
        elif home is not None and (overwrite or not began):
            shutil.rmtree(home, ignore_errors=True)
            if began:
                aside.rename(home)
        raise
    shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def _undone_remotely(path: str, split: str | None) -> Iterator[None]:
    """Delete the new store or the new split of an object store when the import fails."""
    created = not is_there(path)
    began = split is not None and not created and split in FeatureStore.open(path).splits
    try:
        yield
    except BaseException:
        if created and is_there(path):
            FeatureStore.open(path)  # never delete what is no store
            delete_store(path)
        elif split is not None and not created and not began:
            FeatureStore.open(path).delete_split(split)
        raise
