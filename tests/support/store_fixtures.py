"""Fixtures of strict S3 and GCS servers in this process. Import the ones to use, and `credentials`."""

import functools
from collections.abc import Callable, Iterator

import botocore.session
import pytest

from medjob.config.store import StoreRef
from medjob.store import Store, open_store
from tests.fakes.gcs import FakeGCS
from tests.fakes.s3 import FakeS3
from tests.support import store_servers

S3 = {"addressing_style": "path", "retry_seconds": 20}
GCS = {"anonymous": True, "retry_seconds": 20}

# Otherwise each new client parses some megabytes of JSON, which takes longer than most tests.
botocore.session.create_loader = functools.cache(botocore.session.create_loader)


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the servers above accept, and nothing of the machine's own."""
    for name, value in store_servers.CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")


@pytest.fixture
def fake_s3() -> Iterator[FakeS3]:
    with FakeS3(page_size=7) as server:
        yield server


@pytest.fixture
def fake_gcs() -> Iterator[FakeGCS]:
    with FakeGCS(page_size=7) as server:
        yield server


@pytest.fixture
def open_s3(fake_s3: FakeS3) -> Callable[..., Store]:
    """Opens the strict S3, with options."""
    defaults = {"uri": "s3://bucket/some/prefix", "endpoint": fake_s3.endpoint, **S3}
    return lambda **options: open_store(StoreRef(**(defaults | options)))


@pytest.fixture
def open_gcs(fake_gcs: FakeGCS) -> Callable[..., Store]:
    """Opens the strict GCS, with options."""
    defaults = {"uri": "gs://bucket/some/prefix", "endpoint": fake_gcs.endpoint, **GCS}
    return lambda **options: open_store(StoreRef(**(defaults | options)))
