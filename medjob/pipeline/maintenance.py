"""Find, pull and verify the artifacts of a run, and find and delete the garbage in its store."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from medjob.artifacts import checkpoints
from medjob.artifacts.artifact import Artifact, Manifest
from medjob.errors import ConfigError, InputError
from medjob.runtime.files import describe_file, safe_path
from medjob.stage import STAGES
from medjob.store import Entry, Store
from medjob.store.transfer import find_damage

_DATA_PATH = re.compile(r"data/(?P<epoch>[0-9]{1,9})/")
_KEY = re.compile(r"[0-9a-f]{12}")
_NOT_A_FOLDER = (errno.EEXIST, errno.ELOOP, errno.ENOENT, errno.ENOTDIR)
_HINT = "choose another folder with --output"


@dataclass(frozen=True, slots=True)
class VerifyResult:
    """Result of reading every byte of one artifact or checkpoint."""

    artifact: Artifact
    part: str
    """`artifact`, `marker`, or the name of a checkpoint."""
    files: int
    size: int
    """Size of the files in bytes."""
    problems: list[str]


@dataclass(frozen=True, slots=True)
class Garbage:
    """Objects that nothing refers to."""

    prefix: str
    entries: list[Entry]
    """Empty if `prefix` is the key of an unfinished upload."""
    reason: str

    @property
    def size(self) -> int:
        """Size of the objects in bytes."""
        return sum(entry.size for entry in self.entries)


def list_artifacts(store: Store, run: str) -> list[Artifact]:
    """List the artifacts of `run`, finished or not, in the order of the stages.

    The store's paths contain only the first twelve digits of a key, so these are the keys here.
    """
    order = [stage.name for stage in STAGES]
    found = set()
    for entry in store.list(f"{run}/"):
        if entry.key.count("/") >= 3:
            stage, key = entry.key.split("/")[1:3]
            if stage in order and _KEY.fullmatch(key):
                found.add((order.index(stage), key))
    return [Artifact(store, run, order[index], key) for index, key in sorted(found)]


def pull(artifact: Artifact, manifest: Manifest, folder: Path) -> None:
    """Download an artifact's files to `folder` and verify every byte.

    Running it again after an interruption continues the download.

    Raises:
        ConfigError: `folder` cannot be created, or has a file of the same name with different
            contents.
        InputError: a file is missing or damaged.
    """
    for file in manifest.files:
        target = folder / safe_path(file.path)
        if target.exists() and (not target.is_file() or describe_file(target, file.path) != file):
            raise ConfigError(f"{target} already exists with different contents", _HINT)
    for parent in {folder, *((folder / file.path).parent for file in manifest.files)}:
        _make_folder(parent)
    artifact.fetch(manifest, folder)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno not in _NOT_A_FOLDER:
            raise
        raise ConfigError(f"cannot create the folder {folder}: {error.strerror}", _HINT) from None


def verify(store: Store, run: str) -> Iterator[VerifyResult]:
    """Read every byte of the run's published artifacts, and of the checkpoints of the others."""
    for artifact in list_artifacts(store, run):
        try:
            manifest = artifact.manifest()
        except InputError as error:
            yield VerifyResult(artifact, "marker", 1, 0, [error.message])
            continue
        if manifest is not None:
            size = sum(file.size for file in manifest.files)
            problems = artifact.damage(manifest)
            yield VerifyResult(artifact, "artifact", len(manifest.files), size, problems)
            continue
        for name, state in sorted(checkpoints.states(artifact).items()):
            if state == "finished":
                yield _verify_checkpoint(artifact, name)


def _verify_checkpoint(artifact: Artifact, name: str) -> VerifyResult:
    try:
        parts = checkpoints.read_manifest(artifact, name)
    except InputError as error:
        return VerifyResult(artifact, name, 1, 0, [error.message])
    prefix = artifact.path("checkpoints", name)
    problems: list[str] = []
    for node, files in enumerate(parts):
        problems += find_damage(artifact.store, f"{prefix}/part-{node}", files)
    all_files = [file for files in parts for file in files]
    size = sum(file.size for file in all_files)
    return VerifyResult(artifact, name, len(all_files), size, problems)


def find_garbage(store: Store, run: str) -> list[Garbage]:
    """Find the objects that no marker refers to and that no attempt can still need.

    For a published artifact: the data of other attempts, checkpoints and finished rows. For an
    unfinished one: the data of attempts that have ended, and damaged checkpoints. The files of the
    newest attempt are kept, because it may be running.
    """
    return [garbage for artifact in list_artifacts(store, run) for garbage in _garbage_of(artifact)]


def _garbage_of(artifact: Artifact) -> Iterator[Garbage]:
    manifest = artifact.manifest()
    entries = list(artifact.store.list(artifact.path("")))
    if manifest is not None:
        yield from _stale_data(artifact, entries, manifest.epoch, published=True)
        yield from _intermediate_results(artifact, entries)
        for key in artifact.store.unfinished(artifact.path("")):
            yield Garbage(key, [], "unfinished upload")
    else:
        newest_epoch = artifact.epoch()
        yield from _stale_data(artifact, entries, newest_epoch, published=False)
        yield from _unusable_checkpoints(artifact, entries, newest_epoch)
        for key in artifact.store.unfinished(artifact.path("")):
            if f"/data/{newest_epoch}/" not in key and f"-{newest_epoch}/" not in key:
                yield Garbage(key, [], "unfinished upload")


def _stale_data(
    artifact: Artifact, entries: list[Entry], kept_epoch: int, published: bool
) -> Iterator[Garbage]:
    """Find the data of attempts that have published nothing."""
    keys = {entry.key for entry in entries}
    for epoch in sorted(_epochs_with_data(artifact, entries) - {kept_epoch}):
        has_ended = artifact.path("attempts", f"{epoch}.json") in keys
        # Without a recorded outcome, the attempt may be just about to write its marker. The marker
        # must never name files that were deleted here.
        if published or has_ended:
            prefix = artifact.path("data", str(epoch), "")
            yield _garbage_below(prefix, entries, "data of an attempt that published nothing")


def _epochs_with_data(artifact: Artifact, entries: Iterable[Entry]) -> set[int]:
    paths = (entry.key.removeprefix(artifact.path("")) for entry in entries)
    return {int(match["epoch"]) for match in map(_DATA_PATH.match, paths) if match}


def _intermediate_results(artifact: Artifact, entries: list[Entry]) -> Iterator[Garbage]:
    """Find the checkpoints and finished rows of a published artifact."""
    names = {"checkpoints": "checkpoints", "parts": "finished rows", "shards": "finished rows"}
    for folder, name in names.items():
        reason = f"{name} of a published stage"
        garbage = _garbage_below(artifact.path(folder, ""), entries, reason)
        if garbage.entries:
            yield garbage


def _unusable_checkpoints(
    artifact: Artifact, entries: list[Entry], newest_epoch: int
) -> Iterator[Garbage]:
    """Find damaged checkpoints, and torn ones that the newest attempt is not writing."""
    for name, state in sorted(checkpoints.states(artifact).items()):
        _, epoch = checkpoints.step_and_epoch(name)
        if state == "damaged" or (state == "torn" and epoch != newest_epoch):
            yield _garbage_below(
                artifact.path("checkpoints", name, ""), entries, f"{state} checkpoint"
            )


def _garbage_below(prefix: str, entries: Iterable[Entry], reason: str) -> Garbage:
    return Garbage(prefix, [entry for entry in entries if entry.key.startswith(prefix)], reason)


def delete(store: Store, garbage: Garbage) -> None:
    """Delete garbage.

    The manifest of a checkpoint is deleted first. If the deletion is interrupted, the checkpoint
    is torn and thus skipped; with a manifest but without its files it would be damaged.
    """
    if not garbage.entries:
        store.abandon(garbage.prefix)
    for entry in sorted(
        garbage.entries, key=lambda entry: not entry.key.endswith(checkpoints.MANIFEST)
    ):
        store.delete(entry.key)
