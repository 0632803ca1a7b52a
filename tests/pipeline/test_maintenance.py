"""The commands `medjob ls`, `pull`, `verify` and `gc`."""

import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from medjob.artifacts.artifact import Artifact, Attempt
from medjob.artifacts.checkpoints import Checkpoints
from medjob.artifacts.finished_rows import FinishedRows
from medjob.cli.main import main
from medjob.runtime.files import fingerprint
from medjob.store import LocalStore
from tests.fakes.s3 import FakeS3
from tests.support.store_fixtures import credentials, fake_s3, open_s3

__all__ = ["credentials", "fake_s3", "open_s3"]


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


def artifact_of(store: Any, stage: str, key: Any = 1) -> Artifact:
    return Artifact(store, "t", stage, fingerprint(key))


def make_output(tmp_path: Path, text: str) -> Path:
    """Write a folder with two files whose contents depend on `text`."""
    folder = tmp_path / f"output-{text}"
    (folder / "sub").mkdir(parents=True, exist_ok=True)
    (folder / "model.bin").write_text(text * 1000)
    (folder / "sub/config.json").write_text("{}")
    return folder


def save_checkpoint(attempt: Attempt, tmp_path: Path, step: int) -> None:
    checkpoints = Checkpoints(attempt, 5, tmp_path / "snapshots")
    checkpoints.save(step, make_output(tmp_path, f"state{step}"))
    checkpoints.wait()


@pytest.fixture
def filled(store: LocalStore, tmp_path: Path) -> LocalStore:
    """A store with a published sft with garbage, an unfinished dpo, and another run."""
    _publish_sft_with_garbage(store, tmp_path)
    _start_dpo_three_times(store, tmp_path)
    Attempt.begin(Artifact(store, "another", "sft", fingerprint(2)), "x").publish(
        make_output(tmp_path, "y"), {}, {}, {}, {}
    )
    store.put("t/notes/of/a/person.txt", b"not written by medjob")
    return store


def _publish_sft_with_garbage(store: LocalStore, tmp_path: Path) -> None:
    superseded = Attempt.begin(artifact_of(store, "sft"), "superseded")
    store.put(superseded.artifact.path("data", "1", "model.bin"), b"of a superseded attempt")
    save_checkpoint(superseded, tmp_path, 10)
    done = Attempt.begin(artifact_of(store, "sft"), "done")
    FinishedRows(done).add("scores", [{"id": "1"}])
    finished = {"finished": "2026-01-01T00:00:00+00:00"}
    done.publish(make_output(tmp_path, "sft"), {}, {}, {}, finished)


def _start_dpo_three_times(store: LocalStore, tmp_path: Path) -> None:
    """Start an attempt without a recorded outcome, one that was preempted, and one that runs."""
    unknown = Attempt.begin(artifact_of(store, "dpo"), "unknown")
    store.put(unknown.artifact.path("data", "1", "x"), b"of an attempt without an outcome")
    preempted = Attempt.begin(artifact_of(store, "dpo"), "preempted")
    save_checkpoint(preempted, tmp_path, 10)
    preempted.record({"exit_code": 143})
    torn = preempted.artifact.path("checkpoints", "step-00000020-2", "part-0", "x")
    store.put(torn, b"torn")
    store.put(preempted.artifact.path("data", "2", "x"), b"incomplete")
    running = Attempt.begin(artifact_of(store, "dpo"), "running")
    save_checkpoint(running, tmp_path, 20)
    upload = running.artifact.path("checkpoints", "step-00000030-3", "part-0", "x")
    store.put(upload, b"may still be uploading")
    store.put(running.artifact.path("data", "3", "x"), b"may still be uploading")


def call(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    """Run a command in this process, check its exit code, and return its output."""
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    captured = capsys.readouterr()
    assert ended.value.code == code, captured.err
    return captured.out + captured.err


def keys(store: Any) -> set[str]:
    return {entry.key for entry in store.list("")}


def test_ls_shows_runs_and_artifacts(
    filled: LocalStore, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = call(capsys, "ls", "--store", filled.uri)
    assert [line.split()[:3] for line in runs.splitlines()] == [
        ["RUN", "PUBLISHED", "UNFINISHED"],
        ["another", "1", "0"],
        ["t", "1", "1"],
    ]
    table = [
        line.split()
        for line in call(capsys, "ls", "--store", filled.uri, "--run", "t").splitlines()
    ]
    assert [row[0] for row in table] == ["STAGE", "sft", "dpo"]
    assert table[1][2:6] == ["published", "2", "3", "KB"]
    assert table[2][2] == "unfinished"


def test_pull_makes_a_verified_copy_and_overwrites_no_file(
    filled: LocalStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["--store", filled.uri, "--run", "t"]
    target = tmp_path / "model"
    assert "2 files, 3 KB, verified" in call(capsys, "pull", "sft", *run, "-o", str(target))
    assert (target / "model.bin").read_text() == "sft" * 1000
    assert (target / "model.bin").stat().st_nlink == 1  # a copy, not a hard link into the store
    call(capsys, "pull", "sft", *run, "-o", str(target))  # identical files are kept
    (target / "model.bin").unlink()
    (target / "model.bin").write_text("my own notes")
    assert "already exists with different contents" in call(
        capsys, "pull", "sft", *run, "-o", str(target), code=64
    )
    assert (target / "model.bin").read_text() == "my own notes"
    assert "is not published" in call(capsys, "pull", "dpo", *run, code=66)
    Attempt.begin(artifact_of(filled, "sft", "other"), "x").publish(
        make_output(tmp_path, "other"), {}, {}, {}, {}
    )
    assert "matches 2 published artifacts" in call(capsys, "pull", "sft", *run, code=64)
    call(capsys, "pull", f"sft/{fingerprint('other')[:6]}", *run, "-o", str(tmp_path / "second"))
    assert (tmp_path / "second/model.bin").read_text() == "other" * 1000


@pytest.mark.parametrize("name", ["file", "file/below", "loop", "/proc/medjob/x"])
def test_pull_needs_a_folder(
    filled: LocalStore, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (tmp_path / "file").write_text("my own notes")
    (tmp_path / "loop").symlink_to("loop")
    run = ["--store", filled.uri, "--run", "t"]
    output = call(capsys, "pull", "sft", *run, "-o", str(tmp_path / name), code=64)
    assert "cannot create the folder" in output
    assert "hint: choose another folder" in output


def test_pull_replaces_neither_folders_nor_pipes(
    filled: LocalStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["--store", filled.uri, "--run", "t"]
    for number, make in enumerate((Path.mkdir, os.mkfifo)):
        target = tmp_path / f"target{number}"
        target.mkdir()
        make(target / "model.bin")
        output = call(capsys, "pull", "sft", *run, "-o", str(target), code=64)
        assert "model.bin already exists with different contents" in output
    (tmp_path / "third").mkdir()
    (tmp_path / "third/sub").write_text("my own notes")
    output = call(capsys, "pull", "sft", *run, "-o", str(tmp_path / "third"), code=64)
    assert "cannot create the folder" in output


def test_planted_names_are_escaped(filled: LocalStore, capsys: pytest.CaptureFixture[str]) -> None:
    name = "a\nerror: x\x1b[31m"
    filled.put(f"{name}/dpo/{fingerprint(1)[:12]}/data/1/x", b"x")
    upload = filled.root / artifact_of(filled, "sft").path("data", "1", f".partial-12345678{name}")
    upload.touch()
    os.utime(upload, (0, 0))
    marker = filled.root / f"{name}/dpo/{fingerprint(1)[:12]}/_SUCCESS.json"
    marker.mkdir()
    store = ["--store", filled.uri]
    outputs = [
        call(capsys, "ls", *store, "--run", f"{name}2"),
        call(capsys, "gc", *store, "--run", "t"),
        call(capsys, "verify", *store, "--run", name, code=66),
        call(capsys, "ls", *store),
    ]
    os.mkfifo(filled.root / name / "pipe")
    outputs.append(call(capsys, "ls", *store, code=66))
    for output in outputs:
        assert r"a\nerror: x\x1b[31m" in output
        assert "\x1b" not in output


def test_names_that_are_no_keys_are_ignored(
    filled: LocalStore, capsys: pytest.CaptureFixture[str]
) -> None:
    before = call(capsys, "ls", "--store", filled.uri, "--run", "t").splitlines()
    key = artifact_of(filled, "sft").key[:12]
    for name in ("x", f"{key}0", key.upper(), "a\nerror: x\x1b"):
        filled.put(f"t/sft/{name}/_SUCCESS.json", b"{}")
    assert call(capsys, "ls", "--store", filled.uri, "--run", "t").splitlines() == before
    call(capsys, "verify", "--store", filled.uri, "--run", "t")
    call(capsys, "gc", "--store", filled.uri, "--run", "t")


def test_verify_names_a_manifest_that_is_nested_too_deeply(
    filled: LocalStore, capsys: pytest.CaptureFixture[str]
) -> None:
    key = artifact_of(filled, "dpo").path("checkpoints/step-00000020-3/MANIFEST.json")
    filled.put(key, b"[" * 200_000)
    output = call(capsys, "verify", "--store", filled.uri, "--run", "t", code=66)
    assert f"{key} is damaged" in output


def test_verify_reads_every_byte(filled: LocalStore, capsys: pytest.CaptureFixture[str]) -> None:
    run = ["--store", filled.uri, "--run", "t"]
    assert call(capsys, "verify", *run).count("verified") == 3  # sft and two checkpoints of dpo
    for key in (
        artifact_of(filled, "sft").path("data", "2", "model.bin"),
        artifact_of(filled, "dpo").path("checkpoints/step-00000020-3/part-0/model.bin"),
    ):
        path = filled.root / key
        original = path.read_bytes()
        path.unlink()
        path.write_bytes(original[:-1] + b"X")
        output = call(capsys, "verify", *run, code=66)
        assert "1 DAMAGED OR MISSING" in output
        assert f"{key} is damaged" in output
        path.unlink()
        assert f"{key} does not exist" in call(capsys, "verify", *run, code=66)
        path.write_bytes(original)
    filled.put(artifact_of(filled, "sft").path("_SUCCESS.json"), b"{}")
    assert "_SUCCESS.json is damaged" in call(capsys, "verify", *run, code=66)


def test_gc_deletes_only_garbage_and_only_with_delete(
    filled: LocalStore, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["--store", filled.uri, "--run", "t"]
    before = keys(filled)
    assert "--delete" in call(capsys, "gc", *run)
    assert keys(filled) == before
    call(capsys, "gc", *run, "--delete")
    deleted = {
        key.split("/", 1)[1].replace(fingerprint(1)[:12], "KEY") for key in before - keys(filled)
    }
    assert deleted == {
        "sft/KEY/data/1/model.bin",
        "sft/KEY/parts/scores/000002-00000001.jsonl",
        *(
            f"sft/KEY/checkpoints/step-00000010-1/{name}"
            for name in (
                "MANIFEST.json",
                "part-0.json",
                "part-0/model.bin",
                "part-0/sub/config.json",
            )
        ),
        "dpo/KEY/checkpoints/step-00000020-2/part-0/x",
        "dpo/KEY/data/2/x",
    }
    assert "verified" in call(capsys, "verify", *run)
    assert "nothing to delete" in call(capsys, "gc", *run, "--delete")


def test_gc_deletes_unfinished_uploads(
    tmp_path: Path, open_s3: Any, fake_s3: FakeS3, capsys: pytest.CaptureFixture[str]
) -> None:
    store = open_s3()
    attempt = Attempt.begin(artifact_of(store, "sft"), "me")
    store.upload(attempt.artifact.path("data", "1", "old"), 20 << 20).send(0, b"x" * (8 << 20))
    Attempt.begin(artifact_of(store, "sft"), "again")
    store.upload(attempt.artifact.path("data", "2", "running"), 20 << 20).send(0, b"x" * (8 << 20))
    run = [
        "--store",
        store.uri,
        "--run",
        "t",
        "--set",
        f"cluster.store.endpoint={fake_s3.endpoint}",
        "--set",
        "cluster.store.addressingStyle=path",
    ]
    assert "unfinished upload" in call(capsys, "gc", *run, "--delete")
    assert [key.rsplit("/", 1)[1] for key in store.unfinished("t/")] == ["running"]


def test_store_commands_accept_a_run_file(
    tree: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(tree))
    call(capsys, "prepare", "-f", str(path))
    assert "prepare" in call(capsys, "ls", "-f", str(path))
    assert "verified" in call(capsys, "verify", "-f", str(path))
    assert "nothing to delete" in call(capsys, "gc", "-f", str(path))
    assert "verified" in call(
        capsys, "pull", "prepare", "-f", str(path), "-o", str(tmp_path / "pulled")
    )
    assert (tmp_path / "pulled/train.parquet").exists()
    assert "needs --run NAME" in call(capsys, "gc", "--store", f"file://{tmp_path}/store", code=64)
    call(capsys, "ls", code=64)
