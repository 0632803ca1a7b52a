"""Files and their checksums, as manifests describe them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import google_crc32c
from pydantic import BaseModel, ConfigDict

from medjob.errors import InputError


class File(BaseModel):
    """One file of an artifact; `path` is relative to the artifact's data folder."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    path: str
    size: int
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


def files_below(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield name and path of every file below `folder`, sorted.

    Raises:
        InputError: there is a symbolic link, whose target could change after publishing.
    """
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            raise InputError(f"{path} is a symbolic link; only regular files can be published")
        if path.is_file():
            yield path.relative_to(folder).as_posix(), path


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


def link_or_copy(source: Path, target: Path) -> None:
    """Hard-link `target` to `source`, or copy it if the file system cannot link them."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def break_hard_link(path: Path) -> None:
    """Replace `path` by a copy if it has other hard links, so that writing to it changes no others.

    Files from a local store are hard links to the store's own files.
    """
    if path.stat().st_nlink > 1:
        copy = path.with_name(path.name + ".copy")
        shutil.copyfile(path, copy)
        copy.replace(path)


def digest_of(files: Iterable[File]) -> str:
    """Compute the digest of a set of files from their paths, sizes and sha256."""
    return fingerprint([[f.path, f.size, f.sha256] for f in sorted(files, key=lambda f: f.path)])


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
