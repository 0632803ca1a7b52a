"""Models and data sets in buckets: find the objects that an address names, and copy them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, cast

from medjob.config.addresses import check_bucket_uri
from medjob.config.base import ModelRef
from medjob.config.data_suffixes import SUPPORTED, data_suffix
from medjob.config.store import StoreRef
from medjob.errors import ConfigError, InputError, MedjobError
from medjob.sources.data_files import describe_others, is_hidden
from medjob.sources.other_types import hint_for
from medjob.sources.references import Reference, name_of
from medjob.store import Entry, open_store
from medjob.store.source_bucket import SourceBucket, copy_objects

_log = logging.getLogger(__name__)
_BELOW_HINT = "an address that ends in / names all data files below it"
_DATA_HINT = f"supported: {SUPPORTED}; {_BELOW_HINT}"
# Options of the run's store that also apply to other buckets of the same kind.
_SHARED_OPTIONS = (
    "endpoint",
    "addressing_style",
    "request_checksum_calculation",
    "requester_pays",
    "user_project",
    "anonymous",
)


@dataclass(frozen=True, slots=True)
class Original:
    """The objects of a model or data set in a bucket, as they are now."""

    bucket: SourceBucket
    """The bucket, opened at the directory that the objects' keys are relative to."""
    objects: Sequence[Entry]

    @classmethod
    def find(cls, reference: Reference, run_store: StoreRef) -> Original:
        """List the objects that `reference` names.

        Args:
            run_store: The run's store. Its options also apply to other buckets of its kind.

        Raises:
            InputError: the object does not exist, nothing is below the prefix, the prefix holds no
                model, or the file type is unknown.
            ConfigError: the bucket does not exist.
            RetryError: the bucket cannot be reached.
        """
        _check_address(name_of(reference))
        if isinstance(reference, ModelRef):
            return _find_model(reference.id, run_store)
        return _find_data(reference.path, run_store)

    def copy(self, folder: Path) -> None:
        """Download the objects to `folder`."""
        copy_objects(self.bucket, self.objects, folder)


def read_model_config(reference: ModelRef, run_store: StoreRef) -> bytes:
    """Read the `config.json` of a model, and nothing else. Raises as `Original.find`."""
    name = reference.id
    _check_address(name)
    config = _open(name, run_store).get("config.json")
    if config is None:
        raise _no_config(name)
    return config.data


def with_run_file_key(key: str, reference: Reference, error: MedjobError) -> MedjobError:
    """Return `error` with the key and the value of the run file that it is about."""
    name = name_of(reference).rstrip("/")
    message = error.message if error.message.startswith(name) else f"{name}: {error.message}"
    hint = error.hint
    if isinstance(error, ConfigError) and "no such bucket" in error.message:
        hint = "correct the address, or create the bucket"
    return type(error)(f"{key}: {message}", hint)


def store_ref_for(uri: str, run_store: StoreRef) -> StoreRef:
    """Return the options to open the bucket of `uri` with.

    Options of the run's store apply if `uri` has the same scheme. Its region applies only to its
    own bucket, or if an endpoint serves all buckets.
    """
    scheme, bucket, _ = _split_uri(uri)
    run_scheme, run_bucket, _ = _split_uri(run_store.uri)
    options: dict[str, Any] = {"retry_seconds": run_store.retry_seconds}
    if scheme == run_scheme:
        options |= {name: getattr(run_store, name) for name in _SHARED_OPTIONS}
        if run_store.endpoint or bucket == run_bucket:
            options["region"] = run_store.region
    return StoreRef(uri=uri, **options)


def _check_address(uri: str) -> None:
    """Raise ConfigError if stores may read it in different ways."""
    check_bucket_uri(uri, uri)


def _split_uri(uri: str) -> tuple[str, str, str]:
    """Split into scheme, bucket and key."""
    scheme, _, rest = uri.partition("://")
    bucket, _, key = rest.partition("/")
    return scheme, bucket, key


def _open(uri: str, run_store: StoreRef) -> SourceBucket:
    return cast("SourceBucket", open_store(store_ref_for(uri, run_store)))


def _find_model(name: str, run_store: StoreRef) -> Original:
    bucket = _open(name, run_store)
    objects = [entry for entry in bucket.list("") if not _is_folder_marker(entry)]
    if not objects:
        raise InputError(
            f"{name}: no objects have this prefix",
            "name the directory that holds the model's config.json",
        )
    if "config.json" not in {entry.key for entry in objects}:
        raise _no_config(name)
    return Original(bucket, objects)


def _is_folder_marker(entry: Entry) -> bool:
    """Whether the object is an empty one that a console created to show a directory."""
    return f"/{entry.key}".endswith("/")


def _no_config(name: str) -> InputError:
    return InputError(
        f"{name}: not a transformers model: there is no config.json",
        "name the directory that holds it",
    )


def _find_data(name: str, run_store: StoreRef) -> Original:
    last = PurePosixPath(_split_uri(name)[2]).name
    suffix = PurePosixPath(last).suffix
    if name.endswith("/") or not suffix:
        return _find_data_below(name, run_store)
    if not data_suffix(last):
        raise InputError(f"{name}: unknown file type", f"{hint_for([last])}; {_BELOW_HINT}")
    bucket = _open(name.removesuffix(last), run_store)
    first = next(bucket.list(last), None)  # if the key itself exists, it is listed first
    if first is None or first.key != last:
        raise InputError(
            f"{name}: no such object",
            "patterns such as * are not supported; an address that ends in / names all data files "
            "below it",
        )
    return Original(bucket, [first])


def _find_data_below(name: str, run_store: StoreRef) -> Original:
    bucket = _open(name, run_store)
    objects: list[Entry] = []
    others: list[Entry] = []
    for entry in bucket.list(""):
        if not _is_folder_marker(entry) and not is_hidden(PurePosixPath(entry.key)):
            (objects if data_suffix(entry.key) else others).append(entry)
    if not objects:
        raise InputError(f"{name}: no data files have this prefix", _DATA_HINT)
    if others:
        _log.warning("%s: %s", name, describe_others(entry.key for entry in others))
    return Original(bucket, objects)
