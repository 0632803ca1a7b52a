"""Files and their checksums: what a manifest says of each file."""

from __future__ import annotations

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
    """Checksums of a file, taken while its bytes pass in order.

    sha256 is the identity. crc32c is what S3 and GCS keep beside an object, so that they can compare it themselves.
    """

    def __init__(self) -> None:
        self._sha256, self._crc32c, self.size = hashlib.sha256(), google_crc32c.Checksum(), 0

    def update(self, data: bytes) -> None:
        """The file's next bytes."""
        self._sha256.update(data)
        self._crc32c.update(data)
        self.size += len(data)

    def file(self, path: str) -> File:
        """What has passed, under the name `path`."""
        return File(
            path=path,
            size=self.size,
            sha256=self._sha256.hexdigest(),
            crc32c=self._crc32c.digest().hex(),
        )


def describe_file(path: Path, name: str) -> File:
    """Size and checksums of a file, in one pass over it."""
    sums = Checksums()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            sums.update(block)
    return sums.file(name)


def files_below(folder: Path) -> Iterator[tuple[str, Path]]:
    """Names and paths of all files below `folder`, sorted. Links are refused: what they point at may change."""
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            raise InputError(f"{path}: is a link, and links are not published")
        if path.is_file():
            yield path.relative_to(folder).as_posix(), path


def describe_folder(folder: Path) -> list[File]:
    """All files below `folder`, sorted by path."""
    return [describe_file(path, name) for name, path in files_below(folder)]


def link_or_copy(source: Path, target: Path) -> None:
    """Make `target` the same file as `source`: by a hard link, which costs nothing, or by a copy where the disk cannot link."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def own_copy(path: Path) -> None:
    """Part `path` from the store's file that it may be a hard link of, so that whoever writes to it writes to it alone."""
    if path.stat().st_nlink > 1:
        copy = path.with_name(path.name + ".copy")
        shutil.copyfile(path, copy)
        copy.replace(path)


def digest_of(files: Iterable[File]) -> str:
    """Digest of a set of files: paths, sizes and sha256."""
    return fingerprint([[f.path, f.size, f.sha256] for f in sorted(files, key=lambda f: f.path)])


def canonical_json(value: Any) -> str:
    """The one spelling of `value` that hashes are taken over; refuses what JSON cannot hold."""
    return json.dumps(
        value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False
    )


def fingerprint(value: Any) -> str:
    """sha256 of `value`'s canonical JSON, in hex."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def safe_path(path: str) -> PurePosixPath:
    """`path` if it stays inside the folder that it is joined to. A manifest is data, so its paths are not trusted."""
    pure = PurePosixPath(path)
    if pure.is_absolute() or ".." in pure.parts or not pure.parts or "\\" in path or "\0" in path:
        raise InputError(f"{path!r}: leads out of the artifact")
    return pure
