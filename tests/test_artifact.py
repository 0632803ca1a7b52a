"""Publishing and verifying artifacts, concurrent attempts, checkpoints and finished rows."""

import json
import os
import time
from pathlib import Path

import pytest

from medjob.artifacts.artifact import LATEST, MARKER, Artifact, Attempt, Manifest
from medjob.artifacts.checkpoints import Checkpoints, read_manifest, states
from medjob.artifacts.finished_rows import FinishedRows, _first_line
from medjob.artifacts.seal import seal
from medjob.errors import InputError, RetryError, SupersededError
from medjob.runtime.files import canonical_json, fingerprint, safe_path
from medjob.store import LocalStore


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    return Artifact(LocalStore(tmp_path / "store"), "run", "sft", fingerprint({"a": 1}))


def folder(tmp_path: Path, text: str = "data", name: str = "out") -> Path:
    path = tmp_path / name
    (path / "sub").mkdir(parents=True, exist_ok=True)
    (path / "a.txt").write_text(text)
    (path / "sub/b.txt").write_text(text * 2)
    return path


def publish(attempt: Attempt, path: Path) -> Manifest:
    return attempt.publish(path, {"x": 1}, {"in": "d"}, {"loss": 1.0}, {"host": "h"})


def test_published_files_can_be_fetched(artifact: Artifact, tmp_path: Path) -> None:
    assert artifact.manifest() is None
    made = publish(Attempt.begin(artifact, "me"), folder(tmp_path))
    assert artifact.manifest() == made
    back = artifact.fetch(made, tmp_path / "back")
    assert (back / "sub/b.txt").read_text() == "datadata"


def test_digest_depends_only_on_the_files(artifact: Artifact, tmp_path: Path) -> None:
    first = publish(Attempt.begin(artifact, "me"), folder(tmp_path))
    other = Artifact(LocalStore(tmp_path / "other"), "another", "sft", artifact.key)
    second = Attempt.begin(other, "you").publish(
        folder(tmp_path), {}, {}, {}, {"host": "elsewhere"}
    )
    assert first.digest == second.digest
    changed = Artifact(LocalStore(tmp_path / "third"), "run", "sft", artifact.key)
    assert (
        publish(Attempt.begin(changed, "me"), folder(tmp_path, "Data", "out2")).digest
        != second.digest
    )


@pytest.mark.parametrize("name", ["a.txt", "sub/b.txt"])
def test_every_flipped_byte_is_found(artifact: Artifact, tmp_path: Path, name: str) -> None:
    made = publish(Attempt.begin(artifact, "me"), folder(tmp_path))
    victim = tmp_path / "store" / artifact.path("data", "1", name)
    original = victim.read_bytes()
    for position in range(len(original)):
        victim.unlink()
        victim.write_bytes(
            original[:position] + bytes([original[position] ^ 1]) + original[position + 1 :]
        )
        with pytest.raises(InputError, match=f"{name} is damaged"):
            artifact.fetch(made, tmp_path / "back")
    victim.unlink()
    with pytest.raises(InputError, match="does not exist"):
        artifact.fetch(made, tmp_path / "back")


def test_marker_that_is_damaged_or_of_another_key_is_rejected(
    artifact: Artifact, tmp_path: Path
) -> None:
    publish(Attempt.begin(artifact, "me"), folder(tmp_path))
    marker = tmp_path / "store" / artifact.path(MARKER)
    good = marker.read_text()
    for broken in (
        good[:-5],
        good.replace('"key": "', '"key": "0'),
        good.replace('"size": 4', '"size": 5'),
    ):
        marker.write_text(broken)
        with pytest.raises(InputError):
            artifact.manifest()
    marker.write_text(good.replace('"a.txt"', '"../a.txt"'))
    with pytest.raises(InputError, match="points outside"):
        artifact.manifest()


def test_superseded_attempt_fails_at_every_write(artifact: Artifact, tmp_path: Path) -> None:
    old = Attempt.begin(artifact, "old")
    new = Attempt.begin(artifact, "new")
    assert (old.epoch, new.epoch) == (1, 2)
    out = folder(tmp_path)
    for write in (
        lambda: save(old, tmp_path, 1, out),
        lambda: FinishedRows(old).add("rows", [{"id": "a"}]),
        lambda: publish(old, out),
    ):
        with pytest.raises(SupersededError) as caught:
            write()
        assert caught.value.exit_code == 76
    made = publish(new, folder(tmp_path, "new", "out2"))
    assert made.epoch == 2
    artifact.fetch(made, tmp_path / "back")
    assert (tmp_path / "back/a.txt").read_text() == "new"


def test_second_publisher_is_superseded(artifact: Artifact, tmp_path: Path) -> None:
    first = Attempt.begin(artifact, "a")
    publish(first, folder(tmp_path))
    late = Attempt.begin(artifact, "b")
    with pytest.raises(SupersededError, match="published it first"):
        publish(late, folder(tmp_path, "late", "out2"))
    manifest = artifact.manifest()
    assert manifest is not None
    artifact.fetch(manifest, tmp_path / "back")
    assert (tmp_path / "back/a.txt").read_text() == "data"


def test_symbolic_links_are_not_published(artifact: Artifact, tmp_path: Path) -> None:
    out = folder(tmp_path)
    (out / "link").symlink_to("/etc/hostname")
    with pytest.raises(InputError, match="is a symbolic link"):
        publish(Attempt.begin(artifact, "me"), out)


def test_names_that_are_not_utf_8_are_not_published(artifact: Artifact, tmp_path: Path) -> None:
    out = folder(tmp_path)
    (out / "\u00e9t\u00e9").write_text("a name in UTF-8")
    publish(Attempt.begin(artifact, "me"), out)
    (out / os.fsdecode(b"caf\xe9")).write_text("a name in Latin-1")
    with pytest.raises(InputError, match=r"caf\\udce9: the name is not UTF-8"):
        publish(Attempt.begin(artifact, "me"), out)


@pytest.mark.parametrize("path", ["/a", "../a", "a/../../b", "", "a\\..\\b"])
def test_paths_outside_the_folder_are_rejected(path: str) -> None:
    with pytest.raises(InputError):
        safe_path(path)


def test_canonical_json_rejects_nan_and_unknown_types() -> None:
    assert canonical_json({"b": 1, "a": [1.5, None]}) == '{"a":[1.5,null],"b":1}'
    for value in (float("nan"), {1, 2}, object()):
        with pytest.raises((ValueError, TypeError)):
            canonical_json(value)


def save(attempt: Attempt, tmp_path: Path, step: int, folder: Path) -> None:
    checkpoints = Checkpoints(attempt, 9, tmp_path / "snapshots")
    checkpoints.save(step, folder)
    checkpoints.wait()


def test_newest_and_best_checkpoints_are_kept(artifact: Artifact, tmp_path: Path) -> None:
    checkpoints = Checkpoints(Attempt.begin(artifact, "me"), 2, tmp_path / "snapshots")
    for step in (10, 20, 30, 40):
        checkpoints.save(step, folder(tmp_path, str(step)), best_step=10)
    checkpoints.wait()
    steps = sorted(
        path.name for path in (tmp_path / "store" / artifact.path("checkpoints")).iterdir()
    )
    assert steps == ["step-00000010-1", "step-00000030-1", "step-00000040-1"]
    assert (
        json.loads((tmp_path / "store" / artifact.path(LATEST)).read_text())["checkpoint"]
        == "step-00000040-1"
    )
    assert not list((tmp_path / "snapshots").iterdir())
    again = Checkpoints(Attempt.begin(artifact, "again"), 2, tmp_path / "snapshots")
    assert again.restore(tmp_path / "r") == 40
    assert (tmp_path / "r/checkpoint-40/a.txt").read_text() == "40"
    (tmp_path / "r/checkpoint-40/a.txt").write_text("rewritten by the trainer")
    assert (
        Checkpoints(Attempt.begin(artifact, "x"), 2, tmp_path / "s").restore(tmp_path / "r2") == 40
    )  # the store's copy did not change


def test_torn_and_damaged_checkpoints_are_skipped(
    artifact: Artifact, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (10, 20, 30, 40):
        save(Attempt.begin(artifact, "me"), tmp_path, step, folder(tmp_path, str(step)))
    root = tmp_path / "store" / artifact.path("checkpoints")
    (root / "step-00000040-4/part-0/a.txt").write_text("41")  # same size
    (root / "step-00000030-3/MANIFEST.json").unlink()
    (root / "step-00000020-2/MANIFEST.json").write_text(
        json.dumps({"step": 20, "parts": [[]], "seal": "x"})
    )
    again = Checkpoints(Attempt.begin(artifact, "b"), 5, tmp_path / "snapshots")
    assert again.restore(tmp_path / "r") == 10
    assert "skipping checkpoint step-00000040-4:" in caplog.text
    assert "a.txt is damaged" in caplog.text
    assert "skipping checkpoint step-00000030-3: it is torn" in caplog.text
    assert "skipping checkpoint step-00000020-2:" in caplog.text
    caplog.clear()
    assert again.restore(tmp_path / "r") == 10
    assert (
        "skipping checkpoint step-00000040-4: it is damaged" in caplog.text
    )  # quarantined, and not read again
    assert (root / "step-00000040-4/part-0/a.txt").exists()  # kept for diagnosis


def test_checkpoint_of_two_nodes_is_restored_as_a_union(artifact: Artifact, tmp_path: Path) -> None:
    attempt = Attempt.begin(artifact, "me")
    nodes = [Checkpoints(attempt, 2, tmp_path / f"snapshots-{n}", node=n, nodes=2) for n in (0, 1)]
    for n in (0, 1):
        disk = tmp_path / f"disk-{n}"
        disk.mkdir()
        (disk / f"rng_state_{n}.pth").write_text(f"state of rank {n}")
        (disk / "trainer_state.json").write_text(f"node {n}'s")
    nodes[0].save(5, tmp_path / "disk-0")
    time.sleep(0.5)
    assert "finished" not in states(artifact).values()  # node 0 waits for node 1's part
    nodes[1].save(5, tmp_path / "disk-1")
    for node in nodes:
        node.wait()
    for n in (0, 1):
        fresh = Checkpoints(Attempt.begin(artifact, "again"), 2, tmp_path / "s", node=n, nodes=2)
        assert fresh.restore(tmp_path / f"new-disk-{n}") == 5
        found = {
            path.name: path.read_text()
            for path in (tmp_path / f"new-disk-{n}/checkpoint-5").iterdir()
        }
        assert found == {
            "rng_state_0.pth": "state of rank 0",
            "rng_state_1.pth": "state of rank 1",
            "trainer_state.json": "node 0's",
        }


def test_missing_part_of_a_node_leaves_a_torn_checkpoint(
    artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medjob.artifacts.checkpoints.PEER_TIMEOUT_S", 0.5)
    alone = Checkpoints(Attempt.begin(artifact, "me"), 2, tmp_path / "snapshots", node=0, nodes=2)
    alone.save(5, folder(tmp_path))
    with pytest.raises(RetryError, match="node 1 stored no part"):
        alone.wait()
    assert states(artifact) == {"step-00000005-1": "torn"}


def latest(**fields: object) -> bytes:
    """LATEST.json with a hash that matches its fields."""
    prefix = f"run/sft/{fingerprint({'a': 1})[:12]}"
    content = {"artifact": prefix, "epoch": 1, "owner": "x", "checkpoint": None} | fields
    content = {name: value for name, value in content.items() if value != "missing"}
    return json.dumps(content | {"hash": fingerprint(content)}).encode()


@pytest.mark.parametrize(
    "lost",
    [
        None,
        b'{"epoch":1,"owner":"x","checkpoint":null,"seal":"y"}',
        b"not json",
        b'["seal"]',
        b"null",
        b"[" * 200_000,
        b"1" * 10_000,
        b"\xff",
        latest(epoch="x"),
        latest(epoch=None),
        latest(epoch="missing"),
        latest(epoch=-7),
        latest(epoch=10**300),
        latest(epoch=[1]),
        latest(owner=1),
        latest(checkpoint={}),
        latest(artifact="run/sft/0123456789ab", epoch=77),
    ],
)
def test_lost_or_damaged_latest_never_reuses_an_epoch(
    artifact: Artifact, tmp_path: Path, lost: bytes | None
) -> None:
    for step in (1, 2, 3):
        save(Attempt.begin(artifact, "me"), tmp_path, step, folder(tmp_path, str(step)))
    if lost is None:
        artifact.store.delete(artifact.path(LATEST))
    else:
        artifact.store.put(artifact.path(LATEST), lost)
    assert Attempt.begin(artifact, "me").epoch == 4


def test_finished_rows_persist_and_the_first_wins(artifact: Artifact) -> None:
    FinishedRows(Attempt.begin(artifact, "a")).add("kind", [{"id": "1", "text": "first"}])
    second = FinishedRows(Attempt.begin(artifact, "b"))
    second.add("kind", [{"id": "1", "text": "second"}, {"id": "2", "text": "new"}])
    assert {key: row["text"] for key, row in second.read("kind").items()} == {
        "1": "first",
        "2": "new",
    }
    assert second.read("other") == {}


def test_intact_latest_is_believed(artifact: Artifact) -> None:
    artifact.store.put(artifact.path(LATEST), latest(epoch=41))
    assert Attempt.begin(artifact, "me").epoch == 42


@pytest.mark.parametrize("name", ["data/999999999/x", "attempts/999999999.json"])
def test_planted_epoch_is_bounded(artifact: Artifact, name: str) -> None:
    for part in ("data", "attempts"):
        artifact.store.put(artifact.path(part, "9" * 100, "x"), b"planted")
    assert Attempt.begin(artifact, "me").epoch == 1
    artifact.store.delete(artifact.path(LATEST))
    artifact.store.put(artifact.path(name), b"planted")
    with pytest.raises(InputError, match="has had 999999999 attempts, which is impossible"):
        Attempt.begin(artifact, "me")


HOSTILE_JSON = [
    b"",
    b"not json",
    b"null",
    b"[]",
    b'["seal"]',
    b"{}",
    b"[" * 200_000,
    b'{"seal":' * 200_000,
    b"1" * 10_000,
    b"\xff\xfe",
    b'"\\ud800"',
    b'{"seal": null, "parts": 1, "files": "x"}',
]


@pytest.mark.parametrize("data", HOSTILE_JSON)
def test_hostile_json_is_damage(artifact: Artifact, tmp_path: Path, data: bytes) -> None:
    attempt = Attempt.begin(artifact, "me")
    save(attempt, tmp_path, 10, folder(tmp_path))
    artifact.store.put(artifact.path("checkpoints/step-00000010-1/MANIFEST.json"), data)
    with pytest.raises(InputError, match=r"MANIFEST\.json is damaged"):
        read_manifest(artifact, "step-00000010-1")
    assert Checkpoints(attempt, 2, tmp_path / "s").restore(tmp_path / "r") is None
    artifact.store.put(artifact.path(MARKER), data)
    with pytest.raises(InputError, match=r"_SUCCESS\.json is damaged"):
        artifact.manifest()
    FinishedRows(attempt).add("kind", [{"id": "1"}])
    artifact.store.put(artifact.path("parts/kind/000001-00000002.jsonl"), data)
    assert list(FinishedRows(attempt).read("kind")) == ["1"]


@pytest.mark.parametrize("line", [*HOSTILE_JSON[1:], b'{"id": 1}', b'{"id": ["x"]}'])
def test_batch_that_holds_no_rows_is_skipped(artifact: Artifact, line: bytes) -> None:
    """Without a seal key, somebody who can write to the store can make a valid seal."""
    rows = FinishedRows(Attempt.begin(artifact, "me"))
    key = artifact.path("parts/kind/000001-00000001.jsonl")
    artifact.store.put(key, _first_line(line + b"\n", artifact, key) + line + b"\n")
    assert rows.read("kind") == {}


@pytest.mark.parametrize("size", [-1, 10**300, "x", 1.5])
def test_impossible_size_in_a_marker_is_damage(artifact: Artifact, size: object) -> None:
    file = {"path": "a", "size": size, "sha256": "0", "crc32c": "0"}
    content = {"run": "run", "stage": "sft", "key": artifact.key, "epoch": 1, "files": [file]}
    content |= {"digest": fingerprint([["a", size, "0"]]), "params": {}, "inputs": {}}
    content |= {"schema_version": 1, "metrics": {}, "provenance": {}}
    sealed = content | {"seal": seal(content, artifact.store)}
    artifact.store.put(artifact.path(MARKER), json.dumps(sealed).encode())
    with pytest.raises(InputError, match="is damaged"):
        artifact.manifest()
