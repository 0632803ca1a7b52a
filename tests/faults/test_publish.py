"""Publishing and checkpointing are atomic: killed or superseded at any store operation, they leave
the old state or the new one.
"""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from medjob.artifacts.artifact import LATEST, MARKER, Artifact, Attempt, AttemptLost
from medjob.artifacts.checkpoints import Checkpoints
from medjob.artifacts.finished_rows import FinishedRows
from medjob.errors import InputError, SupersededError
from medjob.runtime.files import fingerprint
from medjob.store import LocalStore, Store
from medjob.store.base import PART_SIZE

KEY = fingerprint({"a": 1})
Open = Callable[[], Store]


class KilledError(BaseException):
    """Simulates SIGKILL. A BaseException, so that no handler catches it."""


class InterruptedStore:
    """A store that calls `event` at its operation `number`, just before or after executing it."""

    def __init__(
        self,
        store: Store,
        number: int = -1,
        event: Callable[[], None] = lambda: None,
        after: bool = False,
    ) -> None:
        self._store = store
        self._number = number
        self._event = event
        self._after = after
        self._lock = threading.Lock()
        self.count = 0
        self.happened = False
        self.uri = store.uri
        self.local_path = store.local_path

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._store, name)
        if name == "upload":
            return lambda key, size: _InterruptedUpload(self, found(key, size))
        return lambda *arguments: self.operate(found, *arguments)

    def operate(self, method: Callable[..., Any], *arguments: Any) -> Any:
        with self._lock:
            now = self.count == self._number
            self.count += 1
            self.happened |= now
        if now and not self._after:
            self._event()
        result = method(*arguments)
        if now and self._after:
            self._event()
        return result


class _InterruptedUpload:
    def __init__(self, store: InterruptedStore, upload: Any) -> None:
        self._store, self._upload = store, upload
        self.part_size, self.in_order = upload.part_size, upload.in_order

    def send(self, offset: int, data: bytes) -> None:
        self._store.operate(self._upload.send, offset, data)

    def finish(self, crc32c: str) -> None:
        self._store.operate(self._upload.finish, crc32c)


@pytest.fixture(params=["file", "s3", "gcs"])
def fresh(request: pytest.FixtureRequest, tmp_path: Path) -> Open:
    """Return a function that opens another empty store at each call."""
    count = iter(range(10_000))
    if request.param == "file":
        return lambda: LocalStore(tmp_path / f"store-{next(count)}")
    opener = request.getfixturevalue(f"open_{request.param}")
    scheme = "s3" if request.param == "s3" else "gs"
    return lambda: opener(uri=f"{scheme}://bucket/{next(count)}")


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that makes a stage's output: two small files and one of two parts."""

    def make(text: str) -> Path:
        folder = tmp_path_factory.mktemp("output")
        (folder / "a").write_text(text)
        (folder / "sub").mkdir()
        (folder / "sub/b").write_text(text * 3)
        (folder / "large").write_bytes(text.encode() * (PART_SIZE // len(text)) + b"end" * 99)
        return folder

    return make


def publish(store: Store, folder: Path, owner: str = "me") -> None:
    attempt = Attempt.begin(Artifact(store, "run", "sft", KEY), owner)
    attempt.publish(folder, {}, {}, {}, {"by": owner})


def published_owner(store: Store, tmp_path: Path) -> str | None:
    """Verify the artifact and return its owner, or None if it is not published."""
    artifact = Artifact(store, "run", "sft", KEY)
    manifest = artifact.manifest()
    if manifest is None:
        return None
    assert artifact.damage(manifest) == []
    return str(manifest.provenance["by"])


def kill() -> None:
    raise KilledError


def count_operations(store: Store, work: Callable[[Store], None]) -> int:
    counting = InterruptedStore(store)
    work(counting)
    return counting.count


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_publish_killed_at_any_operation(
    fresh: Open, output: Callable[[str], Path], tmp_path: Path, after: bool
) -> None:
    folder, again = output("first"), output("other")
    total = count_operations(fresh(), lambda store: publish(store, folder))
    assert total >= 8  # LATEST, three files in four parts, the check, the marker
    seen = set()
    for number in range(total):
        store = fresh()
        interrupted = InterruptedStore(store, number, kill, after)
        with pytest.raises(KilledError):
            publish(interrupted, folder)
        assert interrupted.happened
        owner = published_owner(store, tmp_path)
        seen.add(owner)
        if owner is None:  # the next attempt can publish
            publish(store, again, "next")
            assert published_owner(store, tmp_path) == "next"
    assert seen == ({None, "me"} if after else {None})


def test_publish_superseded_at_any_operation(
    fresh: Open, output: Callable[[str], Path], tmp_path: Path
) -> None:
    slow, quick = output("slow!"), output("quick")
    total = count_operations(fresh(), lambda store: publish(store, slow))
    for number in range(2, total):  # starting when it owns its epoch
        store = fresh()
        stale = InterruptedStore(store, number, lambda store=store: publish(store, quick, "newer"))
        with pytest.raises(SupersededError) as caught:
            publish(stale, slow, "stale")
        assert stale.happened
        assert caught.value.exit_code == 76
        assert published_owner(store, tmp_path) == "newer"


def test_one_of_twenty_concurrent_publishers_wins(
    fresh: Open, output: Callable[[str], Path], tmp_path: Path
) -> None:
    store, folder = fresh(), output("race.")

    def write(number: int) -> str:
        try:
            publish(store, folder, f"writer {number}")
        except SupersededError:
            return "superseded"
        return f"writer {number}"

    with ThreadPoolExecutor(20) as pool:
        ended = list(pool.map(write, range(20)))
    winners = set(ended) - {"superseded"}
    assert len(winners) == 1
    assert published_owner(store, tmp_path) == winners.pop()
    assert Artifact(store, "run", "sft", KEY).epoch() == 20  # every attempt had its own


def save_checkpoints(store: Store, folder: Path, tmp_path: Path, steps: tuple[int, ...]) -> None:
    attempt = Attempt.begin(Artifact(store, "run", "sft", KEY), "me")
    checkpoints = Checkpoints(attempt, 1, tmp_path / "snapshots")
    for step in steps:
        checkpoints.save(step, folder)
        checkpoints.wait()


def restore(store: Store, tmp_path: Path) -> int | None:
    attempt = Attempt.begin(Artifact(store, "run", "sft", KEY), "reader")
    return Checkpoints(attempt, 1, tmp_path / "s").restore(tmp_path / "restored")


def test_checkpoint_killed_at_any_operation(
    fresh: Open, output: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = output("state")
    first = count_operations(
        fresh(), lambda store: save_checkpoints(store, folder, tmp_path, (10,))
    )
    total = count_operations(
        fresh(), lambda store: save_checkpoints(store, folder, tmp_path, (10, 20))
    )
    seen = []
    for number in range(first, total):  # including the deletion of the older one
        store = fresh()
        interrupted = InterruptedStore(store, number, kill)
        with pytest.raises(KilledError):
            save_checkpoints(interrupted, folder, tmp_path, (10, 20))
        assert interrupted.happened
        seen.append(restore(store, tmp_path))
    assert set(seen) == {10, 20}
    assert seen == sorted(seen)  # once the newer one is visible, it stays


def test_checkpoint_superseded_at_any_operation(
    fresh: Open, output: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = output("state")
    first = count_operations(fresh(), lambda store: save_checkpoints(store, folder, tmp_path, ()))
    marked = count_operations(
        fresh(), lambda store: save_checkpoints(store, folder, tmp_path, (10,))
    )
    for number in range(first, marked - 2):  # after LATEST.json only old ones are deleted
        store = fresh()
        newer: list[Attempt] = []
        stale = InterruptedStore(
            store,
            number,
            lambda store=store, n=newer: n.append(
                Attempt.begin(Artifact(store, "run", "sft", KEY), "newer")
            ),
        )
        with pytest.raises(SupersededError):
            save_checkpoints(stale, folder, tmp_path, (10,))
        assert stale.happened
        newer[0].check()
        assert restore(store, tmp_path) in {None, 10}


def test_superseded_attempt_cannot_add_finished_rows(fresh: Open) -> None:
    store = fresh()
    artifact = Artifact(store, "run", "sft", KEY)
    stale = FinishedRows(Attempt.begin(artifact, "stale"))
    stale.add("rows", [{"id": "1"}])
    Attempt.begin(artifact, "newer")
    with pytest.raises(SupersededError):
        stale.add("rows", [{"id": "2"}])
    assert set(stale.read("rows")) == {"1"}


def flipped(data: bytes, position: int) -> bytes:
    return data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]


def each_flipped_byte(store: Store, key: str) -> Iterator[bytes]:
    blob = store.get(key)
    assert blob is not None
    for position in range(len(blob.data)):
        yield flipped(blob.data, position)
    store.put(key, blob.data)


def test_every_flipped_byte_is_found(fresh: Open, tmp_path: Path) -> None:
    store, folder = fresh(), tmp_path / "small"
    folder.mkdir()
    (folder / "a").write_text("some data")
    attempt = Attempt.begin(Artifact(store, "run", "sft", KEY), "me")
    FinishedRows(attempt).add("rows", [{"id": "1", "score": 0.5}])
    attempt.publish(folder, {"x": 1}, {"in": "d"}, {"loss": 1.5}, {"by": "me"})
    artifact, found = attempt.artifact, 0
    manifest = artifact.manifest()
    assert manifest is not None
    for broken in each_flipped_byte(store, artifact.path(MARKER)):
        store.put(artifact.path(MARKER), broken)
        with pytest.raises(InputError):
            artifact.manifest()
        found += 1
    for broken in each_flipped_byte(store, artifact.path("data", "1", "a")):
        store.put(artifact.path("data", "1", "a"), broken)
        with pytest.raises(InputError, match="is damaged"):
            artifact.fetch(manifest, tmp_path / "back")
        found += 1
    for broken in each_flipped_byte(store, artifact.path("parts", "rows", "000001-00000001.jsonl")):
        store.put(artifact.path("parts", "rows", "000001-00000001.jsonl"), broken)
        assert FinishedRows(attempt).read("rows") == {}
        found += 1
    for broken in each_flipped_byte(store, artifact.path(LATEST)):
        store.put(artifact.path(LATEST), broken)
        with pytest.raises(AttemptLost, match="was damaged while"):
            attempt.check()
        found += 1
    assert found > 500
    attempt.check()
    assert artifact.damage(manifest) == []
