"""Prepares a stage's context: verified inputs, copies of models and data, directories."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from medjob.config import RunFile
from medjob.config.base import ModelRef
from medjob.config.run_file import StageResources
from medjob.pipeline.snapshot import Snapshot
from medjob.sources import copies, references
from medjob.sources.locations import Location, locate
from medjob.sources.references import Reference
from medjob.stage import Kind, Stage, StageContext, select


def build_context(
    run_file: RunFile, snapshot: Snapshot, stage: Stage, root: Path
) -> StageContext[None]:
    """Fetch the inputs of `stage`, place copies of its models and data, and create its directories.

    Args:
        root: The attempt's folder on this disk.

    Raises:
        InputError: an input is not published, or a file of an input or of a copy is damaged.
    """
    cluster = run_file.cluster
    work_dir = Path(cluster.work_dir).absolute()
    context = StageContext(
        run=select(run_file.run, stage.fields(run_file.run)),
        resources=resources_of(run_file, stage),
        locations=place(snapshot, stage, snapshot.pins(stage), work_dir / "models"),
        inputs={
            name: _fetch_input(snapshot, name, root / "inputs" / name)
            for name in stage.inputs(run_file.run)
        },
        output=root / "output",
        work=root / "work",
        report_to=tuple(cluster.report_to),
        tensorboard=work_dir / "tensorboard",
        extras=None,
    )
    context.output.mkdir(parents=True)
    context.work.mkdir()
    return context


def resources_of(run_file: RunFile, stage: Stage) -> StageResources:
    """The resources of one stage."""
    resources: StageResources = getattr(run_file.resources, stage.name)
    return resources


def _fetch_input(snapshot: Snapshot, name: str, folder: Path) -> Path:
    artifact, manifest = snapshot.published(name)
    return artifact.fetch(manifest, folder)


def place(
    snapshot: Snapshot, stage: Stage, pins: Mapping[str, str], cache: Path
) -> Mapping[str, Location]:
    """Place the store's copies on this disk, and locate every reference.

    The stage and its processes then need no hub and no bucket.

    Args:
        pins: Commit or digest of each reference, by key. Only what is pinned has a copy.
    """
    if stage.kind is Kind.FETCH:
        return {}
    run = snapshot.run_file.run
    named = references.references_in(select(run, stage.fields(run)))
    return place_each(snapshot, named, pins, cache, weights=stage.kind is not Kind.DATA)


def place_each(
    snapshot: Snapshot,
    named: Iterable[Reference],
    pins: Mapping[str, str],
    cache: Path,
    weights: bool,
) -> Mapping[str, Location]:
    """Place the store's copies of these models and data on this disk, and locate each.

    Args:
        pins: As in `place`.
        weights: Whether the weights of models are needed.
    """
    locations = {}
    for reference in named:
        needed = weights or not isinstance(reference, ModelRef)
        if reference.key in pins and snapshot.mirrored(reference):
            copy = copies.place_copy(*snapshot.copy_of(reference, pins), cache, needed)
            locations[reference.key] = Location(reference.key, str(copy))
        else:
            locations[reference.key] = locate(reference, pins, cache)
    return locations
