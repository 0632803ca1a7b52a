"""Tables for people: what is published, what would run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from medjob.artifacts.artifact import MARKER, Artifact
from medjob.errors import InputError
from medjob.pipeline import maintenance
from medjob.pipeline.maintenance import Check, Waste
from medjob.pipeline.runner import Pipeline
from medjob.runtime.tables import text_table
from medjob.stage import STAGES, Stage
from medjob.store import Store


def runs_table(store: Store) -> str:
    """Every run of a store."""
    names = dict.fromkeys(
        entry.key.split("/")[0] for entry in store.list("") if not entry.key.startswith(".")
    )
    rows = [("RUN", "PUBLISHED", "UNFINISHED", "STORED")]
    for run in names:
        found = maintenance.artifacts(store, run)
        published = sum(store.get(artifact.path(MARKER)) is not None for artifact in found)
        stored = sum(entry.size for entry in store.list(f"{run}/"))
        if found:
            rows.append((run, str(published), str(len(found) - published), size_of(stored)))
    return text_table(rows) if len(rows) > 1 else f"nothing in {store.uri} yet"


def artifacts_table(store: Store, run: str) -> str:
    """Every artifact of `run`, finished or not, in the order of the stages; STORED counts checkpoints and leftovers too."""
    rows = [("STAGE", "KEY", "STATE", "FILES", "SIZE", "STORED", "FINISHED")]
    for artifact in maintenance.artifacts(store, run):
        stored = size_of(sum(entry.size for entry in store.list(artifact.path(""))))
        try:
            manifest = artifact.manifest()
        except InputError:
            rows.append((artifact.stage, artifact.key, "damaged", "", "", stored, ""))
            continue
        if manifest is None:
            rows.append((artifact.stage, artifact.key, "unfinished", "", "", stored, ""))
            continue
        size, finished = (
            size_of(sum(file.size for file in manifest.files)),
            str(manifest.provenance.get("finished", "")),
        )
        rows.append(
            (
                artifact.stage,
                artifact.key,
                "published",
                str(len(manifest.files)),
                size,
                stored,
                finished,
            )
        )
    return text_table(rows) if len(rows) > 1 else f"{run}: nothing in {store.uri} yet"


def checks_table(checks: Iterable[Check]) -> str:
    """What `medjob verify` has found."""
    rows = [("STAGE", "KEY", "WHAT", "FILES", "SIZE", "RESULT")]
    for check in checks:
        result = f"{len(check.problems)} DAMAGED OR MISSING" if check.problems else "verified"
        rows.append(
            (
                check.artifact.stage,
                check.artifact.key,
                check.what,
                str(check.files),
                size_of(check.size),
                result,
            )
        )
    return text_table(rows)


def waste_table(found: Sequence[Waste]) -> str:
    """What `medjob gc` would remove."""
    rows = [
        ("WHAT", "FILES", "SIZE", "WHY"),
        *((w.prefix.rstrip("/"), str(len(w.entries)), size_of(w.size), w.why) for w in found),
    ]
    return text_table(rows) if found else "nothing to remove"


def plan_table(pipeline: Pipeline, stages: Sequence[Stage]) -> str:
    """What `medjob run` would do now."""
    rows = [("STAGE", "KEY", "WHAT")]
    missing: str | None = None
    for stage in stages:
        if missing and missing in _upstream(pipeline, stage):
            rows.append((stage.name, "", f"run, after {missing}"))
            continue
        try:
            artifact = pipeline.artifact(stage)
        except InputError as error:
            if missing is None:
                raise
            rows.append((stage.name, "", f"run, after {missing} ({error.message})"))
            continue
        published = artifact.manifest() is not None
        missing = missing or (None if published else stage.name)
        rows.append((stage.name, artifact.key[:12], "skip: published" if published else "run"))
    return text_table(rows)


def _upstream(pipeline: Pipeline, stage: Stage) -> set[str]:
    """Stages whose output decides this one's key."""
    names = {"fetch"} if stage.name != "fetch" else set()
    for name in stage.inputs(pipeline.run_file.run):
        names |= {name} | _upstream(pipeline, next(s for s in STAGES if s.name == name))
    return names


def report_path(pipeline: Pipeline, stage: Stage) -> str | None:
    """Where the published report is, if the stage writes one."""
    artifact: Artifact = pipeline.artifact(stage)
    manifest = artifact.manifest()
    if manifest is None or not any(file.path == "report.html" for file in manifest.files):
        return None
    key = artifact.path("data", str(manifest.epoch), "report.html")
    return str(pipeline.store.local_path(key) or f"{pipeline.store.uri}/{key}")


def size_of(size: float) -> str:
    """Bytes as people read them."""
    for unit in ("B", "KB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"
