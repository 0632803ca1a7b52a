"""Files and their checksums, as manifests describe them."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import stat
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Annotated, Any, BinaryIO

import google_crc32c
from pydantic import BaseModel, ConfigDict, Field

from medjob.errors import InputError
from medjob.runtime.printable import printable

_FICLONE = 0x40049409  # ioctl_ficlone(2), as on x86 and ARM


class File(BaseModel):
    """One file of an artifact; `path` is relative to the artifact's data folder."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    path: str
    size: Annotated[int, Field(ge=0, lt=1 << 63)]
    sha256: str
    crc32c: str


class Checksums:
    """Checksums of a file, computed from its bytes in order.

    sha256 identifies the file. S3 and GCS keep the crc32c of an object and compare it themselves.
    """

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()
        self._crc32c = google_crc32c.Checksum()
        self.size = 0

    def update(self, data: bytes) -> None:
        """Add the file's next bytes."""
        self._sha256.update(data)
        self._crc32c.update(data)
        self.size += len(data)

    def file(self, path: str) -> File:
        """Describe the bytes so far as the file `path`."""
        return File(
            path=path,
            size=self.size,
            sha256=self._sha256.hexdigest(),
            crc32c=self._crc32c.digest().hex(),
        )


def describe_file(path: Path, name: str) -> File:
    """Compute size and checksums of a file in one pass. `name` becomes its path."""
    sums = Checksums()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            sums.update(block)
    return sums.file(name)


def open_regular_file(path: Path) -> BinaryIO:
    """Open `path` for reading, like `path.open("rb")`.

    A pipe would block until somebody writes to it, and a device may never end.

    Raises:
        InputError: it is something other than a regular file.
        OSError: it does not exist or cannot be opened.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in {errno.ELOOP, errno.ENXIO}:  # a loop of links, or a socket
            raise _not_regular(path) from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _not_regular(path)
    return os.fdopen(descriptor, "rb")


def _not_regular(path: Path) -> InputError:
    name = printable(str(path))
    return InputError(f"{name} is not a regular file", "delete it, or restore the file")


def read_regular_file(path: Path, limit: int) -> bytes:
    """Return the content of a small file.

    Raises:
        InputError: it is something other than a regular file, or has more than `limit` bytes.
        OSError: it does not exist or cannot be read.
    """
    data = bytearray()
    with open_regular_file(path) as file:
        while block := file.read(1 << 20):
            data += block
            if len(data) > limit:
                name = printable(str(path))
                raise InputError(
                    f"{name} has more than {limit} bytes", "delete it, or restore the file"
                )
    return bytes(data)


def size_of_regular_file(path: Path) -> int:
    """Return the size of a file in bytes.

    Raises:
        InputError: it is something other than a regular file.
        OSError: it does not exist or cannot be accessed.
    """
    try:
        found = path.stat()
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise _not_regular(path) from None
        raise
    if not stat.S_ISREG(found.st_mode):
        raise _not_regular(path)
    return found.st_size


def files_below(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield name and path of every file below `folder`, sorted.

    Raises:
        InputError: there is a symbolic link, whose target could change after publishing, or a
            name that is not UTF-8, which no manifest can contain.
    """
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            raise InputError(f"{path} is a symbolic link; only regular files can be published")
        if path.is_file():
            name = path.relative_to(folder).as_posix()
            if name.encode(errors="ignore").decode() != name:
                raise InputError(f"{printable(str(path))}: the name is not UTF-8", "rename it")
            yield name, path


def describe_folder(folder: Path) -> list[File]:
    """Describe every file below `folder`, sorted by path."""
    return [describe_file(path, name) for name, path in files_below(folder)]


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add `path` to errors that name no file: those of a write, such as on a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def clone(source: Path, target: IO[Any]) -> bool:
    """Make `target`, an empty file, a copy-on-write copy of `source`.

    It takes neither time nor space. Returns False, with `target` still empty, if the file system
    cannot do it: XFS, Btrfs and bcachefs can, ext4 cannot, and none can across two disks.
    """
    if sys.platform != "linux":
        return False
    with source.open("rb") as file:
        try:
            fcntl.ioctl(target, _FICLONE, file.fileno())
        except OSError:
            return False  # each file system refuses with another number
    return True


def digest_of(files: Iterable[File]) -> str:
    """Compute the digest of a set of files from their paths, sizes and sha256."""
    return fingerprint([[f.path, f.size, f.sha256] for f in sorted(files, key=lambda f: f.path)])


def parse_json(data: bytes | str) -> Any:
    """Parse JSON that anybody may have written.

    Raises:
        ValueError: it is not JSON, or is nested too deeply.
    """
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("the JSON is nested too deeply") from None


def canonical_json(value: Any) -> str:
    """Serialize `value` in the one form that hashes are computed from.

    Raises:
        ValueError, TypeError: JSON cannot represent the value, for example NaN or a set.
    """
    return json.dumps(
        value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False
    )


def fingerprint(value: Any) -> str:
    """Return the sha256 of `value`'s canonical JSON, in hex."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def safe_path(path: str) -> PurePosixPath:
    """Return `path`, or raise InputError if it would leave the folder that it is joined to.

    Paths come from manifests, which are data and not trusted.
    """
    pure = PurePosixPath(path)
    if pure.is_absolute() or ".." in pure.parts or not pure.parts or "\\" in path or "\0" in path:
        raise InputError(f"the path {path!r} points outside its folder")
    return pure
