"""Detects a running attempt that does not start, or whose node is lost."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from medjob.config.pipeline import PipelineParams
from medjob.errors import ConfigError, Preempted, RetryError
from medjob.k8s.api import Api
from medjob.k8s.observe import Job, Pod, latest_event_text

SILENT_S = 60.0  # how long node and stage may be silent, so that a short partition is harmless


@dataclass(frozen=True, slots=True)
class Problem:
    """Why an attempt must be stopped."""

    kind: Literal["stuck", "preempted"]
    code: int
    reason: str


@dataclass(slots=True)
class Watchdog:
    """Checks active attempts, and remembers when each silent one last changed its heartbeat.

    A restart of the orchestrator clears this memory, which delays a detection by a minute at most.
    """

    api: Api
    pipeline: PipelineParams
    clock: Callable[[], float] = time.time
    _heartbeats: dict[str, tuple[bytes, float]] = field(default_factory=dict)

    def check(
        self, job: Job, heartbeat: Callable[[], bytes], others_ran_at: float = 0.0
    ) -> Problem | None:
        """Return the problem of an active Job, or None.

        Args:
            heartbeat: reads bytes from the store that change while the stage works.
            others_ran_at: When pods of the stage's other Jobs ran last. They may have the nodes
                that this one waits for.
        """
        return self._check_node(job, heartbeat) or self._check_start(job, others_ran_at)

    def _check_node(self, job: Job, heartbeat: Callable[[], bytes]) -> Problem | None:
        """Detect a lost node.

        Its pod stays Running for five minutes by Kubernetes' defaults, and its Job active for
        twenty. A node that is only cut off from the API still writes to the store, and its attempt
        may continue.
        """
        lost = self._unreachable_pod(job)
        if lost is None:
            self._heartbeats.pop(job.name, None)
            return None
        current = heartbeat()
        known = self._heartbeats.get(job.name)
        if known is None or known[0] != current:
            self._heartbeats[job.name] = (current, self.clock())
            return None
        if self.clock() - known[1] < SILENT_S:
            return None
        text = f"{lost.name}: its node and the stage have been silent for {SILENT_S:.0f} s"
        return Problem("preempted", Preempted.exit_code, text)

    def _unreachable_pod(self, job: Job) -> Pod | None:
        for pod in job.pods:
            if not pod.ended and (not pod.reachable or pod.overdue(self.clock())):
                return pod
        return None

    def _check_start(self, job: Job, others_ran_at: float) -> Problem | None:
        """Detect an attempt whose pods do not start in time. Time in a queue does not count."""
        if job.state == "suspended" or job.began_at is None:
            return None
        waiting = [pod for pod in job.pods if pod.waiting]
        if any(pod.deleted_at is not None for pod in waiting) or (job.pods and not waiting):
            return None
        unscheduled = [pod for pod in waiting if not pod.scheduled]
        if unscheduled:
            limit = self.pipeline.unschedulable_deadline_seconds
            code = RetryError.exit_code
        else:
            limit = self.pipeline.start_deadline_seconds
            code = ConfigError.exit_code
        blocked = unscheduled or waiting
        since = min((pod.since for pod in blocked), default=job.began_at)
        if unscheduled or not job.pods:  # without pods, a quota may be exceeded
            since = max(since, others_ran_at)
        if self.clock() - since < limit:
            return None
        text = f"not started after {limit} s: {self._reason(job, blocked)}"
        return Problem("stuck", code, text)

    def _reason(self, job: Job, pods: list[Pod]) -> str:
        """Return why the pods did not start: an Event, the state of a pod, or the Job's message."""
        objects = [("Pod", pod.name) for pod in pods] or [("Job", job.name)]
        for kind, name in objects:
            text = latest_event_text(self.api.events(kind, name))
            if text:
                return text
        for pod in pods:
            if pod.reason:
                return f"{pod.reason}: {pod.message}"
        return job.message or "no pod was created, and no Event gives a reason"
