"""For stores that ignore conditional writes: looks first, and is right as long as nobody else writes."""

from __future__ import annotations

import hashlib
import os
import threading

from medjob.errors import ConfigError
from medjob.store.base import Blob, Conflict, Store


class SingleWriterStore:
    """A store whose conditions are checked here, by reading before writing.

    Raises:
        ConfigError: on a cluster, where a second writer can always come.
    """

    def __init__(self, store: Store) -> None:
        if "KUBERNETES_SERVICE_HOST" in os.environ:
            raise ConfigError(
                "cluster.store.singleWriter: is refused on a cluster",
                "use a store that keeps conditional writes",
            )
        self._store, self._lock = store, threading.Lock()
        self.uri = store.uri
        self.put, self.read, self.upload = store.put, store.read, store.upload
        self.local_path, self.list, self.delete = store.local_path, store.list, store.delete
        self.unfinished, self.abandon = store.unfinished, store.abandon

    def get(self, key: str) -> Blob | None:
        blob = self._store.get(key)
        return (
            Blob(blob.data, _version(blob.data)) if blob else None
        )  # such a store's own versions may be worth nothing

    def create(self, key: str, data: bytes) -> str:
        return self._write(key, data, None)

    def swap(self, key: str, data: bytes, version: str) -> str:
        return self._write(key, data, version)

    def _write(self, key: str, data: bytes, version: str | None) -> str:
        with self._lock:
            current = self.get(key)
            found = current.version if current else None
            if found != version and found != _version(data):
                raise Conflict(key)
            self._store.put(key, data)
        return _version(data)


def _version(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
