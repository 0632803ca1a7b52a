"""Where a stage reads a model or data set: a path on this disk, or a hub id at a commit.

The parent process places copies on this disk before a stage starts, and hands the stage a
`Location` for each reference. Neither the stage nor its training processes ask a store.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from medjob.config.base import ModelRef
from medjob.runtime.files import describe_file
from medjob.sources.references import Reference, is_hub, model_location, name_of


@dataclass(frozen=True, slots=True)
class Location:
    """Where one model or data set is read."""

    name: str
    """The reference as the run file names it, for messages."""
    path: str
    """A directory, file or glob on this disk; or the hub id, if `on_hub`."""
    on_hub: bool = False
    """Whether it is read through the hub's own cache, which `fetch` has filled."""
    revision: str | None = None
    """Commit of a hub id."""
    converted: str | None = None
    """For a GGUF file: the directory for its weights in transformers' format."""

    @classmethod
    def of_folder(cls, folder: Path) -> Location:
        """Return the location of a model directory on this disk, such as a stage's input."""
        return cls(str(folder), str(folder))


def locate(reference: Reference, pins: Mapping[str, str], cache: Path) -> Location:
    """Find where this machine reads `reference`, which the store has no copy of.

    Copies are only used from where `place_copy` has just verified them.

    Args:
        pins: Commit or digest of each reference, by key.
        cache: Directory of converted models.

    Raises:
        InputError: a local model does not exist, or the reference is in a bucket.
    """
    name = name_of(reference)
    if is_hub(reference):
        commit = pins.get(reference.key, reference.revision)
        return Location(reference.key, name, on_hub=True, revision=commit)
    if not isinstance(reference, ModelRef):
        return Location(reference.key, name)
    path = model_location(name)
    if not path.is_file():
        return Location(reference.key, str(path))
    digest = describe_file(path, path.name).sha256
    return Location(reference.key, str(path), converted=str(cache / f"gguf-{digest[:16]}"))
