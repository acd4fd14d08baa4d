"""Where stores are, folders and object stores: making, opening, renaming and deleting them."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import zarr
import zarr.errors
from zarr.abc.store import ByteRequest, RangeByteRequest, Store
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.core.common import concurrent_map
from zarr.core.sync import sync
from zarr.storage import LocalStore, ObjectStore, StorePath

from ncbatch.arrays.atomic import take_name
from ncbatch.errors import CorruptionError, StoreError, UsageError, first_line
from ncbatch.store import chunks
from ncbatch.store.format import ARRAYS, ATTRIBUTE, STAGED, read_attributes

Result = TypeVar("Result")
Options: TypeAlias = Mapping[str, Any] | None

# What obstore opens in the same way; tested are s3 and s3a.
SCHEMES = ("s3", "s3a", "gs", "az", "azure", "abfs", "abfss")
_SCHEMES_TEXT = "s3://, gs:// or az://"

# A wrong address is said after seconds; once it was right, a store that is busy is waited for.
_FIRST = {"max_retries": 2, "retry_timeout": timedelta(seconds=5)}
_LATER = {"max_retries": 8, "retry_timeout": timedelta(seconds=60)}
_TIMEOUTS: Any = {"connect_timeout": "5s", "timeout": "120s", "allow_http": True}

_CREDENTIALS = (
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (AWS_SESSION_TOKEN), "
    "or AWS_SKIP_SIGNATURE=true for public data"
)


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a URL."""
    return "://" in os.fspath(path)


def absolute(path: str) -> str:
    """Return a path that holds wherever a process runs; a URL stays as it is."""
    return path if is_remote(path) else os.path.abspath(path)


def as_text(path: str | os.PathLike[str]) -> str:
    """Return a path as it is, and a URL without slashes at its end."""
    where = os.fspath(path)
    return where.rstrip("/") if is_remote(where) else where


def is_there(path: str | os.PathLike[str], storage_options: Options = None) -> bool:
    """Whether anything is at the place of a store; an empty folder is free.

    Raises
    ------
    StoreError
        When an object store cannot be asked.
    """
    place = _place(os.fspath(path), storage_options)
    if isinstance(place, Store):
        return not sync(place.is_empty(""))
    folder = Path(place)
    return is_remote(place) or (
        folder.exists() and not (folder.is_dir() and next(folder.iterdir(), None) is None)
    )


def check_writable(where: str) -> None:
    """Refuse places that stores can be read from only.

    Raises
    ------
    UsageError
        For a URL that is no object store's.
    """
    if is_remote(where) and not _is_object_store(where):
        raise UsageError(f"a new store at '{where}'", f"a folder, or a URL of {_SCHEMES_TEXT}")


def make_root(where: str, header: Mapping[str, Any], storage_options: Options) -> zarr.Group:
    """Make the group of a store at a place that is free.

    Raises
    ------
    StoreError
        When nothing can be written there, or another process has made a store meanwhile.
    """
    place = _place(where, storage_options)
    attributes = {ATTRIBUTE: dict(header)}
    if isinstance(place, Store):
        # Another process may make one at the same time: whose header is read back has won.
        chunks.make_group(StorePath(place), attributes)
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


def open_root(where: str, storage_options: Options = None) -> zarr.Group:
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
    # A URL that is no object store's is opened as zarr does.
    if remote and isinstance(place, str):
        try:
            return zarr.open_group(place, mode="r", zarr_format=3)
        except Exception as error:  # of any library of file systems
            raise StoreError(
                f"'{place}' cannot be opened: {first_line(error)}",
                f"a store, in a folder or at a URL of {_SCHEMES_TEXT}",
            ) from error
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


def check_metadata(where: str) -> None:
    """Refuse a store in a folder of which a metadata file is damaged; reads nothing else.

    Raises
    ------
    CorruptionError
        Names the file.
    """
    # In an object store that would be a request per file; there damage is noticed when it is read.
    for folder, folders, files in () if is_remote(where) else os.walk(where):
        if "zarr.json" not in files:
            continue
        file = Path(folder) / "zarr.json"
        try:
            kind = json.loads(file.read_text(encoding="utf-8"))["node_type"]
        # A writer is at work.
        except FileNotFoundError:
            continue
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptionError(f"metadata '{file}' cannot be read", "", "restore it") from error
        # Below an array there are chunks, which may be millions.
        if kind == "array":
            folders.clear()


def delete_store(where: str, storage_options: Options = None) -> None:
    """Delete all that is at a place; the caller knows that it is a store."""
    place = _place(where, storage_options)
    if isinstance(place, Store):
        sync(place.delete_dir(""))
    else:
        shutil.rmtree(place)


def rename(group: zarr.Group, staged: str, name: str) -> None:
    """Rename a node of `group`; a node that has it is deleted.

    Where nothing can be renamed the node is copied within the store, its own metadata last: until
    then no node of that name is seen, and what was written stays under its staged name.

    Raises
    ------
    StoreError
        When the store can do neither.
    """
    if isinstance(group.store, LocalStore):
        home = Path(group.store.root) / group.path
        take_name(home / staged, home / name, home / f"{staged}{STAGED}replaced")
    elif isinstance(group.store, RemoteStore):
        sync(_copy(group.store, f"{group.path}/{staged}", f"{group.path}/{name}"))
    else:
        raise StoreError(f"{group.store_path} cannot rename", "a folder or an object store")


async def _copy(store: RemoteStore, staged: str, name: str) -> None:
    # First and last the group's own metadata: a node without it is not seen.
    metadata = "/zarr.json"
    await store.delete(name + metadata)
    await store.delete_dir(name)
    keys = [key async for key in store.list_prefix(staged)]
    inner = [(key, name + key.removeprefix(staged)) for key in keys if key != staged + metadata]
    await concurrent_map(inner, store.copy, chunks.SMALL_REQUESTS)
    await store.copy(staged + metadata, name + metadata)
    await store.delete_dir(staged)


def finish_renaming(split: zarr.Group) -> None:
    """Let layers and predictions take their names whose replacing was interrupted."""
    # Where they can be renamed no step is left undone.
    if not isinstance(split.store, RemoteStore):
        return
    complete = [
        name
        for name, group in chunks.subgroups(split, "layers")
        if name.startswith(STAGED) and group.attrs.get("complete")
    ]
    current, staged = chunks.find_nodes(split, ["prediction", f"{STAGED}prediction"])
    # Staged predictions are complete when a staged layer is, or when those that the split had are
    # gone: both come after the last of them was stored.
    lost = "prediction" in read_attributes(split).get(ARRAYS, ()) and current is None
    if staged is not None and (complete or lost):
        rename(split, f"{STAGED}prediction", "prediction")
    for name in complete:
        rename(split, f"layers/{name}", f"layers/{name.removeprefix(STAGED)}")
    if complete or lost:
        chunks.record_arrays(split)


def _place(where: str, storage_options: Options) -> Store | str:
    """Return what zarr opens: a store, or the path or URL of one.

    Raises
    ------
    UsageError
        When the library is missing, or an option is unknown.
    StoreError
        When nothing answers, there is no such bucket, or access is refused.
    """
    if _is_object_store(where):
        # One question, to see that it answers: with few retries, so that an error comes at once.
        with _explain_errors(where):
            _library(where).list_with_delimiter(_open_place(where, storage_options, _FIRST))
        return RemoteStore(where, storage_options)
    if storage_options:
        raise UsageError("storage_options for a local path", f"a URL of {_SCHEMES_TEXT}")
    # When zarr (3.1.6) lists keys it cuts the store's path out wherever it occurs: a store at ``s``
    # would lose the end of ``layers/`` in every key.
    return absolute(where)


def _is_object_store(where: str) -> bool:
    return is_remote(where) and where.partition("://")[0] in SCHEMES


class RemoteStore(ObjectStore[Any]):
    """zarr's store of obstore, whose errors say what to do, and which is sent without credentials.

    Parameters
    ----------
    url : str
        Where it is.
    storage_options : mapping, optional
        Settings of obstore for this kind of store, which go before those of the environment. Other
        processes open the place with them and their own environment.
    """

    def __init__(self, url: str, storage_options: Options = None) -> None:
        super().__init__(_open_place(url, storage_options, _LATER))
        self.url = url
        self._options = dict(storage_options or {})
        self._library = _library(url)

    # `ObjectStore` pickles obstore's object, which holds the credentials of the environment.
    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.url, self._options)

    async def _ask(
        self,
        function: Callable[..., Result],
        *arguments: Any,
        ignore: type[Exception] | None = None,
        **options: Any,
    ) -> Result | None:
        """Call a function of obstore in a thread; None where it raises what is to be ignored."""
        # Its own coroutines, which `ObjectStore` awaits, are finished by threads that may want the
        # interpreter while it ends, and that aborts the process (obstore 0.12, Python before 3.14).

        def answer() -> Result | None:
            with _explain_errors(self.url), suppress(*filter(None, [ignore])):
                return function(self.store, *arguments, **options)
            return None

        return await asyncio.get_running_loop().run_in_executor(_threads(), answer)

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        content = await self._ask(_read, key, byte_range, ignore=FileNotFoundError)
        return None if content is None else prototype.buffer.from_bytes(content)

    async def exists(self, key: str) -> bool:
        return await self._ask(self._library.head, key, ignore=FileNotFoundError) is not None

    async def set(self, key: str, value: Buffer) -> None:
        await self._ask(self._library.put, key, value.as_buffer_like())

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        """Write an object unless there is one; of several processes exactly one succeeds."""
        exists = self._library.exceptions.AlreadyExistsError
        content = value.as_buffer_like()
        await self._ask(self._library.put, key, content, mode="create", ignore=exists)

    async def delete(self, key: str) -> None:
        # S3 says nothing of what is not there, others do.
        await self._ask(self._library.delete, key, ignore=FileNotFoundError)

    async def delete_dir(self, prefix: str) -> None:
        """Delete all objects below a key, many with one request where the store can."""
        if keys := [key async for key in self.list_prefix(prefix)]:
            await self._ask(self._library.delete, keys, ignore=FileNotFoundError)

    async def copy(self, source: str, target: str) -> None:
        """Copy an object within the store, without reading it."""
        await self._ask(self._library.copy, source, target)

    async def list_prefix(self, prefix: str) -> AsyncGenerator[str, None]:
        def collect(store: Any) -> Any:
            return self._library.list(store, prefix or None).collect()

        for entry in await self._ask(collect) or ():
            yield entry["path"]

    async def list_dir(self, prefix: str) -> AsyncGenerator[str, None]:
        inside: Any = await self._ask(self._library.list_with_delimiter, prefix or None)
        for path in (*inside["common_prefixes"], *(entry["path"] for entry in inside["objects"])):
            yield path.rstrip("/").rpartition("/")[2]


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(chunks.SMALL_REQUESTS, thread_name_prefix="ncbatch-requests")


def _read(store: Any, key: str, part: ByteRequest | None) -> Any:
    import obstore

    if part is None:
        return obstore.get(store, key).bytes()
    # Offsets and suffixes are named as zarr names them.
    section: Any = (
        tuple(asdict(part).values()) if isinstance(part, RangeByteRequest) else asdict(part)
    )
    try:
        return obstore.get(store, key, options={"range": section}).bytes()
    except obstore.exceptions.NotSupportedError:  # Azure knows no suffix
        size = obstore.head(store, key)["size"]
        return obstore.get_range(store, key, start=max(size - section["suffix"], 0), end=size)


def _library(url: str) -> Any:
    try:
        import obstore
    except ImportError as error:
        raise UsageError(
            f"'{url}' without the library obstore", "obstore", "pip install 'ncbatch[s3]'"
        ) from error
    return obstore


def _open_place(url: str, storage_options: Options, retries: Any) -> Any:
    failures = (_library(url).exceptions.BaseError, ValueError, TypeError)
    from obstore.store import from_url

    config: Any = dict(storage_options or {})
    try:
        return from_url(
            url.rstrip("/"), config=config, client_options=_TIMEOUTS, retry_config=retries
        )
    except failures as error:
        # One half of a pair of keys.
        if "Missing" in str(error):
            raise _no_credentials(url) from error
        raise UsageError(f"'{url}' cannot be opened: {first_line(error)}") from error


@contextmanager
def _explain_errors(url: str) -> Iterator[None]:
    """Turn what obstore raises into a `StoreError` of one or two lines."""
    failures = (_library(url).exceptions.BaseError, OSError)
    try:
        yield
    except failures as error:
        raise error if isinstance(error, StoreError) else _explanation(url, error) from error


def _explanation(url: str, error: Exception) -> StoreError:
    # obstore's text holds the server's answer, in XML, and debugging output over many lines.
    text = str(error)
    code = _between(text, "Code")
    if code == "NoSuchBucket":
        bucket = url.split("://")[-1].split("/")[0]
        return StoreError(
            f"no bucket '{bucket}' for '{url}'",
            "one that exists",
            "make it first, or check its name and AWS_ENDPOINT_URL",
        )
    if re.search(r"/latest/(api|meta-data)|metadata\.google|credential", text):
        return _no_credentials(url)
    if code in ("AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken") or (
        type(error).__name__ in ("PermissionDeniedError", "UnauthenticatedError")
    ):
        reason = f": {code}" if code else ""
        return StoreError(f"'{url}' refuses access{reason}", "credentials it accepts", _CREDENTIALS)
    asked = re.search(r"Error performing \w+ (https?://[^/\s]+)", text)
    if asked and ("error sending request" in text or "timed out" in text):
        return StoreError(
            f"'{url}': nothing answers at {asked[1]}",
            "an object store",
            "check AWS_ENDPOINT_URL and the network",
        )
    message = _between(text, "Message")
    return StoreError(f"'{url}': {f'{code}: {message}' if message else first_line(error)}")


def _no_credentials(url: str) -> StoreError:
    return StoreError(f"no credentials for '{url}'", "some in the environment", _CREDENTIALS)


def _between(text: str, tag: str) -> str:
    match = re.search(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    return match[1].strip() if match else ""
