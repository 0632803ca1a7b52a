"""Objects that others put into a bucket. No manifest says what they should be: what the bucket itself keeps of them has to do."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import google_crc32c

from medjob.errors import InputError, RetryError
from medjob.runtime.files import safe_path
from medjob.store.base import Entry, Store
from medjob.store.transfer import Transfer


@dataclass(frozen=True, slots=True)
class Stat:
    """What a bucket keeps of an object."""

    size: int
    version: str
    checksums: Mapping[str, str]
    """`crc32c` and `crc32` (hex) of the whole object, where the bucket has them: GCS always, S3 by who uploaded it."""


class Bucket(Store, Protocol):
    """A store whose objects others may write."""

    def stat(self, key: str) -> Stat | None:
        """What is kept of an object; None if there is none."""
        ...


def copy_originals(bucket: Bucket, entries: Sequence[Entry], folder: Path) -> None:
    """Place objects in `folder`: each of one version, and with the checksums that the bucket keeps.

    Raises:
        InputError: one is gone, or is not what its checksum says.
        RetryError: one was replaced meanwhile.
    """
    with Transfer(bucket, "down", sum(entry.size for entry in entries)) as transfer:
        transfer.each(
            lambda entry: _copy(transfer, bucket, entry.key, folder / safe_path(entry.key)), entries
        )


def _copy(transfer: Transfer, bucket: Bucket, key: str, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    where = f"{bucket.uri}/{key}"
    for _ in range(2):  # what was damaged on its way comes whole the second time
        kept = bucket.stat(key)
        if kept is None:
            raise InputError(f"{where}: is not there")
        found = _written(transfer, key, kept.size, target)
        if bucket.stat(key) != kept:
            raise RetryError(
                f"{where}: was replaced while it was copied",
                "the same command copies what is there now",
            )
        if all(found[name] == value for name, value in kept.checksums.items()):
            return
    raise InputError(f"{where}: is not what its checksum in the bucket says", "upload it again")


def _written(transfer: Transfer, key: str, size: int, target: Path) -> dict[str, str]:
    """Checksums of the bytes that were written to `target`."""
    crc32c, crc32 = google_crc32c.Checksum(), 0
    with target.open("wb") as file:
        for data in transfer.ranges(key, 0, size):
            crc32c.update(bytes(data))  # it takes no buffer that can be written to
            crc32 = zlib.crc32(data, crc32)
            file.write(data)
    return {"crc32c": crc32c.digest().hex(), "crc32": f"{crc32:08x}"}
