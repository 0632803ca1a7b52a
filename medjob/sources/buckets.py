"""Models and data in buckets: which objects an address stands for, and how its bucket is reached."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, cast

from medjob.config.base import ModelRef
from medjob.config.store import StoreRef
from medjob.errors import ConfigError, InputError, MedjobError
from medjob.sources.references import DATA_SUFFIXES, Reference, name_of
from medjob.store import Entry, open_store
from medjob.store.source_bucket import SourceBucket, copy_objects

_KNOWN = f"known: {', '.join(DATA_SUFFIXES)}; an address that ends in / stands for all data files below it"
_OPTIONS = (
    "endpoint",
    "addressing_style",
    "request_checksum_calculation",
    "requester_pays",
    "user_project",
    "anonymous",
)


@dataclass(frozen=True, slots=True)
class Original:
    """A model or data set as it stands in a bucket now."""

    bucket: SourceBucket
    """Opened at the folder that the keys of the objects are relative to."""
    objects: Sequence[Entry]

    @classmethod
    def find(cls, reference: Reference, ours: StoreRef) -> Original:
        """What `reference` stands for. `ours` is the job's own store, whose options hold for a bucket of the same kind too.

        Raises:
            InputError: there is no such object, or nothing below the prefix; no model; or a data file of an unknown ending.
            ConfigError: there is no such bucket.
            RetryError: the bucket cannot be reached.
        """
        return (
            _model(name_of(reference), ours)
            if isinstance(reference, ModelRef)
            else _data(name_of(reference), ours)
        )

    def copy(self, folder: Path) -> None:
        """Place the objects in `folder`."""
        copy_objects(self.bucket, self.objects, folder)


def read_config(reference: ModelRef, ours: StoreRef) -> bytes:
    """A model's `config.json` out of its bucket; its weights stay there. Raises as `Original.find`."""
    name = reference.id
    blob = _open(name, ours).get("config.json")
    if blob is None:
        raise _no_model(name)
    return blob.data


def naming(key: str, reference: Reference, error: MedjobError) -> MedjobError:
    """`error`, with the key of the run file that names `reference`."""
    name = name_of(reference).rstrip("/")
    what = error.message if error.message.startswith(name) else f"{name}: {error.message}"
    missing_bucket = isinstance(error, ConfigError) and "no such bucket" in error.message
    return type(error)(
        f"{key}: {what}",
        "correct the address, or create the bucket" if missing_bucket else error.hint,
    )


def store_of(uri: str, ours: StoreRef) -> StoreRef:
    """How the bucket of `uri` is reached. A region is that of one bucket, unless an endpoint stands for all of them."""
    options: dict[str, Any] = {"retry_seconds": ours.retry_seconds}
    if _place(uri)[0] == _place(ours.uri)[0]:
        options |= {name: getattr(ours, name) for name in _OPTIONS}
        if ours.endpoint or _place(uri)[:2] == _place(ours.uri)[:2]:
            options["region"] = ours.region
    return StoreRef(uri=uri, **options)


def _place(uri: str) -> tuple[str, str, str]:
    """Scheme, bucket and key."""
    scheme, _, rest = uri.partition("://")
    bucket, _, key = rest.partition("/")
    return scheme, bucket, key


def _open(uri: str, ours: StoreRef) -> SourceBucket:
    return cast("SourceBucket", open_store(store_of(uri, ours)))


def _model(name: str, ours: StoreRef) -> Original:
    bucket = _open(name, ours)
    objects = [
        entry for entry in bucket.list("") if not f"/{entry.key}".endswith("/")
    ]  # consoles make objects that stand for folders
    if not objects:
        raise InputError(
            f"{name}: there is nothing below it",
            "name the folder that holds the model's config.json",
        )
    if "config.json" not in {entry.key for entry in objects}:
        raise _no_model(name)
    return Original(bucket, objects)


def _no_model(name: str) -> InputError:
    return InputError(
        f"{name}: has no config.json, so it is no transformers model",
        "name the folder that holds it",
    )


def _data(name: str, ours: StoreRef) -> Original:
    last = PurePosixPath(_place(name)[2]).name
    suffix = PurePosixPath(last).suffix
    if name.endswith("/") or not suffix:
        bucket = _open(name, ours)
        below = [
            entry
            for entry in bucket.list("")
            if PurePosixPath(entry.key).suffix in DATA_SUFFIXES and not entry.key.endswith("/")
        ]
        if not below:
            raise InputError(f"{name}: there is no data file below it", _KNOWN)
        return Original(bucket, below)
    if suffix not in DATA_SUFFIXES:
        raise InputError(f"{name}: has an unknown ending", _KNOWN)
    bucket = _open(name.removesuffix(last), ours)
    first = next(bucket.list(last), None)  # the shortest key that begins so
    if first is None or first.key != last:
        raise InputError(
            f"{name}: there is no such object",
            "patterns such as * are not taken; an address that ends in / stands for all below it",
        )
    return Original(bucket, [first])
