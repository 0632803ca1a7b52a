"""Stores: the folder or bucket that holds the artifacts."""

from pathlib import Path

from medjob.config.store import StoreRef
from medjob.store.base import Blob, Conflict, Entry, Store
from medjob.store.local import LocalStore
from medjob.store.probe import probe

__all__ = ["Blob", "Conflict", "Entry", "LocalStore", "Store", "open_store", "probe"]


def open_store(ref: StoreRef) -> Store:
    """Open a store. Each SDK is imported only when needed, so a folder needs neither.

    Raises:
        ConfigError: the bucket does not exist, or an option is wrong.
        RetryError: the bucket cannot be reached.
    """
    store = _open(ref)
    if ref.single_writer:
        from medjob.store.single_writer import SingleWriterStore

        return SingleWriterStore(store)
    return store


def _open(ref: StoreRef) -> Store:
    scheme, _, path = ref.uri.partition("://")
    if scheme == "s3":
        from medjob.store.s3.store import S3Store

        return S3Store(ref)
    if scheme == "gs":
        from medjob.store.gcs import GCSStore

        return GCSStore(ref)
    return LocalStore(Path(path))
