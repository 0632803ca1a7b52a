"""Looks after an attempt that runs: does it start, and is its node still there?"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from medjob.config.pipeline import PipelineParams
from medjob.errors import ConfigError, Preempted, RetryError
from medjob.k8s.api import Api
from medjob.k8s.observe import Job, Pod, latest_event_text

SILENT_S = (
    60.0  # of the node and of the stage itself: a partition shorter than that disturbs nothing
)


@dataclass(frozen=True, slots=True)
class Problem:
    """Why an attempt has to be ended."""

    kind: Literal["stuck", "preempted"]
    code: int
    reason: str


@dataclass(slots=True)
class Watchdog:
    """Remembers since when what is silent. After a restart it begins anew, which costs a minute at most."""

    api: Api
    pipeline: PipelineParams
    clock: Callable[[], float] = time.time
    _beats: dict[str, tuple[bytes, float]] = field(default_factory=dict)

    def look(self, job: Job, heartbeat: Callable[[], bytes]) -> Problem | None:
        """What is wrong with `job`, if anything. `heartbeat` reads what changes in the store while the stage works."""
        return self._lost(job, heartbeat) or self._not_started(job)

    def _lost(self, job: Job, heartbeat: Callable[[], bytes]) -> Problem | None:
        """A node that is gone leaves its pod Running: for five minutes by Kubernetes' defaults, and its Job for twenty.

        A node that is only cut off from the API goes on writing to the store, and is left alone.
        """
        gone = next(
            (
                pod
                for pod in job.pods
                if not pod.ended and (not pod.reachable or pod.overdue(self.clock()))
            ),
            None,
        )
        if gone is None:
            self._beats.pop(job.name, None)
            return None
        beat, since = self._beats.get(job.name, (b"", 0.0))
        now = heartbeat()
        if job.name not in self._beats or now != beat:
            self._beats[job.name] = (now, self.clock())
            return None
        if self.clock() - since < SILENT_S:
            return None
        return Problem(
            "preempted",
            Preempted.exit_code,
            f"{gone.name}: neither its node nor the stage has been heard of for {SILENT_S:.0f} s",
        )

    def _not_started(self, job: Job) -> Problem | None:
        if (
            job.state == "suspended" or job.began_at is None
        ):  # a queue holds it: that is no failure, however long it takes
            return None
        waiting = [pod for pod in job.pods if pod.waiting]
        if any(pod.deleted_at is not None for pod in waiting) or (job.pods and not waiting):
            return None
        unscheduled = [pod for pod in waiting if not pod.scheduled]
        limit = (
            self.pipeline.unschedulable_deadline_seconds
            if unscheduled
            else self.pipeline.start_deadline_seconds
        )
        since = min((pod.since for pod in unscheduled or waiting), default=job.began_at)
        if self.clock() - since < limit:
            return None
        code = RetryError.exit_code if unscheduled else ConfigError.exit_code
        return Problem(
            "stuck", code, f"not started after {limit} s: {self._why(job, unscheduled or waiting)}"
        )

    def _why(self, job: Job, waiting: list[Pod]) -> str:
        """What the cluster says of it."""
        about = [("Pod", pod.name) for pod in waiting] or [("Job", job.name)]
        events = filter(
            None, (latest_event_text(self.api.events(kind, name)) for kind, name in about)
        )
        states = (f"{pod.reason}: {pod.message}" for pod in waiting if pod.reason)
        return next(events, None) or next(
            states, job.message or "no pod was made, and nothing says why"
        )
