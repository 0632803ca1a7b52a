"""The folder of an attempt on this machine's disk."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from medjob.artifacts.artifact import Attempt
from medjob.errors import ConfigError, translate
from medjob.runtime.locks import try_lock

_LOCK = ".lock"


@contextlib.contextmanager
def work_folder(work: Path, attempt: Attempt) -> Iterator[Path]:
    """Create this attempt's folder below `work`, and delete it when the attempt succeeds.

    Its name is unique, since epochs start again in a store that was emptied, and another store has
    the same ones. A lock tells the folders of running attempts from those that ended attempts left,
    which are deleted.

    Raises:
        ConfigError: `work` is not a folder, or its disk has no file locks.
        RetryError: the disk is full or not writable.
    """
    parent = work / attempt.artifact.prefix
    # All nodes share the owner, and perhaps the disk.
    root = parent / f"{attempt.epoch}-{attempt.owner[-12:]}-node{attempt.node}"
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, FileNotFoundError, NotADirectoryError) as error:
        raise ConfigError(
            f"cluster.workDir: cannot create {parent}: {error.strerror}",
            "choose another folder, or remove the file that is in its place",
        ) from None
    _delete_leftovers(parent, attempt)
    lock = _lock_of(root)
    with lock.open("ab") as file:
        try_lock(file, parent)
        root.mkdir()
        try:
            yield root
        except Exception as error:
            translated = translate(error, str(root))
            if translated is error:
                raise
            raise translated from error
        shutil.rmtree(root, ignore_errors=True)
        lock.unlink(missing_ok=True)


def _lock_of(root: Path) -> Path:
    """The lock beside a folder. It is taken before the folder exists, so none is without it.

    It is opened for appending, which empties no file that somebody linked it to.
    """
    return root.with_name(root.name + _LOCK)


def _delete_leftovers(parent: Path, attempt: Attempt) -> None:
    """Delete the folders of attempts that have ended. The other nodes' folders are kept."""
    mine = f"{attempt.epoch}-{attempt.owner[-12:]}-"
    for folder in parent.iterdir():
        if folder.name.startswith(mine) or not folder.is_dir():
            continue
        lock = _lock_of(folder)
        with contextlib.suppress(FileNotFoundError, PermissionError), lock.open("ab") as file:
            if try_lock(file, parent):
                shutil.rmtree(folder, ignore_errors=True)
                lock.unlink(missing_ok=True)
