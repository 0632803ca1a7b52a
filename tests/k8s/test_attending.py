"""Looking after an attempt: does it start, and is its node still there? And who may look after it: the Lease."""

import random
from collections.abc import Callable
from typing import Any

import pytest

from medjob.config.pipeline import PipelineParams
from medjob.errors import RetryError
from medjob.k8s.observe import Job, view_of
from medjob.k8s.orchestrator.lease import Lease
from medjob.k8s.orchestrator.watchdog import Problem, Watchdog
from tests.fakes.cluster import Cluster
from tests.fakes.cluster_api import ModelApi
from tests.fakes.objects import set_condition


class Bench:
    """A watchdog, one Job of it, and a clock."""

    def __init__(self) -> None:
        self.cluster = Cluster(random.Random(0), start=1_000_000.0)
        self.now = self.cluster.now
        self.beat = b"1"
        pipeline = PipelineParams(start_deadline_seconds=600, unschedulable_deadline_seconds=3600)
        self.dog = Watchdog(ModelApi(self.cluster, lambda *_: None), pipeline, lambda: self.now)
        self.pods: list[dict[str, Any]] = []
        self.job: dict[str, Any] = {
            "metadata": {"name": "j", "creationTimestamp": self.cluster.stamp()},
            "spec": {},
            "status": {"startTime": self.cluster.stamp()},
        }

    def pod(
        self,
        name: str,
        state: dict[str, Any] | None = None,
        scheduled: bool = True,
        ready: bool = True,
    ) -> dict[str, Any]:
        """Add a pod that has just been made."""
        labels = {"batch.kubernetes.io/job-name": "j"}
        made: dict[str, Any] = {
            "metadata": {
                "name": name,
                "labels": labels,
                "creationTimestamp": self.cluster.stamp(self.now),
            }
        }
        made["status"] = {
            "phase": "Pending",
            "containerStatuses": [{"name": "medjob", "state": state or {}}],
        }
        set_condition(
            made,
            "PodScheduled",
            "" if scheduled else "Unschedulable",
            "",
            str(scheduled),
            at=self.cluster.stamp(self.now),
        )
        set_condition(made, "Ready", "", "", str(ready))
        self.pods.append(made)
        return made

    @property
    def seen(self) -> Job:
        """The Job as it is observed."""
        return view_of([self.job], self.pods).jobs[0]

    def after(self, seconds: float) -> Problem | None:
        """What the watchdog says that much later."""
        self.now += seconds
        return self.dog.check(self.seen, lambda: self.beat)


def test_a_pod_that_does_not_start_is_stuck_after_its_deadline_for_the_reason_that_the_event_gives() -> (
    None
):
    bench = Bench()
    bench.pod("p", {"waiting": {"reason": "ImagePullBackOff"}})
    bench.cluster.warn("Pod", "p", "Failed", "Failed to pull image:\n not found")
    assert bench.after(599) is None
    problem = bench.after(2)
    assert problem is not None
    assert (problem.kind, problem.code) == ("stuck", 64)
    assert problem.reason == "not started after 600 s: Failed: Failed to pull image: not found"


def test_without_an_event_the_pod_itself_says_why() -> None:
    bench = Bench()
    bench.pod(
        "p",
        {"waiting": {"reason": "CreateContainerConfigError", "message": 'secret "x" not found'}},
    )
    problem = bench.after(601)
    assert problem is not None
    assert 'secret "x" not found' in problem.reason


def test_an_unschedulable_pod_has_its_own_limit_and_once_it_has_a_node_a_whole_deadline_to_start() -> (
    None
):
    bench = Bench()
    pod = bench.pod("p", scheduled=False)
    assert bench.after(3000) is None
    set_condition(pod, "PodScheduled", "", "", at=bench.cluster.stamp(bench.now))
    assert bench.after(1) is None
    assert bench.after(590) is None
    assert bench.after(20) is not None


def test_one_that_no_node_takes_may_find_one_later_so_it_ends_with_75() -> None:
    bench = Bench()
    bench.pod("p", {"running": {}})
    bench.pod("q", scheduled=False)
    assert bench.after(3599) is None
    problem = bench.after(2)
    assert problem is not None
    assert (problem.kind, problem.code) == ("stuck", 75)


def test_the_time_in_a_queue_does_not_count_not_even_at_the_moment_of_admission() -> None:
    bench = Bench()
    bench.job["spec"]["suspend"] = True
    del bench.job["status"]["startTime"]
    assert bench.after(100_000) is None
    bench.job["spec"]["suspend"] = False
    assert bench.after(1) is None  # the Job controller has not looked yet
    bench.job["status"]["startTime"] = bench.cluster.stamp(bench.now)
    assert bench.after(1) is None
    assert bench.after(601) is not None


def test_a_restarted_watchdog_goes_on_counting_where_the_other_one_was() -> None:
    bench = Bench()
    bench.pod("p", {"waiting": {"reason": "ContainerCreating"}})
    assert bench.after(590) is None
    bench.dog = Watchdog(bench.dog.api, bench.dog.pipeline, bench.dog.clock)
    assert bench.after(20) is not None


def test_a_lost_node_is_told_by_two_silences() -> None:
    bench = Bench()
    bench.pod("p", {"running": {}}, ready=False)
    assert bench.after(0) is None
    assert bench.after(59) is None
    problem = bench.after(2)
    assert problem is not None
    assert (problem.kind, problem.code) == ("preempted", 143)


def test_a_node_that_is_cut_off_and_goes_on_working_is_left_alone() -> None:
    bench = Bench()
    bench.pod("p", {"running": {}}, ready=False)
    for step in range(100):
        bench.beat = str(step).encode()
        assert bench.after(30) is None


def test_a_node_that_is_back_in_time_starts_a_new_count() -> None:
    bench = Bench()
    pod = bench.pod("p", {"running": {}}, ready=False)
    assert bench.after(1) is None
    assert bench.after(50) is None
    set_condition(pod, "Ready", "", "")
    assert bench.after(1) is None
    set_condition(pod, "Ready", "", "", "False")
    assert bench.after(50) is None


@pytest.mark.parametrize("state", [{"running": {}}, {"waiting": {"reason": "ContainerCreating"}}])
def test_a_pod_that_outstays_its_deletion_has_lost_its_node_whether_or_not_it_had_started(
    state: dict[str, Any],
) -> None:
    bench = Bench()
    pod = bench.pod("p", state)
    pod["metadata"]["deletionTimestamp"] = bench.cluster.stamp(bench.now + 630)
    assert bench.after(680) is None
    assert bench.after(20) is None
    problem = bench.after(61)
    assert problem is not None
    assert (problem.kind, problem.code) == ("preempted", 143)


def test_a_silent_stage_on_a_node_that_answers_is_left_alone() -> None:
    bench = Bench()
    bench.pod("p", {"running": {}})
    assert all(bench.after(600) is None for _ in range(20))


def test_a_job_without_pods_is_stuck_for_the_reason_that_its_own_event_gives() -> None:
    bench = Bench()
    bench.cluster.warn("Job", "j", "FailedCreate", "exceeded quota: gpus")
    assert bench.after(599) is None
    problem = bench.after(2)
    assert problem is not None
    assert "exceeded quota" in problem.reason


# ---- the Lease


class Clock:
    """One for all holders; real ones have one each, and only differences are used."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def holders() -> tuple[Clock, Callable[[str], Lease], ModelApi]:
    clock, api = Clock(), ModelApi(Cluster(random.Random(0)), lambda *_: None)
    return clock, lambda name: Lease(api, "r", name, clock), api


Holders = tuple[Clock, Callable[[str], Lease], ModelApi]


def test_one_holds_it_and_the_other_gets_it_only_once_the_first_is_silent(holders: Holders) -> None:
    clock, make, _ = holders
    one, two = make("one"), make("two")
    assert one.acquire()
    for _ in range(60):
        clock.now += 1.5
        assert one.acquire()
        assert not two.acquire()
    taken_at = None
    for _ in range(20):
        clock.now += 1.5
        if two.acquire():
            taken_at = clock.now
            break
        assert not two.held
    assert taken_at is not None
    assert taken_at - 90 > 15, "one may have renewed it moments before"
    assert not one.held
    assert not one.acquire()


def test_two_never_hold_it_at_once_however_long_they_stall(holders: Holders) -> None:
    clock, make, _ = holders
    rng = random.Random(4)
    both = [make("one"), make("two"), make("three")]
    holding = set()
    for _ in range(3000):
        clock.now += rng.choice([0.1, 1.5, 1.5, 6.0])
        rng.choice(both).acquire()
        held = [n for n, lease in enumerate(both) if lease.held]
        assert len(held) <= 1
        holding |= set(held)
        if rng.random() < 0.01:
            clock.now += 40
    assert holding == {0, 1, 2}


def test_a_released_one_is_free_at_once(holders: Holders) -> None:
    _, make, _ = holders
    one, two = make("one"), make("two")
    assert one.acquire()
    assert not two.acquire()
    one.release()
    assert not one.held
    assert two.acquire()


def test_who_has_lost_it_does_not_release_the_next_holders(holders: Holders) -> None:
    clock, make, api = holders
    one, two = make("one"), make("two")
    assert one.acquire()
    assert not two.acquire()
    clock.now += 16
    assert two.acquire()
    one.release()
    found = api.lease("r")
    assert found is not None
    assert found["spec"]["holderIdentity"] == "two"


def test_the_clock_of_another_machine_is_never_believed(holders: Holders) -> None:
    _, make, api = holders
    assert make("one").acquire()
    found = api.lease("r")
    assert found is not None
    found["spec"]["renewTime"] = "1999-01-01T00:00:00.000000Z"
    api.replace_lease(found)
    assert not make("two").acquire()


def test_a_lost_answer_leaves_it_ours_and_in_the_same_term(holders: Holders) -> None:
    clock, _, api = holders
    lost = [True]

    def lose(moment: str, name: str, mutates: bool) -> None:
        if moment == "after" and name == "create_lease" and lost.pop():
            raise RetryError("no answer")

    lease = Lease(ModelApi(api._cluster, lose), "r", "one", clock)
    with pytest.raises(RetryError):
        lease.acquire()
    assert not lease.held
    assert lease.acquire()
    term = lease.term
    clock.now += 6
    assert lease.acquire()
    assert lease.term == term


def test_a_term_is_over_when_another_held_it_in_between(holders: Holders) -> None:
    clock, make, _ = holders
    one, two = make("one"), make("two")
    assert one.acquire()
    assert not two.acquire()
    before = one.term
    clock.now += 16
    assert two.acquire()
    two.release()
    assert one.acquire()
    assert one.term == before + 1
