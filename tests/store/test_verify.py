"""`Artifact.verify` and the log of a skipped stage state what was compared."""

import logging
from pathlib import Path

import pytest

from medjob.artifacts.artifact import Artifact, Attempt, Manifest
from medjob.errors import InputError
from medjob.pipeline.runner import _check_published
from medjob.runtime.files import fingerprint
from medjob.store import Store


def publish(store: Store, tmp_path: Path) -> tuple[Artifact, Manifest]:
    folder = tmp_path / "output"
    folder.mkdir()
    (folder / "a").write_bytes(b"some data")
    artifact = Artifact(store, "run", "sft", fingerprint(1))
    return artifact, Attempt.begin(artifact, "me").publish(folder, {}, {}, {}, {})


def expected_result(store: Store) -> str:
    in_folder = store.uri.startswith("file://")
    return "published and verified" if in_folder else "published; names and sizes match"


def test_log_of_a_skipped_stage_states_what_was_checked(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    artifact, manifest = publish(store, tmp_path)
    with caplog.at_level(logging.INFO, "medjob"):
        assert _check_published(artifact) == manifest
    messages = [r.getMessage() for r in caplog.records if r.name == "medjob.pipeline.runner"]
    assert messages == [f"sft: skipped, {artifact.prefix} is {expected_result(store)}"]


def test_verify_reads_bytes_in_a_folder_and_sizes_in_a_bucket(store: Store, tmp_path: Path) -> None:
    artifact, manifest = publish(store, tmp_path)
    key = artifact.path("data", "1", "a")
    store.put(key, b"SOME DATA")
    if store.uri.startswith("file://"):
        with pytest.raises(InputError, match="data/1/a is damaged"):
            artifact.verify(manifest)
    else:
        assert artifact.verify(manifest) == "published; names and sizes match"
    with pytest.raises(InputError, match="data/1/a is damaged"):
        artifact.fetch(manifest, tmp_path / "fetched")


def test_verify_finds_a_missing_or_shorter_file(store: Store, tmp_path: Path) -> None:
    artifact, manifest = publish(store, tmp_path)
    key = artifact.path("data", "1", "a")
    store.put(key, b"some")
    with pytest.raises(InputError, match=r"data/1/a (has 4 bytes|is damaged: it has 4 bytes)"):
        artifact.verify(manifest)
    store.delete(key)
    with pytest.raises(InputError, match="data/1/a does not exist"):
        artifact.verify(manifest)
