"""What ended an attempt, and what follows: the rows of what was measured on a real cluster."""

import json
from pathlib import Path
from typing import Any

import pytest

from medjob.artifacts.artifact import Artifact, Attempt
from medjob.config.pipeline import PipelineParams
from medjob.k8s.observe import Job, Pod, view_of
from medjob.k8s.orchestrator.history import AttemptHistory, exit_record, stored_progress
from medjob.k8s.orchestrator.outcome import Kind, Outcome, classify, outcome_of
from medjob.k8s.orchestrator.retry_policy import GiveUp, Retry, next_action
from medjob.store.local import LocalStore


def pod(
    code: int | None = None, reason: str = "", message: str = "", disrupted: bool = False
) -> Pod:
    """One that has ended, or vanished before it could say how."""
    return Pod(
        "p",
        "sft",
        "j",
        False,
        code is not None,
        code,
        reason,
        message,
        disrupted,
        True,
        None,
        True,
        0.0,
    )


def job(
    *pods: Pod,
    state: str = "failed",
    reason: str = "BackoffLimitExceeded",
    message: str = "",
    nodes: int = 1,
) -> Job:
    """An ended attempt."""
    return Job("j", "sft", "k", 1, "s", nodes, 0.0, 10.0, state, reason, message, pods)  # type: ignore[arg-type]


def record(code: int, reason: str = "said so") -> dict[str, Any]:
    """What the attempt stored."""
    return {"exit_code": code, "reason": reason, "host": "j-0"}


RULE = "Container medjob for pod n/p failed with exit code {} matching FailJob rule at index 0"
TAKEN = "Pod n/p has condition DisruptionTarget matching FailJob rule at index 1"


@pytest.mark.parametrize(
    ("ended", "stored", "kind", "code"),
    [
        # one node
        (job(pod(1)), record(1), "failed", 75),
        (job(pod(139)), None, "failed", 75),
        (job(pod(137)), None, "failed", 75),
        (job(pod(75)), record(75), "failed", 75),
        (job(pod(64)), None, "final", 64),
        (job(pod(67)), record(67), "final", 67),
        (job(pod(143)), record(143), "preempted", 143),
        (job(pod(76)), record(76), "preempted", 76),
        (job(pod(137, "OOMKilled")), None, "memory", 75),
        (
            job(pod(75, "OOMKilled")),
            record(75),
            "memory",
            75,
        ),  # of a child, under a parent that lives
        (job(pod(137, "Evicted", "emptyDir over its limit")), None, "memory", 75),
        (job(pod(137, "Evicted", "node pressure", disrupted=True)), None, "preempted", 143),
        (job(pod(143), reason="DeadlineExceeded"), record(143), "deadline", 75),
        (job(pod(64), reason="DeadlineExceeded"), record(64), "final", 64),
        (job(pod(137, disrupted=True)), None, "preempted", 143),
        (job(pod(64, disrupted=True)), record(64), "final", 64),  # evicted, and exits 64
        (job(pod(1, disrupted=True)), record(1), "preempted", 143),
        (
            job(pod(0, disrupted=True), state="complete"),
            None,
            "preempted",
            143,
        ),  # exits 0 although evicted
        (job(pod(0), state="complete"), None, "failed", 75),
        (job(), None, "preempted", 143),  # evicted past its grace: object, code and record are gone
        (job(), record(143), "preempted", 143),
        (job(), record(1), "failed", 75),
        (job(message=TAKEN), record(1), "preempted", 143),  # it broke while it was told to stop
        (job(), record(65), "final", 65),
        (
            job(message=RULE.format(66)),
            None,
            "final",
            66,
        ),  # the pod is gone, the rule that matched names its code
        (job(message=RULE.format(143)), None, "preempted", 143),
        (job(state="deleted", reason=""), None, "preempted", 143),
        (job(pod(137), state="deleted", reason=""), None, "preempted", 143),
        (job(state="deleted", reason=""), record(64), "final", 64),
        (job(pod(1), state="deleted", reason=""), record(1), "failed", 75),
        # two nodes
        (
            job(pod(143), pod(137, disrupted=True), nodes=2),
            record(143),
            "preempted",
            143,
        ),  # the peer was faster than the evicted one
        (job(pod(75), nodes=2), record(75), "preempted", 143),  # the evicted one is gone
        (job(pod(75), message=TAKEN, nodes=2), record(75), "preempted", 143),
        (
            job(pod(1), pod(143), nodes=2),
            record(1),
            "failed",
            75,
        ),  # one crashed, the other was told to stop
        (job(pod(143), pod(139), nodes=2), record(143), "failed", 75),
        (job(pod(75), pod(1), nodes=2), record(75), "failed", 75),
        (job(pod(75), pod(64), nodes=2), record(75), "final", 64),
        (
            job(pod(137), pod(143), nodes=2),
            record(143),
            "preempted",
            143,
        ),  # one did not hear SIGTERM
        (job(pod(75), pod(137, "OOMKilled"), nodes=2), record(75), "memory", 75),
        (job(pod(75), pod(75), nodes=2), record(75), "failed", 75),  # the store was away for both
    ],
)
def test_what_ended_an_attempt(
    ended: Job, stored: dict[str, Any] | None, kind: Kind, code: int
) -> None:
    outcome = outcome_of(ended, classify(ended, stored), reach=3, now=100.0)
    assert (outcome.kind, outcome.code) == (kind, code)
    assert outcome.reason
    assert (outcome.reach, outcome.seconds) == (3, 90.0)


def test_the_reason_is_the_words_of_the_node_that_failed_first_not_of_its_peer() -> None:
    ended = job(pod(75, message="a peer is gone"), pod(1, message="CUDA error"), nodes=2)
    _, _, reason = classify(ended, record(75, "a peer is gone"))
    assert reason == "CUDA error"


def test_an_evicted_pod_is_explained_by_its_eviction_not_by_its_last_log_lines() -> None:
    terminated = {"exitCode": 137, "reason": "Error", "message": "last lines of a log"}
    raw = {
        "metadata": {
            "name": "j-x",
            "labels": {"batch.kubernetes.io/job-name": "j"},
            "creationTimestamp": "2027-01-01T00:00:00Z",
        },
        "status": {
            "phase": "Failed",
            "reason": "Evicted",
            "message": "Usage of EmptyDir volume exceeds the limit",
            "containerStatuses": [{"name": "medjob", "state": {"terminated": terminated}}],
        },
    }
    seen = view_of(
        [
            {
                "metadata": {"name": "j"},
                "status": {"conditions": [{"type": "Failed", "status": "True"}]},
            }
        ],
        [raw],
    )
    _, _, reason = classify(seen.jobs[0], None)
    assert "EmptyDir" in reason


def history(*entries: tuple[Kind, int]) -> list[Outcome]:
    """Verdicts by kind and reach, a minute apart."""
    return [
        Outcome(n + 1, kind, 75, "why", reach, f"j{n}", "s", 60.0 * n, 10.0)
        for n, (kind, reach) in enumerate(entries)
    ]


@pytest.mark.parametrize(
    ("before", "ends"),
    [
        ([], False),
        ([("failed", 0)] * 2, False),
        ([("failed", 0)] * 3, True),
        ([("failed", 0), ("failed", 0), ("failed", 5)], False),  # a step further refunds
        ([("failed", 5), ("failed", 0), ("failed", 0)], True),  # a step back does not
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
def test_what_follows(before: list[tuple[Kind, int]], ends: bool) -> None:
    found = next_action(history(*before), PipelineParams(retries=2, preemptions=4))
    assert isinstance(found, GiveUp) is ends


def test_failures_wait_longer_each_time_and_preemptions_do_not() -> None:
    pipeline = PipelineParams(retries=20)
    waits = [
        next_action(history(*[("failed", 0)] * count), pipeline).at - 60.0 * (count - 1)
        for count in range(1, 10)
    ]  # type: ignore[union-attr]
    assert waits == sorted(waits)
    assert (waits[0], waits[-1]) == (10.0, 300.0)
    assert next_action(history(("preempted", 0)), pipeline) == Retry(0.0)


# ---- what is kept of it in the store


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    return Artifact(LocalStore(tmp_path), "t", "sft", "0123456789abcdef")


def test_how_far_a_stage_got_is_not_forgotten_when_the_next_attempt_begins(
    artifact: Artifact,
) -> None:
    name = "step-00000100-1"
    Attempt.begin(artifact, "a").point_to(name)
    artifact.store.put(artifact.path("checkpoints", name, "MANIFEST.json"), b"{}")
    artifact.store.put(artifact.path("checkpoints", "step-00000200-1", "part-0.json"), b"torn")
    assert stored_progress(artifact) == 100
    Attempt.begin(artifact, "b")
    assert stored_progress(artifact) == 100


def test_of_several_nodes_records_the_one_that_tells_most_is_taken_and_damaged_ones_are_passed_over(
    artifact: Artifact,
) -> None:
    records = {
        "1": (64, "other-a1-x"),
        "2": (75, "job-a1-0"),
        "2-node1": (1, "job-a1-1"),
        "3": (66, "job-a10-0"),
    }
    for name, (code, host) in records.items():
        artifact.store.put(
            artifact.path("attempts", f"{name}.json"),
            json.dumps({"exit_code": code, "host": host}).encode(),
        )
    artifact.store.put(artifact.path("attempts", "4.json"), b'{"exit_code": 64, "host": "job-a1')
    artifact.store.put(artifact.path("attempts", "5.json"), b"[1]")
    found = exit_record(artifact, "job-a1")
    assert found is not None
    assert found["exit_code"] == 1


def test_a_record_is_found_under_the_shortened_name_that_pods_of_a_long_job_get(
    artifact: Artifact,
) -> None:
    name = "r" * 34 + "-candidates-12345678-a10"
    artifact.store.put(
        artifact.path("attempts", "1.json"),
        json.dumps({"exit_code": 64, "host": f"{name}-"[:58] + "abcde"}).encode(),
    )
    assert exit_record(artifact, name) is not None


def test_the_first_verdict_stands_and_another_versions_fields_do_not_damage_it(
    tmp_path: Path,
) -> None:
    store = LocalStore(tmp_path)
    first, second = history(("failed", 1), ("preempted", 2))
    newer = json.dumps(first.as_dict() | {"field_of_a_later_version": 1})
    store.put("t/orchestrator/sft/0123456789ab/a0001.json", newer.encode())
    kept = AttemptHistory(store, "t")
    kept.record_outcome(
        "sft", "0123456789abcdef", Outcome(1, "final", 64, "too late", 0, "j", "s", 0.0, 0.0)
    )
    kept.record_outcome("sft", "0123456789abcdef", second)
    assert kept.outcomes("sft", "0123456789abcdef") == [first, second]
    assert AttemptHistory(store, "t").outcomes("sft", "0123456789abcdef") == [first, second]
