"""Seals: who can only write to a store cannot make one, and a missing key never looks like damage."""

import json
import os
import shutil
import signal
import stat
from pathlib import Path
from typing import Any

import pytest

from medjob.artifacts import seal
from medjob.artifacts.artifact import MARKER, Artifact, Attempt
from medjob.artifacts.checkpoints import MANIFEST, Checkpoints, states
from medjob.artifacts.finished_rows import FinishedRows
from medjob.errors import ConfigError, InputError, RetryError
from medjob.runtime.files import canonical_json, digest_of, fingerprint
from medjob.store.local import LocalStore


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LocalStore:
    """A store of a user who has no key yet."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("MEDJOB_SECRETS", str(tmp_path / "secrets"))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    seal._find_key.cache_clear()
    return LocalStore(tmp_path / "store")


def use_key(tmp_path: Path, text: str) -> None:
    (tmp_path / "secrets").mkdir(exist_ok=True)
    (tmp_path / "secrets/seal-key").write_text(text)
    seal._find_key.cache_clear()


def published(store: LocalStore, folder: Path) -> Artifact:
    folder.mkdir()
    (folder / "adapter").write_text("weights")
    artifact = Artifact(store, "run", "sft", fingerprint(1))
    Attempt.begin(artifact, "me").publish(folder, {}, {}, {}, {})
    return artifact


def rewrite(artifact: Artifact, make_seal: Any) -> None:
    """Change a number in the marker, and replace its seal."""
    path = Path(str(artifact.store.local_path(artifact.path(MARKER))))
    marker = json.loads(path.read_text())
    del marker["seal"]
    marker["metrics"] = {"loss": 0.1}
    path.unlink()
    path.write_text(json.dumps(marker | {"seal": make_seal(marker)}))


def test_own_key_is_made_once_and_readable_by_its_owner_only(
    store: LocalStore, tmp_path: Path
) -> None:
    artifact = published(store, tmp_path / "output")
    key = seal.key_file()
    assert key == tmp_path / "config/medjob/seal-key"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert len(list(key.parent.iterdir())) == 1
    text = key.read_text()
    seal._find_key.cache_clear()
    manifest = artifact.manifest()
    assert manifest is not None
    assert manifest.seal.startswith("hmac-sha256:")
    assert key.read_text() == text
    assert digest_of(manifest.files) == manifest.digest


@pytest.mark.parametrize(
    ("make_seal", "message"),
    [
        (fingerprint, "sealed without the key of this store"),
        (
            lambda marker: "hmac-sha256:00000000:" + "0" * 64,
            "sealed with another key, which this machine lacks",
        ),
        (lambda marker: "", "is damaged"),
        (lambda marker: "nonsense \u2042", "is damaged"),
    ],
)
def test_marker_that_was_sealed_anew_is_refused(
    store: LocalStore, tmp_path: Path, make_seal: Any, message: str
) -> None:
    artifact = published(store, tmp_path / "output")
    rewrite(artifact, make_seal)
    with pytest.raises(InputError, match=message):
        artifact.manifest()


def test_kept_seal_does_not_fit_changed_fields(store: LocalStore, tmp_path: Path) -> None:
    artifact = published(store, tmp_path / "output")
    manifest = artifact.manifest()
    assert manifest is not None
    rewrite(artifact, lambda marker: manifest.seal)
    with pytest.raises(InputError, match="is damaged"):
        artifact.manifest()


def test_secret_key_is_shared_between_machines(store: LocalStore, tmp_path: Path) -> None:
    use_key(tmp_path, "a" * 32)
    artifact = published(store, tmp_path / "output")
    assert not seal.key_file().exists()
    assert artifact.manifest() is not None
    use_key(tmp_path, "b" * 32)
    with pytest.raises(InputError, match="sealed with another key"):
        artifact.manifest()
    use_key(tmp_path, "short")
    with pytest.raises(InputError, match="only 5 characters"):
        artifact.manifest()


def test_pod_makes_no_key_that_would_vanish_with_it(
    store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    artifact = published(store, tmp_path / "output")
    assert not seal.key_file().exists()
    manifest = artifact.manifest()
    assert manifest is not None
    assert not manifest.seal.startswith("hmac")
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST")
    use_key(tmp_path, "a" * 32)
    with pytest.raises(InputError, match="without the key of this store"):
        artifact.manifest()


def test_checkpoint_of_another_key_neither_resumes_nor_starts_anew(
    store: LocalStore, tmp_path: Path
) -> None:
    use_key(tmp_path, "a" * 32)
    artifact = Artifact(store, "run", "sft", fingerprint(1))
    attempt = Attempt.begin(artifact, "me")
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint/state").write_text("state")
    checkpoints = Checkpoints(attempt, keep=2, snapshots=tmp_path / "snapshots")
    checkpoints.save(3, tmp_path / "checkpoint")
    checkpoints.wait()
    assert Checkpoints(attempt, 2, tmp_path / "s").restore(tmp_path / "first") == 3
    use_key(tmp_path, "b" * 32)
    with pytest.raises(InputError, match="sealed with another key"):
        Checkpoints(attempt, 2, tmp_path / "s").restore(tmp_path / "second")
    use_key(tmp_path, "a" * 32)  # it was not taken for damaged
    assert Checkpoints(attempt, 2, tmp_path / "s").restore(tmp_path / "third") == 3
    path = Path(str(store.local_path(artifact.path("checkpoints/step-00000003-1", MANIFEST))))
    manifest = json.loads(path.read_text())
    del manifest["seal"]
    path.unlink()
    path.write_text(canonical_json(manifest | {"seal": fingerprint(manifest)}))
    with pytest.raises(InputError, match="without the key"):
        Checkpoints(attempt, 2, tmp_path / "s").restore(tmp_path / "fourth")


def test_planted_rows_are_computed_again(store: LocalStore, tmp_path: Path) -> None:
    artifact = Artifact(store, "run", "judge", fingerprint(1))
    rows = FinishedRows(Attempt.begin(artifact, "me"))
    rows.add("scores", [{"id": "a", "value": 0.5}])
    planted = b'{"id": "b", "value": 1.0}\n'
    plain = json.dumps({"seal": fingerprint(planted.decode())}).encode() + b"\n"
    store.create(artifact.path("parts", "scores", "000001-00000009.jsonl"), plain + planted)
    assert list(rows.read("scores")) == ["a"]


@pytest.fixture(params=["with a key", "without a key"])
def either_store(
    request: pytest.FixtureRequest, store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> LocalStore:
    if request.param == "without a key":
        monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    return store


def folder_of(artifact: Artifact, *parts: str) -> Path:
    return Path(str(artifact.store.local_path(artifact.path(*parts))))


def saved(artifact: Artifact, tmp_path: Path, step: int) -> Attempt:
    """Store one checkpoint, and return its attempt."""
    attempt = Attempt.begin(artifact, "me")
    (tmp_path / "checkpoint").mkdir(exist_ok=True)
    (tmp_path / "checkpoint/state").write_text(f"state of step {step}")
    checkpoints = Checkpoints(attempt, keep=9, snapshots=tmp_path / "snapshots")
    checkpoints.save(step, tmp_path / "checkpoint")
    checkpoints.wait()
    return attempt


@pytest.mark.parametrize(
    ("run", "stage", "key"),
    [
        ("run", "sft", fingerprint(2)),
        ("run", "sft", fingerprint(1)[:12] + fingerprint(2)[12:]),  # the same path
        ("run", "dpo", fingerprint(1)),
        ("other", "sft", fingerprint(1)),
    ],
)
def test_checkpoints_of_another_artifact_are_not_resumed(
    either_store: LocalStore,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    run: str,
    stage: str,
    key: str,
) -> None:
    source = Artifact(either_store, "run", "sft", fingerprint(1))
    saved(source, tmp_path, 3)
    target = Artifact(either_store, run, stage, key)
    attempt = Attempt.begin(target, "me")
    if target.prefix != source.prefix:
        shutil.copytree(folder_of(source, "checkpoints"), folder_of(target, "checkpoints"))
    assert Checkpoints(attempt, 2, tmp_path / "s").restore(tmp_path / "restored") is None
    assert "skipping checkpoint step-00000003-1:" in caplog.text
    assert "belongs to another artifact: run/sft/" in caplog.text


@pytest.mark.parametrize("name", ["step-00000009-1", "step-00000003-9"])
def test_older_checkpoint_does_not_pass_for_a_newer_one(
    either_store: LocalStore, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    artifact = Artifact(either_store, "run", "sft", fingerprint(1))
    attempt = saved(artifact, tmp_path, 3)
    checkpoints = folder_of(artifact, "checkpoints")
    shutil.copytree(checkpoints / "step-00000003-1", checkpoints / name)
    assert Checkpoints(attempt, 2, tmp_path / "s").restore(tmp_path / "restored") == 3
    assert f"skipping checkpoint {name}:" in caplog.text
    assert "belongs to another checkpoint: step-00000003-1" in caplog.text


@pytest.mark.parametrize(
    ("stage", "key", "kind", "name"),
    [
        ("judge", fingerprint(2), "scores", "000001-00000001.jsonl"),
        ("candidates", fingerprint(1), "scores", "000001-00000001.jsonl"),
        ("judge", fingerprint(1), "answers", "000001-00000001.jsonl"),
        ("judge", fingerprint(1), "scores", "000000-00000001.jsonl"),
    ],
)
def test_rows_that_were_copied_from_elsewhere_are_computed_again(
    either_store: LocalStore, tmp_path: Path, stage: str, key: str, kind: str, name: str
) -> None:
    source = Artifact(either_store, "run", "judge", fingerprint(1))
    rows = FinishedRows(Attempt.begin(source, "me"))
    rows.add("scores", [{"id": "a", "value": 0.5}])
    target = Artifact(either_store, "run", stage, key)
    batch = folder_of(target, "parts", kind, name)
    batch.parent.mkdir(parents=True, exist_ok=True)
    folder_of(source, "parts", "scores", "000001-00000001.jsonl").rename(batch)
    assert FinishedRows(Attempt.begin(target, "me")).read(kind) == {}


@pytest.mark.parametrize(("run", "stage"), [("other", "sft"), ("run", "export")])
def test_marker_of_another_run_or_stage_is_refused(
    either_store: LocalStore, tmp_path: Path, run: str, stage: str
) -> None:
    artifact = published(either_store, tmp_path / "output")
    copy = Artifact(either_store, run, stage, artifact.key[:12])  # as from a listing
    shutil.copytree(folder_of(artifact), folder_of(copy))
    with pytest.raises(InputError, match=f"belongs to another artifact: {artifact.prefix}"):
        copy.manifest()


def test_part_of_an_unknown_author_is_not_sealed_by_node_0(
    store: LocalStore, tmp_path: Path
) -> None:
    artifact = Artifact(store, "run", "sft", fingerprint(1))
    other = saved(artifact, tmp_path, 3)
    nodes = Checkpoints(other, keep=9, snapshots=tmp_path / "snapshots", nodes=2)
    part = folder_of(artifact, "checkpoints/step-00000003-1/part-0.json").read_bytes()
    for step, planted in ((4, part), (5, b"[" * 100_000), (6, b"{}")):
        store.put(artifact.path(f"checkpoints/step-{step:08d}-1/part-1.json"), planted)
        nodes.save(step, tmp_path / "checkpoint")
        with pytest.raises(RetryError, match=r"part-1\.json (belongs to node 0|is damaged)"):
            nodes.wait()
        assert states(artifact)[f"step-{step:08d}-1"] == "torn"
    content = json.loads(part)
    del content["seal"]
    content |= {"checkpoint": "step-00000007-1", "node": 1}
    store.put(
        artifact.path("checkpoints/step-00000007-1/part-1.json"),
        json.dumps(content | {"seal": fingerprint(content)}).encode(),
    )
    nodes.save(7, tmp_path / "checkpoint")
    with pytest.raises(InputError, match="sealed without the key of this store"):
        nodes.wait()


def test_planted_part_of_this_node_does_not_end_the_training(
    store: LocalStore, tmp_path: Path
) -> None:
    artifact = Artifact(store, "run", "sft", fingerprint(1))
    checkpoints = Checkpoints(saved(artifact, tmp_path, 3), 9, tmp_path / "snapshots")
    store.put(artifact.path("checkpoints/step-00000004-1/part-0.json"), b"planted")
    checkpoints.save(4, tmp_path / "checkpoint")
    with pytest.raises(RetryError, match="was written by somebody else"):
        checkpoints.wait()


@pytest.mark.parametrize("kind", ["pipe", "directory", "huge"])
def test_key_that_is_no_small_file_is_refused(store: LocalStore, tmp_path: Path, kind: str) -> None:
    path = seal.key_file()
    path.parent.mkdir(parents=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    else:
        path.write_text("a" * 100_000)
    previous = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("the read blocks"))
    signal.alarm(10)
    with pytest.raises(InputError, match=r"seal-key (is not a regular file|has more than)"):
        published(store, tmp_path / "output")
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


def test_unknown_home_folder_is_named(
    store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", "~nosuchuser/x")
    with pytest.raises(ConfigError, match="~nosuchuser/x: the home folder is not known"):
        published(store, tmp_path / "output")
