"""Fixtures that open each kind of store."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from medjob.config.store import StoreRef
from medjob.store import Store, open_store
from tests.fakes.s3 import FakeS3
from tests.support import store_servers
from tests.support.store_fixtures import GCS, S3, credentials, fake_gcs, fake_s3, open_gcs, open_s3

__all__ = ["credentials", "fake_gcs", "fake_s3", "open_gcs", "open_s3"]


@pytest.fixture(scope="session")
def weed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Run SeaweedFS and return its endpoint."""
    with store_servers.seaweedfs(tmp_path_factory.mktemp("weed")) as endpoint:
        yield endpoint


@pytest.fixture(scope="session")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Run gcp-storage-emulator and return its endpoint."""
    with store_servers.gcs_emulator(tmp_path_factory.mktemp("gcs")) as endpoint:
        yield endpoint


@pytest.fixture(scope="session")
def moto() -> Iterator[str]:
    """Run moto and return its endpoint."""
    with store_servers.moto() as endpoint:
        yield endpoint


@pytest.fixture(
    params=[
        "file",
        "s3",
        "gcs",
        "seaweedfs",
        "moto",
        "s3-without-checksums",
        "gcs-emulator",
        "s3-ignoring-conditions",
    ]
)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    """Open each kind of store: a folder, strict fakes, real servers, and emulators that need
    `singleWriter`.
    """
    name = str(request.param)
    prefix = f"{store_servers.BUCKET}/{tmp_path.name}"
    if name == "file":
        yield open_store(StoreRef(uri=f"file://{tmp_path}/store"))
    elif name in {"s3", "gcs"}:
        yield request.getfixturevalue(f"open_{name}")()
    elif name == "s3-without-checksums":
        yield request.getfixturevalue("open_s3")(request_checksum_calculation="when_required")
    elif name == "s3-ignoring-conditions":
        with FakeS3(ignore_conditions=True) as server:
            yield open_store(
                StoreRef(uri="s3://bucket/x", endpoint=server.endpoint, single_writer=True, **S3)
            )
    elif name == "gcs-emulator":
        yield open_store(
            StoreRef(
                uri=f"gs://{prefix}",
                endpoint=request.getfixturevalue("emulator"),
                single_writer=True,
                **GCS,
            )
        )
    else:
        endpoint = request.getfixturevalue("weed" if name == "seaweedfs" else name)
        yield open_store(StoreRef(uri=f"s3://{prefix}", endpoint=endpoint, **S3))
