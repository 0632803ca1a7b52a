"""Conditional writes for stores that ignore them: safe only while no other process writes."""

from __future__ import annotations

import hashlib
import os
import threading

from medjob.errors import ConfigError
from medjob.store.base import Blob, Conflict, Store


class SingleWriterStore:
    """A store whose write conditions are checked in this process, by reading before writing.

    Raises:
        ConfigError: on a cluster, where a second writer can appear at any time.
    """

    def __init__(self, store: Store) -> None:
        if "KUBERNETES_SERVICE_HOST" in os.environ:
            raise ConfigError(
                "cluster.store.singleWriter is not allowed on a cluster",
                "use a store that supports conditional writes",
            )
        self._store = store
        self._lock = threading.Lock()
        self.uri = store.uri
        self.put = store.put
        self.read = store.read
        self.upload = store.upload
        self.local_path = store.local_path
        self.list = store.list
        self.delete = store.delete
        self.unfinished = store.unfinished
        self.abandon = store.abandon

    def get(self, key: str) -> Blob | None:
        blob = self._store.get(key)
        # Derive the version from the data: versions of a store without conditions are unreliable.
        return Blob(blob.data, _version(blob.data)) if blob else None

    def create(self, key: str, data: bytes) -> str:
        return self._write(key, data, None)

    def swap(self, key: str, data: bytes, version: str) -> str:
        return self._write(key, data, version)

    def _write(self, key: str, data: bytes, expected: str | None) -> str:
        with self._lock:
            blob = self.get(key)
            current = blob.version if blob else None
            if current != expected and current != _version(data):
                raise Conflict(key)
            self._store.put(key, data)
        return _version(data)


def _version(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
