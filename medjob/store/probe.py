"""A look at a store before anything is spent: does it let us in, and does it keep what fencing rests on?"""

from __future__ import annotations

import uuid
from collections.abc import Callable

from medjob.errors import ConfigError
from medjob.store.base import Conflict, Store

_FOLDER = ".medjob-probe"


def probe(store: Store) -> None:
    """List; write, write conditionally and delete one small object.

    Raises:
        RetryError: the store is away, or refuses one of these.
        ConfigError: there is no such bucket; or the store ignores conditional writes, so that two attempts could overwrite one another.
    """
    key, text = (
        f"{_FOLDER}/{uuid.uuid4().hex}",
        b"medjob looks whether this store keeps conditions; safe to delete\n",
    )
    next(
        iter(store.list(f"{_FOLDER}/")), None
    )  # first: of a bucket that is not there, some stores say "denied" to who writes
    version = store.create(key, text)
    try:
        if not _refuses(store, key, version):
            raise ConfigError(
                f"{store.uri}: ignores conditional writes, so two attempts could overwrite one another unseen",
                "use a store with If-Match and If-None-Match; or, where one process on one machine is all that ever writes, "
                "cluster.store.singleWriter: true",
            )
    finally:
        store.delete(key)


def _refuses(store: Store, key: str, version: str) -> bool:
    """Whether a second creation and a swap from an old version both fail."""
    if not _conflicts(lambda: store.create(key, b"a second creation")):
        return False
    newer = store.swap(key, b"newer", version)
    return newer != version and _conflicts(lambda: store.swap(key, b"from an old version", version))


def _conflicts(write: Callable[[], str]) -> bool:
    try:
        write()
    except Conflict:
        return True
    return False
