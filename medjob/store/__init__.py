"""Stores: where artifacts are kept."""

from pathlib import Path

from medjob.errors import ConfigError
from medjob.store.base import Blob, Conflict, Entry, Store
from medjob.store.local import LocalStore

__all__ = ["Blob", "Conflict", "Entry", "LocalStore", "Store", "open_store"]


def open_store(uri: str) -> Store:
    """Open `file://FOLDER`.

    Raises:
        ConfigError: for a scheme that this version cannot open.
    """
    scheme, _, rest = uri.partition("://")
    if scheme != "file":
        raise ConfigError(f"cluster.store: {scheme}:// stores cannot be opened by this version (got {uri!r})", "use file://FOLDER")
    return LocalStore(Path(rest))
