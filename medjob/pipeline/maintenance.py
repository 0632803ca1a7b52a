"""What a store holds for a run: finding, pulling and verifying artifacts, and removing what nothing refers to."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from medjob.artifacts import checkpoints
from medjob.artifacts.artifact import Artifact, Manifest
from medjob.errors import ConfigError, InputError
from medjob.runtime.files import break_hard_link, describe_file, safe_path
from medjob.stage import STAGES
from medjob.store import Entry, Store
from medjob.store.transfer import find_damage

_EPOCH_OF_DATA = re.compile(r"data/(\d+)/")


@dataclass(frozen=True, slots=True)
class Check:
    """What reading every byte of one artifact or checkpoint has shown."""

    artifact: Artifact
    what: str
    files: int
    size: int
    problems: list[str]


@dataclass(frozen=True, slots=True)
class Waste:
    """Objects that nothing refers to, and why."""

    prefix: str
    entries: list[Entry]
    why: str

    @property
    def size(self) -> int:
        """Bytes that removing it frees."""
        return sum(entry.size for entry in self.entries)


def artifacts(store: Store, run: str) -> list[Artifact]:
    """Every artifact of `run`, finished or not, in the order of the stages. Their keys are the twelve digits of the path."""
    order = [stage.name for stage in STAGES]
    places = {
        tuple(entry.key.split("/")[1:3])
        for entry in store.list(f"{run}/")
        if entry.key.count("/") >= 3
    }
    known = [place for place in places if place[0] in order]
    return [
        Artifact(store, run, stage, key)
        for stage, key in sorted(known, key=lambda place: (order.index(place[0]), place[1]))
    ]


def find_published(store: Store, run: str, name: str) -> tuple[Artifact, Manifest]:
    """The published artifact `STAGE` or `STAGE/KEY` of a run; `KEY` may be shortened.

    Raises:
        InputError: there is none.
        ConfigError: there are several.
    """
    stage, _, key = name.partition("/")
    candidates = [
        artifact
        for artifact in artifacts(store, run)
        if artifact.stage == stage and artifact.key.startswith(key)
    ]
    found = [
        (artifact, manifest)
        for artifact in candidates
        if (manifest := artifact.manifest()) is not None
    ]
    if not found:
        raise InputError(
            f"{store.uri}/{run}/{name}: nothing is published there", "`medjob ls` shows what is"
        )
    if len(found) > 1:
        listed = ", ".join(
            f"{stage}/{artifact.key} ({manifest.provenance.get('finished')})"
            for artifact, manifest in found
        )
        raise ConfigError(f"{run}/{name}: {len(found)} are published", f"name one of {listed}")
    return found[0]


def pull(artifact: Artifact, manifest: Manifest, folder: Path) -> None:
    """Place an artifact's files in `folder`, every byte verified; an interrupted pull goes on where it stood.

    Raises:
        ConfigError: another file of the same name stands there.
        InputError: a file is missing or damaged.
    """
    for file in manifest.files:
        target = folder / safe_path(file.path)
        if target.exists() and describe_file(target, file.path) != file:
            raise ConfigError(
                f"{target}: is there already, and is another file",
                "name another folder with --output",
            )
    artifact.fetch(manifest, folder)
    for file in manifest.files:
        break_hard_link(folder / safe_path(file.path))


def verify(store: Store, run: str) -> Iterator[Check]:
    """Read every byte that the run's markers and checkpoints name."""
    for artifact in artifacts(store, run):
        try:
            manifest = artifact.manifest()
        except InputError as error:
            yield Check(artifact, "marker", 1, 0, [error.message])
            continue
        if manifest is not None:
            size = sum(file.size for file in manifest.files)
            yield Check(artifact, "artifact", len(manifest.files), size, artifact.damage(manifest))
            continue
        for name, state in sorted(checkpoints.states(artifact).items()):
            if state == "finished":
                yield _check_checkpoint(artifact, name)


def _check_checkpoint(artifact: Artifact, name: str) -> Check:
    try:
        parts = checkpoints.read_manifest(artifact, name)
    except InputError as error:
        return Check(artifact, name, 1, 0, [error.message])
    place = artifact.path("checkpoints", name)
    problems = [
        line
        for n, files in enumerate(parts)
        for line in find_damage(artifact.store, f"{place}/part-{n}", files)
    ]
    every = [file for files in parts for file in files]
    return Check(artifact, name, len(every), sum(file.size for file in every), problems)


def waste(store: Store, run: str) -> list[Waste]:
    """What no marker refers to and no attempt can still need.

    Of a published artifact: other attempts' data, its checkpoints and its finished rows. Of an unfinished one: what
    attempts that have ended left, and damaged checkpoints; the newest attempt's files stay, since it may be running now.
    """
    return [found for artifact in artifacts(store, run) for found in _waste_of(artifact)]


def _waste_of(artifact: Artifact) -> Iterator[Waste]:
    manifest = artifact.manifest()
    entries = list(artifact.store.list(artifact.path("")))
    kept = manifest.epoch if manifest else artifact.epoch()
    for epoch in sorted(_epochs_of_data(artifact, entries) - {kept}):
        if manifest is None and artifact.path("attempts", f"{epoch}.json") not in {
            entry.key for entry in entries
        }:
            continue  # nobody saw it end: it may hang just before its marker, which must not come to name what is gone
        yield _below(
            artifact.path("data", str(epoch), ""), entries, "an attempt that published nothing"
        )
    if manifest is not None:
        for folder, what in (("checkpoints", "checkpoints"), ("parts", "finished rows")):
            found = _below(artifact.path(folder, ""), entries, f"{what} of a published stage")
            if found.entries:
                yield found
    else:
        for name, state in sorted(checkpoints.states(artifact).items()):
            _, epoch = checkpoints.step_and_epoch(name)
            if state == "damaged" or (state == "torn" and epoch != kept):
                yield _below(
                    artifact.path("checkpoints", name, ""), entries, f"a {state} checkpoint"
                )
    for key in artifact.store.unfinished(artifact.path("")):
        if manifest is not None or (f"/data/{kept}/" not in key and f"-{kept}/" not in key):
            yield Waste(key, [], "an upload that was never finished")


def _epochs_of_data(artifact: Artifact, entries: Iterable[Entry]) -> set[int]:
    found = (_EPOCH_OF_DATA.match(entry.key.removeprefix(artifact.path(""))) for entry in entries)
    return {int(match[1]) for match in found if match}


def _below(prefix: str, entries: Iterable[Entry], why: str) -> Waste:
    return Waste(prefix, [entry for entry in entries if entry.key.startswith(prefix)], why)


def remove(store: Store, found: Waste) -> None:
    """Delete it. A checkpoint's manifest goes first: what is half removed is torn, never damaged."""
    if not found.entries:
        store.abandon(found.prefix)
    for entry in sorted(
        found.entries, key=lambda entry: not entry.key.endswith(checkpoints.MANIFEST)
    ):
        store.delete(entry.key)
