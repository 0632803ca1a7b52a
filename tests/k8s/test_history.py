"""The attempt history in the store, and what stages store about their progress and end."""

import json
from pathlib import Path

import pytest

from medjob.artifacts.artifact import Artifact, Attempt
from medjob.k8s.orchestrator.history import AttemptHistory, exit_record, stored_progress
from medjob.k8s.orchestrator.outcome import Outcome
from medjob.store.local import LocalStore


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    return Artifact(LocalStore(tmp_path), "t", "sft", "0123456789abcdef")


def test_stored_progress_survives_the_start_of_the_next_attempt(
    artifact: Artifact,
) -> None:
    name = "step-00000100-1"
    Attempt.begin(artifact, "a").point_to(name)
    artifact.store.put(artifact.path("checkpoints", name, "MANIFEST.json"), b"{}")
    artifact.store.put(artifact.path("checkpoints", "step-00000200-1", "part-0.json"), b"torn")
    assert stored_progress(artifact) == 100
    Attempt.begin(artifact, "b")
    assert stored_progress(artifact) == 100


def test_most_specific_record_is_chosen_and_damaged_ones_are_skipped(
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


def test_record_is_found_under_the_shortened_pod_name_of_a_long_job(
    artifact: Artifact,
) -> None:
    name = "r" * 34 + "-candidates-12345678-a10"
    artifact.store.put(
        artifact.path("attempts", "1.json"),
        json.dumps({"exit_code": 64, "host": f"{name}-"[:58] + "abcde"}).encode(),
    )
    assert exit_record(artifact, name) is not None


def test_first_outcome_is_kept_and_unknown_fields_are_ignored(
    tmp_path: Path,
) -> None:
    store = LocalStore(tmp_path)
    first = Outcome(1, "failed", 75, "the reason", 1, "j0", "s", 0.0, 10.0)
    second = Outcome(2, "preempted", 75, "the reason", 2, "j1", "s", 60.0, 10.0)
    newer = json.dumps(first.as_dict() | {"field_of_a_later_version": 1})
    store.put("t/orchestrator/sft/0123456789ab/a0001.json", newer.encode())
    kept = AttemptHistory(store, "t")
    kept.record_outcome(
        "sft", "0123456789abcdef", Outcome(1, "final", 64, "too late", 0, "j", "s", 0.0, 0.0)
    )
    kept.record_outcome("sft", "0123456789abcdef", second)
    assert kept.outcomes("sft", "0123456789abcdef") == [first, second]
    assert AttemptHistory(store, "t").outcomes("sft", "0123456789abcdef") == [first, second]
