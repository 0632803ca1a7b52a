"""Copy a user's models and data out of a bucket.

No manifest describes these objects, so they are checked against the bucket's own metadata.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import google_crc32c

from medjob.errors import InputError, RetryError
from medjob.runtime.files import naming, safe_path
from medjob.store.base import Entry, Store
from medjob.store.transfer import Transfer


@dataclass(frozen=True, slots=True)
class Stat:
    """The metadata that a bucket keeps for an object."""

    size: int
    version: str
    checksums: Mapping[str, str]
    """`crc32c` and `crc32` of the whole object, in hex, if the bucket has them.

    GCS always has them; S3 has those that the uploader sent.
    """


class SourceBucket(Store, Protocol):
    """A bucket that users write to."""

    def stat(self, key: str) -> Stat | None:
        """Return an object's metadata, or None if it does not exist."""
        ...


def copy_objects(bucket: SourceBucket, entries: Sequence[Entry], folder: Path) -> None:
    """Copy objects to `folder`, each from a single version and checked against its checksums.

    Raises:
        InputError: an object no longer exists, or does not match its checksum.
        RetryError: an object was replaced during the copy.
    """
    _check_names(bucket, entries)
    with Transfer(bucket, "down", sum(entry.size for entry in entries)) as transfer:
        transfer.map(
            lambda entry: _copy(transfer, bucket, entry.key, folder / safe_path(entry.key)), entries
        )


def _check_names(bucket: SourceBucket, entries: Sequence[Entry]) -> None:
    """Raise if two objects have the same path on a disk, or one has the path of a directory."""
    paths = {safe_path(entry.key): entry.key for entry in entries}
    folders = {folder for path in paths for folder in path.parents}
    taken = sorted(folders & paths.keys())
    twice = [entry.key for entry in entries if paths[safe_path(entry.key)] != entry.key]
    for key in [*twice, *(paths[path] for path in taken)]:
        raise InputError(
            f"{bucket.uri}/{key} has the same path as another object or directory",
            "rename it, or name each object instead of the directory",
        )


def _copy(transfer: Transfer, bucket: SourceBucket, key: str, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    source = f"{bucket.uri}/{key}"
    for _ in range(2):  # the second try repairs corruption in transit
        before = bucket.stat(key)
        if before is None:
            raise InputError(f"{source} does not exist")
        checksums = _write_and_checksum(transfer, key, before.size, target)
        if bucket.stat(key) != before:
            raise RetryError(
                f"{source} was replaced while it was copied",
                "run the same command again to copy the new version",
            )
        if all(checksums[name] == value for name, value in before.checksums.items()):
            return
    raise InputError(f"{source} does not match its checksum in the bucket", "upload it again")


def _write_and_checksum(transfer: Transfer, key: str, size: int, target: Path) -> dict[str, str]:
    """Write an object to `target` and return the checksums of the written bytes."""
    crc32c = google_crc32c.Checksum()
    crc32 = 0
    with naming(target.parent), target.open("wb") as file:
        for data in transfer.ranges(key, 0, size):
            crc32c.update(bytes(data))  # google_crc32c rejects writable buffers
            crc32 = zlib.crc32(data, crc32)
            file.write(data)
    return {"crc32c": crc32c.digest().hex(), "crc32": f"{crc32:08x}"}
