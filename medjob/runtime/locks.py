"""Locks on files, which the kernel releases when their process ends."""

from __future__ import annotations

import contextlib
import errno
import fcntl
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from medjob.errors import ConfigError

# How file systems refuse a lock that they do not support.
_UNSUPPORTED = {errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}


def lock(file: IO[Any], folder: Path) -> None:
    """Lock `file`, which is in `folder`, and wait until other processes have released it.

    Raises:
        ConfigError: the file system of `folder` has no locks.
    """
    _flock(file, fcntl.LOCK_EX, folder)


def try_lock(file: IO[Any], folder: Path) -> bool:
    """Lock `file`, which is in `folder`. Return False if another process holds the lock.

    Raises:
        ConfigError: the file system of `folder` has no locks.
    """
    try:
        _flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB, folder)
    except BlockingIOError:
        return False
    return True


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock on the file `path`, which is created if it does not exist.

    Raises:
        ConfigError: the file system has no locks.
    """
    with path.open("ab") as file:  # unlike "wb", it empties no file that `path` is a link to
        lock(file, path.parent)
        yield


def _flock(file: IO[Any], operation: int, folder: Path) -> None:
    try:
        fcntl.flock(file, operation)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        raise ConfigError(
            f"{folder}: this disk has no file locks ({error.strerror})",
            "use another folder for cluster.workDir and for a file:// store; mount NFS without "
            "nolock",
        ) from None
