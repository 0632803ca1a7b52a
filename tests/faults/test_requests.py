"""Requests that fail or arrive twice, and responses that are lost, cut off or corrupted.

The result is the same as without faults.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medjob.artifacts.artifact import Artifact, Attempt
from medjob.artifacts.checkpoints import Checkpoints
from medjob.errors import InputError, RetryError
from medjob.runtime.files import fingerprint
from medjob.store import Store
from medjob.store.base import PART_SIZE
from medjob.store.transfer import PARTIAL, download_files, upload_folder
from tests.fakes.gcs import FakeGCS
from tests.fakes.s3 import FakeS3
from tests.fakes.server import FakeServer, Fault

ServerAndOpen = tuple[FakeServer, Callable[..., Store]]
S3_WORK = {
    "AbortMultipartUpload",
    "CompleteMultipartUpload",
    "CreateMultipartUpload",
    "DeleteObject",
    "GetObject",
    "ListMultipartUploads",
    "ListObjectsV2",
    "PutObject",
    "UploadPart",
}
GCS_WORK = {"DeleteObject", "GetObject", "ListObjects", "PutChunk", "PutObject", "StartUpload"}


@pytest.fixture(params=["s3", "gcs"])
def opened(request: pytest.FixtureRequest) -> ServerAndOpen:
    """A strict fake server, and a function that opens a store in it."""
    return request.getfixturevalue(f"fake_{request.param}"), request.getfixturevalue(
        f"open_{request.param}"
    )


def source_folder(tmp_path: Path, parts: int = 2) -> Path:
    folder = tmp_path / "source"
    folder.mkdir(exist_ok=True)
    (folder / "large").write_bytes(bytes(range(256)) * (PART_SIZE // 256) * parts + b"end")
    (folder / "small").write_bytes(b"small")
    return folder


def work(store: Store, tmp_path: Path, folder: Path) -> list[Any]:
    """Run every operation that a pipeline uses, and return the results."""
    first = store.create("k/pointer", b"1")
    second = store.swap("k/pointer", b"2", first)
    store.put("k/other", b"x")
    files = upload_folder(store, folder, "k/data")
    download_files(store, "k/data", files, tmp_path / "down")
    store.upload("k/unfinished", 2 * PART_SIZE)
    store.abandon("k/unfinished")
    store.delete("k/other")
    blob = store.get("k/pointer")
    assert blob is not None
    assert blob.version == second
    assert first != second
    return [
        blob.data,
        files,
        [(e.key, e.size) for e in store.list("k/")],
        (tmp_path / "down/large").read_bytes() == (folder / "large").read_bytes(),
    ]


@pytest.mark.parametrize("kind", ["500", "503", "429", "cut", "lost", "duplicate", "flip"])
def test_one_fault_at_each_operation(opened: ServerAndOpen, tmp_path: Path, kind: str) -> None:
    server, opener = opened
    folder = source_folder(tmp_path)
    expected = work(opener(uri=f"{opener().uri}/undisturbed"), tmp_path / "undisturbed", folder)
    operations = S3_WORK if isinstance(server, FakeS3) else GCS_WORK
    assert operations <= set(server.operations)
    for operation in sorted(operations if kind != "flip" else {"GetObject"}):
        fault = (
            Fault("status", operation, status=int(kind))
            if kind.isdigit()
            else Fault(kind, operation)
        )  # type: ignore[arg-type]
        server.faults[:] = [fault]
        assert (
            work(opener(uri=f"{opener().uri}/{kind}-{operation}"), tmp_path / operation, folder)
            == expected
        )
        assert fault.hits == 1, operation


def test_several_faults_at_once(opened: ServerAndOpen, tmp_path: Path) -> None:
    server, opener = opened
    folder = source_folder(tmp_path, parts=3)
    expected = work(opener(uri=f"{opener().uri}/undisturbed"), tmp_path / "undisturbed", folder)
    server.faults[:] = [Fault("status", status=503, after=n, retry_after=0) for n in (1, 5, 9)]
    server.faults += [
        Fault("lost", after=3),
        Fault("cut", key="large", times=2),
        Fault("flip", "GetObject", "large", after=3),
    ]
    assert work(opener(uri=f"{opener().uri}/faulty"), tmp_path / "faulty", folder) == expected
    assert [fault.hits for fault in server.faults] == [1, 1, 1, 1, 2, 1]


@pytest.mark.parametrize("module", ["s3", "gcs"])
def test_timed_out_requests_are_retried(
    module: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if module == "s3":
        monkeypatch.setattr("medjob.store.s3.store._READ_S", 0.5)
    else:
        monkeypatch.setattr("medjob.store.gcs._TIMEOUT_S", (1, 0.5))
    server, store = (
        request.getfixturevalue(f"fake_{module}"),
        request.getfixturevalue(f"open_{module}")(),
    )
    files = upload_folder(store, source_folder(tmp_path), "d")
    server.faults[:] = [
        Fault("slow", "GetObject", seconds=1.5),
        Fault("slow", "PutObject", seconds=1.5),
    ]
    store.put("x", b"x")
    download_files(store, "d", files, tmp_path / "down")
    assert [fault.hits for fault in server.faults] == [1, 1]


def test_unreachable_store_ends_with_exit_code_75(opened: ServerAndOpen) -> None:
    server, opener = opened
    store = opener(retry_seconds=0.5)
    server.faults[:] = [Fault("status", status=503, times=None)]
    with pytest.raises(RetryError, match=r"503.*tried for 0 s") as caught:
        store.get("k")
    assert caught.value.exit_code == 75
    assert server.faults[0].hits > 1
    server.stop()
    with pytest.raises(RetryError):
        store.get("k")


@pytest.mark.parametrize("status", [403, 503])
def test_unreadable_store_never_means_step_0(
    opened: ServerAndOpen, tmp_path: Path, status: int
) -> None:
    server, opener = opened
    store = opener(retry_seconds=0.3)
    attempt = Attempt.begin(Artifact(store, "run", "sft", fingerprint(1)), "me")
    checkpoints = Checkpoints(attempt, 2, tmp_path / "snapshots")
    checkpoints.save(10, source_folder(tmp_path))
    checkpoints.wait()
    for operation in (
        "ListObjectsV2" if isinstance(server, FakeS3) else "ListObjects",
        "GetObject",
    ):
        server.faults[:] = [Fault("status", operation, status=status, times=None)]
        with pytest.raises(RetryError):
            checkpoints.restore(tmp_path / "restored")
        assert server.faults[0].hits
    server.faults.clear()
    assert checkpoints.restore(tmp_path / "restored") == 10  # and it was not quarantined


def test_training_continues_while_the_store_is_unreachable(
    opened: ServerAndOpen, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server, opener = opened
    attempt = Attempt.begin(Artifact(opener(retry_seconds=0.3), "run", "sft", fingerprint(1)), "me")
    checkpoints = Checkpoints(attempt, 2, tmp_path / "snapshots")
    server.faults[:] = [outage := Fault("kill_store")]
    checkpoints.save(10, source_folder(tmp_path))
    with pytest.raises(RetryError):
        checkpoints._under_way.result()  # type: ignore[union-attr]
    checkpoints.check()
    assert outage.hits
    server.faults.clear()
    checkpoints.save(20, source_folder(tmp_path))
    checkpoints.wait()
    assert "an earlier checkpoint was not stored" in caplog.text
    assert checkpoints.restore(tmp_path / "restored") == 20


def sizes(server: FakeServer, operation: str) -> list[int]:
    return [request.size for request in server.requests if request.operation == operation]


def test_interrupted_upload_resumes(opened: ServerAndOpen, tmp_path: Path) -> None:
    server, opener = opened
    store, folder = opener(retry_seconds=0), source_folder(tmp_path, parts=4)
    operation = "UploadPart" if isinstance(server, FakeS3) else "PutChunk"
    server.faults[:] = [Fault("status", operation, status=503, after=2, times=None)]
    with pytest.raises(RetryError):
        upload_folder(store, folder, "d")
    assert server.faults[0].hits
    assert "some/prefix/d/large" not in server.objects
    server.faults.clear()
    server.requests.clear()
    files = upload_folder(store, folder, "d")
    assert (
        sum(sizes(server, operation)) == 2 * PART_SIZE + 3
    )  # two of the four full parts had arrived
    assert ("ListParts" if isinstance(server, FakeS3) else "QueryUpload") in server.operations
    download_files(store, "d", files, tmp_path / "down")


def test_persisted_half_of_a_chunk_is_not_sent_again(
    fake_gcs: FakeGCS, open_gcs: Callable[..., Store], tmp_path: Path
) -> None:
    fake_gcs.faults[:] = [Fault("break", "PutChunk", after=1)]
    files = upload_folder(open_gcs(), source_folder(tmp_path, parts=3), "d")
    assert fake_gcs.faults[0].hits == 1
    assert "QueryUpload" in fake_gcs.operations
    assert sizes(fake_gcs, "PutChunk") == [PART_SIZE, PART_SIZE // 2, PART_SIZE // 2, PART_SIZE, 3]
    download_files(open_gcs(), "d", files, tmp_path / "down")


@pytest.mark.parametrize("module", ["s3", "gcs"])
def test_upload_that_the_store_lost_restarts(
    module: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    server, store = (
        request.getfixturevalue(f"fake_{module}"),
        request.getfixturevalue(f"open_{module}")(),
    )
    operation = "UploadPart" if module == "s3" else "PutChunk"
    server.faults[:] = [Fault("status", operation, status=404, code="NoSuchUpload", after=1)]
    files = upload_folder(store, source_folder(tmp_path, parts=3), "d")
    assert server.faults[0].hits == 1
    assert (
        server.operations.count("CreateMultipartUpload" if module == "s3" else "StartUpload") == 2
    )
    download_files(store, "d", files, tmp_path / "down")


def test_interrupted_download_resumes(
    opened: ServerAndOpen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # With one thread, requests are sent in order, so it is known which ones fail.
    monkeypatch.setattr("medjob.store.transfer.THREADS", 1)
    server, opener = opened
    files = [
        file
        for file in upload_folder(opener(), source_folder(tmp_path, parts=4), "d")
        if file.path == "large"
    ]
    server.faults[:] = [Fault("status", "GetObject", status=503, after=2, times=None)]
    with pytest.raises(RetryError):
        download_files(opener(retry_seconds=0), "d", files, tmp_path / "down")
    assert server.faults[0].hits
    arrived = (tmp_path / "down" / f"{PARTIAL}large").stat().st_size
    assert arrived == 2 * PART_SIZE
    server.faults.clear()
    server.requests.clear()
    download_files(opener(), "d", files, tmp_path / "down")
    starts = sorted(
        int(r.headers["range"].removeprefix("bytes=").split("-")[0])
        for r in server.requests
        if "range" in r.headers
    )
    assert starts[0] == arrived
    assert [path.name for path in (tmp_path / "down").iterdir()] == ["large"]


def test_bytes_flipped_at_rest_are_found(opened: ServerAndOpen, tmp_path: Path) -> None:
    server, opener = opened
    files = upload_folder(opener(), source_folder(tmp_path), "d")
    for offset in (0, PART_SIZE, 2 * PART_SIZE + 2):
        server.corrupt("some/prefix/d/large", offset)
        with pytest.raises(InputError, match=r"d/large is damaged"):
            download_files(opener(), "d", files, tmp_path / "down")
        assert not list(tmp_path.glob("down/*large"))  # no file that a later run could use
        server.corrupt("some/prefix/d/large", offset)
    download_files(opener(), "d", files, tmp_path / "down")
