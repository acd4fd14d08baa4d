"""Object stores for tests: a folder that obstore reads as one, and a bucket of an S3 server."""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ncbatch.store import place

BUCKET = "features"
SECRET = "not-to-be-shipped"


class Folder:
    """Objects in a folder at a ``file://`` URL."""

    def __init__(self, folder: Path) -> None:
        self.root = f"file://{folder}"

    def _path(self, url: str, key: str) -> Path:
        return Path(url.removeprefix("file://")) / key

    def keys(self, url: str) -> dict[str, bytes]:
        """Read every object of a store by its key below it."""
        files = (path for path in self._path(url, "").rglob("*") if path.is_file())
        return {str(x.relative_to(self._path(url, ""))): x.read_bytes() for x in files}

    def put(self, url: str, key: str, content: bytes) -> None:
        self._path(url, key).parent.mkdir(parents=True, exist_ok=True)
        self._path(url, key).write_bytes(content)

    def delete(self, url: str, key: str) -> None:
        self._path(url, key).unlink()


class Bucket:
    """Objects in a bucket of the S3 server that the environment names."""

    root = f"s3://{BUCKET}"

    def __init__(self) -> None:
        import boto3

        endpoint, region = os.environ["AWS_ENDPOINT_URL"], os.environ["AWS_REGION"]
        self.client = boto3.client("s3", endpoint_url=endpoint, region_name=region)

    def _place(self, url: str, key: str) -> dict[str, str]:
        return {"Bucket": BUCKET, "Key": f"{url.removeprefix(self.root + '/')}/{key}"}

    def keys(self, url: str) -> dict[str, bytes]:
        prefix = self._place(url, "")["Key"]
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
        names = [entry["Key"] for page in pages for entry in page.get("Contents", ())]
        return {
            name.removeprefix(prefix): self.client.get_object(Bucket=BUCKET, Key=name)[
                "Body"
            ].read()
            for name in names
        }

    def put(self, url: str, key: str, content: bytes) -> None:
        self.client.put_object(**self._place(url, key), Body=content)

    def delete(self, url: str, key: str) -> None:
        self.client.delete_object(**self._place(url, key))


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """Run an S3 server with a bucket, and say so in the environment."""
    # They come with the extra test-s3, which the fast suite does without.
    pytest.importorskip("boto3")
    pytest.importorskip("obstore")
    moto_server = pytest.importorskip("moto.server")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    running = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    with pytest.MonkeyPatch.context() as patch:
        set_environment(patch, endpoint)
        Bucket().client.create_bucket(Bucket=BUCKET)
        yield endpoint
    running.stop()


def set_environment(patch: pytest.MonkeyPatch, endpoint: str) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        patch.delenv(name)
    patch.setenv("AWS_ENDPOINT_URL", endpoint)
    patch.setenv("AWS_ACCESS_KEY_ID", "tester")
    patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    patch.setenv("AWS_REGION", "us-east-1")


@pytest.fixture(scope="module", params=["folder", pytest.param("s3", marks=pytest.mark.slow)])
def objects(request, tmp_path_factory) -> Iterator[Folder | Bucket]:
    """Give an object store to write to, and what reads and alters it without the package."""
    if request.param == "s3":
        request.getfixturevalue("server")
        yield Bucket()
        return
    obstore_store = pytest.importorskip("obstore.store")
    opened = obstore_store.from_url

    def from_url(url: str, **options: Any) -> Any:
        return opened(url, mkdir=True) if url.startswith("file://") else opened(url, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(place, "SCHEMES", (*place.SCHEMES, "file"))
        patch.setattr(obstore_store, "from_url", from_url)
        yield Folder(tmp_path_factory.mktemp("objects"))


@pytest.fixture
def url(objects) -> str:
    return f"{objects.root}/{uuid.uuid4()}/run.zarr"
