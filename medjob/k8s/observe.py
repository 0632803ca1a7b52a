"""The state of a release's Jobs and pods, parsed from the API's objects."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

Object = dict[str, Any]
State = Literal["active", "complete", "failed", "suspended", "deleted"]
# Labels. Tools such as Argo CD overwrite those of app.kubernetes.io, so medjob reads only its own.
RELEASE = "medjob/release"
STAGE = "medjob/component"
KEY = "medjob/key"
ATTEMPT = "medjob/attempt"
SUBMISSION = "medjob/submission"
SHARD = "medjob/shard"
QUEUE = "kueue.x-k8s.io/queue-name"
ORCHESTRATOR = "orchestrator"
# Why the kubelet reports a pod as not ready. If the node is lost, the reason is a different one.
_REPORTED_BY_NODE = ("ContainersNotReady", "ReadinessGatesNotReady", "PodCompleted")
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
    """All containers of the pod have ended. A sidecar can keep a pod alive for ever."""
    exit_code: int | None
    """Exit code of the container `medjob`; None while it has not ended."""
    reason: str
    """Why the pod ended (OOMKilled, Evicted) or has not started (Unschedulable, ...)."""
    message: str
    failed_init_container: str
    """Why `medjob` never started: an init container has failed. Webhooks add them."""
    disrupted: bool
    """The cluster removed the pod: eviction, preemption by a more important pod, or a lost node."""
    reachable: bool
    """False once the node has been silent for a while."""
    deleted_at: float | None
    """When the pod's grace period ends; None if the pod is not being deleted."""
    scheduled: bool
    since: float
    """When the pod was scheduled, or created if it has no node yet."""
    shard: str = ""
    """Like `Job.shard`."""

    @property
    def finished(self) -> bool:
        """Whether the container `medjob` has ended, whatever the other containers do."""
        return self.ended or self.exit_code is not None

    @property
    def waiting(self) -> bool:
        """Whether the container has not started yet.

        The exit code matters because the phase stays Running for a while after the container ends.
        """
        return not self.running and not self.finished

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
    shard: str = ""
    """Which shard of the stage it computes, such as `0-of-3`; see `Work.shard`."""

    @property
    def active(self) -> bool:
        """Whether the Job has not ended and is not being deleted."""
        return self.state in ("active", "suspended")

    @property
    def finished(self) -> bool:
        """Whether the attempt is over: all containers `medjob` have ended, or one has failed.

        Kubernetes ends the Job only after the other containers of its pods have ended as well. If
        one pod fails, it deletes the others, and these may still save. If a node is lost, its peers
        fail, and the watchdog finds out why.
        """
        if self.state != "active":
            return False
        remaining = [pod for pod in self.pods if not pod.finished]
        if any(pod.exit_code for pod in self.pods):
            return all(pod.deleted_at is None and pod.reachable for pod in remaining)
        return len(self.pods) >= self.nodes and not remaining


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
    labels = meta.get("labels") or {}
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
        shard=labels.get(SHARD, ""),
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
    labels = meta.get("labels") or {}
    status = pod.get("status", {})
    conditions = {c["type"]: c for c in status.get("conditions", [])}
    ready = conditions.get("Ready", {})
    node_is_silent = ready.get("status") == "False" and ready.get("reason") not in _REPORTED_BY_NODE
    scheduling = conditions.get("PodScheduled", {"status": "True"})
    scheduled = scheduling["status"] == "True"
    state = _container_state(status)
    running = "running" in state
    broken = "" if running or "terminated" in state else _failed_init_container(status)
    since = _timestamp(scheduling.get("lastTransitionTime")) if scheduled else None
    return Pod(
        name=meta["name"],
        stage=labels.get(STAGE, ""),
        job=labels.get("batch.kubernetes.io/job-name", ""),
        running=running,
        ended=status.get("phase") in ("Succeeded", "Failed"),
        exit_code=(state.get("terminated") or {}).get("exitCode"),
        reason=_pod_reason(status, state, {} if scheduled else scheduling),
        message=_pod_message(status, state, {} if scheduled else scheduling) or broken,
        failed_init_container=broken,
        disrupted=conditions.get("DisruptionTarget", {}).get("status") == "True",
        reachable=not (running and node_is_silent),
        deleted_at=_timestamp(meta.get("deletionTimestamp")),
        scheduled=scheduled,
        since=since or _timestamp(meta.get("creationTimestamp")) or 0.0,
        shard=labels.get(SHARD, ""),
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


def _failed_init_container(status: Object) -> str:
    """Describe the init container that has failed. Native sidecars are init containers, too."""
    for container in status.get("initContainerStatuses", []):
        code = (container.get("state", {}).get("terminated") or {}).get("exitCode")
        if code:
            return f"the init container {container['name']} ended with exit code {code}"
    return ""


def other_containers(pod: Object) -> list[str]:
    """Names of the containers beside `medjob` that keep a pod alive, such as a mesh's proxy.

    Kubernetes ends native sidecars, which are init containers, after the container `medjob`.
    """
    statuses = pod.get("status", {}).get("containerStatuses", [])
    others = (status for status in statuses if status["name"] != "medjob")
    return [status["name"] for status in others if "terminated" not in status.get("state", {})]


def true_conditions(item: Object) -> set[str]:
    """Types of the conditions that are true. A condition can be present and false."""
    conditions = item.get("status", {}).get("conditions", [])
    return {each["type"] for each in conditions if each["status"] == "True"}


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
