"""How an attempt ended, derived from its record in the store, its pods and its Job.

The Job's own reason is not enough. On several nodes, a peer that saves and exits before the evicted
pod is gone makes a preemption look like a crash, and an evicted pod takes its exit code with it.
So the record in the store is read first, then the pods, then the Job.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from medjob.errors import (
    EXIT_CODES,
    Preempted,
    RetryError,
    SupersededError,
)
from medjob.k8s.observe import Job, Pod
from medjob.pipeline.outcome import CRASH_RANK, FINAL, specificity_rank

Kind = Literal["final", "memory", "deadline", "stuck", "preempted", "failed", "paused", "replaced"]
Cause = tuple[Kind, int, str]
"""Kind, exit code of the run if it ended now, reason."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one attempt ended. Outcomes are kept in the store, so deleting Jobs resets no budget."""

    attempt: int
    kind: Kind
    code: int
    """Exit code that the run ends with if no attempt follows; see errors.py."""
    reason: str
    reach: int
    """Progress of the stage: its newest stored step, or its number of finished batches of rows."""
    job: str
    submission: str
    at: float
    """When the end was noticed (POSIX seconds)."""
    seconds: float
    """Time from the Job's start to its end. Time in a queue does not count."""

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as JSON types."""
        return asdict(self)


def outcome_of(job: Job, cause: Cause, reach: int, now: float) -> Outcome:
    """Build the outcome of a Job's attempt that ends now because of `cause`."""
    kind, code, reason = cause
    return Outcome(
        attempt=job.attempt,
        kind=kind,
        code=code,
        reason=reason,
        reach=reach,
        job=job.name,
        submission=job.submission,
        at=now,
        seconds=now - (job.began_at or now),
    )


def classify(job: Job, record: Mapping[str, Any] | None) -> Cause:
    """Find out why a Job ended without publishing its artifact.

    Args:
        record: what the attempt stored about its end, if it got that far.
    """
    exits = sorted(_reported_exits(job, record), key=lambda each: specificity_rank(each[0]))
    codes = [code for code, _ in exits]
    reason = exits[0][1] if exits else ""
    if codes and codes[0] in FINAL:
        return "final", codes[0], reason or EXIT_CODES[codes[0]]
    killed = _killed_pod(job)
    if killed is not None:
        return "memory", RetryError.exit_code, _kill_reason(killed)
    if job.reason == "DeadlineExceeded":
        message = f"activeDeadlineSeconds has passed ({job.message})"
        return "deadline", RetryError.exit_code, message
    if any(pod.disrupted for pod in job.pods) or "DisruptionTarget" in job.message:
        return "preempted", Preempted.exit_code, reason or "the cluster removed a pod"
    if codes and specificity_rank(codes[0]) == CRASH_RANK:
        return "failed", RetryError.exit_code, reason or f"exit code {codes[0]}"
    if Preempted.exit_code in codes or job.state == "deleted" or 0 < len(job.pods) < job.nodes:
        return "preempted", Preempted.exit_code, reason or "the Job or one of its pods was deleted"
    if SupersededError.exit_code in codes:
        return "preempted", SupersededError.exit_code, reason or EXIT_CODES[76]
    if job.state == "complete" or (codes and set(codes) == {0}):
        message = "exit code 0, but no verified artifact is published"
        return "failed", RetryError.exit_code, message
    if not exits:
        message = job.message or "the pods are gone and left no record"
        return "preempted", Preempted.exit_code, message
    return "failed", RetryError.exit_code, reason or job.message or f"exit code {codes[0]}"


def _killed_pod(job: Job) -> Pod | None:
    """Return a pod that exceeded its memory or disk. A disrupted pod did not."""
    for pod in job.pods:
        if pod.reason in ("OOMKilled", "Evicted") and not pod.disrupted:
            return pod
    return None


def _kill_reason(pod: Pod) -> str:
    if pod.reason == "OOMKilled":
        return "OOMKilled: out of memory: raise memory in the profile, or lower microBatchSize"
    return f"{pod.reason}: {pod.message}"


def _reported_exits(job: Job, record: Mapping[str, Any] | None) -> Iterator[tuple[int, str]]:
    """Yield each known exit code with its message: from the record, the pods and the Job."""
    if record is not None:
        yield int(record["exit_code"]), str(record.get("reason", ""))
    for pod in job.pods:
        if pod.exit_code is not None:
            yield pod.exit_code, pod.message.strip()
        elif pod.ended and pod.failed_init_container:
            yield 1, pod.message
    # The pod may be gone. Then the Job's message has the code that matched a podFailurePolicy rule.
    matched = re.search(r"failed with exit code (\d+)", job.message)
    if matched:
        yield int(matched[1]), job.message
