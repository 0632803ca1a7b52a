"""What ended an attempt, and what is to be done about it.

A Job's own reason is not enough: a peer that saves and exits before the evicted pod is gone makes a preemption look like a
crash, and an evicted pod takes its code along. So the attempt's record in the store comes first, then what the pods say.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from medjob.config.pipeline import PipelineParams
from medjob.errors import (
    EXIT_CODES,
    ConfigError,
    DataError,
    GateError,
    InputError,
    Preempted,
    RetryError,
    SupersededError,
)
from medjob.k8s.observe import Job

Kind = Literal["final", "memory", "deadline", "stuck", "preempted", "failed", "paused", "replaced"]
_FINAL = (ConfigError.exit_code, DataError.exit_code, InputError.exit_code, GateError.exit_code)
_LONGEST_PAUSE_S = 300.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one attempt ended: kept in the store, so that no clean-up of Jobs resets a budget."""

    attempt: int
    kind: Kind
    code: int
    """The exit code that the run would end with, were this the end; one of the table of errors.py."""
    reason: str
    reach: int
    """How far the stage had got: newest stored step, or number of finished batches."""
    job: str
    submission: str
    at: float
    seconds: float
    """From when it was allowed to make pods to its end as far as it was seen; waiting in a queue costs nothing."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def classify(job: Job, record: Mapping[str, Any] | None, reach: int, now: float) -> Outcome:
    """The verdict on a Job that has ended without publishing. `record` is what the stage itself has stored of its end."""
    kind, code, reason = _cause(job, record)
    return Outcome(
        job.attempt,
        kind,
        code,
        reason,
        reach,
        job.name,
        job.submission,
        now,
        now - (job.began_at or now),
    )


def _cause(job: Job, record: Mapping[str, Any] | None) -> tuple[Kind, int, str]:
    told = sorted(_told(job, record), key=lambda each: specificity_rank(each[0]))
    codes, reason = [code for code, _ in told], told[0][1] if told else ""
    if codes and codes[0] in _FINAL:
        return "final", codes[0], reason or EXIT_CODES[codes[0]]
    killed = next(
        (pod for pod in job.pods if pod.reason in ("OOMKilled", "Evicted") and not pod.disrupted),
        None,
    )
    if killed is not None:
        what = (
            "out of memory: raise memory in the profile, or lower microBatchSize"
            if killed.reason == "OOMKilled"
            else killed.message
        )
        return "memory", RetryError.exit_code, f"{killed.reason}: {what}"
    if job.reason == "DeadlineExceeded":
        return "deadline", RetryError.exit_code, f"activeDeadlineSeconds are over ({job.message})"
    if any(pod.disrupted for pod in job.pods) or "DisruptionTarget" in job.message:
        return "preempted", Preempted.exit_code, reason or "the cluster took a pod away"
    if codes and specificity_rank(codes[0]) == _CRASH:
        return "failed", RetryError.exit_code, reason or f"exit code {codes[0]}"
    if Preempted.exit_code in codes or job.state == "deleted" or 0 < len(job.pods) < job.nodes:
        return "preempted", Preempted.exit_code, reason or "its Job or a pod of it was taken away"
    if SupersededError.exit_code in codes:
        return "preempted", SupersededError.exit_code, reason or EXIT_CODES[76]
    if job.state == "complete":
        return (
            "failed",
            RetryError.exit_code,
            "the Job is Complete, and nothing verified is published",
        )
    if not told:
        return (
            "preempted",
            Preempted.exit_code,
            job.message or "its pods are gone, and left no record",
        )
    return "failed", RetryError.exit_code, reason or job.message or f"exit code {codes[0]}"


def _told(job: Job, record: Mapping[str, Any] | None) -> Iterator[tuple[int, str]]:
    """Exit codes, and what was said with them, by all who know of one."""
    if record is not None:
        yield int(record["exit_code"]), str(record.get("reason", ""))
    for pod in job.pods:
        if pod.exit_code is not None:
            yield pod.exit_code, pod.message.strip()
    named = re.search(
        r"failed with exit code (\d+)", job.message
    )  # by the rule that matched, when the pod itself is gone
    if named:
        yield int(named[1]), job.message


_CRASH = 1


def specificity_rank(code: int) -> int:
    """How much an exit code tells of what went wrong, when several nodes have one each: 0 the most.

    A peer that misses another exits 75, one that is told to stop 143, and one that hears neither 137 when its grace is over.
    """
    if code in _FINAL:
        return 0
    return {
        Preempted.exit_code: 2,
        RetryError.exit_code: 3,
        SupersededError.exit_code: 3,
        137: 4,
        0: 5,
    }.get(code, _CRASH)


@dataclass(frozen=True, slots=True)
class GiveUp:
    """The run ends here."""

    code: int
    reason: str


@dataclass(frozen=True, slots=True)
class Retry:
    """One more attempt, `at` this time (POSIX seconds) or later."""

    at: float


def next_action(history: Sequence[Outcome], pipeline: PipelineParams) -> GiveUp | Retry:
    """What follows after `history`, the verdicts on one stage's attempts in order. A step further refunds what went before."""
    if not history:
        return Retry(0.0)
    last = history[-1]
    furthest = max(outcome.reach for outcome in history)
    since = history[next(n for n, outcome in enumerate(history) if outcome.reach == furthest) :]
    if last.kind in ("final", "deadline", "stuck"):
        return GiveUp(last.code, last.reason)
    if last.kind == "memory" and sum(outcome.kind == "memory" for outcome in since) > 1:
        return GiveUp(last.code, last.reason)
    failures = sum(outcome.kind in ("failed", "memory") for outcome in since)
    if failures > pipeline.retries:
        return GiveUp(
            last.code, f"{failures} failures without a step further, the last: {last.reason}"
        )
    preemptions = sum(outcome.kind == "preempted" for outcome in since)
    if preemptions > pipeline.preemptions:
        return GiveUp(
            RetryError.exit_code,
            f"{preemptions} preemptions without a step further, the last: {last.reason}",
        )
    if last.kind in ("failed", "memory"):
        return Retry(last.at + min(5.0 * 2**failures, _LONGEST_PAUSE_S))
    return Retry(last.at + (5.0 if preemptions > 2 else 0.0))
