"""The watchdog: attempts that do not start, and lost nodes."""

import random
from typing import Any

import pytest

from medjob.config.pipeline import PipelineParams
from medjob.k8s.observe import Job, view_of
from medjob.k8s.orchestrator.watchdog import Problem, Watchdog
from tests.fakes.cluster import Cluster
from tests.fakes.cluster_api import ModelApi
from tests.fakes.objects import set_condition


class WatchedJob:
    """A watchdog, a Job that it checks, and a clock."""

    def __init__(self) -> None:
        self.cluster = Cluster(random.Random(0), start=1_000_000.0)
        self.now = self.cluster.now
        self.heartbeat = b"1"
        pipeline = PipelineParams(start_deadline_seconds=600, unschedulable_deadline_seconds=3600)
        self.watchdog = Watchdog(
            ModelApi(self.cluster, lambda *_: None), pipeline, lambda: self.now
        )
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
        """Add a pod that was just created."""
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
    def observed(self) -> Job:
        """The Job as parsed by medjob.k8s.observe."""
        return view_of([self.job], self.pods).jobs[0]

    def after(self, seconds: float) -> Problem | None:
        """Advance the clock and return the result of the check."""
        self.now += seconds
        return self.watchdog.check(self.observed, lambda: self.heartbeat)


def test_pod_that_does_not_start_is_stuck_and_its_event_is_the_reason() -> None:
    watched = WatchedJob()
    watched.pod("p", {"waiting": {"reason": "ImagePullBackOff"}})
    watched.cluster.warn("Pod", "p", "Failed", "Failed to pull image:\n not found")
    assert watched.after(599) is None
    problem = watched.after(2)
    assert problem is not None
    assert (problem.kind, problem.code) == ("stuck", 64)
    assert problem.reason == "not started after 600 s: Failed: Failed to pull image: not found"


def test_state_of_the_pod_is_the_reason_if_there_is_no_event() -> None:
    watched = WatchedJob()
    watched.pod(
        "p",
        {"waiting": {"reason": "CreateContainerConfigError", "message": 'secret "x" not found'}},
    )
    problem = watched.after(601)
    assert problem is not None
    assert 'secret "x" not found' in problem.reason


def test_start_deadline_begins_when_the_pod_is_scheduled() -> None:
    watched = WatchedJob()
    pod = watched.pod("p", scheduled=False)
    assert watched.after(3000) is None
    set_condition(pod, "PodScheduled", "", "", at=watched.cluster.stamp(watched.now))
    assert watched.after(1) is None
    assert watched.after(590) is None
    assert watched.after(20) is not None


def test_unschedulable_pod_is_stuck_with_code_75() -> None:
    watched = WatchedJob()
    watched.pod("p", {"running": {}})
    watched.pod("q", scheduled=False)
    assert watched.after(3599) is None
    problem = watched.after(2)
    assert problem is not None
    assert (problem.kind, problem.code) == ("stuck", 75)


def test_time_in_a_queue_does_not_count_towards_the_start_deadline() -> None:
    watched = WatchedJob()
    watched.job["spec"]["suspend"] = True
    del watched.job["status"]["startTime"]
    assert watched.after(100_000) is None
    watched.job["spec"]["suspend"] = False
    assert watched.after(1) is None  # the Job controller has not set startTime yet
    watched.job["status"]["startTime"] = watched.cluster.stamp(watched.now)
    assert watched.after(1) is None
    assert watched.after(601) is not None


def test_restarted_watchdog_keeps_the_start_deadline() -> None:
    watched = WatchedJob()
    watched.pod("p", {"waiting": {"reason": "ContainerCreating"}})
    assert watched.after(590) is None
    watched.watchdog = Watchdog(
        watched.watchdog.api, watched.watchdog.pipeline, watched.watchdog.clock
    )
    assert watched.after(20) is not None


def test_node_is_lost_if_both_node_and_stage_are_silent() -> None:
    watched = WatchedJob()
    watched.pod("p", {"running": {}}, ready=False)
    assert watched.after(0) is None
    assert watched.after(59) is None
    problem = watched.after(2)
    assert problem is not None
    assert (problem.kind, problem.code) == ("preempted", 143)


def test_cut_off_node_whose_stage_works_is_no_problem() -> None:
    watched = WatchedJob()
    watched.pod("p", {"running": {}}, ready=False)
    for step in range(100):
        watched.heartbeat = str(step).encode()
        assert watched.after(30) is None


def test_silence_is_counted_anew_after_a_node_returns() -> None:
    watched = WatchedJob()
    pod = watched.pod("p", {"running": {}}, ready=False)
    assert watched.after(1) is None
    assert watched.after(50) is None
    set_condition(pod, "Ready", "", "")
    assert watched.after(1) is None
    set_condition(pod, "Ready", "", "", "False")
    assert watched.after(50) is None


@pytest.mark.parametrize("state", [{"running": {}}, {"waiting": {"reason": "ContainerCreating"}}])
def test_pod_that_outlives_its_grace_period_has_lost_its_node(
    state: dict[str, Any],
) -> None:
    watched = WatchedJob()
    pod = watched.pod("p", state)
    pod["metadata"]["deletionTimestamp"] = watched.cluster.stamp(watched.now + 630)
    assert watched.after(680) is None
    assert watched.after(20) is None
    problem = watched.after(61)
    assert problem is not None
    assert (problem.kind, problem.code) == ("preempted", 143)


def test_silent_stage_on_a_reachable_node_is_no_problem() -> None:
    watched = WatchedJob()
    watched.pod("p", {"running": {}})
    assert all(watched.after(600) is None for _ in range(20))


def test_job_without_pods_is_stuck_and_its_event_is_the_reason() -> None:
    watched = WatchedJob()
    watched.cluster.warn("Job", "j", "FailedCreate", "exceeded quota: gpus")
    assert watched.after(599) is None
    problem = watched.after(2)
    assert problem is not None
    assert "exceeded quota" in problem.reason
