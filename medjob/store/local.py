"""A folder as a store: for laptops, tests and shared disks."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from medjob.errors import ConfigError, InputError, RetryError
from medjob.runtime.files import (
    naming,
    open_regular_file,
    read_regular_file,
    size_of_regular_file,
)
from medjob.runtime.locks import locked
from medjob.runtime.printable import printable
from medjob.store.base import MAX_BLOB_SIZE, PART_SIZE, Blob, Conflict, Entry, checked_key

_PARTIAL = ".partial-"
_LOCK = ".lock-"
_STALE_S = 3600.0  # a younger temporary file may belong to a running upload
# How file systems and FUSE mounts such as exFAT and gcsfuse refuse to create a hard link.
_UNSUPPORTED = {
    errno.EINVAL,
    errno.EMLINK,
    errno.ENOSYS,
    errno.ENOTSUP,
    errno.EOPNOTSUPP,
    errno.EPERM,
    errno.EXDEV,
}
_RANDOM_CHARS = 8  # mkstemp inserts this many characters between prefix and suffix


class LocalStore:
    """`file://FOLDER`. Objects are written to a temporary file and renamed: writes are atomic.

    Others may be able to write to the folder too. A pipe or a device in it is refused, because it
    may never end, and so are writes through a symbolic link, which would end up elsewhere.
    """

    def __init__(self, root: Path) -> None:
        try:
            self.root = root.expanduser().absolute()
        except RuntimeError as error:
            raise ConfigError(
                f"cluster.store: {root}: {error}", "use an absolute path: file:///FOLDER"
            ) from None
        self.uri = f"file://{self.root}"

    def get(self, key: str) -> Blob | None:
        try:
            data = read_regular_file(self._path(key), MAX_BLOB_SIZE)
        except (FileNotFoundError, NotADirectoryError):
            return None
        return Blob(data, hashlib.sha256(data).hexdigest())

    def put(self, key: str, data: bytes) -> None:
        with self._partial(key, data) as partial:
            _replace(partial, self._path(key))

    def create(self, key: str, data: bytes) -> str:
        with self._partial(key, data) as partial:
            try:
                # Unlike a rename, a hard link fails if the target exists.
                os.link(partial, self._path(key))
            except FileExistsError:
                found = self.get(key)
                if found is None or found.data != data:
                    raise Conflict(key) from None
            except OSError as error:
                if error.errno not in _UNSUPPORTED:
                    raise
                raise ConfigError(
                    f"{self.uri}: this disk has no hard links, which keep two attempts from "
                    f"overwriting each other ({error.strerror})",
                    "use another folder or a bucket; if only one process on one machine ever "
                    "writes to this store, set cluster.store.singleWriter: true",
                ) from None
        return hashlib.sha256(data).hexdigest()

    def swap(self, key: str, data: bytes, version: str) -> str:
        with self._locked(key), self._partial(key, data) as partial:
            current = self.get(key)
            if current is None or (current.version != version and current.data != data):
                raise Conflict(key)
            _replace(partial, self._path(key))
        return hashlib.sha256(data).hexdigest()

    def read(self, key: str, start: int, into: memoryview) -> None:
        try:
            with open_regular_file(self._path(key)) as file:
                count = os.preadv(file.fileno(), [into], start)
        except (FileNotFoundError, NotADirectoryError):
            raise InputError(f"{self.uri}/{key} does not exist") from None
        if count < len(into):
            raise InputError(f"{self.uri}/{key} is shorter than expected")

    def upload(self, key: str, size: int) -> _LocalUpload:
        return _LocalUpload(self._path_to_write(key))

    def local_path(self, key: str) -> Path | None:
        return self._path(key)

    def list(self, prefix: str) -> Iterator[Entry]:
        entries = []
        for key, path in self._walk(prefix):
            with contextlib.suppress(FileNotFoundError):  # deleted in the meantime
                if not path.name.startswith((_PARTIAL, _LOCK)):
                    entries.append(Entry(key, size_of_regular_file(path)))
        return iter(sorted(entries, key=lambda entry: entry.key))

    def delete(self, key: str) -> None:
        path = self._path_to_write(key)
        with contextlib.suppress(FileNotFoundError, NotADirectoryError, IsADirectoryError):
            path.unlink()
        with contextlib.suppress(OSError):  # stop at the first folder that is not empty
            for folder in path.parents:
                if folder == self.root:
                    break
                folder.rmdir()

    def unfinished(self, prefix: str) -> Iterator[str]:
        for key, path in self._walk(prefix):
            if path.name.startswith(_PARTIAL) and _age_s(path) > _STALE_S:
                yield str(Path(key).with_name(path.name[len(_PARTIAL) + _RANDOM_CHARS :]))

    def abandon(self, key: str) -> None:
        path = self._path_to_write(key)
        for partial in path.parent.glob(f"{_PARTIAL}{'?' * _RANDOM_CHARS}{path.name}"):
            if _age_s(partial) > _STALE_S:
                partial.unlink(missing_ok=True)

    def _walk(self, prefix: str) -> Iterator[tuple[str, Path]]:
        folder = self._path(prefix.rpartition("/")[0])
        for directory, _, names in os.walk(folder, onerror=_raise_unless_missing):
            for name in names:
                path = Path(directory, name)
                key = path.relative_to(self.root).as_posix()
                if key.startswith(prefix):
                    yield key, path

    def _path(self, key: str) -> Path:
        return self.root / checked_key(key)

    def _path_to_write(self, key: str) -> Path:
        """Return the object's path.

        Raises:
            InputError: a folder on the way to it is a symbolic link.
        """
        path = self._path(key)
        for folder in path.parents:
            if folder == self.root:
                break
            if folder.is_symlink():
                raise _is_link(folder)
        return path

    @contextlib.contextmanager
    def _partial(self, key: str, data: bytes) -> Iterator[Path]:
        partial = _new_partial(self._path_to_write(key))
        try:
            with naming(partial.parent), partial.open("wb") as file:
                file.write(data)
                file.flush()
                _sync(file.fileno())
            yield partial
        except FileNotFoundError:
            raise _deleted(partial.parent) from None
        finally:
            partial.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _locked(self, key: str) -> Iterator[None]:
        path = self._path_to_write(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.with_name(f"{_LOCK}{path.name}")
        if lock.is_symlink():
            raise _is_link(lock)
        with contextlib.suppress(FileNotFoundError):
            size_of_regular_file(lock)  # opening a pipe would block
        with locked(lock):
            yield


class _LocalUpload:
    part_size = PART_SIZE
    in_order = False

    def __init__(self, path: Path) -> None:
        self._path = path
        self._partial = _new_partial(path)
        self._file = self._partial.open("r+b")

    def send(self, offset: int, data: bytes) -> None:
        remaining = memoryview(data)
        with naming(self._path.parent):
            while remaining:  # on an almost full disk, a write can be short without an error
                count = os.pwrite(self._file.fileno(), remaining, offset)
                remaining = remaining[count:]
                offset += count

    def finish(self, crc32c: str) -> None:
        with naming(self._path.parent):
            _sync(self._file.fileno())
            self._file.close()
        try:
            _replace(self._partial, self._path)
        except FileNotFoundError:
            raise _deleted(self._path.parent) from None


def _replace(partial: Path, path: Path) -> None:
    try:
        partial.replace(path)
    except IsADirectoryError:
        raise InputError(f"{path} is a directory, not a file", "delete it") from None


def _is_link(path: Path) -> InputError:
    return InputError(
        f"{printable(str(path))} is a symbolic link, so nothing is written there",
        "replace it with a folder, or name its target in cluster.store",
    )


def _sync(descriptor: int) -> None:
    """Write a file to the disk itself, if the file system can."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}:
            raise


def _deleted(folder: Path) -> RetryError:
    return RetryError(
        f"{folder} was deleted while a file was written to it",
        "restore the store, or run the same command again to start from what is in it now",
    )


def _raise_unless_missing(error: OSError) -> None:
    """Handle an error of os.walk: a missing folder is empty, an unreadable one is an error."""
    if error.errno == errno.ELOOP:
        name = printable(str(error.filename))
        raise InputError(f"{name} is a loop of symbolic links", "delete it")
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise RetryError(
            f"cannot list {error.filename}: {error.strerror}",
            "check the permissions of the folder and the state of its disk",
        )


def _age_s(path: Path) -> float:
    try:
        return time.time() - path.lstat().st_mtime
    except FileNotFoundError:
        return 0.0


def _new_partial(path: Path) -> Path:
    """Create an empty temporary file beside `path`."""
    try:
        while True:
            path.parent.mkdir(parents=True, exist_ok=True)
            # A concurrent `delete` may remove the empty folder before the file is created.
            with contextlib.suppress(FileNotFoundError):
                handle, name = tempfile.mkstemp(prefix=_PARTIAL, suffix=path.name, dir=path.parent)
                break
    except (FileNotFoundError, PermissionError, NotADirectoryError, FileExistsError) as error:
        raise ConfigError(
            f"cluster.store: cannot write to {path.parent}: {error.strerror}",
            "choose another folder",
        ) from None
    os.close(handle)
    return Path(name)  # only its owner can read it
