"""A folder that others can write to may contain pipes, devices, links and directories: none of them
blocks a command, exhausts the memory, or leads a write to another folder."""

import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from medjob.errors import ConfigError, InputError
from medjob.runtime.files import File
from medjob.store import LocalStore, Store
from medjob.store.base import PART_SIZE
from medjob.store.transfer import download_files, find_damage


def _stop(*_: object) -> None:
    raise TimeoutError


@pytest.fixture(autouse=True)
def time_limit() -> Iterator[None]:
    """End a read that blocks, or that never ends."""
    previous = signal.signal(signal.SIGALRM, _stop)
    signal.alarm(10)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


@pytest.fixture
def folder(tmp_path: Path) -> LocalStore:
    (tmp_path / "store/d").mkdir(parents=True)
    return LocalStore(tmp_path / "store")


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


IRREGULAR: dict[str, Callable[[Path], object]] = {
    "pipe": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "loop": lambda path: path.symlink_to(path.name),
    "socket": _socket,
    "directory": lambda path: path.mkdir(),
}


@pytest.mark.parametrize("kind", IRREGULAR)
def test_only_regular_files_are_read(folder: LocalStore, tmp_path: Path, kind: str) -> None:
    version = folder.create("d/x", b"old")
    path = folder.root / "d/x"
    path.unlink()
    IRREGULAR[kind](path)
    files = [File(path="x", size=3, sha256="0" * 64, crc32c="00000000")]
    reads: list[Callable[[], object]] = [
        lambda: folder.get("d/x"),
        lambda: folder.read("d/x", 0, memoryview(bytearray(3))),
        lambda: folder.create("d/x", b"new"),
        lambda: folder.swap("d/x", b"new", version),
        lambda: download_files(folder, "d", files, tmp_path / "down"),
    ]
    if kind != "directory":  # which holds objects, and is none
        reads.append(lambda: folder.list("d/"))
    for read in reads:
        with pytest.raises(InputError, match="store/d/x is not a regular file"):
            read()
    assert find_damage(folder, "d", files)[0].endswith("store/d/x is not a regular file")


def test_directory_is_neither_replaced_nor_deleted(folder: LocalStore) -> None:
    (folder.root / "d/x").mkdir()
    with pytest.raises(InputError, match="is a directory, not a file"):
        folder.put("d/x", b"data")
    upload = folder.upload("d/x", PART_SIZE + 1)
    with pytest.raises(InputError, match="is a directory, not a file"):
        upload.finish("00000000")
    folder.delete("d/x")
    assert (folder.root / "d/x").is_dir()


@pytest.mark.parametrize("link", ["d", "d/e"])
def test_no_write_follows_a_link_to_another_folder(
    folder: LocalStore, tmp_path: Path, link: str
) -> None:
    home = tmp_path / "home"
    (home / "e").mkdir(parents=True)
    for name in ("x", "e/x"):
        (home / name).write_text("mine")
    version = LocalStore(home).create("new", b"1")
    (folder.root / "d").rmdir()
    (folder.root / link).parent.mkdir(exist_ok=True)
    (folder.root / link).symlink_to(home)
    before = {path: path.read_bytes() for path in home.rglob("*") if path.is_file()}
    writes: list[Callable[[], object]] = [
        lambda: folder.put(f"{link}/x", b"theirs"),
        lambda: folder.create(f"{link}/y", b"theirs"),
        lambda: folder.swap(f"{link}/new", b"2", version),
        lambda: folder.upload(f"{link}/e/x", PART_SIZE + 1),
        lambda: folder.delete(f"{link}/x"),
        lambda: folder.abandon(f"{link}/x"),
    ]
    for write in writes:
        with pytest.raises(InputError, match="is a symbolic link"):
            write()
    assert {path: path.read_bytes() for path in home.rglob("*") if path.is_file()} == before


def test_root_of_a_store_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "store").symlink_to(tmp_path / "disk")
    LocalStore(tmp_path / "store").put("a/b", b"data")
    assert (tmp_path / "disk/a/b").read_bytes() == b"data"


@pytest.mark.parametrize("kind", ["pipe", "link"])
def test_planted_lock_is_refused(folder: LocalStore, tmp_path: Path, kind: str) -> None:
    version = folder.create("d/x", b"1")
    lock = folder.root / "d/.lock-x"
    if kind == "pipe":
        os.mkfifo(lock)
    else:
        lock.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=r"\.lock-x is (not a regular file|a symbolic link)"):
        folder.swap("d/x", b"2", version)
    assert not (tmp_path / "elsewhere").exists()


def test_loop_of_links_in_place_of_a_folder_is_named(folder: LocalStore) -> None:
    (folder.root / "run").mkdir()
    (folder.root / "run/sft").symlink_to("sft")
    for prefix in ("run/", "run/sft/"):
        with pytest.raises(InputError, match=r"run/sft is (not a regular file|a loop)"):
            folder.list(prefix)


def test_unknown_home_folder_is_named() -> None:
    with pytest.raises(ConfigError, match=r"cluster\.store: ~nosuchuser/x"):
        LocalStore(Path("~nosuchuser/x"))


def test_huge_object_is_not_read_into_memory(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("local", "s3.store", "gcs", "base"):
        monkeypatch.setattr(f"medjob.store.{module}.MAX_BLOB_SIZE", 1000)
    store.put("a", b"x" * 1000)
    store.put("b", b"x" * 1001)
    blob = store.get("a")
    assert blob is not None
    assert len(blob.data) == 1000
    with pytest.raises(InputError, match="b has more than 1000 bytes"):
        store.get("b")
