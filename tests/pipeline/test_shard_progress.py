"""The progress of a stage over all of its shards."""

from pathlib import Path

import pytest

from medjob.artifacts.artifact import Artifact
from medjob.pipeline.shard_progress import (
    ShardProgress,
    describe,
    progress_of,
    shard_list,
    total_progress,
)
from medjob.store.local import LocalStore


def numbers(step: float, total: float, per_s: float = 0.0, **more: float) -> dict[str, float]:
    return {"step": step, "total": total, "per_s": per_s, **more}


def test_rows_and_speeds_are_added_and_the_slowest_shard_sets_the_time() -> None:
    shards = [
        ShardProgress(0, "running", numbers(40, 100, 2.0, tokens_per_second=900)),
        ShardProgress(1, "running", numbers(10, 100, 1.0, tokens_per_second=500)),
    ]
    assert total_progress(shards) == {
        "step": 50,
        "total": 200,
        "per_s": 3.0,
        "tokens_per_second": 1400,
        "eta_s": 90,
    }


def test_shards_that_do_not_run_have_no_speed() -> None:
    shards = [
        ShardProgress(0, "published", numbers(100, 100, 7.0)),
        ShardProgress(1, "running", numbers(50, 100, 1.0)),
        ShardProgress(2, "waiting", numbers(20, 100, 9.0)),  # preempted
    ]
    found = total_progress(shards)
    assert (found["step"], found["total"], found["per_s"]) == (170, 300, 1.0)
    assert found["eta_s"] == 80  # of the preempted shard, at the speed of the running one


def test_requests_to_endpoints_are_those_of_all_shards() -> None:
    shards = [
        ShardProgress(0, "published", numbers(9, 9, endpoint_requests=9, endpoint_cost=0.5)),
        ShardProgress(1, "running", numbers(3, 9, endpoint_requests=4, endpoint_cost=0.25)),
    ]
    found = total_progress(shards)
    assert (found["endpoint_requests"], found["endpoint_cost"]) == (13, 0.75)


def test_a_shard_that_has_not_reported_counts_as_long_as_the_others() -> None:
    shards = [
        ShardProgress(0, "running", numbers(50, 100, 5.0)),
        ShardProgress(1, "waiting"),
    ]
    found = total_progress(shards)
    assert (found["step"], found["total"], found["eta_s"]) == (50, 200, 20)


def test_without_a_report_there_is_no_progress() -> None:
    assert total_progress([ShardProgress(0, "running"), ShardProgress(1, "waiting")]) == {}
    stuck = [ShardProgress(0, "running", numbers(0, 100))]
    assert total_progress(stuck) == {"step": 0, "total": 100, "per_s": 0.0}


@pytest.mark.parametrize("data", [b"{dam", b"[1]", b'{"step": 1}'])
def test_damaged_progress_is_ignored(tmp_path: Path, data: bytes) -> None:
    artifact = Artifact(LocalStore(tmp_path), "r", "candidates", "0" * 64)
    assert progress_of(artifact) == {}
    artifact.store.put(artifact.path("progress.json"), data)
    assert progress_of(artifact) == {}


def test_states_are_listed_as_ranges() -> None:
    shards = [
        *(ShardProgress(index, "published") for index in (0, 4)),
        *(ShardProgress(index, "running") for index in (1, 2, 3)),
        ShardProgress(5, "waiting"),
    ]
    found = describe(shard_list(shards))
    assert found == "6 shards: 2 published (0, 4), 3 running (1-3), 1 waiting (5)"
    assert describe(shard_list(shards[2:5])) == "3 shards: 3 running (1-3)"
