"""Models that other runs published in the same store: `run:NAME/STAGE`."""

from __future__ import annotations

from medjob.artifacts.artifact import MARKER, Artifact, Manifest
from medjob.config.base import ModelRef
from medjob.errors import ConfigError, InputError
from medjob.store import Store


def find_model(store: Store, reference: ModelRef) -> tuple[Artifact, Manifest]:
    """Find the artifact that `run:NAME/STAGE` or `run:NAME/STAGE/KEY` names.

    Raises:
        InputError: the store has no such artifact.
        ConfigError: the stage was published several times, and no key says which one is meant.
    """
    run, stage, *rest = reference.id.removeprefix("run:").split("/")
    key = rest[0] if rest else ""
    found = [
        (artifact, manifest)
        for artifact, manifest in _published(store, run, stage)
        if artifact.key.startswith(key)
    ]
    if not found:
        raise InputError(
            f"{reference.id}: {store.uri}/{run}/{stage} has no published artifact"
            + (f" whose key starts with {key}" if key else ""),
            f"`medjob ls --store {store.uri} --run {run}` lists what is there",
        )
    if len(found) > 1:
        listed = ", ".join(
            f"run:{run}/{stage}/{artifact.key} ({manifest.provenance.get('finished')})"
            for artifact, manifest in found
        )
        raise ConfigError(
            f"{reference.id} names {len(found)} published artifacts", f"name one of {listed}"
        )
    return found[0]


def _published(store: Store, run: str, stage: str) -> list[tuple[Artifact, Manifest]]:
    paths = (entry.key.split("/") for entry in store.list(f"{run}/{stage}/"))
    keys = sorted({path[2] for path in paths if path[3:] == [MARKER]})
    artifacts = [Artifact(store, run, stage, key) for key in keys]
    markers = [(artifact, artifact.manifest()) for artifact in artifacts]
    return [(artifact, manifest) for artifact, manifest in markers if manifest is not None]
