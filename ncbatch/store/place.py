"""Where stores are: local folders and object stores; making, opening and deleting them there."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from typing import Any, Self, TypeVar

import zarr
import zarr.errors
from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, Store
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.core.sync import sync
from zarr.storage import ObjectStore

from ncbatch.errors import StoreError, UsageError
from ncbatch.store.chunks import SMALL_REQUESTS, gathered, make_group
from ncbatch.store.format import ATTRIBUTE, check_metadata

# Object stores through obstore: zarr's own store, whose errors say what to do.


Result = TypeVar("Result")

# What obstore opens in the same way; tested are s3 and s3a.
SCHEMES = ("s3", "s3a", "gs", "az", "azure", "abfs", "abfss")

# A wrong address is said after seconds; once it was right, a store that is busy is waited for.
_FIRST = {"max_retries": 2, "retry_timeout": timedelta(seconds=5)}
_LATER = {"max_retries": 8, "retry_timeout": timedelta(seconds=60)}
_TIMEOUTS = {"connect_timeout": "5s", "timeout": "120s", "allow_http": True}

_CREDENTIALS = (
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (AWS_SESSION_TOKEN), "
    "or AWS_SKIP_SIGNATURE=true for public data"
)


def connect(url: str, storage_options: Mapping[str, Any] | None = None) -> RemoteStore:
    """Open a place in an object store, and ask it one question to see that it answers.

    Parameters
    ----------
    url : str
        Such as ``s3://bucket/prefix``.
    storage_options : mapping, optional
        Settings of obstore for this kind of store, which go before those of the environment.

    Raises
    ------
    UsageError
        When the library is missing, or an option is unknown.
    StoreError
        When nothing answers, there is no such bucket, or access is refused.
    """
    with _explained(url):
        _library(url).list_with_delimiter(_opened(url, storage_options, _FIRST))
    return RemoteStore(url, storage_options)


class RemoteStore(ObjectStore[Any]):
    """A place in an object store.

    Parameters
    ----------
    url : str
        Where it is.
    storage_options : mapping, optional
        As for `connect`. Other processes open the place with them and their own environment.
    """

    def __init__(
        self,
        url: str,
        storage_options: Mapping[str, Any] | None = None,
        *,
        read_only: bool = False,
    ) -> None:
        super().__init__(_opened(url, storage_options, _LATER), read_only=read_only)
        self.url, self._options = url, dict(storage_options or {})

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(type(self), read_only=self.read_only), (self.url, self._options)

    def with_read_only(self, read_only: bool = False) -> Self:
        """Give the same place, for reading only or not."""
        return type(self)(self.url, self._options, read_only=read_only)

    async def _ask(
        self, function: Callable[..., Result], *arguments: Any, **options: Any
    ) -> Result:
        """Call a function of obstore in a thread.

        Its own coroutines are finished by threads that may want the interpreter while it ends,
        which aborts the process (obstore 0.12, Python before 3.14).
        """

        def asked() -> Result:
            with _explained(self.url):
                return function(self.store, *arguments, **options)

        return await asyncio.get_running_loop().run_in_executor(_threads(), asked)

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """Read an object or a part of it; None when there is none."""
        found = await self._ask(_read, key, byte_range)
        return None if found is None else prototype.buffer.from_bytes(found)

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        """Read parts of objects."""
        return await gathered(self.get(key, prototype, part) for key, part in key_ranges)

    async def exists(self, key: str) -> bool:
        """Whether there is an object of that name."""
        return await self._ask(_size, key) is not None

    async def set(self, key: str, value: Buffer) -> None:
        """Write an object, in one step."""
        self._check_writable()
        await self._ask(_library(self.url).put, key, value.as_buffer_like())

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        """Write an object unless there is one; of several processes exactly one succeeds."""
        self._check_writable()
        await self._ask(_put_new, key, value.as_buffer_like())

    async def delete(self, key: str) -> None:
        """Delete an object, if it is there."""
        self._check_writable()
        await self._ask(_delete, [key])

    async def delete_dir(self, prefix: str) -> None:
        """Delete all objects below a key, many with one request where the store can."""
        self._check_writable()
        await self._ask(_delete, [key async for key in self.list_prefix(prefix)])

    async def copy(self, source: str, target: str) -> None:
        """Copy an object within the store, without reading it."""
        self._check_writable()
        await self._ask(_library(self.url).copy, source, target)

    def list(self) -> AsyncGenerator[str, None]:
        """List all keys."""
        return self.list_prefix("")

    async def list_prefix(self, prefix: str) -> AsyncGenerator[str, None]:
        """List all keys below a key."""
        for key in await self._ask(_keys, prefix):
            yield key

    async def list_dir(self, prefix: str) -> AsyncGenerator[str, None]:
        """List what is directly below a key."""
        found = await self._ask(_library(self.url).list_with_delimiter, prefix or None)
        inside = [*found["common_prefixes"], *(entry["path"] for entry in found["objects"])]
        for path in inside:
            yield path.rstrip("/").rpartition("/")[2]

    async def getsize(self, key: str) -> int:
        """Give the size of an object."""
        size = await self._ask(_size, key)
        if size is None:
            raise FileNotFoundError(key)
        return size


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(SMALL_REQUESTS, thread_name_prefix="ncbatch-requests")


def _read(store: Any, key: str, part: ByteRequest | None) -> Any:
    """Read bytes of an object; None when there is none."""
    import obstore

    try:
        match part:
            case None:
                return obstore.get(store, key).bytes()
            case RangeByteRequest(start, end):
                return obstore.get_range(store, key, start=start, end=end)
            case OffsetByteRequest(offset):
                return obstore.get(store, key, options={"range": {"offset": offset}}).bytes()
        try:
            return obstore.get(store, key, options={"range": {"suffix": part.suffix}}).bytes()
        except obstore.exceptions.NotSupportedError:  # Azure
            size = int(obstore.head(store, key)["size"])
            return obstore.get_range(store, key, start=max(size - part.suffix, 0), end=size)
    except FileNotFoundError:
        return None


def _size(store: Any, key: str) -> int | None:
    import obstore

    try:
        return int(obstore.head(store, key)["size"])
    except FileNotFoundError:
        return None


def _put_new(store: Any, key: str, value: Any) -> None:
    import obstore

    with suppress(obstore.exceptions.AlreadyExistsError):
        obstore.put(store, key, value, mode="create")


def _delete(store: Any, keys: Sequence[str]) -> None:
    import obstore

    if keys:
        with suppress(FileNotFoundError):  # S3 says nothing, others do
            obstore.delete(store, keys)


def _keys(store: Any, prefix: str) -> Sequence[str]:
    import obstore

    return [entry["path"] for entry in obstore.list(store, prefix or None).collect()]


def _library(url: str) -> Any:
    try:
        import obstore
    except ImportError as error:
        raise UsageError(
            f"'{url}' without the library obstore", "obstore", "pip install 'ncbatch[s3]'"
        ) from error
    return obstore


def _opened(url: str, storage_options: Mapping[str, Any] | None, retries: Any) -> Any:
    failures = (_library(url).exceptions.BaseError, ValueError, TypeError)
    from obstore.store import from_url

    options: Any = {
        "config": dict(storage_options or {}), "client_options": _TIMEOUTS, "retry_config": retries
    }  # fmt: skip
    try:
        return from_url(url.rstrip("/"), **options)
    except failures as error:
        if "Missing" in str(error):  # one half of a pair of keys
            raise _no_credentials(url) from error
        raise UsageError(f"'{url}' cannot be opened: {_first_line(error)}") from error


@contextmanager
def _explained(url: str) -> Iterator[None]:
    """Turn what obstore raises into a `StoreError` of one or two lines."""
    failures = (_library(url).exceptions.BaseError, OSError)
    try:
        yield
    except failures as error:
        if isinstance(error, StoreError):
            raise
        raise _explanation(url, error) from error


def _explanation(url: str, error: Exception) -> StoreError:
    text = str(error)
    code = _between(text, "Code")
    bucket = url.split("://")[-1].split("/")[0]
    if code == "NoSuchBucket":
        return StoreError(
            f"no bucket '{bucket}' for '{url}'", "one that exists",
            "make it first, or check its name and AWS_ENDPOINT_URL",
        )  # fmt: skip
    if re.search(r"/latest/(api|meta-data)|metadata\.google|credential", text):
        return _no_credentials(url)
    if code in ("AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken") or (
        type(error).__name__ in ("PermissionDeniedError", "UnauthenticatedError")
    ):
        what = f": {code}" if code else ""
        return StoreError(f"'{url}' refuses access{what}", "credentials it accepts", _CREDENTIALS)
    asked = re.search(r"Error performing \w+ (https?://[^/\s]+)", text)
    if asked and ("error sending request" in text or "timed out" in text):
        return StoreError(
            f"'{url}': nothing answers at {asked[1]}", "an object store",
            "check AWS_ENDPOINT_URL and the network",
        )  # fmt: skip
    message = _between(text, "Message")
    return StoreError(f"'{url}': {f'{code}: {message}' if message else _first_line(error)}")


def _no_credentials(url: str) -> StoreError:
    return StoreError(f"no credentials for '{url}'", "some in the environment", _CREDENTIALS)


def _between(text: str, tag: str) -> str:
    found = re.search(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    return found[1].strip() if found else ""


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


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
