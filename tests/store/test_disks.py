"""Disks that are full, deleted or without hard links and locks, and file names they do not take."""

import errno
import fcntl
import os
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medjob.artifacts.artifact import LATEST, Artifact, Attempt, AttemptLost
from medjob.artifacts.checkpoints import Checkpoints
from medjob.artifacts.finished_rows import FinishedRows
from medjob.config.store import StoreRef
from medjob.errors import ConfigError, MedjobError, RetryError, SupersededError, translate
from medjob.runtime.files import fingerprint
from medjob.store import LocalStore, Store, open_store, probe
from medjob.store.base import PART_SIZE
from medjob.store.transfer import download_files, upload_folder


def failing(number: int) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize(
    "name", ["EPERM", "ENOTSUP", "EOPNOTSUPP", "EMLINK", "EXDEV", "ENOSYS", "EINVAL"]
)
def test_disk_without_hard_links_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(os, "link", failing(getattr(errno, name)))
    with pytest.raises(ConfigError, match="has no hard links") as caught:
        probe(LocalStore(tmp_path / "store"))
    assert "singleWriter" in caught.value.hint
    assert not [path for path in (tmp_path / "store").rglob("*") if path.is_file()]


def test_disk_without_hard_links_works_with_a_single_writer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "link", failing(errno.EPERM))
    store = open_store(StoreRef(uri=f"file://{tmp_path}/store", single_writer=True))
    probe(store)
    attempt = Attempt.begin(Artifact(store, "run", "sft", fingerprint(1)), "me")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a").write_text("1")
    manifest = attempt.publish(tmp_path / "out", {}, {}, {}, {})
    attempt.artifact.fetch(manifest, tmp_path / "back")
    assert (tmp_path / "back" / "a").read_text() == "1"


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.EINVAL])
def test_disk_without_locks_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    store = LocalStore(tmp_path / "store")
    version = store.create("k", b"1")
    monkeypatch.setattr(fcntl, "flock", failing(number))
    with pytest.raises(ConfigError, match="has no file locks"):
        store.swap("k", b"2", version)


def is_translated(error: BaseException, code: int, text: str) -> bool:
    translated = translate(error, "/scratch/work")
    return (
        isinstance(translated, MedjobError)
        and translated.exit_code == code
        and text in str(translated)
    )


def raised(call: Callable[[], Any]) -> BaseException:
    with pytest.raises(BaseException) as caught:  # noqa: PT011
        call()
    return caught.value


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_full_disk_of_a_local_store_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    store, source = LocalStore(tmp_path / "store"), tmp_path / "source"
    source.mkdir()
    (source / "large").write_bytes(b"x" * (PART_SIZE + 1))
    files = upload_folder(store, source, "d")
    version = store.create("k", b"1")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing(number))
        for call in (
            lambda: store.put("d2/a", b"1"),
            lambda: store.create("d2/b", b"1"),
            lambda: store.swap("k", b"2", version),
            lambda: upload_folder(store, source, "d3"),
        ):
            assert is_translated(raised(call), 75, str(tmp_path / "store"))
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", failing(number))
        assert is_translated(
            raised(lambda: upload_folder(store, source, "d4")), 75, str(tmp_path / "store")
        )
    with monkeypatch.context() as patch:
        patch.setattr("medjob.store.transfer._write_all", failing(number))
        error = raised(lambda: download_files(store, "d", files, tmp_path / "down"))
        assert is_translated(error, 75, str(tmp_path / "down"))


def test_full_disk_during_a_download_is_named(
    tmp_path: Path, open_s3: Callable[..., Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "a").write_bytes(b"x" * 100)
    files = upload_folder(open_s3(), tmp_path / "source", "d")
    monkeypatch.setattr("medjob.store.transfer._write_all", failing(errno.ENOSPC))
    error = raised(lambda: download_files(open_s3(), "d", files, tmp_path / "down"))
    assert is_translated(error, 75, str(tmp_path / "down"))


def _torch_error(full: Path) -> BaseException:
    import torch

    return raised(lambda: torch.save({"a": torch.zeros(100_000)}, full))


def _torch_folder_error(full: Path) -> BaseException:
    import torch

    return raised(lambda: torch.save({"a": torch.zeros(2)}, full.parent / "gone" / "optimizer.pt"))


def _numpy_error(full: Path) -> BaseException:
    import numpy as np

    with full.open("wb", buffering=0) as file:
        return raised(lambda: np.zeros(100_000).tofile(file))


def _text_error(full: Path) -> BaseException:
    return raised(lambda: full.write_text("x" * 100_000))


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="needs /dev/full")
@pytest.mark.parametrize("make", [_torch_error, _torch_folder_error, _numpy_error, _text_error])
def test_full_disk_in_a_library_names_the_work_folder(
    make: Callable[[Path], BaseException], tmp_path: Path
) -> None:
    full = tmp_path / "full"
    full.symlink_to("/dev/full")  # a library that replaces the file replaces only the link
    error = make(full)
    assert is_translated(error, 75, "/scratch/work"), f"{type(error).__name__}: {error}"


class SafetensorError(Exception):
    """As in safetensors, whose text depends on its version."""


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(
            "[enforce fail at inline_container.cc:603] . PytorchStreamWriter failed writing file data/36: file write failed"
        ),
        RuntimeError("[enforce fail at inline_container.cc:424] . unexpected pos 4992 vs 4886"),
        RuntimeError("basic_ios::clear: iostream error"),
        RuntimeError("write(): fd 7 failed with No space left on device"),
        SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        ),
        SafetensorError(
            'IoError(Os { code: 28, kind: StorageFull, message: "No space left on device" })'
        ),
        Exception("Disk quota exceeded (os error 122)"),
        OSError("4096 requested and 512 written"),
        shutil.Error([("a", "b", "[Errno 28] No space left on device: 'b'")]),
        sqlite3.OperationalError("database or disk is full"),
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.ENOTCONN, "Transport endpoint is not connected"),
        OSError(errno.EMFILE, "Too many open files"),
        OSError(errno.ESTALE, "Stale file handle"),
        FileNotFoundError(errno.ENOENT, "No such file or directory", "/scratch/work/a"),
    ],
)
def test_errors_of_the_disk_end_with_75_and_a_folder(error: BaseException) -> None:
    assert is_translated(error, 75, "/scratch/work")


@pytest.mark.parametrize(
    "error",
    [
        ValueError("4 requested"),
        RuntimeError("size mismatch"),
        KeyError("No space left on device"),
        FileNotFoundError(2, "No such file", "/x"),
        TypeError("x"),
    ],
)
def test_other_errors_are_not_blamed_on_the_disk(error: BaseException, tmp_path: Path) -> None:
    assert translate(error, str(tmp_path)) is error


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS])
def test_disk_that_cannot_sync_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(os, "fsync", failing(number))
    store = LocalStore(tmp_path / "store")
    probe(store)
    store.put("k", b"1")
    assert (tmp_path / "store/k").read_bytes() == b"1"


def test_operations_that_a_disk_lacks_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "replace", failing(errno.ENOSYS))
    error = raised(lambda: LocalStore(tmp_path / "store").put("k", b"1"))
    assert is_translated(error, 64, "does not support an operation")


def test_file_names_that_are_too_long_are_named(tmp_path: Path) -> None:
    name = "n" * 250
    error = raised(lambda: LocalStore(tmp_path).put(f"d/{name}", b"1"))
    assert is_translated(error, 64, "too long for this disk: ")


def test_deleted_store_is_no_newer_attempt(tmp_path: Path, open_s3: Callable[..., Store]) -> None:
    for store in (LocalStore(tmp_path / "store"), open_s3()):
        attempt = Attempt.begin(Artifact(store, "run", "sft", fingerprint(1)), "me")
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / "a").write_text("1")
        store.delete(attempt.artifact.path(LATEST))
        for call in (
            attempt.check,
            lambda attempt=attempt: attempt.point_to("step-00000001-1"),
            lambda attempt=attempt: attempt.publish(tmp_path / "out", {}, {}, {}, {}),
            lambda attempt=attempt: FinishedRows(attempt).add("rows", [{"id": "1"}]),
        ):
            with pytest.raises(AttemptLost, match=r"LATEST.json was deleted while") as caught:
                call()
            assert caught.value.exit_code == 75
        Attempt.begin(Artifact(store, "run", "sft", fingerprint(1)), "other")
        with pytest.raises(SupersededError, match="newer attempt"):
            attempt.check()


def test_training_ends_soon_after_its_store_was_deleted(tmp_path: Path) -> None:
    attempt = Attempt.begin(
        Artifact(LocalStore(tmp_path / "store"), "run", "sft", fingerprint(1)), "me"
    )
    checkpoints = Checkpoints(attempt, 2, tmp_path / "snapshots")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a").write_text("1")
    checkpoints.save(1, tmp_path / "out")
    checkpoints.wait()
    shutil.rmtree(tmp_path / "store")
    checkpoints.save(2, tmp_path / "out")
    while checkpoints.under_way:
        pass
    with pytest.raises(AttemptLost):
        checkpoints.check()
    with pytest.raises(AttemptLost):
        checkpoints.save(3, tmp_path / "out")


def test_store_deleted_during_a_write_ends_with_75(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = LocalStore(tmp_path / "store")
    real = os.fsync

    def delete(descriptor: int) -> None:
        real(descriptor)
        shutil.rmtree(tmp_path / "store")

    monkeypatch.setattr(os, "fsync", delete)
    for write in (store.put, store.create):
        with pytest.raises(RetryError, match="was deleted while"):
            write("d/k", b"1")
    upload = store.upload("d/large", 3)
    upload.send(0, b"abc")
    with pytest.raises(RetryError, match="was deleted while"):
        upload.finish("")
