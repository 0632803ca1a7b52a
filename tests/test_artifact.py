"""Publishing, verifying, and two attempts at once."""

import json
from pathlib import Path

import pytest

from medjob.artifact import MARKER, Artifact, Attempt, Manifest, canonical_json, fingerprint, safe_path
from medjob.checkpoints import Checkpoints
from medjob.errors import InputError, SupersededError
from medjob.rows import FinishedRows
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


def test_what_is_published_comes_back_verified(artifact: Artifact, tmp_path: Path) -> None:
    assert artifact.manifest() is None
    made = publish(Attempt.begin(artifact, "me"), folder(tmp_path))
    assert artifact.manifest() == made
    back = artifact.fetch(made, tmp_path / "back")
    assert (back / "sub/b.txt").read_text() == "datadata"


def test_digest_covers_the_content_alone(artifact: Artifact, tmp_path: Path) -> None:
    first = publish(Attempt.begin(artifact, "me"), folder(tmp_path))
    other = Artifact(LocalStore(tmp_path / "other"), "another", "sft", artifact.key)
    second = other_made = Attempt.begin(other, "you").publish(folder(tmp_path), {}, {}, {}, {"host": "elsewhere"})
    assert first.digest == second.digest
    changed = Artifact(LocalStore(tmp_path / "third"), "run", "sft", artifact.key)
    assert publish(Attempt.begin(changed, "me"), folder(tmp_path, "Data", "out2")).digest != other_made.digest


@pytest.mark.parametrize("name", ["a.txt", "sub/b.txt"])
def test_every_flipped_byte_is_found(artifact: Artifact, tmp_path: Path, name: str) -> None:
    made = publish(Attempt.begin(artifact, "me"), folder(tmp_path))
    victim = tmp_path / "store" / artifact.path("data", "1", name)
    original = victim.read_bytes()
    for position in range(len(original)):
        victim.unlink()
        victim.write_bytes(original[:position] + bytes([original[position] ^ 1]) + original[position + 1 :])
        with pytest.raises(InputError, match=f"{name}: is damaged"):
            artifact.fetch(made, tmp_path / "back")
    victim.unlink()
    with pytest.raises(InputError, match="is not there"):
        artifact.fetch(made, tmp_path / "back")


def test_a_damaged_or_foreign_marker_is_refused(artifact: Artifact, tmp_path: Path) -> None:
    publish(Attempt.begin(artifact, "me"), folder(tmp_path))
    marker = tmp_path / "store" / artifact.path(MARKER)
    good = marker.read_text()
    for broken in (good[:-5], good.replace('"key": "', '"key": "0'), good.replace('"size": 4', '"size": 5')):
        marker.write_text(broken)
        with pytest.raises(InputError):
            artifact.manifest()
    marker.write_text(good.replace('"a.txt"', '"../a.txt"'))
    with pytest.raises(InputError, match="leads out"):
        artifact.manifest()


def test_a_newer_attempt_stops_the_older_at_every_write(artifact: Artifact, tmp_path: Path) -> None:
    old = Attempt.begin(artifact, "old")
    new = Attempt.begin(artifact, "new")
    assert (old.epoch, new.epoch) == (1, 2)
    out = folder(tmp_path)
    for write in (
        lambda: Checkpoints(old, 2).save(1, out),
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


def test_two_that_both_reach_the_end(artifact: Artifact, tmp_path: Path) -> None:
    first = Attempt.begin(artifact, "a")
    publish(first, folder(tmp_path))
    late = Attempt.begin(artifact, "b")
    with pytest.raises(SupersededError, match="published it first"):
        publish(late, folder(tmp_path, "late", "out2"))
    manifest = artifact.manifest()
    assert manifest is not None
    artifact.fetch(manifest, tmp_path / "back")
    assert (tmp_path / "back/a.txt").read_text() == "data"


def test_links_are_not_published(artifact: Artifact, tmp_path: Path) -> None:
    out = folder(tmp_path)
    (out / "link").symlink_to("/etc/hostname")
    with pytest.raises(InputError, match="is a link"):
        publish(Attempt.begin(artifact, "me"), out)


@pytest.mark.parametrize("path", ["/a", "../a", "a/../../b", "", "a\\..\\b"])
def test_paths_that_lead_out(path: str) -> None:
    with pytest.raises(InputError):
        safe_path(path)


def test_canonical_json_refuses_what_has_no_one_spelling() -> None:
    assert canonical_json({"b": 1, "a": [1.5, None]}) == '{"a":[1.5,null],"b":1}'
    for value in (float("nan"), {1, 2}, object()):
        with pytest.raises((ValueError, TypeError)):
            canonical_json(value)


def test_checkpoints_keep_the_last_ones_and_the_best(artifact: Artifact, tmp_path: Path) -> None:
    checkpoints = Checkpoints(Attempt.begin(artifact, "me"), keep=2)
    for step in (10, 20, 30, 40):
        checkpoints.save(step, folder(tmp_path, str(step)), best_step=10)
    steps = sorted(path.name for path in (tmp_path / "store" / artifact.path("checkpoints")).iterdir())
    assert steps == ["step-00000010-1", "step-00000030-1", "step-00000040-1"]
    again = Checkpoints(Attempt.begin(artifact, "again"), keep=2)
    assert again.restore(tmp_path / "r") == 40
    assert (tmp_path / "r/checkpoint-40/a.txt").read_text() == "40"
    (tmp_path / "r/checkpoint-40/a.txt").write_text("rewritten by the trainer")
    assert Checkpoints(Attempt.begin(artifact, "x"), 2).restore(tmp_path / "r2") == 40  # the store's copy is untouched


def test_torn_and_damaged_checkpoints_are_passed_over(artifact: Artifact, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoints = Checkpoints(Attempt.begin(artifact, "me"), keep=5)
    for step in (10, 20, 30, 40):
        checkpoints.save(step, folder(tmp_path, str(step)))
    root = tmp_path / "store" / artifact.path("checkpoints")
    (root / "step-00000040-1/a.txt").write_text("41")  # as long as it was
    (root / "step-00000030-1/MANIFEST.json").unlink()
    (root / "step-00000020-1/MANIFEST.json").write_text(json.dumps({"step": 20, "files": [], "digest": "x"}))
    assert Checkpoints(Attempt.begin(artifact, "b"), 5).restore(tmp_path / "r") == 10
    assert "step-00000040-1 is passed over: a.txt is damaged" in caplog.text
    assert "step-00000030-1 is passed over" in caplog.text
    assert "step-00000020-1 is passed over" in caplog.text


def test_finished_rows_survive_and_the_first_stands(artifact: Artifact) -> None:
    FinishedRows(Attempt.begin(artifact, "a")).add("kind", [{"id": "1", "text": "first"}])
    second = FinishedRows(Attempt.begin(artifact, "b"))
    second.add("kind", [{"id": "1", "text": "second"}, {"id": "2", "text": "new"}])
    assert {key: row["text"] for key, row in second.read("kind").items()} == {"1": "first", "2": "new"}
    assert second.read("other") == {}
