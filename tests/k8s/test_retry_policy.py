"""The retry policy: what follows an attempt."""

import pytest

from medjob.config.pipeline import PipelineParams
from medjob.k8s.orchestrator.outcome import Kind, Outcome
from medjob.k8s.orchestrator.retry_policy import GiveUp, Retry, next_action


def outcomes_of(*entries: tuple[Kind, int]) -> list[Outcome]:
    """Return outcomes of these kinds and steps, a minute apart."""
    return [
        Outcome(n + 1, kind, 75, "the reason", reach, f"j{n}", "s", 60.0 * n, 10.0)
        for n, (kind, reach) in enumerate(entries)
    ]


@pytest.mark.parametrize(
    ("before", "ends"),
    [
        ([], False),
        ([("failed", 0)] * 2, False),
        ([("failed", 0)] * 3, True),
        ([("failed", 0), ("failed", 0), ("failed", 5)], False),  # a new step refunds
        ([("failed", 5), ("failed", 0), ("failed", 0)], True),  # an earlier step does not
        ([("failed", 5), ("failed", 0), ("failed", 6), ("failed", 0)], False),
        ([("failed", 5), ("failed", 0), ("failed", 6), ("failed", 0), ("failed", 6)], True),
        ([("failed", 0), ("preempted", 0), ("failed", 0)], False),
        ([("preempted", 0)] * 4, False),
        ([("preempted", 0)] * 5, True),
        ([("preempted", 0)] * 4 + [("preempted", 1)] * 4, False),
        ([("paused", 0)] * 30, False),
        ([("replaced", 0)] * 30, False),
        ([("memory", 0)], False),
        ([("memory", 0), ("memory", 0)], True),
        ([("memory", 0), ("memory", 1)], False),
        ([("memory", 0), ("failed", 0), ("memory", 0)], True),
        ([("final", 0)], True),
        ([("deadline", 0)], True),
        ([("stuck", 0)], True),
    ],
)
def test_retry_policy_ends_the_run_or_retries(before: list[tuple[Kind, int]], ends: bool) -> None:
    action = next_action(outcomes_of(*before), PipelineParams(retries=2, preemptions=4))
    assert isinstance(action, GiveUp) is ends


def test_delay_grows_with_failures_but_not_with_preemptions() -> None:
    pipeline = PipelineParams(retries=20)
    waits = [
        next_action(outcomes_of(*[("failed", 0)] * count), pipeline).at - 60.0 * (count - 1)
        for count in range(1, 10)
    ]
    assert waits == sorted(waits)
    assert (waits[0], waits[-1]) == (10.0, 300.0)
    assert next_action(outcomes_of(("preempted", 0)), pipeline) == Retry(0.0)
