"""Check a store before any work starts: access, and support for conditional writes."""

from __future__ import annotations

import uuid
from collections.abc import Callable

from medjob.errors import ConfigError
from medjob.store.base import Conflict, Store

_FOLDER = ".medjob-probe"
_TEXT = b"medjob tests conditional writes with this object; it is safe to delete\n"


def probe(store: Store) -> None:
    """List the store, then write, list, read, conditionally write and delete one small object.

    Raises:
        RetryError: the store is unreachable or denies one of these operations.
        ConfigError: the bucket does not exist; the store does not list or return what was written,
            so that checkpoints would not be found; or it ignores conditional writes, so that two
            attempts could overwrite each other.
    """
    # List first: if the bucket does not exist, some stores answer a write with "access denied".
    next(iter(store.list(f"{_FOLDER}/")), None)
    key = f"{_FOLDER}/{uuid.uuid4().hex}"
    version = store.create(key, _TEXT)
    try:
        _check_visible(store, key)
        if not _honors_conditions(store, key, version):
            raise ConfigError(
                f"{store.uri} ignores conditional writes, so two attempts could overwrite each "
                "other unnoticed",
                "use a store that supports If-Match and If-None-Match; if only one process on one "
                "machine ever writes to this store, set cluster.store.singleWriter: true",
            )
    finally:
        store.delete(key)


def _check_visible(store: Store, key: str) -> None:
    """Raise unless the object is listed under its key, and can be read whole and in part."""
    listed = [(entry.key, entry.size) for entry in store.list(key)]
    if listed != [(key, len(_TEXT))]:
        raise ConfigError(
            f"{store.uri}: the store does not list an object that was just written, so "
            "checkpoints would be stored and never found",
            "check the prefix in cluster.store, or use another store",
        )
    blob = store.get(key)
    part = bytearray(len(_TEXT) - 1)
    store.read(key, 1, memoryview(part))
    if blob is None or blob.data != _TEXT or part != _TEXT[1:]:
        raise ConfigError(
            f"{store.uri}: the store does not return what was just written",
            "check for a cache or a proxy in front of the store, or use another store",
        )


def _honors_conditions(store: Store, key: str, version: str) -> bool:
    """Whether a second create and a swap from an outdated version both fail."""
    if not _conflicts(lambda: store.create(key, b"second create")):
        return False
    newer = store.swap(key, b"newer", version)
    return newer != version and _conflicts(lambda: store.swap(key, b"outdated swap", version))


def _conflicts(write: Callable[[], str]) -> bool:
    try:
        write()
    except Conflict:
        return True
    return False
