"""How an attempt ended. The rows were measured on a real cluster."""

from typing import Any

import pytest

from medjob.k8s.observe import Job, Pod, view_of
from medjob.k8s.orchestrator.outcome import Kind, classify, outcome_of


def pod(
    code: int | None = None, reason: str = "", message: str = "", disrupted: bool = False
) -> Pod:
    """Return a pod that ended with this code, or that vanished without a code."""
    return Pod(
        name="p",
        stage="sft",
        job="j",
        running=False,
        ended=code is not None,
        exit_code=code,
        reason=reason,
        message=message,
        failed_init_container="",
        disrupted=disrupted,
        reachable=True,
        deleted_at=None,
        scheduled=True,
        since=0.0,
    )


def job(
    *pods: Pod,
    state: str = "failed",
    reason: str = "BackoffLimitExceeded",
    message: str = "",
    nodes: int = 1,
) -> Job:
    """Return the Job of an ended attempt."""
    return Job(
        name="j",
        stage="sft",
        key="k",
        attempt=1,
        submission="s",
        nodes=nodes,
        created_at=0.0,
        began_at=10.0,
        state=state,  # type: ignore[arg-type]
        reason=reason,
        message=message,
        pods=pods,
    )


def record(code: int, reason: str = "the reason") -> dict[str, Any]:
    """Return the record that the attempt stored."""
    return {"exit_code": code, "reason": reason, "host": "j-0"}


RULE = "Container medjob for pod n/p failed with exit code {} matching FailJob rule at index 0"
DISRUPTED = "Pod n/p has condition DisruptionTarget matching FailJob rule at index 1"


@pytest.mark.parametrize(
    ("ended", "stored", "kind", "code"),
    [
        # ---- one node
        (job(pod(1)), record(1), "failed", 75),
        (job(pod(139)), None, "failed", 75),
        (job(pod(137)), None, "failed", 75),
        (job(pod(75)), record(75), "failed", 75),
        (job(pod(64)), None, "final", 64),
        (job(pod(67)), record(67), "final", 67),
        (job(pod(143)), record(143), "preempted", 143),
        (job(pod(76)), record(76), "preempted", 76),
        (job(pod(137, "OOMKilled")), None, "memory", 75),
        # a child process was killed, its parent exited
        (job(pod(75, "OOMKilled")), record(75), "memory", 75),
        (job(pod(137, "Evicted", "emptyDir over its limit")), None, "memory", 75),
        (job(pod(137, "Evicted", "node pressure", disrupted=True)), None, "preempted", 143),
        (job(pod(143), reason="DeadlineExceeded"), record(143), "deadline", 75),
        (job(pod(64), reason="DeadlineExceeded"), record(64), "final", 64),
        (job(pod(137, disrupted=True)), None, "preempted", 143),
        # evicted, but exits 64
        (job(pod(64, disrupted=True)), record(64), "final", 64),
        (job(pod(1, disrupted=True)), record(1), "preempted", 143),
        # evicted, but exits 0
        (job(pod(0, disrupted=True), state="complete"), None, "preempted", 143),
        (job(pod(0), state="complete"), None, "failed", 75),
        # killed after its grace: pod, code and record are gone
        (job(), None, "preempted", 143),
        (job(), record(143), "preempted", 143),
        (job(), record(1), "failed", 75),
        # failed while stopping
        (job(message=DISRUPTED), record(1), "preempted", 143),
        (job(), record(65), "final", 65),
        # the pod is gone, but the matched rule names its code
        (job(message=RULE.format(66)), None, "final", 66),
        (job(message=RULE.format(143)), None, "preempted", 143),
        (job(state="deleted", reason=""), None, "preempted", 143),
        (job(pod(137), state="deleted", reason=""), None, "preempted", 143),
        (job(state="deleted", reason=""), record(64), "final", 64),
        (job(pod(1), state="deleted", reason=""), record(1), "failed", 75),
        # ---- two nodes
        # the peer ended before the evicted pod
        (job(pod(143), pod(137, disrupted=True), nodes=2), record(143), "preempted", 143),
        # the evicted pod is gone
        (job(pod(75), nodes=2), record(75), "preempted", 143),
        (job(pod(75), message=DISRUPTED, nodes=2), record(75), "preempted", 143),
        # one crashed, and its peer was stopped
        (job(pod(1), pod(143), nodes=2), record(1), "failed", 75),
        (job(pod(143), pod(139), nodes=2), record(143), "failed", 75),
        (job(pod(75), pod(1), nodes=2), record(75), "failed", 75),
        (job(pod(75), pod(64), nodes=2), record(75), "final", 64),
        # one ignored SIGTERM
        (job(pod(137), pod(143), nodes=2), record(143), "preempted", 143),
        (job(pod(75), pod(137, "OOMKilled"), nodes=2), record(75), "memory", 75),
        # the store was unavailable for both
        (job(pod(75), pod(75), nodes=2), record(75), "failed", 75),
    ],
)
def test_outcome_of_an_attempt(
    ended: Job, stored: dict[str, Any] | None, kind: Kind, code: int
) -> None:
    outcome = outcome_of(ended, classify(ended, stored), reach=3, now=100.0)
    assert (outcome.kind, outcome.code) == (kind, code)
    assert outcome.reason
    assert (outcome.reach, outcome.seconds) == (3, 90.0)


def test_reason_comes_from_the_node_that_failed_first() -> None:
    ended = job(pod(75, message="a peer has ended"), pod(1, message="CUDA error"), nodes=2)
    _, _, reason = classify(ended, record(75, "a peer has ended"))
    assert reason == "CUDA error"


def test_eviction_is_the_reason_rather_than_the_last_log_lines() -> None:
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
