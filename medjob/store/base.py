"""The store protocol: the operations that artifacts need from a bucket or a folder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from medjob.errors import InputError

PART_SIZE = 8 << 20  # bytes; S3 accepts parts of 5 MiB or more, GCS multiples of 256 KiB
# Bytes that `get` reads at most. The marker of an artifact with half a million files fits.
MAX_BLOB_SIZE = 256 << 20


class Conflict(Exception):
    """A conditional write failed: the object already exists, or changed since it was read."""


class UploadLost(Exception):
    """The store dropped an unfinished upload or holds damaged bytes of it. Restart the upload."""


@dataclass(frozen=True, slots=True)
class Blob:
    """A small object, and its version for a compare-and-swap."""

    data: bytes
    version: str


@dataclass(frozen=True, slots=True)
class Entry:
    """One listed object: its key relative to the store's root, and its size in bytes."""

    key: str
    size: int


class Upload(Protocol):
    """An upload of one file in parts. The object appears only when the upload is finished."""

    part_size: int
    """Bytes of each part except the last."""
    in_order: bool
    """Whether parts must be sent one after another. Otherwise they may be sent concurrently."""

    def send(self, offset: int, data: bytes) -> None:
        """Send one part, unless an interrupted upload of the same file already stored it.

        Raises:
            UploadLost: the store dropped the upload.
        """
        ...

    def finish(self, crc32c: str) -> None:
        """Make the object visible.

        `crc32c` is the checksum of the whole file in hex. A store that keeps checksums compares it.

        Raises:
            UploadLost: the store dropped the upload, or received damaged bytes.
        """
        ...


class Store(Protocol):
    """Objects under keys such as `run/sft/0123456789ab/_SUCCESS.json`.

    Every method retries transient failures and then raises RetryError.
    It also raises RetryError when access is denied (403), because the content is then unknown.
    A missing object is reported as None or an empty listing, never as an error, and an error is
    never reported as a missing object.
    All methods are thread-safe.
    """

    uri: str

    def get(self, key: str) -> Blob | None:
        """Read a small object. Return None if it does not exist.

        Raises:
            InputError: it has more than MAX_BLOB_SIZE bytes; in a folder, also if it is something
                other than a regular file.
        """
        ...

    def put(self, key: str, data: bytes) -> None:
        """Write a small object, replacing any existing one."""
        ...

    def create(self, key: str, data: bytes) -> str:
        """Write a small object if it does not exist, and return its version.

        If the object already holds exactly `data`, the write counts as successful, here and in
        `swap`: a response can be lost after the write, and a request can arrive twice.
        Concurrent writers must therefore write different data, for example by including an owner.

        Raises:
            Conflict: the object exists with different data.
        """
        ...

    def swap(self, key: str, data: bytes, version: str) -> str:
        """Replace a small object if it still has `version`, and return the new version.

        Raises:
            Conflict: the object has another version, or does not exist.
        """
        ...

    def read(self, key: str, start: int, into: memoryview) -> None:
        """Fill `into` with the object's bytes from offset `start`.

        Raises:
            InputError: the object does not exist or is too short.
        """
        ...

    def upload(self, key: str, size: int) -> Upload:
        """Start or resume the upload of a file larger than PART_SIZE. Each key is written once."""
        ...

    def local_path(self, key: str) -> Path | None:
        """Return the object's path on a local disk, or None for a bucket."""
        ...

    def list(self, prefix: str) -> Iterator[Entry]:
        """List the objects whose key starts with `prefix`, sorted by key."""
        ...

    def delete(self, key: str) -> None:
        """Delete an object if it exists."""
        ...

    def unfinished(self, prefix: str) -> Iterator[str]:
        """List the keys below `prefix` with unfinished uploads.

        Unfinished uploads take up space, and `list` does not show them.
        """
        ...

    def abandon(self, key: str) -> None:
        """Abort every unfinished upload of `key`."""
        ...


def too_large(where: str) -> InputError:
    """Return the error for an object that `get` refuses."""
    return InputError(
        f"{where} has more than {MAX_BLOB_SIZE} bytes", "delete it, or restore the object"
    )


def checked_key(key: str) -> str:
    """Return `key`, or raise InputError if it points outside the store."""
    if key.startswith("/") or ".." in key.split("/"):
        raise InputError(f"the key {key} points outside the store")
    return key
