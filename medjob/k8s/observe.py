"""What the API says of a run's stages, in the few words that decisions need."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

Object = dict[str, Any]
STAGE, KEY, ATTEMPT, SUBMISSION = (
    "app.kubernetes.io/component",
    "medjob/key",
    "medjob/attempt",
    "medjob/submission",
)
MANAGED = "app.kubernetes.io/managed-by=medjob"
OVERDUE_S = 60.0  # a pod that is still there so long after its grace has no node that could end it


@dataclass(frozen=True, slots=True)
class Pod:
    """A pod of a stage."""

    name: str
    stage: str
    job: str
    running: bool
    """Its container has been started and has not ended, as far as the node has said."""
    ended: bool
    exit_code: int | None
    reason: str
    """Why it ended (OOMKilled, Evicted), or why it does not start (ImagePullBackOff, Unschedulable)."""
    message: str
    disrupted: bool
    """Whether the cluster took it away: eviction, preemption by a more important pod, a lost node."""
    reachable: bool
    """False once its node has not been heard of for a while."""
    deleted_at: float | None
    """When it should be gone, its grace included (POSIX seconds); None while nobody wants that."""
    scheduled: bool
    since: float
    """When it got its node, or was created if it has none yet (POSIX seconds)."""

    @property
    def waiting(self) -> bool:
        """Whether its container has not been started yet. (For a while after its end the pod's phase is still Running.)"""
        return not self.running and not self.ended and self.exit_code is None

    def overdue(self, now: float) -> bool:
        """Whether it should have been gone for so long that nobody is there to end it."""
        return not self.ended and self.deleted_at is not None and now >= self.deleted_at + OVERDUE_S


@dataclass(frozen=True, slots=True)
class Job:
    """A Job of a stage: one attempt."""

    name: str
    stage: str
    key: str
    attempt: int
    submission: str
    nodes: int
    created_at: float
    began_at: float | None
    """When it was allowed to make pods, the last time that a queue let it; None before that."""
    state: Literal["active", "complete", "failed", "suspended", "deleted"]
    reason: str
    message: str
    pods: tuple[Pod, ...] = field(default=())

    @property
    def active(self) -> bool:
        """Whether it may still do something."""
        return self.state in ("active", "suspended")


@dataclass(frozen=True, slots=True)
class View:
    """Everything of a release at one moment."""

    jobs: tuple[Job, ...]
    """Oldest attempt first."""
    pods: tuple[Pod, ...]
    """Those of Jobs that are gone, too."""


def view_of(jobs: Iterable[Object], pods: Iterable[Object]) -> View:
    """What two listings say."""
    seen = tuple(pod_of(pod) for pod in pods)
    return View(
        tuple(
            sorted((_job_of(job, seen) for job in jobs), key=lambda job: (job.stage, job.attempt))
        ),
        seen,
    )


def _job_of(job: Object, pods: Iterable[Pod]) -> Job:
    meta, labels = job["metadata"], job["metadata"].get("labels", {})
    conditions = {
        c["type"]: c for c in job.get("status", {}).get("conditions", []) if c["status"] == "True"
    }
    state: Literal["active", "complete", "failed", "suspended", "deleted"] = "active"
    if "Complete" in conditions:
        state = "complete"
    elif "Failed" in conditions:
        state = "failed"
    elif meta.get("deletionTimestamp"):
        state = "deleted"
    elif job.get("spec", {}).get("suspend"):
        state = "suspended"
    ended = conditions.get("Failed") or conditions.get("FailureTarget") or {}
    return Job(
        name=meta["name"],
        stage=labels.get(STAGE, ""),
        key=labels.get(KEY, ""),
        attempt=int(labels.get(ATTEMPT, 0)),
        submission=labels.get(SUBMISSION, ""),
        nodes=job.get("spec", {}).get("completions") or 1,
        created_at=_seconds(meta.get("creationTimestamp")) or 0.0,
        began_at=_seconds(job.get("status", {}).get("startTime")),
        state=state,
        reason=ended.get("reason", ""),
        message=ended.get("message", ""),
        pods=tuple(pod for pod in pods if pod.job == meta["name"]),
    )


def pod_of(pod: Object) -> Pod:
    """One pod."""
    meta, status = pod["metadata"], pod.get("status", {})
    conditions = {c["type"]: c for c in status.get("conditions", [])}
    container: Object = next(
        (c for c in status.get("containerStatuses", []) if c["name"] == "medjob"), {}
    )
    state: Object = container.get("state", {})
    terminated, waiting = state.get("terminated") or {}, state.get("waiting") or {}
    placed = conditions.get("PodScheduled", {"status": "True"})
    scheduled = placed["status"] == "True"
    disruption = conditions.get("DisruptionTarget", {})
    reason = (
        status.get("reason")
        or terminated.get("reason")
        or (waiting.get("reason") if scheduled else placed.get("reason"))
        or ""
    )
    about_pod = (
        status.get("message") if status.get("reason") else ""
    )  # why it was evicted tells more than its last lines
    message = (
        about_pod
        or terminated.get("message")
        or waiting.get("message")
        or ("" if scheduled else placed.get("message"))
        or ""
    )
    running = "running" in state
    return Pod(
        name=meta["name"],
        stage=meta.get("labels", {}).get(STAGE, ""),
        job=meta.get("labels", {}).get("batch.kubernetes.io/job-name", ""),
        running=running,
        ended=status.get("phase") in ("Succeeded", "Failed"),
        exit_code=terminated.get("exitCode"),
        reason=reason,
        message=message,
        disrupted=disruption.get("status") == "True",
        reachable=not (running and conditions.get("Ready", {}).get("status") == "False"),
        deleted_at=_seconds(meta.get("deletionTimestamp")),
        scheduled=scheduled,
        since=(_seconds(placed.get("lastTransitionTime")) if scheduled else None)
        or _seconds(meta.get("creationTimestamp"))
        or 0.0,
    )


def latest_event_text(events: Sequence[Object]) -> str:
    """The newest warning among an object's Events (oldest first); where nothing warns, what was last done; "" without any."""
    told = [event for event in events if event.get("type") == "Warning"] or events
    return (
        f"{told[-1].get('reason')}: {' '.join(str(told[-1].get('message')).split())}"
        if told
        else ""
    )


def _seconds(text: str | None) -> float | None:
    return datetime.fromisoformat(text).timestamp() if text else None
