"""A stage with shards on the simulated cluster: each shard is replaced alone."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from medjob.artifacts.shard import unfinished_shards
from medjob.errors import ConfigError, RetryError
from medjob.k8s import observe
from medjob.k8s.orchestrator import status_reporter
from medjob.k8s.orchestrator.history import AttemptHistory
from medjob.k8s.orchestrator.outcome import Outcome
from medjob.pipeline.runner import Pipeline
from medjob.stage import get_stage
from tests.fakes.objects import Object, condition, ended
from tests.fakes.workload import Fault
from tests.k8s.world import World

pytestmark = pytest.mark.usefixtures("simulated")

STAGE = "candidates"


def outcomes(world: World, shard: str) -> list[Outcome]:
    """Return the outcomes of a shard's attempts, or those of `join-of-N`."""
    key = Pipeline(world.run_file, world.store).artifact(get_stage(STAGE)).key
    return AttemptHistory(world.store, "t").outcomes(STAGE, key, shard)


def created(world: World) -> Counter[str]:
    """Count the created Jobs by shard: `s0`, or `join`."""
    names = [name for stage, _, name in world.created if stage == STAGE]
    return Counter(name.split("-")[-2] for name in names)


def completed(world: World, **faults: list[Fault]) -> Counter[str]:
    """Run to a successful end, and count the created Jobs. `s1` are the faults of shard 1."""
    for shard, kinds in faults.items():
        world.workload.faults[f"{STAGE} {shard[1:]}-of-{world.shards}"] = list(kinds)
    assert "are published" in str(world.run())
    injected = [fault for _, fault in world.workload.injected]
    expected = [fault for kinds in faults.values() for fault in kinds]
    assert Counter(injected) == Counter(expected), "a fault was not injected"
    assert not world.active()
    assert len(world.digests()) == 3
    return created(world)


def once_all_run(world: World, act: Callable[[], None]) -> None:
    """Do something some seconds after all shards have begun."""
    done = False
    count = world.shards

    def check(*_: object) -> None:
        nonlocal done
        if not done and len([p for _, p in world.workload.begun if "/shards/" in p]) >= count:
            done = True
            world.planned.append((world.cluster.now + 5, act))

    world.on_call = check


def test_every_shard_has_a_job_and_the_last_one_joins(folder: Path) -> None:
    world = World(folder, shards=3)
    assert completed(world) == {"s0": 1, "s1": 1, "s2": 1}
    artifact = Pipeline(world.run_file, world.store).artifact(get_stage(STAGE))
    assert not unfinished_shards(artifact, 3)
    jobs = [job for job in world.cluster.jobs.values() if f"-{STAGE}-" in job["metadata"]["name"]]
    assert len(jobs) == 3
    for job in jobs:
        label = job["metadata"]["labels"][observe.SHARD]
        template = job["spec"]["template"]
        assert template["metadata"]["labels"][observe.SHARD] == label
        variable = {"name": "MEDJOB_SHARD", "value": label[0]}
        assert template["spec"]["containers"][0]["env"] == [variable]
        assert job["spec"]["completions"] == 1


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        (Fault("crash"), "failed"),
        (Fault("oom"), "memory"),
        (Fault("exit0"), "failed"),
        (Fault("evict"), "preempted"),
        (Fault("vanish"), "preempted"),
        (Fault("delete_pod"), "preempted"),
        (Fault("delete_job"), "preempted"),
        (Fault("dead"), "preempted"),
        (Fault("crash", code=76), "preempted"),
    ],
    ids=lambda value: f"{value.kind}-{value.code}" if isinstance(value, Fault) else "",
)
def test_only_the_disturbed_shard_is_redone(folder: Path, fault: Fault, kind: str) -> None:
    world = World(folder, seed=1, shards=3)
    assert completed(world, s1=[fault]) == {"s0": 1, "s1": 2, "s2": 1}
    assert [outcome.kind for outcome in outcomes(world, "1-of-3")] == [kind]
    assert not outcomes(world, "0-of-3")
    assert not outcomes(world, "2-of-3")


def test_other_shards_run_on_while_a_lost_node_is_waited_for(folder: Path) -> None:
    """The lost shard is replaced minutes later. By then the others are published."""
    world = World(folder, shards=3)
    ended: dict[str, float] = {}

    def watch(*_: object) -> None:
        for name, job in world.cluster.jobs.items():
            if "completionTime" in job.get("status", {}):
                ended.setdefault(name.split("-")[-2], world.time())

    world.on_call = watch
    completed(world, s2=[Fault("dead")])
    assert max(ended["s0"], ended["s1"]) + 60 < ended["s2"]


def test_a_cut_off_shard_that_works_is_left_alone(folder: Path) -> None:
    world = World(folder, shards=2)
    assert completed(world, s0=[Fault("cut", after=2, seconds=200)]) == {"s0": 1, "s1": 1}


def test_a_final_exit_code_of_one_shard_ends_the_run_and_the_other_shards(folder: Path) -> None:
    world = World(folder, shards=3)
    world.workload.step_s = 30  # the others would take longer
    world.workload.faults[f"{STAGE} 1-of-3"] = [Fault("crash", code=64)]
    error = world.run()
    assert isinstance(error, ConfigError)
    assert "candidates 1-of-3: " in error.message
    assert not world.active()
    assert created(world) == {"s0": 1, "s1": 1, "s2": 1}
    stopped = [outcomes(world, shard)[0] for shard in ("0-of-3", "2-of-3")]
    assert [outcome.kind for outcome in stopped] == ["replaced", "replaced"]
    assert "a layer failed" in stopped[0].reason


def test_each_shard_has_its_own_retries(folder: Path) -> None:
    """Two failures of each of two shards are less than three of one."""
    world = World(folder, shards=2, changes={"pipeline": {"retries": 2}})
    crashes = [Fault("crash", after=2)] * 2
    assert completed(world, s0=crashes, s1=crashes) == {"s0": 3, "s1": 3}


def test_failures_of_one_shard_end_the_run_after_the_retries(folder: Path) -> None:
    world = World(folder, shards=2, changes={"pipeline": {"retries": 1}})
    world.workload.faults[f"{STAGE} 0-of-2"] = [Fault("crash", after=2)] * 9
    error = world.run()
    assert isinstance(error, RetryError)
    assert "2 failures without a new step" in error.message


@pytest.mark.parametrize("kind", ["evict", "delete_job", "dead"])
def test_shards_are_joined_again_if_the_pod_that_joins_them_is_lost(
    folder: Path, kind: str
) -> None:
    world = World(folder, shards=2)
    lost = False

    def lose_the_joining_pod(*_: object) -> None:
        nonlocal lost
        whole = [pod for pod, prefix in world.workload.begun if "/shards/" not in prefix]
        joining = [pod for pod in whole if f"-{STAGE}-" in pod]
        if joining and not lost:
            lost = True
            (name,) = joining
            world.workload.ignore_sigterm_probability = 0.0
            if kind == "dead":
                world.cluster.change_node(name, "dead")
            elif kind == "evict":
                world.cluster.delete_pod(world.cluster.pods[name], "EvictionByEvictionAPI")
            else:
                owner = world.cluster.pods[name]["metadata"]["ownerReferences"][0]["name"]
                world.cluster.jobs.pop(owner, None)

    world.on_call = lose_the_joining_pod
    assert "are published" in str(world.run())
    assert lost
    assert created(world) == {"s0": 1, "s1": 1, "join": 1}


def test_pause_stops_all_shards_and_resume_continues_them(folder: Path) -> None:
    world = World(folder, shards=3)
    world.workload.ignore_sigterm_probability = 0.0
    world.planned += [
        (world.cluster.now + 38, lambda: world.pause(True)),
        (world.cluster.now + 300, lambda: world.pause(False)),
    ]
    assert completed(world) == {"s0": 2, "s1": 2, "s2": 2}
    kinds = [outcomes(world, f"{index}-of-3")[0].kind for index in range(3)]
    assert kinds == ["paused"] * 3


@pytest.mark.parametrize("on_change", ["wait", "replace"])
def test_a_changed_number_of_shards_replaces_the_running_ones(folder: Path, on_change: str) -> None:
    world = World(folder, shards=2)
    world.workload.step_s = 20

    def submit() -> None:
        world.shards = 5
        world.submit(world.configured({"pipeline": {"onChange": on_change}}))

    once_all_run(world, submit)
    assert "are published" in str(world.run())
    assert created(world) == {"s0": 2, "s1": 2, "s2": 1, "s3": 1, "s4": 1}
    for shard in ("0-of-2", "1-of-2"):
        (outcome,) = outcomes(world, shard)
        assert (outcome.kind, outcome.reason) == ("replaced", "the stage now has 5 shard(s)")


def test_changed_key_replaces_all_shards(folder: Path) -> None:
    world = World(folder, shards=2)
    world.workload.step_s = 20
    changes = {"pipeline": {"onChange": "replace"}, "run": {"candidates": {"temperature": 0.9}}}
    once_all_run(world, lambda: world.submit(world.configured(changes)))
    assert "are published" in str(world.run())
    keys = {key for stage, key, _ in world.created if stage == STAGE}
    assert len(keys) == 2
    assert len(world.digests()) == 3


def test_a_shard_may_wait_for_a_node_as_long_as_the_others_run(folder: Path) -> None:
    """One node is enough for all shards, one after another."""
    changes = {"pipeline": {"unschedulableDeadlineSeconds": 30}}
    world = World(folder, shards=3, changes=changes)
    world.workload.step_s = 15

    def schedule_s(pod: Object) -> float:
        return float("inf") if is_taken(world, pod) else 1.0

    world.cluster.schedule_s = schedule_s
    assert completed(world) == {"s0": 1, "s1": 1, "s2": 1}


def is_taken(world: World, pod: Object) -> bool:
    """Whether another pod has the only node."""
    return any(
        condition(other, "PodScheduled") and not ended(other)
        for name, other in world.cluster.pods.items()
        if name != pod["metadata"]["name"]
    )


def test_a_join_may_take_minutes(folder: Path) -> None:
    """The pods of published shards are ended after a minute, but not the one that joins them."""
    world = World(folder, shards=2)
    world.workload.step_s = 100
    assert completed(world) == {"s0": 1, "s1": 1}


def test_a_queue_may_admit_shards_one_by_one(folder: Path) -> None:
    world = World(folder, seed=3, shards=3, queue=900)
    assert completed(world) == {"s0": 1, "s1": 1, "s2": 1}


def test_status_shows_the_progress_of_all_shards(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(status_reporter, "STATUS_S", 1.0)
    world = World(folder, shards=3)
    world.workload.step_s = 10
    rows: list[Object] = []

    def watch(process: object, moment: str, name: str, mutates: bool) -> None:
        if name == "patch_job" and moment == "after":
            shown = status_reporter.shown_status(world.cluster.jobs["r-orchestrator"])
            rows.extend(row for row in shown["stages"] if row["stage"] == STAGE)

    world.on_call = watch
    completed(world, s1=[Fault("crash", after=12)])
    running = [row for row in rows if row.get("progress", {}).get("step")]
    assert {row["progress"]["total"] for row in running} == {9}
    assert sorted(row["progress"]["step"] for row in running) == [
        row["progress"]["step"] for row in running
    ]
    assert any(len(row["shards"]["running"]) == 3 for row in rows if "shards" in row)
    assert any(row["shards"]["waiting"] == [1] for row in rows if "shards" in row)
    assert rows[-1]["state"] == "published"
    assert rows[-1]["tries"] == 4
