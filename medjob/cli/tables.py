"""Tables that commands print."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence

from medjob.artifacts.artifact import MARKER, Artifact
from medjob.errors import InputError
from medjob.pipeline import maintenance
from medjob.pipeline.maintenance import Garbage, VerifyResult
from medjob.pipeline.runner import Pipeline
from medjob.runtime.printable import printable
from medjob.runtime.tables import text_table
from medjob.stage import Stage, get_stage
from medjob.store import Store


def runs_table(store: Store) -> str:
    """List the runs in a store."""
    names = dict.fromkeys(
        entry.key.split("/")[0] for entry in store.list("") if not entry.key.startswith(".")
    )
    rows = [("RUN", "PUBLISHED", "UNFINISHED", "STORED")]
    for run in names:
        artifacts = maintenance.list_artifacts(store, run)
        if not artifacts:
            continue
        published = sum(map(_has_marker, artifacts))
        stored = sum(entry.size for entry in store.list(f"{run}/"))
        rows.append((run, str(published), str(len(artifacts) - published), size_of(stored)))
    return text_table(rows) if len(rows) > 1 else f"no runs in {printable(store.uri)}"


def _has_marker(artifact: Artifact) -> bool:
    with contextlib.suppress(InputError):  # `medjob ls --run` shows it as damaged
        return artifact.store.get(artifact.path(MARKER)) is not None
    return False


def artifacts_table(store: Store, run: str) -> str:
    """List the artifacts of `run`, finished or not, in the order of the stages.

    SIZE covers the published files. STORED also covers checkpoints and garbage.
    """
    rows = [("STAGE", "KEY", "STATE", "FILES", "SIZE", "STORED", "FINISHED")]
    rows += [_artifact_row(store, artifact) for artifact in maintenance.list_artifacts(store, run)]
    if len(rows) == 1:
        return printable(f"{run}: no artifacts in {store.uri}")
    return text_table(rows)


def _artifact_row(store: Store, artifact: Artifact) -> tuple[str, str, str, str, str, str, str]:
    stored = size_of(sum(entry.size for entry in store.list(artifact.path(""))))
    try:
        manifest = artifact.manifest()
    except InputError:
        return (artifact.stage, artifact.key, "damaged", "", "", stored, "")
    if manifest is None:
        return (artifact.stage, artifact.key, "unfinished", "", "", stored, "")
    files = str(len(manifest.files))
    size = size_of(sum(file.size for file in manifest.files))
    finished = str(manifest.provenance.get("finished", ""))
    return (artifact.stage, artifact.key, "published", files, size, stored, finished)


def verify_table(results: Iterable[VerifyResult]) -> str:
    """Show the results of `medjob verify`."""
    rows = [("STAGE", "KEY", "PART", "FILES", "SIZE", "RESULT")]
    for result in results:
        problems = len(result.problems)
        rows.append(
            (
                result.artifact.stage,
                result.artifact.key,
                result.part,
                str(result.files),
                size_of(result.size),
                f"{problems} DAMAGED OR MISSING" if problems else "verified",
            )
        )
    return text_table(rows)


def garbage_table(found: Sequence[Garbage]) -> str:
    """List what `medjob gc` would delete."""
    if not found:
        return "nothing to delete"
    rows = [("PREFIX", "FILES", "SIZE", "REASON")]
    for garbage in found:
        files = str(len(garbage.entries))
        rows.append((garbage.prefix.rstrip("/"), files, size_of(garbage.size), garbage.reason))
    return text_table(rows)


def plan_table(pipeline: Pipeline, stages: Sequence[Stage]) -> str:
    """List what `medjob run` would do with each stage."""
    rows = [("STAGE", "KEY", "ACTION")]
    first_missing: str | None = None
    for stage in stages:
        if first_missing and first_missing in _upstream(pipeline, stage):
            rows.append((stage.name, "", f"run, after {first_missing}"))
            continue
        try:
            artifact = pipeline.artifact(stage)
        except InputError as error:
            if first_missing is None:
                raise
            rows.append((stage.name, "", f"run, after {first_missing} ({error.message})"))
            continue
        published = artifact.manifest() is not None
        if not published and first_missing is None:
            first_missing = stage.name
        rows.append((stage.name, artifact.key[:12], "skip: published" if published else "run"))
    return text_table(rows)


def _upstream(pipeline: Pipeline, stage: Stage) -> set[str]:
    """Collect the stages whose artifacts the key of `stage` depends on."""
    names = {"fetch"} if stage.name != "fetch" else set()
    for name in stage.inputs(pipeline.run_file.run):
        names |= {name} | _upstream(pipeline, get_stage(name))
    return names


def report_path(pipeline: Pipeline, stage: Stage) -> str | None:
    """Return the path or URI of the stage's published report; None if it has no report."""
    artifact = pipeline.artifact(stage)
    manifest = artifact.manifest()
    if manifest is None or not any(file.path == "report.html" for file in manifest.files):
        return None
    key = artifact.path("data", str(manifest.epoch), "report.html")
    return str(pipeline.store.local_path(key) or f"{pipeline.store.uri}/{key}")


def size_of(size: float) -> str:
    """Format a number of bytes."""
    for unit in ("B", "KB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"
