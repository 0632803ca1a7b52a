"""Upgrades that change the key of a stage while one of its attempts runs."""

from pathlib import Path

import pytest

from medjob.k8s.observe import view_of
from medjob.k8s.orchestrator.history import AttemptHistory
from medjob.pipeline.runner import Pipeline
from medjob.stage import get_stage
from tests.fakes.objects import stage_job
from tests.fakes.workload import Fault
from tests.k8s.world import OrchestratorProcess, World

pytestmark = pytest.mark.usefixtures("simulated")


def upgraded(folder: Path, on_change: str, *faults: Fault) -> World:
    """Return a run whose learning rate changes while sft runs."""
    pipeline = {"onChange": on_change, "startDeadlineSeconds": 100}
    world = World(folder, changes={"pipeline": pipeline})
    world.workload.faults["sft"] = list(faults)
    changed = world.configured({"pipeline": pipeline, "run": {"sft": {"learning_rate": 0.001}}})

    def submit() -> None:
        assert world.current is not None
        world.current.graceful = True
        world.submit(changed)

    world.planned.append((world.cluster.now + 33, submit))
    return world


def first_of_sft(world: World) -> str:
    """Return the name of the first Job of sft."""
    return next((name for stage, _, name in world.created if stage == "sft"), "none yet")


def kinds(world: World) -> dict[str, list[str]]:
    """Return the kinds of the outcomes of sft, by key."""
    keys = dict.fromkeys(key for stage, key, _ in world.created if stage == "sft")
    return {
        key: [outcome.kind for outcome in AttemptHistory(world.store, "t").outcomes("sft", key)]
        for key in keys
    }


def test_on_change_wait_lets_the_old_attempt_publish_first(
    folder: Path,
) -> None:
    world = upgraded(folder, "wait")
    assert "published" in str(world.run())
    assert list(kinds(world).values()) == [[], []]
    assert len({key for stage, key, _ in world.created if stage == "sft"}) == 2
    old = World(folder)
    assert Pipeline(old.run_file, world.store).artifact(get_stage("sft")).manifest() is not None


def test_on_change_replace_is_recorded_and_keeps_the_checkpoints(
    folder: Path,
) -> None:
    world = upgraded(folder, "replace")
    assert "published" in str(world.run())
    assert list(kinds(world).values()) == [["replaced"], []]
    old = Pipeline(World(folder).run_file, world.store).artifact(get_stage("sft"))
    assert old.manifest() is None
    assert list(world.store.list(old.path("checkpoints", "")))


def test_on_change_wait_does_not_wait_for_a_lost_or_stuck_attempt(
    folder: Path,
) -> None:
    dead = upgraded(folder / "dead", "wait", Fault("dead", after=2, seconds=10**6))
    assert "published" in str(dead.run())
    assert next(iter(kinds(dead).values())) == ["preempted"]
    stuck = upgraded(folder / "stuck", "wait")
    stuck.cluster.pull_s = lambda pod: (
        float("inf") if pod["metadata"]["name"].startswith(first_of_sft(stuck)) else 2.0
    )
    assert "published" in str(stuck.run())
    assert next(iter(kinds(stuck).values())) == ["stuck"]


def test_pause_also_stops_an_attempt_of_an_earlier_configuration(folder: Path) -> None:
    world = upgraded(folder, "wait")
    at = world.cluster.now
    world.planned += [(at + 36, lambda: world.pause(True)), (at + 200, lambda: world.pause(False))]
    assert "published" in str(world.run())
    assert next(iter(kinds(world).values())) == ["paused"]


def test_job_with_the_fallback_key_belongs_to_this_configuration(
    folder: Path,
) -> None:
    """The orchestrator learns the key of `fetch` when its artifact is published.

    Before that, the key depends on files that only the image of the stages has.
    """
    world = World(folder)
    orchestrator = OrchestratorProcess(world, world.run_file, "s0", 0).orchestrator
    fetch = get_stage("fetch")
    fallback = orchestrator._key(fetch, None)
    orchestrator._published["fetch"] = "f" * 64

    def text_for(key: str) -> str:
        job = stage_job("fetch", 1, False, world.run_file)
        job["metadata"]["labels"] |= {"medjob/key": key[:12], "medjob/attempt": "1"}
        result = orchestrator._handle_other_jobs(view_of([job], []), paused=False)
        return result.text if result else ""

    assert "is published" in text_for("f" * 64)
    assert "is published" in text_for(fallback)
    assert "earlier configuration" in text_for("e" * 64)
