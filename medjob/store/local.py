"""A folder as a store: for laptops, tests and shared disks."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from medjob.errors import ConfigError, InputError
from medjob.store.base import Blob, Conflict, Entry

_PARTIAL = ".partial-"


class LocalStore:
    """`file://FOLDER`. Writes go to a temporary name and are renamed, so that a reader sees all of an object or none."""

    def __init__(self, root: Path) -> None:
        self.root = root.expanduser().absolute()
        self.uri = f"file://{self.root}"
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"cluster.store: cannot make {self.root}: {error.strerror}") from None

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
                os.link(partial, self._path(key))  # unlike a rename, a link fails where something stands
            except FileExistsError:
                raise Conflict(key) from None
        return hashlib.sha256(data).hexdigest()

    def swap(self, key: str, data: bytes, version: str) -> str:
        with self._locked(key), self._partial(key, data) as partial:
            current = self.get(key)
            if current is None or current.version != version:
                raise Conflict(key)
            partial.replace(self._path(key))
        return hashlib.sha256(data).hexdigest()

    def upload(self, path: Path, key: str) -> None:
        with self._partial(key, None) as partial:
            shutil.copyfile(path, partial)  # no link: whoever wrote the file may write to it again
            partial.replace(self._path(key))

    def download(self, key: str, path: Path) -> None:
        source = self._path(key)
        if not source.is_file():
            raise InputError(f"{self.uri}/{key}: is not there")
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(_PARTIAL + path.name)
        partial.unlink(missing_ok=True)
        _link_or_copy(source, partial)
        partial.replace(path)

    def list(self, prefix: str) -> Iterator[Entry]:
        folder = self._path(prefix.rpartition("/")[0])
        found = []
        for directory, _, names in os.walk(folder):
            for name in names:
                path = Path(directory, name)
                key = path.relative_to(self.root).as_posix()
                if key.startswith(prefix) and not name.startswith((_PARTIAL, ".lock-")):
                    found.append(Entry(key, path.stat().st_size))
        return iter(sorted(found, key=lambda entry: entry.key))

    def delete(self, key: str) -> None:
        path = self._path(key)
        path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # the first folder that is not empty ends it
            for folder in path.parents:
                if folder == self.root:
                    break
                folder.rmdir()

    def _path(self, key: str) -> Path:
        if key.startswith("/") or ".." in key.split("/"):
            raise InputError(f"{key}: leads out of the store")
        return self.root / key

    @contextlib.contextmanager
    def _partial(self, key: str, data: bytes | None) -> Iterator[Path]:
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=_PARTIAL, dir=path.parent)
        partial = Path(name)
        try:
            with os.fdopen(handle, "wb") as file:
                if data is not None:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
            partial.chmod(0o644)
            yield partial
        finally:
            partial.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _locked(self, key: str) -> Iterator[None]:
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_name(f".lock-{path.name}").open("wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _link_or_copy(source: Path, target: Path) -> None:
    """Make `target` the same file as `source`, or a copy where the disk cannot link."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
