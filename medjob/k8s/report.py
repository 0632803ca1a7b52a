"""The status of a run: rows of values that the orchestrator collects, and the table that users see.

The orchestrator writes the status to an annotation of its own Job, so `medjob status` needs no
access to the bucket.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from medjob.artifacts.artifact import Artifact, Manifest
from medjob.k8s.observe import Job, View
from medjob.k8s.orchestrator.history import stored_progress
from medjob.k8s.orchestrator.outcome import Outcome
from medjob.pipeline import shard_progress
from medjob.pipeline.runner import Pipeline
from medjob.pipeline.shard_progress import ShardProgress, progress_of, total_progress
from medjob.runtime.tables import text_table

ANNOTATION = "medjob/status"
_COLUMNS = (
    "STAGE",
    "STATE",
    "TRIES",
    "STEP",
    "ETA",
    "SPEED",
    "LOSS",
    "SAVED",
    "HOURS",
    "GPU-H",
    "COST",
)


@dataclass(frozen=True, slots=True)
class ShardArtifact:
    """One shard of a stage."""

    name: str
    """`0-of-3`, as the label of its Jobs."""
    artifact: Artifact
    manifest: Manifest | None
    """None until it is published."""


def stage_row(
    pipeline: Pipeline,
    name: str,
    artifact: Artifact | None,
    outcomes: list[Outcome],
    view: View,
    now: float,
    shards: Sequence[ShardArtifact] = (),
) -> dict[str, Any]:
    """Return the status of one stage as JSON types."""
    active = [job for job in view.jobs if job.stage == name and job.active]
    manifest = artifact.manifest() if artifact else None
    published = [shard.manifest for shard in shards if shard.manifest]
    seconds = sum(outcome.seconds for outcome in outcomes)
    seconds += sum(_seconds_of(found.provenance) for found in published)
    # Time in a queue does not count.
    seconds += sum(now - (job.began_at or now) for job in _at_work(active, shards))
    if manifest and not active:
        seconds += _seconds_of(manifest.provenance)
    resources = getattr(pipeline.run_file.resources, name)
    row: dict[str, Any] = {
        "stage": name,
        "state": _state(active, manifest, outcomes),
        "key": artifact.key[:12] if artifact else "",
        "tries": len(outcomes) + _other_tries(active, manifest, shards),
        "seconds": round(seconds),
        "gpus": resources.gpus * resources.nodes,
        "price": _price_per_gpu_hour(pipeline, resources.profile),
    }
    if shards and not manifest:
        row |= _shard_progress(active, shards)
    elif active and artifact:
        row |= _progress(artifact)
    if manifest:
        row["endpoints"] = manifest.metrics.get("endpoints", {})
    return row


def _at_work(active: Sequence[Job], shards: Sequence[ShardArtifact]) -> list[Job]:
    """Leave out the Jobs of published shards, whose time is that of their markers."""
    published = {shard.name for shard in shards if shard.manifest}
    return [job for job in active if job.shard not in published]


def _other_tries(
    active: Sequence[Job], manifest: Manifest | None, shards: Sequence[ShardArtifact]
) -> int:
    """Number of attempts without an outcome, because they run or have published."""
    if not shards:
        return int(bool(active) or manifest is not None)
    published = sum(shard.manifest is not None for shard in shards)
    return published + len(_at_work(active, shards))


def _state(active: Sequence[Job], manifest: Manifest | None, outcomes: list[Outcome]) -> str:
    if manifest:
        return "published"
    if not active:
        return "stopped" if outcomes else "pending"
    states = [_job_state(job) for job in active]
    return next(state for state in ("running", "starting", "queued", "stopped") if state in states)


def _job_state(job: Job) -> str:
    if job.finished:
        return "stopped"
    if any(pod.running for pod in job.pods):
        return "running"
    return "queued" if job.state == "suspended" else "starting"


def _shard_progress(active: Sequence[Job], shards: Sequence[ShardArtifact]) -> dict[str, Any]:
    """Return the progress of all shards together, and which of them are in which state."""
    running = {job.shard for job in active if _job_state(job) == "running"}
    found = []
    for index, shard in enumerate(shards):
        state: shard_progress.State = "published" if shard.manifest else "waiting"
        if shard.name in running and not shard.manifest:
            state = "running"
        found.append(ShardProgress(index, state, progress_of(shard.artifact)))
    return {"progress": total_progress(found), "shards": shard_progress.shard_list(found)}


def _price_per_gpu_hour(pipeline: Pipeline, profile: str | None) -> float | None:
    if not profile:
        return None
    found = pipeline.run_file.cluster.profiles.get(profile)
    return found.price_per_gpu_hour if found else None


def _seconds_of(provenance: Mapping[str, Any]) -> float:
    started = datetime.fromisoformat(str(provenance["started"]))
    finished = datetime.fromisoformat(str(provenance["finished"]))
    return (finished - started).total_seconds()


def _progress(artifact: Artifact) -> dict[str, Any]:
    return {"progress": progress_of(artifact), "saved": stored_progress(artifact)}


def lines(status: Mapping[str, Any], run: str, currency: str) -> Iterator[str]:
    """Yield the lines of the status table."""
    age = _duration(time.time() - status["at"])
    yield f"{run}: {status['state']}, {status['text']} ({age} ago)"
    rows = [_COLUMNS, *(_cells(row, currency) for row in status.get("stages", []))]
    yield from text_table(rows).splitlines()
    for row in status.get("stages", []):
        requests, tokens, cost = _endpoint_figures(row)
        if requests:
            yield (
                f"{row['stage']}: {requests:,} requests to endpoints, {tokens:,} tokens, "
                f"{cost:.2f} {currency}"
            )
        if "shards" in row:
            yield f"{row['stage']}: {shard_progress.describe(row['shards'])}"


def _cells(row: Mapping[str, Any], currency: str) -> tuple[str, ...]:
    progress = row.get("progress", {})
    hours = row["seconds"] / 3600
    gpu_hours = hours * row["gpus"]
    cost = ""
    at_endpoints = _endpoint_figures(row)[2]
    if (row["price"] is not None and gpu_hours) or at_endpoints:
        cost = f"{gpu_hours * (row['price'] or 0) + at_endpoints:.2f} {currency}"
    return (
        row["stage"],
        row["state"],
        str(row["tries"] or ""),
        f"{progress['step']}/{progress['total']}" if "step" in progress else "",
        _duration(progress["eta_s"]) if "eta_s" in progress else "",
        _speed(progress),
        f"{progress['loss']:.4g}" if "loss" in progress else "",
        _saved(row),
        f"{hours:.2f}" if row["seconds"] else "",
        f"{gpu_hours:.2f}" if gpu_hours else "",
        cost,
    )


def _endpoint_figures(row: Mapping[str, Any]) -> tuple[int, int, float]:
    """Requests, tokens and cost of a stage at endpoints: of all of them once it is published."""
    progress = row.get("progress", {})
    running = [progress.get(f"endpoint_{name}", 0) for name in ("requests", "tokens", "cost")]
    found = [
        (each["requests"], each["input_tokens"] + each["output_tokens"], each["cost"])
        for each in row.get("endpoints", {}).values()
    ]
    requests, tokens, cost = map(sum, zip(*found, strict=True)) if found else running
    return int(requests), int(tokens), float(cost)


def _speed(progress: Mapping[str, Any]) -> str:
    if "tokens_per_second" in progress:
        return f"{progress['tokens_per_second']:,.0f} tok/s"
    return f"{progress['per_s']}/s" if "per_s" in progress else ""


def _saved(row: Mapping[str, Any]) -> str:
    """Return the newest stored step and its age. Orchestrators of older versions give no age."""
    if not row.get("saved"):
        return ""
    if not row.get("saved_at"):
        return str(row["saved"])
    return f"{row['saved']}, {_duration(time.time() - row['saved_at'])} ago"


def _duration(seconds: float) -> str:
    seconds = max(0, round(seconds))
    if seconds < 120:
        return f"{seconds} s"
    return f"{seconds // 60} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
