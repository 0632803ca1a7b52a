"""The store contract, tested on every store of the `store` fixture."""

import os
import threading
from pathlib import Path

import pytest

from medjob.errors import InputError
from medjob.runtime.files import describe_folder
from medjob.store import Conflict, Store, probe
from medjob.store.base import PART_SIZE
from medjob.store.transfer import download_files, find_damage, upload_folder


def test_put_get_and_delete(store: Store) -> None:
    assert store.get("a/b") is None
    store.put("a/b", b"1")
    store.put("a/b", b"2")
    blob = store.get("a/b")
    assert blob is not None
    assert blob.data == b"2"
    store.delete("a/b")
    store.delete("a/b")
    assert store.get("a/b") is None


def test_create_never_overwrites(store: Store) -> None:
    store.create("k", b"first")
    with pytest.raises(Conflict):
        store.create("k", b"second")
    blob = store.get("k")
    assert blob is not None
    assert blob.data == b"first"


def test_swap_requires_the_current_version(store: Store) -> None:
    old = store.create("k", b"1")
    new = store.swap("k", b"2", old)
    with pytest.raises(Conflict):
        store.swap("k", b"3", old)
    with pytest.raises(Conflict):
        store.swap("none", b"3", old)
    blob = store.get("k")
    assert blob is not None
    assert (blob.data, blob.version) == (b"2", new)


def test_one_of_many_concurrent_swaps_wins(store: Store) -> None:
    version, wins = store.create("k", b"0"), []

    def write(number: int) -> None:
        try:
            store.swap("k", b"w%d" % number, version)
            wins.append(number)
        except Conflict:
            return

    threads = [threading.Thread(target=write, args=(n,)) for n in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wins) == 1
    blob = store.get("k")
    assert blob is not None
    assert blob.data == b"w%d" % wins[0]


def test_repeating_a_conditional_write_succeeds(store: Store) -> None:
    first = store.create("k", b"by me")
    assert store.create("k", b"by me") == first
    second = store.swap("k", b"by me again", first)
    assert store.swap("k", b"by me again", first) == second


def test_list_returns_a_prefix_in_order(store: Store) -> None:
    keys = [f"run/x/{n:02d} name+&%é" for n in range(17)]  # more than one page of the fakes
    for key in reversed(keys):
        store.put(key, b"1")
    store.put("run/y", b"12")
    assert [(entry.key, entry.size) for entry in store.list("run/x/")] == [(key, 1) for key in keys]
    assert [entry.key for entry in store.list("run/")][-1] == "run/y"
    assert list(store.list("nothing/")) == []


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Small files, an empty one, one of exactly one part, and one with a third part of 1 byte."""
    for name, size in (
        ("small", 1000),
        ("sub/empty", 0),
        ("sub/one part", PART_SIZE),
        ("large", 2 * PART_SIZE + 1),
    ):
        path = tmp_path / "source" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.urandom(size))
    return tmp_path / "source"


def test_files_survive_upload_and_download(store: Store, folder: Path, tmp_path: Path) -> None:
    files = upload_folder(store, folder, "run/data")
    assert files == describe_folder(folder)
    assert {entry.key: entry.size for entry in store.list("run/data/")} == {
        f"run/data/{file.path}": file.size for file in files
    }
    download_files(store, "run/data", files, tmp_path / "down")
    assert describe_folder(tmp_path / "down") == files  # no temporary files are left
    assert find_damage(store, "run/data", files) == []
    assert list(store.unfinished("run/")) == []


def test_ranged_reads_and_their_errors(store: Store, folder: Path) -> None:
    upload_folder(store, folder, "d")
    large = (folder / "large").read_bytes()
    for start, length in ((PART_SIZE - 3, 7), (0, 1), (2 * PART_SIZE, 1), (5, 0)):
        store.read("d/large", start, memoryview(piece := bytearray(length)))
        assert piece == large[start : start + length]
    with pytest.raises(InputError, match="does not exist"):
        store.read("d/nothing", 0, memoryview(bytearray(10)))
    for start in (995, 1000):
        with pytest.raises(InputError, match="is shorter"):
            store.read("d/small", start, memoryview(bytearray(10)))


def test_missing_and_damaged_files_are_named_and_not_kept(
    store: Store, folder: Path, tmp_path: Path
) -> None:
    files = upload_folder(store, folder, "d")
    store.delete("d/small")
    store.put("d/sub/one part", b"x" * PART_SIZE)
    missing, damaged = find_damage(store, "d", files)
    assert missing.endswith("d/small does not exist")
    assert "d/sub/one part is damaged" in damaged
    for file in files:
        if file.path in {"small", "sub/one part"}:
            with pytest.raises(InputError, match=file.path):
                download_files(store, "d", [file], tmp_path / "down")
            assert not (tmp_path / "down" / file.path).exists()


def test_unfinished_uploads_are_listed_and_aborted(store: Store) -> None:
    upload = store.upload("d/large", PART_SIZE + 1)
    upload.send(0, b"x" * upload.part_size)
    assert store.get("d/large") is None
    folder = store.local_path("d")
    if folder is not None:
        for partial in folder.iterdir():
            os.utime(partial, (0, 0))  # a recent file may belong to a running upload
    if store.uri.startswith("gs"):
        assert list(store.unfinished("d/")) == []  # GCS does not list resumable uploads
    else:
        assert list(store.unfinished("d/")) == ["d/large"]
    store.abandon("d/large")
    assert list(store.unfinished("d/")) == []


def test_probe_passes_and_leaves_nothing(store: Store) -> None:
    probe(store)
    assert list(store.list("")) == []


@pytest.mark.parametrize("key", ["../outside", "/etc/passwd", "a/../../b"])
def test_keys_outside_the_store_are_rejected(store: Store, key: str) -> None:
    with pytest.raises(InputError, match="points outside"):
        store.put(key, b"x")
