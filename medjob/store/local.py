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
from medjob.runtime.files import naming
from medjob.runtime.locks import lock
from medjob.store.base import PART_SIZE, Blob, Conflict, Entry, checked_key

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
    """`file://FOLDER`. Objects are written to a temporary file and renamed: writes are atomic."""

    def __init__(self, root: Path) -> None:
        self.root = root.expanduser().absolute()
        self.uri = f"file://{self.root}"

    def get(self, key: str) -> Blob | None:
        try:
            data = self._path(key).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        return Blob(data, hashlib.sha256(data).hexdigest())

    def put(self, key: str, data: bytes) -> None:
        with self._partial(key, data) as partial:
            partial.replace(self._path(key))

    def create(self, key: str, data: bytes) -> str:
        with self._partial(key, data) as partial:
            try:
                # Unlike a rename, a hard link fails if the target exists.
                os.link(partial, self._path(key))
            except FileExistsError:
                if self._path(key).read_bytes() != data:
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
            partial.replace(self._path(key))
        return hashlib.sha256(data).hexdigest()

    def read(self, key: str, start: int, into: memoryview) -> None:
        try:
            with self._path(key).open("rb") as file:
                count = os.preadv(file.fileno(), [into], start)
        except (FileNotFoundError, IsADirectoryError):
            raise InputError(f"{self.uri}/{key} does not exist") from None
        if count < len(into):
            raise InputError(f"{self.uri}/{key} is shorter than expected")

    def upload(self, key: str, size: int) -> _LocalUpload:
        return _LocalUpload(self._path(key))

    def local_path(self, key: str) -> Path | None:
        return self._path(key)

    def list(self, prefix: str) -> Iterator[Entry]:
        entries = []
        for key, path in self._walk(prefix):
            with contextlib.suppress(FileNotFoundError):  # deleted in the meantime
                if not path.name.startswith((_PARTIAL, _LOCK)):
                    entries.append(Entry(key, path.stat().st_size))
        return iter(sorted(entries, key=lambda entry: entry.key))

    def delete(self, key: str) -> None:
        path = self._path(key)
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
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
        path = self._path(key)
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

    @contextlib.contextmanager
    def _partial(self, key: str, data: bytes) -> Iterator[Path]:
        partial = _new_partial(self._path(key))
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
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_name(f"{_LOCK}{path.name}").open("wb") as file:
            lock(file, path.parent)
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
            self._partial.replace(self._path)
        except FileNotFoundError:
            raise _deleted(self._path.parent) from None


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
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise RetryError(
            f"cannot list {error.filename}: {error.strerror}",
            "check the permissions of the folder and the state of its disk",
        )


def _age_s(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
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
    except (PermissionError, NotADirectoryError, FileExistsError) as error:
        raise ConfigError(
            f"cluster.store: cannot write to {path.parent}: {error.strerror}",
            "choose another folder",
        ) from None
    os.close(handle)
    return Path(name)  # only its owner can read it
