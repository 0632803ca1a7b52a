"""Tables for people: what is published, what would run."""

from __future__ import annotations

from collections.abc import Sequence

from medjob.artifact import MARKER, Artifact, parse_manifest
from medjob.errors import InputError
from medjob.runner import Line
from medjob.stage import STAGES, Stage
from medjob.store import LocalStore, Store


def artifacts_table(store: Store, run: str) -> str:
    """Every artifact of `run`, finished or not, in the order of the stages."""
    order = [stage.name for stage in STAGES]
    places = {tuple(entry.key.split("/")[1:3]) for entry in store.list(f"{run}/")}
    rows = [("STAGE", "KEY", "STATE", "FILES", "SIZE", "FINISHED")]
    for stage, key in sorted(places, key=lambda place: (order.index(place[0]), place[1])):
        marker = f"{run}/{stage}/{key}/{MARKER}"
        blob = store.get(marker)
        if blob is None:
            rows.append((stage, key, "unfinished", "", "", ""))
            continue
        manifest = parse_manifest(blob.data, marker)
        size = sum(file.size for file in manifest.files)
        rows.append((stage, key, "published", str(len(manifest.files)), _size(size), str(manifest.provenance.get("finished", ""))))
    return _table(rows) if len(rows) > 1 else f"{run}: nothing in {store.uri} yet"


def plan_table(line: Line, stages: Sequence[Stage]) -> str:
    """What `medjob run` would do now."""
    rows = [("STAGE", "KEY", "WHAT")]
    missing: str | None = None
    for stage in stages:
        if missing and missing in _upstream(line, stage):
            rows.append((stage.name, "", f"run, after {missing}"))
            continue
        try:
            artifact = line.artifact(stage)
        except InputError as error:
            if missing is None:
                raise
            rows.append((stage.name, "", f"run, after {missing} ({error.message})"))
            continue
        published = artifact.manifest() is not None
        missing = missing or (None if published else stage.name)
        rows.append((stage.name, artifact.key[:12], "skip: published" if published else "run"))
    return _table(rows)


def _upstream(line: Line, stage: Stage) -> set[str]:
    """Stages whose output decides this one's key."""
    names = {"fetch"} if stage.name != "fetch" else set()
    for name in stage.inputs(line.job.run):
        names |= {name} | _upstream(line, next(s for s in STAGES if s.name == name))
    return names


def report_path(line: Line, stage: Stage) -> str | None:
    """Where the published report is, if the stage writes one."""
    artifact: Artifact = line.artifact(stage)
    manifest = artifact.manifest()
    if manifest is None or not any(file.path == "report.html" for file in manifest.files):
        return None
    key = artifact.path("data", str(manifest.epoch), "report.html")
    return str(line.store.root / key) if isinstance(line.store, LocalStore) else f"{line.store.uri}/{key}"


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def _size(size: float) -> str:
    for unit in ("B", "KB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"
