"""Find a published artifact by its name: `STAGE`, or `STAGE/KEY` if there are several."""

from __future__ import annotations

from medjob.artifacts.artifact import MARKER, Artifact, Manifest
from medjob.errors import ConfigError, InputError
from medjob.store import Store


def find_published(store: Store, run: str, name: str) -> tuple[Artifact, Manifest]:
    """Find the published artifact `STAGE` or `STAGE/KEY`, where `KEY` may be a prefix of the key.

    Raises:
        InputError: no published artifact matches.
        ConfigError: several match.
    """
    stage, _, key = name.partition("/")
    keys = [each for each in _published_keys(store, run, stage) if each.startswith(key)]
    artifacts = [Artifact(store, run, stage, each) for each in keys]
    found = [
        (artifact, manifest)
        for artifact in artifacts
        if (manifest := artifact.manifest()) is not None
    ]
    if not found:
        raise InputError(
            f"{store.uri}/{run}/{name} is not published", "`medjob ls` lists published artifacts"
        )
    if len(found) > 1:
        listed = ", ".join(
            f"{stage}/{artifact.key} ({manifest.provenance.get('finished')})"
            for artifact, manifest in found
        )
        raise ConfigError(
            f"{run}/{name} matches {len(found)} published artifacts", f"name one of {listed}"
        )
    return found[0]


def _published_keys(store: Store, run: str, stage: str) -> list[str]:
    if not stage.isalpha():  # not the name of a stage, and perhaps a path that leaves the run
        return []
    paths = (entry.key.split("/") for entry in store.list(f"{run}/{stage}/"))
    return sorted({path[2] for path in paths if path[3:] == [MARKER]})
