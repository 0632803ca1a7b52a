"""Runs with one kind of fault: how the orchestrator handles it, and how the run ends."""

from pathlib import Path

import pytest

from medjob.errors import ConfigError, DataError, RetryError
from medjob.k8s.orchestrator import main
from medjob.k8s.orchestrator.history import AttemptHistory
from medjob.k8s.orchestrator.outcome import Outcome
from medjob.pipeline.runner import Pipeline
from medjob.stage import get_stage
from tests.fakes.objects import set_condition
from tests.fakes.workload import Fault
from tests.k8s.world import World

pytestmark = pytest.mark.usefixtures("simulated")


def outcomes(world: World, stage: str) -> list[Outcome]:
    """Return the outcomes of a stage's attempts."""
    key = Pipeline(world.run_file, world.store).artifact(get_stage(stage)).key
    return AttemptHistory(world.store, "t").outcomes(stage, key)


def completed(world: World, *faults: Fault, stage: str = "sft") -> list[Outcome]:
    """Run to a successful end with one fault per attempt, and return the outcomes."""
    world.workload.faults[stage] = list(faults)
    assert "are published" in str(world.run())
    assert [fault for _, fault in world.workload.injected] == list(faults), (
        "a fault was not injected"
    )
    assert not world.active()
    assert len(world.digests()) == 3
    return outcomes(world, stage)


def test_run_without_faults_publishes_stage_after_stage(folder: Path) -> None:
    world = World(folder)
    assert completed(world) == []
    assert [stage for stage, _, _ in world.created] == ["fetch", "prepare", "sft"]


@pytest.mark.parametrize(
    ("fault", "kind", "code"),
    [
        (Fault("crash"), "failed", 75),
        (Fault("crash", code=139, recorded=False), "failed", 75),
        (Fault("crash", code=75), "failed", 75),
        (Fault("oom"), "memory", 75),
        (Fault("child_oom"), "memory", 75),
        (Fault("exit0"), "failed", 75),
        (Fault("evict"), "preempted", 143),
        (Fault("vanish"), "preempted", 143),
        (Fault("delete_pod"), "preempted", 143),
        (Fault("delete_job"), "preempted", 143),
        (Fault("dead"), "preempted", 143),
    ],
    ids=lambda value: f"{value.kind}-{value.code}" if isinstance(value, Fault) else "",
)
@pytest.mark.parametrize("nodes", [1, 2])
def test_outcome_is_classified_and_the_next_attempt_succeeds(
    folder: Path, nodes: int, fault: Fault, kind: str, code: int
) -> None:
    if nodes > 1 and fault.code == 75:
        kind, code = (
            "preempted",
            143,
        )  # its peer was stopped, and nothing shows which of the two ended first
    found = completed(World(folder, seed=1, nodes=nodes), fault)
    assert [(outcome.attempt, outcome.kind, outcome.code) for outcome in found] == [(1, kind, code)]


def test_cut_off_node_keeps_its_attempt(folder: Path) -> None:
    world = World(folder)
    assert completed(world, Fault("cut", after=2, seconds=200)) == []
    assert len(world.created) == 3


def test_silent_cut_off_node_is_replaced_and_fenced_off(
    folder: Path,
) -> None:
    world = World(folder)
    world.workload.faults["sft"] = [Fault("cut", after=2, seconds=250)]
    world.workload.frozen_s = 195
    assert "are published" in str(world.run())
    assert [outcome.kind for outcome in outcomes(world, "sft")] == ["preempted"]
    while world.cluster.now < max([0.0, *(at for at, _ in world.workload.rejoin)]) + 100:
        world.tick()
    codes = [code for job, code in world.workload.ends if job == world.workload.injected[0][0]]
    assert codes == [76], "the old container came back and was fenced off"
    assert len(world.digests()) == 3


@pytest.mark.parametrize("code", [64, 65, 66, 67])
@pytest.mark.parametrize("kind", ["crash", "evict"])
def test_final_exit_code_ends_the_run_even_for_an_evicted_pod(
    folder: Path, code: int, kind: str
) -> None:
    world = World(folder)
    world.workload.faults["prepare"] = [Fault(kind, code=code)]
    error = world.run()
    assert getattr(error, "exit_code", 0) == code
    assert [stage for stage, _, _ in world.created] == ["fetch", "prepare"]
    assert not world.active()


def test_failures_without_a_new_step_end_the_run_after_the_retries(folder: Path) -> None:
    world = World(folder, changes={"pipeline": {"retries": 2}})
    world.workload.faults["sft"] = [Fault("crash", after=2)] * 9
    error = world.run()
    assert isinstance(error, RetryError)
    assert "3 failures without a new step" in error.message
    assert len(world.created) == 2 + 3


def test_new_step_refunds_earlier_failures(
    folder: Path,
) -> None:
    world = World(folder, changes={"pipeline": {"retries": 2}})
    early, later = Fault("crash", after=2), Fault("crash", after=4)
    found = completed(world, early, later, early, later, early)
    assert [outcome.reach for outcome in found] == [0, 1, 1, 2, 2]


def test_preemptions_have_a_limit_of_their_own(folder: Path) -> None:
    world = World(folder, changes={"pipeline": {"preemptions": 6}})
    world.workload.faults["fetch"] = [Fault("vanish", after=1)] * 20
    error = world.run()
    assert isinstance(error, RetryError)
    assert "7 preemptions" in error.message


def test_second_oom_kill_at_the_same_step_ends_the_run(folder: Path) -> None:
    world = World(folder)
    world.workload.faults["sft"] = [Fault("oom", after=2)] * 3
    error = world.run()
    assert "OOMKilled" in str(error)
    assert len(world.created) == 2 + 2


def test_image_pull_failure_ends_the_run_and_quotes_the_event(folder: Path) -> None:
    world = World(folder, changes={"pipeline": {"startDeadlineSeconds": 300}})
    world.cluster.pull_s = lambda _: float("inf")
    error = world.run()
    assert isinstance(error, ConfigError)
    assert "Failed to pull image" in error.message
    assert not world.active()


def test_rejected_pods_end_the_run_and_the_error_quotes_the_event(folder: Path) -> None:
    world = World(folder)
    world.cluster.refuses_pods = "violates PodSecurity"
    error = world.run()
    assert isinstance(error, ConfigError)
    assert "violates PodSecurity" in error.message


def test_late_crash_is_not_a_failure_to_start(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a moment the pod of an ended container is still Running."""
    world = World(folder, changes={"pipeline": {"startDeadlineSeconds": 10}})
    world.workload.step_s = 10
    monkeypatch.setattr(main, "POLL_S", 0.5)  # one step falls into that moment
    (outcome,) = completed(world, Fault("crash", after=25))
    assert outcome.kind == "failed", outcome


def test_scheduling_and_image_pull_have_separate_deadlines(folder: Path) -> None:
    world = World(
        folder,
        changes={"pipeline": {"startDeadlineSeconds": 100, "unschedulableDeadlineSeconds": 1000}},
    )
    world.cluster.schedule_s = lambda _: 500.0
    world.cluster.pull_s = lambda _: 60.0
    assert completed(world) == []


def test_unschedulable_pod_ends_the_run_after_its_own_deadline(folder: Path) -> None:
    world = World(
        folder,
        changes={"pipeline": {"startDeadlineSeconds": 100, "unschedulableDeadlineSeconds": 400}},
    )
    world.cluster.schedule_s = lambda _: float("inf")
    error = world.run()
    assert isinstance(error, RetryError)
    assert "400 s: FailedScheduling" in error.message


def test_queue_may_hold_a_job_longer_than_any_deadline(folder: Path) -> None:
    world = World(folder, queue=900, changes={"pipeline": {"startDeadlineSeconds": 60}})
    assert completed(world) == []


def test_stage_over_its_deadline_ends_the_run(folder: Path) -> None:
    world = World(folder, changes={"resources": {"sft": {"activeDeadlineSeconds": 6}}})
    error = world.run()
    assert "activeDeadlineSeconds" in str(error)
    assert len(world.created) == 3


def test_node_lost_after_publication_does_not_delay_the_run(
    folder: Path,
) -> None:
    world = World(folder)
    world.workload.faults["prepare"] = [Fault("dead_after_publishing", after=1, seconds=10**6)]
    assert "are published" in str(world.run())
    assert [fault.kind for _, fault in world.workload.injected] == ["dead_after_publishing"]
    assert not world.active()
    assert outcomes(world, "prepare") == []


def test_deleted_job_counts_and_its_name_is_not_reused(folder: Path) -> None:
    world = World(folder)
    found = completed(world, Fault("delete_job"), Fault("delete_job", after=6))
    assert [outcome.attempt for outcome in found] == [1, 2]
    assert [name.rpartition("-")[2] for stage, _, name in world.created if stage == "sft"] == [
        "a1",
        "a2",
        "a3",
    ]


def test_retry_budgets_survive_the_deletion_of_ended_jobs(folder: Path) -> None:
    world = World(folder, changes={"pipeline": {"retries": 1, "ttlSecondsAfterFinished": 1}})
    world.workload.faults["sft"] = [Fault("crash", after=2)] * 5
    error = world.run()
    assert "2 failures" in str(error)


def test_job_deleted_in_the_foreground_is_classified_after_its_pods_end(folder: Path) -> None:
    world = World(folder)
    world.workload.ignore_sigterm_probability = 0.0

    def delete() -> None:
        job = next(job for job in world.active() if "-sft-" in job["metadata"]["name"])
        job["metadata"]["deletionTimestamp"] = world.cluster.stamp()

    world.workload.on_fault["delete_foreground"] = delete
    world.workload.faults["sft"] = [Fault("delete_foreground", code=65)]
    assert isinstance(world.run(), DataError)
    assert [(outcome.kind, outcome.code) for outcome in outcomes(world, "sft")] == [("final", 65)]


def test_pause_stops_the_attempt_and_resume_continues_from_its_steps(folder: Path) -> None:
    world = World(folder)
    world.planned += [
        (world.cluster.now + 38, lambda: world.pause(True)),
        (world.cluster.now + 300, lambda: world.pause(False)),
    ]
    found = completed(world)
    assert [outcome.kind for outcome in found] == ["paused"]
    assert found[0].reach > 0


def test_data_error_contains_the_message_of_the_stage(folder: Path) -> None:
    world = World(folder)
    world.workload.faults["prepare"] = [Fault("crash", code=65)]
    error = world.run()
    assert isinstance(error, DataError)
    assert "a layer failed" in error.message


def test_damaged_outcome_counts_as_a_failure_and_the_run_continues(folder: Path) -> None:
    world = World(folder)
    world.workload.faults["fetch"] = [Fault("crash", after=2), Fault("crash", after=2)]
    key = Pipeline(world.run_file, world.store).artifact(get_stage("fetch")).key
    name = f"t/orchestrator/fetch/{key[:12]}/a0001.json"
    world.planned.append((world.cluster.now + 12, lambda: world.store.put(name, b"{dam")))
    world.submit()
    world.planned.append((world.cluster.now + 13, world.submit))
    assert "published" in str(world.run())
    assert [(v.attempt, v.kind) for v in outcomes(world, "fetch")] == [(1, "failed"), (2, "failed")]


def test_queued_job_of_a_published_stage_is_deleted(folder: Path) -> None:
    world = World(folder)

    def suspend() -> None:
        job = next(job for job in world.active() if "-prepare-" in job["metadata"]["name"])
        job["spec"]["suspend"] = True
        set_condition(job, "Suspended", "JobSuspended", "")

    world.workload.on_fault["suspend_when_published"] = suspend
    assert completed(world, Fault("suspend_when_published", after=1, code=0), stage="prepare") == []
