"""Pods with containers beside medjob's: the end of the container `medjob` decides, not the pod's."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from medjob.errors import ConfigError, MedjobError
from medjob.k8s import observe, report
from medjob.k8s.client import status
from medjob.k8s.client.release import Installed
from medjob.k8s.orchestrator import status_reporter
from medjob.k8s.orchestrator.outcome import classify
from tests.fakes.cluster import Cluster, Node
from tests.fakes.cluster_api import ModelApi
from tests.fakes.objects import Object, ended
from tests.fakes.workload import Fault
from tests.k8s.test_one_fault import completed
from tests.k8s.world import World

MINUTES = 60.0


def stage_pods(world: World) -> list[str]:
    return [name for name, pod in world.cluster.pods.items() if not ended(pod)]


@pytest.mark.usefixtures("simulated")
@pytest.mark.parametrize("code", [64, 65, 66, 67])
@pytest.mark.parametrize("nodes", [1, 2])
def test_final_code_ends_the_run_although_a_sidecar_lives(
    folder: Path, code: int, nodes: int
) -> None:
    world = World(folder, nodes=nodes, sidecar=True)
    started = world.cluster.now
    world.workload.faults["sft"] = [Fault("crash", code=code, index=nodes - 1)]
    error = world.run()
    assert isinstance(error, MedjobError)
    assert error.exit_code == code
    assert world.cluster.now - started < 10 * MINUTES
    assert not world.active()  # the GPUs are free
    for _ in range(60):
        world.cluster.tick()
    assert not stage_pods(world)


@pytest.mark.usefixtures("simulated")
@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        (Fault("crash"), "failed"),
        (Fault("crash", code=75), "failed"),
        (Fault("exit0"), "failed"),
        (Fault("crash", code=143), "preempted"),
        (Fault("oom"), "memory"),
        (Fault("evict"), "preempted"),
        (Fault("dead"), "preempted"),
    ],
    ids=lambda value: f"{value.kind}-{value.code}" if isinstance(value, Fault) else "",
)
@pytest.mark.parametrize("nodes", [1, 2])
def test_attempt_with_a_sidecar_is_retried(
    folder: Path, fault: Fault, kind: str, nodes: int
) -> None:
    world = World(folder, nodes=nodes, sidecar=True)
    found = completed(world, fault)
    assert kind in [outcome.kind for outcome in found]


@pytest.mark.usefixtures("simulated")
def test_successful_stages_with_a_sidecar_do_not_hold_their_nodes(folder: Path) -> None:
    world = World(folder, sidecar=True)
    started = world.cluster.now
    assert completed(world) == []
    assert world.cluster.now - started < 10 * MINUTES


@pytest.mark.usefixtures("simulated")
def test_orphaned_pod_with_a_sidecar_does_not_stop_the_run(folder: Path) -> None:
    """As after `kubectl delete job --cascade=orphan`."""
    world = World(folder, sidecar=True)
    orphan: Object = {
        "metadata": {
            "name": "r-sft-old",
            "labels": {"medjob/release": "r", "medjob/component": "sft"},
            "ownerReferences": [{"uid": "uid-2"}],  # the ConfigMap, so that it is not collected
        },
        "spec": {},
    }
    world.cluster.added(world.cluster.pods, orphan)["status"] = {
        "phase": "Running",
        "containerStatuses": [
            {"name": "medjob", "state": {"terminated": {"exitCode": 0}}},
            {"name": "proxy", "state": {"running": {}}},
        ],
    }
    world.cluster.nodes["r-sft-old"] = Node()
    world.cluster.containers["r-sft-old"] = Ended()
    world.check = lambda: None  # type: ignore[method-assign]
    assert "are published" in str(world.run())


class Ended:
    """A container that has ended, beside a sidecar."""

    exit_code: int | None = 0
    reason = message = ""

    def tick(self) -> None: ...
    def terminate(self) -> None: ...


# ---- one pod


def pod(*statuses: Object, ready: tuple[str, str] = ("True", ""), **more: Any) -> Object:
    """A running pod with the states of its containers."""
    conditions = [{"type": "Ready", "status": ready[0], "reason": ready[1]}]
    status_of_pod = {"phase": "Running", "conditions": conditions, "containerStatuses": statuses}
    meta = {"name": "r-sft-1", "labels": {"medjob/release": "r", "medjob/component": "sft"}}
    return {"metadata": meta, "status": status_of_pod | more}


RUNNING: Object = {"running": {"startedAt": "2026-01-01T00:00:00Z"}}
MEDJOB: Object = {"name": "medjob", "state": RUNNING}
PROXY: Object = {"name": "proxy", "state": RUNNING}


@pytest.mark.parametrize(
    ("ready", "reachable"),
    [
        (("True", ""), True),
        (("False", "ContainersNotReady"), True),  # the kubelet says so, and the node lives
        (("False", "ReadinessGatesNotReady"), True),
        (("False", ""), False),
        (("False", "NodeNotReady"), False),
    ],
)
def test_sidecar_that_is_not_ready_is_no_lost_node(ready: tuple[str, str], reachable: bool) -> None:
    assert observe.pod_of(pod(MEDJOB, PROXY, ready=ready)).reachable is reachable


@pytest.mark.parametrize("others", [(), (PROXY,), ({"name": "a", "state": {"waiting": {}}},)])
def test_exit_code_is_that_of_medjob_whatever_the_order(others: tuple[Object, ...]) -> None:
    done = {"name": "medjob", "state": {"terminated": {"exitCode": 67, "message": "gate"}}}
    for statuses in ((done, *others), (*others, done)):
        found = observe.pod_of(pod(*statuses))
        assert (found.exit_code, found.finished, found.waiting) == (67, True, False)
    failed = {"name": "proxy", "state": {"terminated": {"exitCode": 1}}}
    assert observe.pod_of(pod(failed, MEDJOB)).exit_code is None
    assert not observe.pod_of(pod(failed, MEDJOB)).finished


def test_failed_init_container_of_a_webhook_is_a_failure_with_its_name() -> None:
    init = [
        {"name": "istio-init", "state": {"terminated": {"exitCode": 0}}},
        {"name": "vault-agent-init", "state": {"terminated": {"exitCode": 2}}},
    ]
    waiting = {"name": "medjob", "state": {"waiting": {"reason": "PodInitializing"}}}
    raw = pod(waiting, phase="Failed", initContainerStatuses=init)
    raw["metadata"]["labels"]["batch.kubernetes.io/job-name"] = "j"
    job = {
        "metadata": {"name": "j", "labels": {"medjob/attempt": "1"}},
        "status": {"conditions": [{"type": "Failed", "status": "True", "reason": "x"}]},
    }
    (found,) = observe.view_of([job], [raw]).jobs
    kind, _, reason = classify(found, None)
    assert (kind, reason) == (
        "failed",
        "the init container vault-agent-init ended with exit code 2",
    )


def test_native_sidecar_that_is_killed_at_the_end_is_no_failure() -> None:
    done = {"name": "medjob", "state": {"terminated": {"exitCode": 0}}}
    native = {"name": "istio-proxy", "state": {"terminated": {"exitCode": 137}}}
    found = observe.pod_of(pod(done, initContainerStatuses=[native], phase="Succeeded"))
    assert (found.exit_code, found.message, found.failed_init_container) == (0, "", "")


# ---- the orchestrator's own pod


def orchestrator(*others: Object, **labels: str) -> tuple[Cluster, ModelApi]:
    """A cluster with the Job `o` of an orchestrator and its pod `o-1`."""
    cluster = Cluster(random.Random(0))
    own = {"medjob/release": "r", "medjob/component": "orchestrator"}
    meta = {"name": "o", "labels": own | labels}
    cluster.added(cluster.jobs, {"metadata": meta, "spec": {"backoffLimit": 1000}, "status": {}})
    cluster.added(cluster.pods, {"metadata": {"name": "o-1", "labels": own}})["status"] = {
        "phase": "Running",
        "containerStatuses": [{"name": "medjob", "state": RUNNING}, *others],
    }
    cluster.config_maps["r-pipeline"] = {
        "metadata": {"labels": {"medjob/release": "r"}},
        "data": {"job.yaml": '{"run": {"name": "t"}, "cluster": {"currency": "USD"}}'},
    }
    return cluster, ModelApi(cluster, lambda *_: None)


@pytest.fixture
def own_pod(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JOB_NAME", "o")
    monkeypatch.setenv("POD_NAME", "o-1")


@pytest.mark.usefixtures("own_pod")
@pytest.mark.parametrize(
    ("others", "labels", "failed", "spec"),
    [
        ((), {}, False, {}),
        ((), {}, True, {"backoffLimit": 0}),
        ((PROXY,), {}, False, {"suspend": True}),
        ((PROXY,), {}, True, {"backoffLimit": 0, "activeDeadlineSeconds": 1}),
        # Kueue would resume a Job that it has admitted
        ((PROXY,), {observe.QUEUE: "q"}, False, {"activeDeadlineSeconds": 1}),
        (({"name": "init", "state": {"terminated": {"exitCode": 0}}},), {}, False, {}),
    ],
)
def test_pod_of_the_orchestrator_ends_after_the_run(
    others: tuple[Object, ...], labels: dict[str, str], failed: bool, spec: Object
) -> None:
    cluster, api = orchestrator(*others, **labels)
    if failed:
        status_reporter.show_failure(api, ConfigError("wrong"))
        shown = json.loads(cluster.jobs["o"]["metadata"]["annotations"][report.ANNOTATION])
        assert (shown["state"], shown["code"]) == ("failed", 64)
    else:
        status_reporter.release_own_pod(api)
    assert cluster.jobs["o"]["spec"] == {"backoffLimit": 1000} | spec


def test_status_tells_if_a_sidecar_survives_a_crashed_orchestrator() -> None:
    cluster, api = orchestrator(PROXY)
    cluster.jobs["o"]["status"] = {"active": 1}
    cluster.pods["o-1"]["status"]["containerStatuses"][0]["state"] = {
        "terminated": {"exitCode": 137}
    }
    assert status.table(Installed("r", api))[-1] == (
        "o-1 has ended with exit code 137, but proxy keeps it alive: "
        "kubectl delete pod o-1 -n medjob lets a new orchestrator start"
    )


# ---- a suspended orchestrator


def suspended(cluster: Cluster, *, truth: str = "True", suspend: bool = True) -> None:
    job = cluster.jobs["o"]
    job["spec"]["suspend"] = suspend
    job["status"] = {"conditions": [{"type": "Suspended", "status": truth}]}
    cluster.pods.clear()
    about = {"kind": "Job", "name": "o"}
    event = {"type": "Normal", "reason": "Suspended", "message": "Job suspended"}
    cluster.events.append({"involvedObject": about, **event})


@pytest.mark.parametrize("reported", [False, True])
def test_status_tells_that_the_orchestrator_is_suspended(reported: bool) -> None:
    cluster, api = orchestrator()
    suspended(cluster)
    if reported:
        shown = {"state": "running", "text": "sft: attempt 1", "code": 0, "at": 0}
        cluster.jobs["o"]["metadata"]["annotations"] = {report.ANNOTATION: json.dumps(shown)}
    assert status.table(Installed("r", api))[-1] == (
        "o is suspended: Suspended: Job suspended "
        "(if Kueue suspends every Job without a queue, set cluster.orchestrator.queue)"
    )


def test_status_names_the_queue_of_a_suspended_orchestrator() -> None:
    cluster, api = orchestrator(**{observe.QUEUE: "small"})
    suspended(cluster)
    assert "(the queue small admits it)" in status.table(Installed("r", api))[-1]


def test_condition_that_is_present_but_false_is_not_true() -> None:
    cluster, api = orchestrator()
    suspended(cluster, truth="False", suspend=False)
    assert status.table(Installed("r", api))[-1] == "o has no pod: Suspended: Job suspended"


def test_finished_run_whose_job_is_suspended_is_only_done() -> None:
    cluster, api = orchestrator()
    suspended(cluster)
    shown = {"state": "done", "text": "all published", "code": 0, "at": 0}
    cluster.jobs["o"]["metadata"]["annotations"] = {report.ANNOTATION: json.dumps(shown)}
    assert not any("suspended" in line for line in status.table(Installed("r", api)))


# ---- objects that other tools have changed


def test_release_is_found_although_its_standard_labels_were_overwritten() -> None:
    cluster, api = orchestrator()
    for found in (cluster.jobs["o"], cluster.pods["o-1"], cluster.config_maps["r-pipeline"]):
        found["metadata"]["labels"] |= {
            "app.kubernetes.io/instance": "team-a-r",
            "app.kubernetes.io/name": "other",
            "app.kubernetes.io/component": "x",
            "app.kubernetes.io/managed-by": "argocd",
        }
    cluster.jobs["o"]["status"] = {"active": 1}
    installed = Installed("r", api)
    assert [job["metadata"]["name"] for job in installed.orchestrator_jobs()] == ["o"]
    assert status.table(installed) == ["the orchestrator has not reported a status yet"]


@pytest.mark.usefixtures("simulated")
def test_jobs_are_created_in_the_namespace_of_the_orchestrator(folder: Path) -> None:
    """kustomize moves the objects that it can see, but not the Jobs in the ConfigMap."""
    world = World(folder)
    world.submit()
    assert world.current is not None
    for manifest in world.current.orchestrator.manifests.values():
        manifest["metadata"]["namespace"] = "elsewhere"
    assert "are published" in str(world.run())
    jobs = [job for name, job in world.cluster.jobs.items() if name.startswith("r-sft")]
    assert {job["metadata"]["namespace"] for job in jobs} == {"medjob"}
