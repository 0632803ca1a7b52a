"""How a run stands, as its orchestrator says it: in the store, and on its own Job, where `medjob status` needs no bucket to read it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from typing import Any

from medjob.artifacts.artifact import Artifact
from medjob.k8s.observe import View
from medjob.k8s.orchestrator import history as attempt_history
from medjob.k8s.orchestrator.retry_policy import Outcome
from medjob.pipeline.runner import Pipeline
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
    history: list[Outcome],
    view: View,
    now: float,
) -> dict[str, Any]:
    """One stage: what is known of it."""
    running = next((job for job in view.jobs if job.stage == name and job.active), None)
    manifest = artifact.manifest() if artifact else None
    state = (
        "published" if manifest else "running" if running else "stopped" if history else "pending"
    )
    if running and not manifest and not any(pod.running for pod in running.pods):
        state = "queued" if running.state == "suspended" else "starting"
    row: dict[str, Any] = {
        "stage": name,
        "state": state,
        "key": artifact.key[:12] if artifact else "",
        "tries": len(history) + (running is not None or manifest is not None),
    }
    seconds = sum(outcome.seconds for outcome in history)
    if running:
        seconds += now - (running.began_at or now)  # waiting in a queue costs nothing
    elif manifest:
        seconds += _seconds_of(manifest.provenance)
    row["seconds"] = round(seconds)
    resources = getattr(pipeline.run_file.resources, name)
    row["gpus"] = resources.gpus * resources.nodes
    profile = (
        pipeline.run_file.cluster.profiles.get(resources.profile) if resources.profile else None
    )
    row["price"] = profile.price_per_gpu_hour if profile else None
    if running and artifact:
        row |= _progress(artifact)
    return row


def _seconds_of(provenance: Mapping[str, Any]) -> float:
    from datetime import datetime

    begun, ended = (
        datetime.fromisoformat(str(provenance[name])) for name in ("started", "finished")
    )
    return (ended - begun).total_seconds()


def _progress(artifact: Artifact) -> dict[str, Any]:
    try:
        event = json.loads(attempt_history.heartbeat(artifact) or b"{}")
    except ValueError:
        return {}
    return {"progress": event, "saved": attempt_history.reach(artifact)}


def lines(status: Mapping[str, Any], run: str, currency: str) -> Iterator[str]:
    """The status as a table."""
    yield f"{run}: {status['state']}, {status['text']} ({_duration(time.time() - status['at'])} ago)"
    rows = [_COLUMNS, *(_cells(row, currency) for row in status.get("stages", []))]
    yield from text_table(rows).splitlines()


def _cells(row: Mapping[str, Any], currency: str) -> tuple[str, ...]:
    progress = row.get("progress", {})
    hours = row["seconds"] / 3600
    gpu_hours = hours * row["gpus"]
    cost = (
        f"{gpu_hours * row['price']:.2f} {currency}"
        if row["price"] is not None and gpu_hours
        else ""
    )
    return (
        row["stage"],
        row["state"],
        str(row["tries"] or ""),
        f"{progress['step']}/{progress['total']}" if "step" in progress else "",
        _duration(progress["eta_s"]) if "eta_s" in progress else "",
        f"{progress['tokens_per_second']:,.0f} tok/s"
        if "tokens_per_second" in progress
        else f"{progress['per_s']}/s"
        if "per_s" in progress
        else "",
        f"{progress['loss']:.4g}" if "loss" in progress else "",
        _saved(row),
        f"{hours:.2f}" if row["seconds"] else "",
        f"{gpu_hours:.2f}" if gpu_hours else "",
        cost,
    )


def _saved(row: Mapping[str, Any]) -> str:
    """The newest stored step, and its age as far as the orchestrator (which may be of another version than this client) tells it."""
    if not row.get("saved"):
        return ""
    return (
        f"{row['saved']}, {_duration(time.time() - row['saved_at'])} ago"
        if row.get("saved_at")
        else str(row["saved"])
    )


def _duration(seconds: float) -> str:
    seconds = max(0, round(seconds))
    if seconds < 120:
        return f"{seconds} s"
    return f"{seconds // 60} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
