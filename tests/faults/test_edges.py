"""Unusual but valid responses, concurrent processes, and repeated errors."""

import fcntl
import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from medjob.artifacts.artifact import Artifact, Attempt
from medjob.artifacts.checkpoints import Checkpoints
from medjob.config.store import StoreRef
from medjob.errors import ConfigError, RetryError
from medjob.runtime.files import describe_folder, fingerprint
from medjob.store import LocalStore, Store, open_store
from medjob.store.base import PART_SIZE
from medjob.store.transfer import PARTIAL, download_files, find_damage, upload_folder
from tests.fakes.gcs import FakeGCS
from tests.fakes.s3 import FakeS3
from tests.fakes.server import Fault, Request, Response
from tests.faults.test_publish import InterruptedStore


def folder_with(tmp_path: Path, **sizes: int) -> Path:
    folder = tmp_path / "source"
    folder.mkdir(exist_ok=True)
    for name, size in sizes.items():
        (folder / name).write_bytes(os.urandom(size))
    return folder


def checkpoints_in(store: Store, tmp_path: Path) -> Checkpoints:
    return Checkpoints(
        Attempt.begin(Artifact(store, "run", "sft", fingerprint(1)), "me"),
        2,
        tmp_path / "snapshots",
    )


@pytest.mark.parametrize("after", [0, 1, 2])
def test_gcs_upload_continues_after_a_partly_persisted_chunk(
    fake_gcs: FakeGCS,
    open_gcs: Callable[..., Store],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    after: int,
) -> None:
    real, chunks = fake_gcs.process, iter(range(100))

    def process(request: Request) -> Response:
        if request.operation == "PutChunk" and next(chunks) == after:
            first, last, total = re.findall(r"\d+", request.headers["content-range"])
            kept = (int(last) - int(first)) // 2 // (256 << 10) * (256 << 10)
            request.body, request.data = request.body[:kept], request.data[:kept]
            request.headers["content-length"] = str(kept)
            request.headers["content-range"] = f"bytes {first}-{int(first) + kept - 1}/{total}"
        return real(request)

    monkeypatch.setattr(fake_gcs, "process", process)
    folder = folder_with(tmp_path, large=2 * PART_SIZE + (4 << 20))
    files = upload_folder(open_gcs(), folder, "d")
    assert fake_gcs.operations.count("PutChunk") == 4
    assert find_damage(open_gcs(), "d", files) == []


def test_gcs_upload_without_progress_stops_retrying(
    fake_gcs: FakeGCS,
    open_gcs: Callable[..., Store],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real, chunks = fake_gcs.process, iter(range(1000))
    monkeypatch.setattr(
        fake_gcs,
        "process",
        lambda r: Response(308) if r.operation == "PutChunk" and next(chunks) < 50 else real(r),
    )
    with pytest.raises(RetryError, match="persisted none of"):
        upload_folder(open_gcs(retry_seconds=0.5), folder_with(tmp_path, large=PART_SIZE + 1), "d")


def test_small_object_corrupted_in_transit_is_read_again(
    fake_s3: FakeS3,
    fake_gcs: FakeGCS,
    open_s3: Callable[..., Store],
    open_gcs: Callable[..., Store],
) -> None:
    for server, store in ((fake_s3, open_s3()), (fake_gcs, open_gcs())):
        store.put("k", b"some data")
        server.faults[:] = [Fault("flip", "GetObject")]
        blob = store.get("k")
        assert blob is not None
        assert (blob.data, server.faults[0].hits) == (b"some data", 1)


def test_reads_from_aws_use_the_endpoint_of_the_region() -> None:
    store: Any = open_store(StoreRef(uri="s3://bucket/x", region="eu-central-2"))
    assert store._reader._url_and_region == (
        "https://bucket.s3.eu-central-2.amazonaws.com/",
        "eu-central-2",
    )
    dotted: Any = open_store(StoreRef(uri="s3://my.bucket/x", region="eu-central-2"))
    assert dotted._reader._url_and_region[0].endswith("/my.bucket/")  # TLS wildcards match no dots


def test_ignored_range_headers_do_not_quarantine_a_checkpoint(
    fake_s3: FakeS3, open_s3: Callable[..., Store], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = checkpoints_in(open_s3(), tmp_path)
    checkpoints.save(10, folder_with(tmp_path, a=1000))
    checkpoints.wait()
    real = fake_s3.process

    def process(request: Request) -> Response:
        request.headers["range"] = "ignored"
        return real(request)

    with monkeypatch.context() as patch:
        patch.setattr(fake_s3, "process", process)
        with pytest.raises(ConfigError, match="ignores Range headers"):
            checkpoints.restore(tmp_path / "restored")
    assert checkpoints.restore(tmp_path / "restored") == 10


def test_lost_response_to_a_latest_update_supersedes_nobody(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "store")
    attempt = Attempt.begin(Artifact(store, "run", "sft", fingerprint(1)), "me")

    def fail() -> None:
        raise RetryError("the store is unreachable")

    attempt.artifact = Artifact(
        InterruptedStore(store, 0, fail, after=True), "run", "sft", fingerprint(1)
    )  # type: ignore[arg-type]
    with pytest.raises(RetryError):
        attempt.point_to("step-00000010-1")
    attempt.check()
    attempt.point_to("step-00000020-1")
    attempt.check()


def test_unlistable_folder_is_an_error_and_not_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = checkpoints_in(LocalStore(tmp_path / "store"), tmp_path)
    checkpoints.save(10, folder_with(tmp_path, a=10))
    checkpoints.wait()
    real = os.scandir

    def scandir(path: Any) -> Any:
        if "checkpoints" in str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(RetryError, match="cannot list"):
        checkpoints.restore(tmp_path / "restored")


def test_failing_uploads_do_not_deadlock(
    fake_s3: FakeS3, open_s3: Callable[..., Store], tmp_path: Path
) -> None:
    folder = folder_with(tmp_path, **{f"large{n}": 2 * PART_SIZE for n in range(8)})
    fake_s3.faults[:] = [Fault("status", "UploadPart", status=404, code="NoSuchUpload", times=None)]
    # This used to hang: each failed upload kept a buffer.
    with ThreadPoolExecutor(1) as pool, pytest.raises(RetryError):
        pool.submit(upload_folder, open_s3(), folder, "d").result(timeout=60)
    assert fake_s3.faults[0].hits


def test_second_process_downloading_the_same_file_is_refused(
    open_s3: Callable[..., Store], tmp_path: Path
) -> None:
    files = upload_folder(open_s3(), folder_with(tmp_path, a=1000), "d")
    (tmp_path / "down").mkdir()
    with (tmp_path / "down" / f"{PARTIAL}a").open("wb") as locked:
        fcntl.flock(locked, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="another process is downloading to"):
            download_files(open_s3(), "d", files, tmp_path / "down")
    download_files(open_s3(), "d", files, tmp_path / "down")
    assert describe_folder(tmp_path / "down") == files


def test_missing_empty_file_is_reported(
    open_s3: Callable[..., Store], open_gcs: Callable[..., Store], tmp_path: Path
) -> None:
    for store in (open_s3(), open_gcs()):
        files = upload_folder(store, folder_with(tmp_path, empty=0), "d")
        assert find_damage(store, "d", files) == []
        store.delete("d/empty")
        assert "does not exist" in find_damage(store, "d", files)[0]


def test_failed_uploads_leave_no_snapshots(
    fake_s3: FakeS3, open_s3: Callable[..., Store], tmp_path: Path
) -> None:
    checkpoints = checkpoints_in(open_s3(retry_seconds=0), tmp_path)
    fake_s3.faults[:] = [Fault("status", "PutObject", status=503, times=None)]
    for step in (1, 2, 3):
        checkpoints.save(step, folder_with(tmp_path, a=1000))
    with pytest.raises(RetryError):
        checkpoints.wait()
    assert fake_s3.faults[0].hits
    assert list((tmp_path / "snapshots").iterdir()) == []


def test_permanent_s3_errors_are_not_retried(
    fake_s3: FakeS3, open_s3: Callable[..., Store]
) -> None:
    fake_s3.faults[:] = [
        Fault("status", "PutObject", status=501, code="NotImplemented", times=None)
    ]
    with pytest.raises(ConfigError, match="NotImplemented"):
        open_s3().put("k", b"x")
    assert fake_s3.faults[0].hits == 1
