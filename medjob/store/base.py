"""The store protocol: what artifacts need of a bucket or a folder, and no more."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


class Conflict(Exception):
    """A conditional write lost: the object exists already, or has changed since it was read."""


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


class Store(Protocol):
    """Objects under keys such as `run/sft/0123456789ab/_SUCCESS.json`.

    Every method raises RetryError when the store is out of reach and InputError when it refuses. "Is not there" is
    None or an empty listing, and is never confused with "cannot tell".
    """

    uri: str

    def get(self, key: str) -> Blob | None:
        """Read a small object; None if there is none."""
        ...

    def put(self, key: str, data: bytes) -> None:
        """Write a small object, whatever stood there."""
        ...

    def create(self, key: str, data: bytes) -> str:
        """Write a small object only if there is none; its version. Raises Conflict."""
        ...

    def swap(self, key: str, data: bytes, version: str) -> str:
        """Replace a small object only if it still has `version`; its new version. Raises Conflict."""
        ...

    def upload(self, path: Path, key: str) -> None:
        """Store a file. The key is written once and never again."""
        ...

    def download(self, key: str, path: Path) -> None:
        """Place an object at `path`, whole or not at all. Raises InputError if there is none."""
        ...

    def list(self, prefix: str) -> Iterator[Entry]:
        """Objects whose key begins with `prefix`, sorted by key."""
        ...

    def delete(self, key: str) -> None:
        """Remove an object, if it is there."""
        ...
