"""Nothing outside a folder's store shares a file with it, so published files never change."""

import errno
import fcntl
import os
from pathlib import Path
from typing import Any

import pytest

from medjob.errors import InputError
from medjob.runtime.files import File
from medjob.store import LocalStore
from medjob.store.base import PART_SIZE
from medjob.store.transfer import PARTIAL, download_files, find_damage, upload_folder

SIZES = {"empty": 0, "small": 1000, "sub/large": 2 * PART_SIZE + 1}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, size in SIZES.items():
        path = tmp_path / "source" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.urandom(size))
    return tmp_path / "source"


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


@pytest.fixture
def files(store: LocalStore, folder: Path) -> list[File]:
    return upload_folder(store, folder, "d")


def write_in_place(folder: Path) -> None:
    """Write to each file below `folder`, as a library does that opens its input for writing."""
    for name in SIZES:
        with (folder / name).open("r+b") as file:
            file.write(b"XXXX")


def published(store: LocalStore, name: str) -> Path:
    return store.root / "d" / name


def test_writing_to_a_download_does_not_change_the_store(
    store: LocalStore, files: list[File], tmp_path: Path
) -> None:
    download_files(store, "d", files, tmp_path / "down")
    write_in_place(tmp_path / "down")
    assert find_damage(store, "d", files) == []


def test_writing_to_uploaded_files_does_not_change_the_store(
    store: LocalStore, files: list[File], folder: Path
) -> None:
    write_in_place(folder)
    assert find_damage(store, "d", files) == []


@pytest.mark.parametrize("link", [os.link, os.symlink])
@pytest.mark.parametrize("prefix", ["", PARTIAL])
def test_links_into_the_store_are_replaced_by_copies(
    store: LocalStore, files: list[File], tmp_path: Path, link: Any, prefix: str
) -> None:
    """Earlier versions linked files, and an interrupted one left links to temporary names."""
    down = tmp_path / "down"
    for name in SIZES:
        path = down / name
        path.parent.mkdir(parents=True, exist_ok=True)
        link(published(store, name), path.with_name(prefix + path.name))
    download_files(store, "d", files, down)
    write_in_place(down)
    assert find_damage(store, "d", files) == []
    assert not [path for path in down.rglob("*") if path.is_symlink() or PARTIAL in path.name]


def test_link_to_a_temporary_name_is_not_written_through(
    store: LocalStore, files: list[File], tmp_path: Path
) -> None:
    (tmp_path / "notes").write_text("my notes")
    (tmp_path / "down").mkdir()
    (tmp_path / "down" / f"{PARTIAL}small").symlink_to(tmp_path / "notes")
    download_files(store, "d", files, tmp_path / "down")
    assert (tmp_path / "notes").read_text() == "my notes"


def test_lock_that_is_a_link_does_not_empty_its_target(store: LocalStore, tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("my notes")
    version = store.create("d/k", b"1")
    (store.root / "d/.lock-k").symlink_to(tmp_path / "notes")
    with pytest.raises(InputError, match="is a symbolic link"):
        store.swap("d/k", b"2", version)
    assert (tmp_path / "notes").read_text() == "my notes"


def test_interrupted_copy_is_resumed(store: LocalStore, files: list[File], tmp_path: Path) -> None:
    partial = tmp_path / "down/sub" / f"{PARTIAL}large"
    partial.parent.mkdir(parents=True)
    for start in (published(store, "sub/large").read_bytes()[:5000], b"other bytes"):
        partial.write_bytes(start)
        download_files(store, "d", files, tmp_path / "down")
        assert (tmp_path / "down/sub/large").read_bytes() == (
            published(store, "sub/large").read_bytes()
        )
        (tmp_path / "down/sub/large").unlink()


@pytest.mark.parametrize("size", [999, 1001])
def test_damaged_length_is_reported(
    store: LocalStore, files: list[File], tmp_path: Path, size: int
) -> None:
    os.truncate(published(store, "small"), size)
    with pytest.raises(InputError, match=f"small is damaged: it has {size} bytes"):
        download_files(store, "d", files, tmp_path / "down")


def test_files_are_cloned_where_the_file_system_can(
    store: LocalStore, files: list[File], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ext4 cannot, so `ficlone` copies. Nothing is read through the store then."""

    cloned = []

    def ficlone(target: Any, request: int, source: int) -> None:
        assert request == 0x40049409
        cloned.append(target)
        os.sendfile(target.fileno(), source, 0, os.fstat(source).st_size)
        os.lseek(target.fileno(), 0, os.SEEK_SET)

    def refuse(*_: Any) -> None:
        raise OSError(errno.EIO, "read")

    monkeypatch.setattr(fcntl, "ioctl", ficlone)
    monkeypatch.setattr(LocalStore, "read", refuse)
    download_files(store, "d", files, tmp_path / "down")
    assert len(cloned) == len(files)
    for name in SIZES:
        assert (tmp_path / "down" / name).read_bytes() == published(store, name).read_bytes()
