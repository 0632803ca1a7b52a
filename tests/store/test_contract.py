"""What every store has to do. Stores are added to the fixture's list."""

import os
import threading
from pathlib import Path

import pytest

from medjob.errors import ConfigError, InputError
from medjob.store import Conflict, Store, open_store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(f"file://{tmp_path}/store")


def test_small_objects(store: Store) -> None:
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


def test_swap_wants_the_version_it_was_shown(store: Store) -> None:
    old = store.create("k", b"1")
    new = store.swap("k", b"2", old)
    with pytest.raises(Conflict):
        store.swap("k", b"3", old)
    with pytest.raises(Conflict):
        store.swap("none", b"3", old)
    blob = store.get("k")
    assert blob is not None
    assert (blob.data, blob.version) == (b"2", new)


def test_of_many_writers_one_wins(store: Store) -> None:
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


def test_files_go_up_and_down_and_are_listed(store: Store, tmp_path: Path) -> None:
    source = tmp_path / "file"
    source.write_bytes(os.urandom(100_000))
    store.upload(source, "run/x/file")
    store.put("run/x/a", b"1")
    store.put("run/y", b"1")
    store.download("run/x/file", tmp_path / "down/file")
    assert (tmp_path / "down/file").read_bytes() == source.read_bytes()
    assert [(entry.key, entry.size) for entry in store.list("run/x/")] == [("run/x/a", 1), ("run/x/file", 100_000)]
    assert list(store.list("nothing/")) == []
    assert [path.name for path in (tmp_path / "down").iterdir()] == ["file"]


def test_a_missing_file_is_an_error_and_leaves_nothing(store: Store, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not there"):
        store.download("nothing", tmp_path / "x")
    assert not list(tmp_path.glob("x*"))


@pytest.mark.parametrize("key", ["../outside", "/etc/passwd", "a/../../b"])
def test_keys_stay_inside(store: Store, key: str) -> None:
    with pytest.raises(InputError, match="leads out"):
        store.put(key, b"x")


def test_schemes_that_are_not_there_are_refused() -> None:
    with pytest.raises(ConfigError, match="gs://"):
        open_store("gs://bucket/x")
