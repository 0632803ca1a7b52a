"""Folders of attempts on one disk: of running and ended attempts, of several stores and nodes."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from medjob.artifacts.artifact import Artifact, Attempt
from medjob.errors import ConfigError, RetryError, translate
from medjob.pipeline.work_folder import work_folder
from medjob.runtime.files import fingerprint
from medjob.store import LocalStore


def begin(store: Path) -> Attempt:
    return Attempt.begin(Artifact(LocalStore(store), "run", "prepare", fingerprint(1)), "host:1")


def left(work: Path) -> list[Path]:
    return sorted(work.glob("run/prepare/*/*"))


def fail_with_rows(root: Path) -> None:
    (root / "rows").write_text("half")
    raise ValueError("bad row")


def fail(work: Path, attempt: Attempt) -> Path:
    """Leave the folder of a failed attempt."""
    with pytest.raises(ValueError, match="bad row"), work_folder(work, attempt) as root:
        fail_with_rows(root)
    return root


def test_folder_is_deleted_after_success_and_kept_after_a_failure(tmp_path: Path) -> None:
    work = tmp_path / "work"
    with work_folder(work, begin(tmp_path / "store")) as root:
        (root / "output").mkdir()
        assert root.parent == next(work.glob("run/prepare/*"))
    assert left(work) == []
    failed = fail(work, begin(tmp_path / "store"))
    assert (failed / "rows").exists()
    with work_folder(work, begin(tmp_path / "store")) as root:
        assert not failed.exists()
        assert list(root.iterdir()) == []
    assert left(work) == []


def test_emptied_and_other_stores_start_anew(tmp_path: Path) -> None:
    work = tmp_path / "work"
    for store in ("store", "emptied", "another"):  # each starts with epoch 1
        attempt = begin(tmp_path / store)
        assert attempt.epoch == 1
        fail(work, attempt)
    assert len([path for path in left(work) if path.is_dir()]) == 1


def test_folder_of_a_running_attempt_is_kept(tmp_path: Path) -> None:
    """Two runs at once: the later one supersedes the earlier one, which must find that out itself."""
    work = tmp_path / "work"
    first = begin(tmp_path / "store")
    with work_folder(work, first) as running:
        (running / "rows").write_text("half")
        with work_folder(work, begin(tmp_path / "store")) as newer:
            assert (running / "rows").exists()
            assert newer != running
        assert (running / "rows").exists()


def test_folder_of_a_killed_process_is_deleted(tmp_path: Path) -> None:
    code = f"""if True:
        import os, signal
        from pathlib import Path
        from tests.pipeline.test_work_folder import begin, work_folder
        with work_folder(Path({str(tmp_path)!r}) / "work", begin(Path({str(tmp_path)!r}) / "store")):
            os.kill(os.getpid(), signal.SIGKILL)
    """
    subprocess.run([sys.executable, "-c", code], check=False, cwd=Path(__file__).parents[2])
    assert len(left(tmp_path / "work")) == 2  # the folder and its lock
    with work_folder(tmp_path / "work", begin(tmp_path / "store")):
        assert len(left(tmp_path / "work")) == 2
    assert left(tmp_path / "work") == []


def test_nodes_that_share_a_disk_keep_each_others_folders(tmp_path: Path) -> None:
    first = begin(tmp_path / "store")
    second = Attempt.join(first.artifact, first.epoch, first.owner, 1)
    with work_folder(tmp_path / "work", first) as one:
        with work_folder(tmp_path / "work", second) as two:
            assert one.is_dir()
            assert two.is_dir()
            assert one != two
        assert one.is_dir()


def test_full_disk_without_a_file_name_names_the_folder(tmp_path: Path) -> None:
    with (
        pytest.raises(RetryError, match=str(tmp_path)),
        work_folder(tmp_path / "work", begin(tmp_path / "store")),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def delete_and_write(root: Path) -> None:
    root.rmdir()
    (root / "rows").write_text("x")


def test_folder_that_is_deleted_in_use_ends_with_75(tmp_path: Path) -> None:
    with (
        pytest.raises(RetryError, match="was deleted while"),
        work_folder(tmp_path / "work", begin(tmp_path / "store")) as root,
    ):
        delete_and_write(root)


def test_work_folder_that_cannot_be_created_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt = begin(tmp_path / "store")
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ConfigError, match=r"cluster.workDir: cannot create"),
        work_folder(tmp_path / "file", attempt),
    ):
        pass

    def read_only(path: Path, *_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(Path, "mkdir", read_only)
    with (
        pytest.raises(OSError, match="Read-only") as caught,
        work_folder(tmp_path / "work", attempt),
    ):
        pass
    translated = translate(caught.value)
    assert isinstance(translated, RetryError)
    assert str(tmp_path) in translated.message


def test_lock_that_is_a_link_does_not_empty_its_target(tmp_path: Path) -> None:
    work, notes = tmp_path / "work", tmp_path / "notes"
    notes.write_text("my notes")
    failed = fail(work, begin(tmp_path / "store"))
    lock = failed.with_name(f"{failed.name}.lock")
    lock.unlink()
    lock.symlink_to(notes)
    with work_folder(work, begin(tmp_path / "store")):
        assert not failed.exists()
    assert notes.read_text() == "my notes"
