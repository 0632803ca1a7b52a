"""What follows an attempt: another attempt now, another one later, or the end of the run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from medjob.config.pipeline import PipelineParams
from medjob.errors import RetryError
from medjob.k8s.orchestrator.outcome import Outcome

_LONGEST_DELAY_S = 300.0


@dataclass(frozen=True, slots=True)
class GiveUp:
    """End the run with this exit code."""

    code: int
    reason: str


@dataclass(frozen=True, slots=True)
class Retry:
    """Start another attempt, not before `at` (POSIX seconds)."""

    at: float


def next_action(outcomes: Sequence[Outcome], pipeline: PipelineParams) -> GiveUp | Retry:
    """Decide what follows the outcomes of one stage's attempts, which are in order.

    A new stored step refunds all failures and preemptions before it.
    """
    if not outcomes:
        return Retry(0.0)
    last = outcomes[-1]
    recent = _since_last_progress(outcomes)
    if last.kind in ("final", "deadline", "stuck"):
        return GiveUp(last.code, last.reason)
    if last.kind == "memory" and _count(recent, "memory") > 1:
        return GiveUp(last.code, last.reason)
    failures = _count(recent, "failed", "memory")
    if failures > pipeline.retries:
        text = f"{failures} failures without a new step; the last one: {last.reason}"
        return GiveUp(last.code, text)
    preemptions = _count(recent, "preempted")
    if preemptions > pipeline.preemptions:
        text = f"{preemptions} preemptions without a new step; the last one: {last.reason}"
        return GiveUp(RetryError.exit_code, text)
    if last.kind in ("failed", "memory"):
        return Retry(last.at + min(5.0 * 2**failures, _LONGEST_DELAY_S))
    return Retry(last.at + (5.0 if preemptions > 2 else 0.0))


def _since_last_progress(outcomes: Sequence[Outcome]) -> Sequence[Outcome]:
    """Return the outcomes from the first one that reached the stage's furthest step."""
    furthest = max(outcome.reach for outcome in outcomes)
    first = next(n for n, outcome in enumerate(outcomes) if outcome.reach == furthest)
    return outcomes[first:]


def _count(outcomes: Sequence[Outcome], *kinds: str) -> int:
    return sum(outcome.kind in kinds for outcome in outcomes)
