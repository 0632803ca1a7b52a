"""The status of a run: rows of values that the orchestrator collects, and the table that users see.

The orchestrator writes the status to an annotation of its own Job, so `medjob status` needs no
access to the bucket.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any

from medjob.artifacts.artifact import Artifact, Manifest
from medjob.k8s.observe import Job, View
from medjob.k8s.orchestrator.history import heartbeat, stored_progress
from medjob.k8s.orchestrator.outcome import Outcome
from medjob.pipeline.runner import Pipeline
from medjob.runtime.files import parse_json
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


def stage_row(
    pipeline: Pipeline,
    name: str,
    artifact: Artifact | None,
    outcomes: list[Outcome],
    view: View,
    now: float,
) -> dict[str, Any]:
    """Return the status of one stage as JSON types."""
    active = next((job for job in view.jobs if job.stage == name and job.active), None)
    manifest = artifact.manifest() if artifact else None
    seconds = sum(outcome.seconds for outcome in outcomes)
    if active:
        seconds += now - (active.began_at or now)  # time in a queue does not count
    elif manifest:
        seconds += _seconds_of(manifest.provenance)
    resources = getattr(pipeline.run_file.resources, name)
    row: dict[str, Any] = {
        "stage": name,
        "state": _state(active, manifest, outcomes),
        "key": artifact.key[:12] if artifact else "",
        "tries": len(outcomes) + (active is not None or manifest is not None),
        "seconds": round(seconds),
        "gpus": resources.gpus * resources.nodes,
        "price": _price_per_gpu_hour(pipeline, resources.profile),
    }
    if active and artifact:
        row |= _progress(artifact)
    if manifest:
        row["endpoints"] = manifest.metrics.get("endpoints", {})
    return row


def _state(active: Job | None, manifest: Manifest | None, outcomes: list[Outcome]) -> str:
    if manifest:
        return "published"
    if active is None:
        return "stopped" if outcomes else "pending"
    if active.finished:
        return "stopped"
    if any(pod.running for pod in active.pods):
        return "running"
    return "queued" if active.state == "suspended" else "starting"


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
    try:
        event = parse_json(heartbeat(artifact) or b"{}")
    except ValueError:
        return {}
    if not isinstance(event, dict) or ("step" in event and "total" not in event):
        return {}
    numbers = {name: value for name, value in event.items() if isinstance(value, int | float)}
    return {"progress": numbers, "saved": stored_progress(artifact)}


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
