"""Seals: they show that a marker or a manifest was written by somebody who has the store's key.

A user who can write to a store can change an artifact and rewrite its manifest to match, so a hash
of public fields proves nothing. A seal is therefore an HMAC with a key that is kept outside the
store. Without a key it is a plain hash, which only reveals accidental damage.

Such a user can also copy an object that was sealed elsewhere. A seal therefore covers the place of
its object as well: the run, the stage, the key and the object's own name.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import hmac
import json
import logging
import os
import secrets
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict

from medjob.errors import ConfigError, InputError
from medjob.runtime.files import canonical_json, fingerprint, read_regular_file
from medjob.runtime.secrets import secret
from medjob.store import Store

_log = logging.getLogger(__name__)
_NAME = "seal-key"
_HMAC = "hmac-sha256:"
_MIN_BYTES = 16
_MAX_BYTES = 4096


class SealError(InputError):
    """A file was sealed with another key, or without one. It may well be intact."""


class Sealed(BaseModel):
    """A JSON object in the store that names the artifact it was written for."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    run: str
    stage: str
    key: str
    """The whole key of the artifact."""
    seal: str = ""
    """Seal of all other fields."""

    def sealed(self, store: Store) -> Self:
        """Return a copy with its seal for `store`."""
        return self.model_copy(update={"seal": seal(self.content(), store)})

    def check(self, store: Store, where: str) -> None:
        """Check the seal. `where` names the object in errors.

        Raises:
            InputError: the seal does not match.
        """
        if not is_sealed(self.content(), self.seal, store):
            raise explain(self.content(), self.seal, store, where)

    def content(self) -> Any:
        """What the seal is computed from."""
        return json.loads(self.model_dump_json(exclude={"seal"}))


def seal(value: Any, store: Store) -> str:
    """Return the seal of a JSON value: an HMAC, or without a key its fingerprint."""
    key = _key_of(store)
    if key is None:
        return fingerprint(value)
    return _prefix(key) + hmac.digest(key, canonical_json(value).encode(), "sha256").hex()


def is_sealed(value: Any, found: str, store: Store) -> bool:
    """Whether `found` is the seal of `value`."""
    return hmac.compare_digest(found.encode(), seal(value, store).encode())


def explain(value: Any, found: str, store: Store, where: str) -> InputError:
    """Return the error for a seal that does not match `value`.

    Args:
        where: Path of the sealed file.
    """
    key = _key_of(store)
    expected = _prefix(key) if key is not None else ""
    if found.startswith(_HMAC) and not found.startswith(expected or "-"):
        return SealError(
            f"{where} was sealed with {'another' if key else 'a'} key, which this machine lacks",
            f"put the key with which the store was written into {key_file()} or, as {_NAME}, into "
            "the secrets folder; or delete the artifact to compute it again",
        )
    if key is not None and found == fingerprint(value):
        return SealError(
            f"{where} was sealed without the key of this store, so anybody may have written it",
            "delete the artifact to compute it again",
        )
    return InputError(
        f"{where} is damaged (its seal does not match)",
        "restore it, or delete the artifact to compute it again",
    )


def _prefix(key: bytes) -> str:
    """The beginning of every seal with this key. It tells a change from another key."""
    return f"{_HMAC}{hashlib.sha256(key).hexdigest()[:8]}:"


def key_file() -> Path:
    """Path of the key for stores on this machine's disks. Readable by its owner only.

    Raises:
        ConfigError: the home folder is not known.
    """
    folder = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    try:
        return Path(folder).expanduser() / "medjob" / _NAME
    except RuntimeError:
        raise ConfigError(
            f"{folder}: the home folder is not known",
            "set XDG_CONFIG_HOME to the folder that holds medjob/seal-key",
        ) from None


def _key_of(store: Store) -> bytes | None:
    """Return the key of a store: the secret, or for a folder this user's own key."""
    return _find_key(store.uri, is_folder=store.local_path("") is not None)


@functools.cache
def _find_key(uri: str, is_folder: bool) -> bytes | None:
    text = secret(_NAME)
    if text is None and is_folder and not _in_pod():
        text = _own_key()
    if text is None:
        _log.info("there is no seal key for %s: its writers are trusted like the code", uri)
        return None
    if len(text) < _MIN_BYTES:
        raise InputError(
            f"the {_NAME} has only {len(text)} characters",
            "make one with: openssl rand -hex 32",
        )
    return text.encode()


def _own_key() -> str | None:
    """Read this user's key. The first call creates it, if the home folder can be written to.

    Raises:
        InputError: the key is not a regular file, or is too large.
    """
    path = key_file()
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            _create(path, secrets.token_hex(32))
        return read_regular_file(path, _MAX_BYTES).decode("ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        _log.warning("%s: no seal key: %s", path, type(error).__name__)
        return None


def _create(path: Path, text: str) -> None:
    """Write a new file as a whole, unless another process has just done it."""
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text + "\n")
    try:
        with contextlib.suppress(FileExistsError):
            path.hardlink_to(partial)  # unlike a rename, it replaces no file
    finally:
        partial.unlink()


def _in_pod() -> bool:
    """Whether the home folder vanishes with this pod, and a key in it too."""
    return "KUBERNETES_SERVICE_HOST" in os.environ
