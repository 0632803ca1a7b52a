"""The store protocol: what artifacts need of a bucket or a folder, and no more."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from medjob.errors import InputError

PART = 8 << 20  # bytes; S3 takes parts of 5 MiB or more, GCS multiples of 256 KiB


class Conflict(Exception):
    """A conditional write lost: the object exists already, or has changed since it was read."""


class UploadLost(Exception):
    """The store has forgotten an unfinished upload, or holds damaged bytes of it: it has to be sent from the start."""


@dataclass(frozen=True, slots=True)
class Blob:
    """A small object and the version that a compare-and-swap names."""

    data: bytes
    version: str


@dataclass(frozen=True, slots=True)
class Entry:
    """One listed object: its key below the store's root, and its size in bytes."""

    key: str
    size: int


class Upload(Protocol):
    """A file on its way into a store, in parts. Nothing can be read of it before it is finished."""

    part_size: int
    """Bytes of every part but the last."""
    in_order: bool
    """Whether a part may be sent only after the one before it; else many at once, in any order."""

    def send(self, offset: int, data: bytes) -> None:
        """Send one part, unless the store has it from an interrupted upload of the same file. Raises UploadLost."""
        ...

    def finish(self, crc32c: str) -> None:
        """Make the object appear. `crc32c` (hex) is the whole file's: a store that keeps checksums compares it. Raises UploadLost."""
        ...


class Store(Protocol):
    """Objects under keys such as `run/sft/0123456789ab/_SUCCESS.json`.

    Every method tries again what may succeed, and then raises RetryError; also when the store refuses (403), since
    what it holds cannot be told. "Is not there" is None or an empty listing, and is never confused with "cannot tell".
    Every method may be called from many threads at once.
    """

    uri: str

    def get(self, key: str) -> Blob | None:
        """Read a small object; None if there is none."""
        ...

    def put(self, key: str, data: bytes) -> None:
        """Write a small object, whatever stood there."""
        ...

    def create(self, key: str, data: bytes) -> str:
        """Write a small object only if there is none; its version. Raises Conflict.

        An object that holds exactly `data` counts as written by this call, here and in `swap`: an answer can get lost
        after the write, and a request can arrive twice. So a caller's data must bear its own name.
        """
        ...

    def swap(self, key: str, data: bytes, version: str) -> str:
        """Replace a small object only if it still has `version`; its new version. Raises Conflict."""
        ...

    def read(self, key: str, start: int, into: memoryview) -> None:
        """Fill `into` with the object's bytes from `start` on. Raises InputError if it has not as many."""
        ...

    def upload(self, key: str, size: int) -> Upload:
        """Begin, or go on with, the upload of a file of more than PART bytes. The key is written once and never again."""
        ...

    def local_path(self, key: str) -> Path | None:
        """Where the object is on a disk of this machine, so that it can be linked; None for a bucket."""
        ...

    def list(self, prefix: str) -> Iterator[Entry]:
        """Objects whose key begins with `prefix`, sorted by key."""
        ...

    def delete(self, key: str) -> None:
        """Remove an object, if it is there."""
        ...

    def unfinished(self, prefix: str) -> Iterator[str]:
        """Keys below `prefix` of uploads that were begun and not finished: they take space and are listed nowhere else."""
        ...

    def abandon(self, key: str) -> None:
        """Drop every unfinished upload of `key`."""
        ...


def checked_key(key: str) -> str:
    """`key` if it stays inside the store."""
    if key.startswith("/") or ".." in key.split("/"):
        raise InputError(f"{key}: leads out of the store")
    return key
