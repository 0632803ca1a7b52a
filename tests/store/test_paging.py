"""What a store lists is what was written: incomplete lists, folded keys and stale answers."""

import re
from collections.abc import Callable
from typing import Any

import pytest

from medjob.config.base import ModelRef
from medjob.config.prepare import DataSource
from medjob.config.store import StoreRef
from medjob.errors import ConfigError, InputError
from medjob.sources.buckets import Original, read_model_config
from medjob.store import LocalStore, Store, open_store, probe
from tests.fakes.gcs import FakeGCS
from tests.fakes.s3 import FakeS3
from tests.fakes.server import Request, Response


class WrongLists(FakeS3):
    """Changes its answers to ListObjectsV2."""

    def __init__(self, pattern: bytes, replacement: bytes) -> None:
        super().__init__(page_size=3)
        self.pattern, self.replacement = pattern, replacement

    def _list_objects_v2(self, request: Request) -> Response:
        response = super()._list_objects_v2(request)
        response.body = re.sub(self.pattern, self.replacement, response.body)
        return response


class IgnoresToken(FakeS3):
    """Sends the first page again and again, with a new token each time."""

    def _list_objects_v2(self, request: Request) -> Response:
        request.query.pop("continuation-token", None)
        response = super()._list_objects_v2(request)
        response.body = response.body.replace(b"</NextC", b"%d</NextC" % len(self.requests))
        return response


class IgnoresPrefix(FakeS3):
    """Lists the whole bucket."""

    def _list_objects_v2(self, request: Request) -> Response:
        request.query["prefix"] = ""
        return super()._list_objects_v2(request)


class FoldsKeys(FakeS3):
    """Keeps `a//b` as `a/b`, and lists by the keys that it keeps."""

    def identify(self, request: Request) -> None:
        super().identify(request)
        request.key = re.sub("/(./)+", "/", re.sub("/+", "/", request.key)).lstrip("/")


class RepeatsToken(FakeGCS):
    """Answers every page with the same token."""

    def _list_objects(self, request: Request) -> Response:
        response = super()._list_objects(request)
        response.body = re.sub(
            rb'"nextPageToken": "[^"]*"', b'"nextPageToken": "MDE="', response.body
        )
        return response


TOKEN = rb"<NextContinuationToken>.*?</NextContinuationToken>"


def opened(server: Any, uri: str = "s3://bucket/x") -> Store:
    options = (
        {"anonymous": True}
        if uri.startswith("gs")
        else {"addressing_style": "path", "region": "us-east-1"}
    )
    return open_store(StoreRef(uri=uri, endpoint=server.endpoint, retry_seconds=2, **options))


@pytest.mark.parametrize(
    ("server", "text"),
    [
        (WrongLists(TOKEN, b""), "no continuation token"),
        (
            WrongLists(TOKEN, b"<NextContinuationToken></NextContinuationToken>"),
            "no continuation token",
        ),
        (
            WrongLists(TOKEN, b"<NextContinuationToken>eC9hMDI=</NextContinuationToken>"),
            "repeats a continuation|the same page again",
        ),
        (IgnoresToken(page_size=3), "sends the same page again"),
        (IgnoresPrefix(page_size=3), "lists objects outside of x/rows/"),
        (RepeatsToken(page_size=3), "repeats a continuation|the same page again"),
    ],
)
def test_incomplete_list_is_an_error(server: Any, text: str) -> None:
    scheme = "gs" if isinstance(server, FakeGCS) else "s3"
    with server:
        for number in range(10):
            opened(server, f"{scheme}://bucket/x/rows").put(f"a{number:02}.jsonl", b"{}\n")
        opened(server, f"{scheme}://bucket/elsewhere").put("b.jsonl", b"{}\n")
        ours = StoreRef(
            uri=f"{scheme}://bucket/x",
            endpoint=server.endpoint,
            retry_seconds=2,
            anonymous=scheme == "gs",
        )
        for call in (
            lambda: list(opened(server, f"{scheme}://bucket/x").list("rows/")),
            lambda: Original.find(DataSource(path=f"{scheme}://bucket/x/rows/"), ours),
        ):
            with pytest.raises(ConfigError, match=text):
                call()


def test_unfinished_uploads_that_are_cut_off_are_an_error() -> None:
    class CutUploads(FakeS3):
        def _list_multipart_uploads(self, request: Request) -> Response:
            response = super()._list_multipart_uploads(request)
            response.body = re.sub(
                rb"<Next(Key|UploadId)Marker>.*?</Next(Key|UploadId)Marker>", b"", response.body
            )
            return response

    with CutUploads(page_size=2) as server:
        store = opened(server)
        for number in range(3):
            store.upload(f"k{number}", 9 << 20)
        with pytest.raises(ConfigError, match="list of unfinished uploads ends early"):
            list(store.unfinished(""))


def test_probe_lists_what_it_has_written() -> None:
    with FoldsKeys() as server:
        store: Any = opened(server)
        probe(store)
        store._prefix = "/x/"  # a prefix with an empty segment is refused before this
        with pytest.raises(ConfigError, match="does not list an object that was just written"):
            probe(store)


def test_probe_reads_what_it_has_written(fake_s3: FakeS3, open_s3: Callable[..., Store]) -> None:
    store: Any = open_s3()

    def read(key: str, start: int, into: memoryview) -> None:
        into[:] = b"x" * len(into)

    store.read = read
    with pytest.raises(ConfigError, match="does not return what was just written"):
        probe(store)
    assert fake_s3.objects == {}


WRONG = [
    "//x",
    "/x//y",
    "/x/./y",
    "/x/../y",
    "/..",
    "/.",
    "/x\\y",
    "/x//",
    "//",
    "/x\ny",
    "/x\x00",
    "/x\x7f",
    "/./",
]


@pytest.mark.parametrize("path", WRONG)
@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_ambiguous_prefixes_are_refused(scheme: str, path: str) -> None:
    uri = f"{scheme}://bucket{path}"
    with pytest.raises(ConfigError, match=r"cluster.store: the (path|address) contains"):
        StoreRef(uri=uri)
    ours = StoreRef(uri=f"{scheme}://bucket/x")
    if "\n" not in path:  # no address of a model or of data
        with pytest.raises(ConfigError, match="contains"):
            Original.find(DataSource.model_construct(path=uri), ours)
        with pytest.raises(ConfigError, match="contains"):
            read_model_config(ModelRef.model_construct(id=uri), ours)


@pytest.mark.parametrize(
    "uri",
    [
        "s3://bucket",
        "s3://bucket/",
        "gs://bucket/x/",
        "s3://bucket/a..b/.c/d-",
        "s3://bucket/year=2026/x",
        "file:///a//b/../c",
    ],
)
def test_other_prefixes_are_accepted(uri: str) -> None:
    assert StoreRef(uri=uri).uri == uri


def test_objects_with_the_same_path_on_a_disk_are_refused(
    fake_s3: FakeS3, open_s3: Callable[..., Store], tmp_path: Any
) -> None:
    for keys in (("a/b.jsonl", "a//b.jsonl"), ("c.jsonl", "c.jsonl/d.jsonl")):
        fake_s3.buckets["bucket"].clear()
        writer: Any = open_s3(uri="s3://bucket")
        for key in keys:
            writer.put(f"rows/{key}", b"{}\n")
        ours = StoreRef(
            uri="s3://bucket/x",
            endpoint=fake_s3.endpoint,
            addressing_style="path",
            region="us-east-1",
        )
        found = Original.find(DataSource(path="s3://bucket/rows/"), ours)
        with pytest.raises(InputError, match="has the same path"):
            found.copy(tmp_path / "copy")


def test_local_store_passes_the_probe(tmp_path: Any) -> None:
    store = LocalStore(tmp_path / "store")
    probe(store)
    assert list(store.list("")) == []
