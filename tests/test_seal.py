"""Seals: who can only write to a store cannot make one, and a missing key never looks like damage."""

import json
import stat
from pathlib import Path
from typing import Any

import pytest

from medjob.artifacts import seal
from medjob.artifacts.artifact import MARKER, Artifact, Attempt
from medjob.artifacts.checkpoints import MANIFEST, Checkpoints
from medjob.artifacts.finished_rows import FinishedRows
from medjob.errors import InputError
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
