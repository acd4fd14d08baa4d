"""Object stores through obstore: zarr's own store, whose errors say what to do."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any, Self

from zarr.abc.store import ByteRequest
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import ObjectStore

from ncbatch.errors import StoreError, UsageError

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

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """Read an object or a part of it; None when there is none."""
        with _explained(self.url):
            return await super().get(key, prototype, byte_range)

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        """Read parts of objects."""
        with _explained(self.url):
            return await super().get_partial_values(prototype, key_ranges)

    async def exists(self, key: str) -> bool:
        """Whether there is an object of that name."""
        with _explained(self.url):
            return await super().exists(key)

    async def set(self, key: str, value: Buffer) -> None:
        """Write an object, in one step."""
        with _explained(self.url):
            await super().set(key, value)

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        """Write an object unless there is one; of several processes exactly one succeeds."""
        with _explained(self.url):
            await super().set_if_not_exists(key, value)

    async def delete(self, key: str) -> None:
        """Delete an object, if it is there."""
        with _explained(self.url):
            await super().delete(key)

    async def delete_dir(self, prefix: str) -> None:
        """Delete all objects below a key, many with one request where the store can."""
        obstore = _library(self.url)
        self._check_writable()
        with _explained(self.url):
            found = await obstore.list(self.store, prefix or None).collect_async()
            if found:
                await obstore.delete_async(self.store, [entry["path"] for entry in found])

    async def copy(self, source: str, target: str) -> None:
        """Copy an object within the store, without reading it."""
        with _explained(self.url):
            await _library(self.url).copy_async(self.store, source, target)

    def list(self) -> AsyncGenerator[str, None]:
        """List all keys."""
        return self._explained_list(super().list())

    def list_prefix(self, prefix: str) -> AsyncGenerator[str, None]:
        """List all keys below a key."""
        return self._explained_list(super().list_prefix(prefix))

    def list_dir(self, prefix: str) -> AsyncGenerator[str, None]:
        """List what is directly below a key."""
        return self._explained_list(super().list_dir(prefix))

    async def getsize(self, key: str) -> int:
        """Give the size of an object."""
        with _explained(self.url):
            return await super().getsize(key)

    async def _explained_list(self, keys: AsyncGenerator[str, None]) -> AsyncGenerator[str, None]:
        with _explained(self.url):
            async for key in keys:
                yield key


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
