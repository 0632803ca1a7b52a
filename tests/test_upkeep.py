"""`medjob ls`, `pull`, `verify` and `gc`."""

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
from tests.store.conftest import credentials, fake_s3, open_s3

__all__ = ["credentials", "fake_s3", "open_s3"]


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


def artifact(store: Any, stage: str, key: Any = 1) -> Artifact:
    return Artifact(store, "t", stage, fingerprint(key))


def folder(tmp_path: Path, text: str) -> Path:
    made = tmp_path / f"output-{text}"
    (made / "sub").mkdir(parents=True, exist_ok=True)
    (made / "model.bin").write_text(text * 1000)
    (made / "sub/config.json").write_text("{}")
    return made


def checkpoint(attempt: Attempt, tmp_path: Path, step: int) -> None:
    checkpoints = Checkpoints(attempt, 5, tmp_path / "snapshots")
    checkpoints.save(step, folder(tmp_path, f"state{step}"))
    checkpoints.wait()


@pytest.fixture
def filled(store: LocalStore, tmp_path: Path) -> LocalStore:
    """A published sft with leftovers, an unfinished dpo that was resumed once, and another run."""
    late = Attempt.begin(artifact(store, "sft"), "late")
    store.put(late.artifact.path("data", "1", "model.bin"), b"of an attempt that lost")
    checkpoint(late, tmp_path, 10)
    done = Attempt.begin(artifact(store, "sft"), "done")
    FinishedRows(done).add("scores", [{"id": "1"}])
    done.publish(folder(tmp_path, "sft"), {}, {}, {}, {"finished": "2026-01-01T00:00:00+00:00"})
    hanging = Attempt.begin(artifact(store, "dpo"), "hanging")
    store.put(hanging.artifact.path("data", "1", "x"), b"nobody saw it end")
    first = Attempt.begin(artifact(store, "dpo"), "first")
    checkpoint(first, tmp_path, 10)
    first.record({"exit_code": 143})
    store.put(first.artifact.path("checkpoints", "step-00000020-2", "part-0", "x"), b"torn")
    store.put(first.artifact.path("data", "2", "x"), b"begun")
    second = Attempt.begin(artifact(store, "dpo"), "second")
    checkpoint(second, tmp_path, 20)
    store.put(
        second.artifact.path("checkpoints", "step-00000030-3", "part-0", "x"), b"may be under way"
    )
    store.put(second.artifact.path("data", "3", "x"), b"may be under way")
    Attempt.begin(Artifact(store, "another", "sft", fingerprint(2)), "x").publish(
        folder(tmp_path, "y"), {}, {}, {}, {}
    )
    store.put("t/notes/of/a/person.txt", b"not ours")
    return store


def call(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
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


def test_pull_brings_a_verified_copy_and_overwrites_nothing(
    filled: LocalStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place, target = ["--store", filled.uri, "--run", "t"], tmp_path / "model"
    assert "2 files, 3 KB, verified" in call(capsys, "pull", "sft", *place, "-o", str(target))
    assert (target / "model.bin").read_text() == "sft" * 1000
    assert (target / "model.bin").stat().st_nlink == 1  # no link into the store
    call(capsys, "pull", "sft", *place, "-o", str(target))  # what is there is left
    (target / "model.bin").unlink()
    (target / "model.bin").write_text("my own notes")
    assert "is another file" in call(capsys, "pull", "sft", *place, "-o", str(target), code=64)
    assert (target / "model.bin").read_text() == "my own notes"
    assert "nothing is published there" in call(capsys, "pull", "dpo", *place, code=66)
    Attempt.begin(artifact(filled, "sft", "other"), "x").publish(
        folder(tmp_path, "other"), {}, {}, {}, {}
    )
    assert "2 are published" in call(capsys, "pull", "sft", *place, code=64)
    call(capsys, "pull", f"sft/{fingerprint('other')[:6]}", *place, "-o", str(tmp_path / "second"))
    assert (tmp_path / "second/model.bin").read_text() == "other" * 1000


def test_verify_reads_every_byte(filled: LocalStore, capsys: pytest.CaptureFixture[str]) -> None:
    place = ["--store", filled.uri, "--run", "t"]
    assert call(capsys, "verify", *place).count("verified") == 3  # sft, and both checkpoints of dpo
    for key in (
        artifact(filled, "sft").path("data", "2", "model.bin"),
        artifact(filled, "dpo").path("checkpoints/step-00000020-3/part-0/model.bin"),
    ):
        path = filled.root / key
        good = path.read_bytes()
        path.unlink()
        path.write_bytes(good[:-1] + b"X")
        said = call(capsys, "verify", *place, code=66)
        assert "1 DAMAGED OR MISSING" in said
        assert f"{key} is damaged" in said
        path.unlink()
        assert f"{key} does not exist" in call(capsys, "verify", *place, code=66)
        path.write_bytes(good)
    filled.put(artifact(filled, "sft").path("_SUCCESS.json"), b"{}")
    assert "_SUCCESS.json is damaged" in call(capsys, "verify", *place, code=66)


def test_gc_removes_what_nothing_refers_to_and_only_when_told(
    filled: LocalStore, capsys: pytest.CaptureFixture[str]
) -> None:
    place, before = ["--store", filled.uri, "--run", "t"], keys(filled)
    assert "--delete" in call(capsys, "gc", *place)
    assert keys(filled) == before
    call(capsys, "gc", *place, "--delete")
    gone = {
        key.split("/", 1)[1].replace(fingerprint(1)[:12], "KEY") for key in before - keys(filled)
    }
    assert gone == {
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
    assert "verified" in call(capsys, "verify", *place)
    assert "nothing to remove" in call(capsys, "gc", *place, "--delete")


def test_gc_drops_uploads_that_were_never_finished(
    tmp_path: Path, open_s3: Any, fake_s3: FakeS3, capsys: pytest.CaptureFixture[str]
) -> None:
    store = open_s3()
    attempt = Attempt.begin(artifact(store, "sft"), "me")
    store.upload(attempt.artifact.path("data", "1", "old"), 20 << 20).send(0, b"x" * (8 << 20))
    Attempt.begin(artifact(store, "sft"), "again")
    store.upload(attempt.artifact.path("data", "2", "running"), 20 << 20).send(0, b"x" * (8 << 20))
    place = [
        "--store",
        store.uri,
        "--run",
        "t",
        "--set",
        f"cluster.store.endpoint={fake_s3.endpoint}",
        "--set",
        "cluster.store.addressingStyle=path",
    ]
    assert "an upload that was never finished" in call(capsys, "gc", *place, "--delete")
    assert [key.rsplit("/", 1)[1] for key in store.unfinished("t/")] == ["running"]


def test_the_verbs_take_a_run_file_too(
    tree: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(tree))
    call(capsys, "prepare", "-f", str(path))
    assert "prepare" in call(capsys, "ls", "-f", str(path))
    assert "verified" in call(capsys, "verify", "-f", str(path))
    assert "nothing to remove" in call(capsys, "gc", "-f", str(path))
    assert "verified" in call(
        capsys, "pull", "prepare", "-f", str(path), "-o", str(tmp_path / "pulled")
    )
    assert (tmp_path / "pulled/train.parquet").exists()
    assert "needs --run NAME" in call(capsys, "gc", "--store", f"file://{tmp_path}/store", code=64)
    call(capsys, "ls", code=64)
