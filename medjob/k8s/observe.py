"""The state of a release's Jobs and pods, parsed from the API's objects."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

Object = dict[str, Any]
State = Literal["active", "complete", "failed", "suspended", "deleted"]
STAGE = "app.kubernetes.io/component"
KEY = "medjob/key"
ATTEMPT = "medjob/attempt"
SUBMISSION = "medjob/submission"
MANAGED = "app.kubernetes.io/managed-by=medjob"
OVERDUE_S = 60.0  # a pod that is deleted but exists for so long after its grace has lost its node


@dataclass(frozen=True, slots=True)
class Pod:
    """A pod of a stage. Times are POSIX seconds."""

    name: str
    stage: str
    job: str
    running: bool
    """The container has started and has not ended, as last reported by the node."""
    ended: bool
    exit_code: int | None
    reason: str
    """Why the pod ended (OOMKilled, Evicted) or has not started (Unschedulable, ...)."""
    message: str
    disrupted: bool
    """The cluster removed the pod: eviction, preemption by a more important pod, or a lost node."""
    reachable: bool
    """False once the node has been silent for a while."""
    deleted_at: float | None
    """When the pod's grace period ends; None if the pod is not being deleted."""
    scheduled: bool
    since: float
    """When the pod was scheduled, or created if it has no node yet."""

    @property
    def waiting(self) -> bool:
        """Whether the container has not started yet.

        The exit code matters because the phase stays Running for a while after the container ends.
        """
        return not self.running and not self.ended and self.exit_code is None

    def overdue(self, now: float) -> bool:
        """Whether the pod outlives its grace period, which means that its node is lost."""
        return not self.ended and self.deleted_at is not None and now >= self.deleted_at + OVERDUE_S


@dataclass(frozen=True, slots=True)
class Job:
    """A Job of a stage, which is one attempt. Times are POSIX seconds."""

    name: str
    stage: str
    key: str
    attempt: int
    submission: str
    nodes: int
    created_at: float
    began_at: float | None
    """When the Job was last allowed to create pods; None while a queue holds it."""
    state: State
    reason: str
    message: str
    pods: tuple[Pod, ...] = field(default=())

    @property
    def active(self) -> bool:
        """Whether the Job has not ended and is not being deleted."""
        return self.state in ("active", "suspended")


@dataclass(frozen=True, slots=True)
class View:
    """The Jobs and pods of a release at one moment."""

    jobs: tuple[Job, ...]
    """Oldest attempt first."""
    pods: tuple[Pod, ...]
    """Includes pods whose Job is gone."""


def view_of(jobs: Iterable[Object], pods: Iterable[Object]) -> View:
    """Parse the listings of Jobs and pods."""
    all_pods = tuple(pod_of(pod) for pod in pods)
    parsed = (_job_of(job, all_pods) for job in jobs)
    return View(tuple(sorted(parsed, key=lambda job: (job.stage, job.attempt))), all_pods)


def _job_of(job: Object, pods: Iterable[Pod]) -> Job:
    meta = job["metadata"]
    labels = meta.get("labels", {})
    spec = job.get("spec", {})
    status = job.get("status", {})
    conditions = {c["type"]: c for c in status.get("conditions", []) if c["status"] == "True"}
    failure = conditions.get("Failed") or conditions.get("FailureTarget") or {}
    return Job(
        name=meta["name"],
        stage=labels.get(STAGE, ""),
        key=labels.get(KEY, ""),
        attempt=int(labels.get(ATTEMPT, 0)),
        submission=labels.get(SUBMISSION, ""),
        nodes=spec.get("completions") or 1,
        created_at=_timestamp(meta.get("creationTimestamp")) or 0.0,
        began_at=_timestamp(status.get("startTime")),
        state=_job_state(job, conditions),
        reason=failure.get("reason", ""),
        message=failure.get("message", ""),
        pods=tuple(pod for pod in pods if pod.job == meta["name"]),
    )


def _job_state(job: Object, conditions: Object) -> State:
    if "Complete" in conditions:
        return "complete"
    if "Failed" in conditions:
        return "failed"
    if job["metadata"].get("deletionTimestamp"):
        return "deleted"
    return "suspended" if job.get("spec", {}).get("suspend") else "active"


def pod_of(pod: Object) -> Pod:
    """Parse a pod."""
    meta = pod["metadata"]
    labels = meta.get("labels", {})
    status = pod.get("status", {})
    conditions = {c["type"]: c for c in status.get("conditions", [])}
    scheduling = conditions.get("PodScheduled", {"status": "True"})
    scheduled = scheduling["status"] == "True"
    state = _container_state(status)
    running = "running" in state
    since = _timestamp(scheduling.get("lastTransitionTime")) if scheduled else None
    return Pod(
        name=meta["name"],
        stage=labels.get(STAGE, ""),
        job=labels.get("batch.kubernetes.io/job-name", ""),
        running=running,
        ended=status.get("phase") in ("Succeeded", "Failed"),
        exit_code=(state.get("terminated") or {}).get("exitCode"),
        reason=_pod_reason(status, state, {} if scheduled else scheduling),
        message=_pod_message(status, state, {} if scheduled else scheduling),
        disrupted=conditions.get("DisruptionTarget", {}).get("status") == "True",
        reachable=not (running and conditions.get("Ready", {}).get("status") == "False"),
        deleted_at=_timestamp(meta.get("deletionTimestamp")),
        scheduled=scheduled,
        since=since or _timestamp(meta.get("creationTimestamp")) or 0.0,
    )


def _container_state(status: Object) -> Object:
    """Return the state of the container `medjob`. A service mesh adds others."""
    for container in status.get("containerStatuses", []):
        if container["name"] == "medjob":
            return dict(container.get("state", {}))
    return {}


def _pod_reason(status: Object, state: Object, unscheduled: Object) -> str:
    """Return why the pod ended or does not start. `unscheduled` is empty if it has a node."""
    terminated = state.get("terminated") or {}
    waiting = state.get("waiting") or {}
    blocked = unscheduled or waiting
    return status.get("reason") or terminated.get("reason") or blocked.get("reason") or ""


def _pod_message(status: Object, state: Object, unscheduled: Object) -> str:
    """Return the message for the reason. An eviction explains more than the log's last lines."""
    if status.get("reason") and status.get("message"):
        return str(status["message"])
    terminated = state.get("terminated") or {}
    waiting = state.get("waiting") or {}
    return terminated.get("message") or waiting.get("message") or unscheduled.get("message") or ""


def latest_event_text(events: Sequence[Object]) -> str:
    """Return the newest warning of an object's Events, or the newest Event, or an empty string.

    Args:
        events: oldest first.
    """
    warnings = [event for event in events if event.get("type") == "Warning"]
    relevant = warnings or events
    if not relevant:
        return ""
    latest = relevant[-1]
    return f"{latest.get('reason')}: {' '.join(str(latest.get('message')).split())}"


def _timestamp(text: str | None) -> float | None:
    return datetime.fromisoformat(text).timestamp() if text else None
