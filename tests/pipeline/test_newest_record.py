"""How the newest attempt ended: from its record, whatever a launcher's exit code says."""

from pathlib import Path

import pytest

from medjob.artifacts.artifact import Artifact, Attempt
from medjob.pipeline.outcome import newest_record
from medjob.runtime.files import fingerprint
from medjob.store import LocalStore


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    return Artifact(LocalStore(tmp_path / "store"), "run", "sft", fingerprint("outcome"))


def test_newest_attempt_counts(artifact: Artifact) -> None:
    Attempt.begin(artifact, "a").record({"exit_code": 64, "reason": "old"})
    assert newest_record(artifact) == {"exit_code": 64, "reason": "old"}
    second = Attempt.begin(artifact, "b")
    assert newest_record(artifact) is None  # it was killed, or it runs
    second.record({"exit_code": 143, "reason": "new"})
    assert newest_record(artifact) == {"exit_code": 143, "reason": "new"}


def test_most_specific_code_of_several_nodes_counts(artifact: Artifact) -> None:
    leader = Attempt.begin(artifact, "a")
    leader.record({"exit_code": 75, "reason": "lost the connection to node 1"})
    follower = Attempt.join(artifact, leader.epoch, leader.owner, 1)
    follower.record({"exit_code": 65, "reason": "row 3 is wrong"})
    assert newest_record(artifact) == {"exit_code": 65, "reason": "row 3 is wrong"}


def test_damaged_record_is_no_outcome(artifact: Artifact) -> None:
    attempt = Attempt.begin(artifact, "a")
    artifact.store.put(artifact.path("attempts", f"{attempt.epoch}.json"), b"{")
    assert newest_record(artifact) is None
