"""A simulated cluster in memory: API server, Job controller, kubelets and garbage collector.

It behaves like a real cluster (v1.34), as measured:

- A Job is Failed only after its pods have ended.
- The object of an evicted pod vanishes.
- If a node loses power, its pod stays Running and not Ready, later Terminating, and never ends.
- Pods of a Job that is deleted in the background live through their grace period.
- A suspended Job has no pods.
"""

import json
import random
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Literal, Protocol

from tests.fakes.objects import (
    INDEX,
    JOB_NAME,
    Object,
    condition,
    ended,
    finished,
    matching_rule,
    seconds,
    set_condition,
)

# Time since the last heartbeat of a node.
NOT_READY_S = 22
EVICTED_S = 322


class Container(Protocol):
    """A container, which the kubelet advances by one second at a time."""

    exit_code: int | None
    reason: str
    message: str

    def tick(self) -> None: ...
    def terminate(self) -> None: ...


class Node:
    """The node of one pod. If it is `cut`, its containers run but the API has no news of them."""

    def __init__(self) -> None:
        self.state: Literal["up", "dead", "cut"] = "up"
        self.since = 0.0


class Cluster:
    """One namespace of a cluster."""

    def __init__(self, rng: random.Random, start: float = 1_800_000_000.0) -> None:
        self.rng = rng
        self.now = start
        self.config_maps: dict[str, Object] = {}
        self.jobs: dict[str, Object] = {}
        self.pods: dict[str, Object] = {}
        self.leases: dict[str, Object] = {}
        self.events: list[Object] = []
        self.nodes: dict[str, Node] = {}
        self.containers: dict[str, Container] = {}
        self.start: Callable[[Object], Container] = _nothing_to_run
        self.schedule_s: Callable[[Object], float] = lambda _: 1.0
        self.pull_s: Callable[[Object], float] = lambda _: 2.0
        self.refuses_pods = ""
        """Why no pod can be created, such as a quota; empty if pods can be created."""
        self.sidecar = False
        """Whether every pod has a second container, which ends only when the pod is deleted."""
        self._version = 0
        self._uid = 0

    # ---- time

    def tick(self) -> None:
        """Advance the cluster by one second."""
        self.now += 1
        for job in list(self.jobs.values()):
            if "template" in job["spec"]:
                self._control(job)
        self._collect_garbage()
        for pod in list(self.pods.values()):
            self._run(pod)
        self._watch_nodes()

    def stamp(self, at: float | None = None) -> str:
        """Format a time like the API; by default the current one."""
        return datetime.fromtimestamp(self.now if at is None else at, UTC).strftime(
            "%Y-%m-%dT%H:%M:%SZ"
        )

    def added(self, kind: dict[str, Object], manifest: Object) -> Object:
        """Store a new object and return it."""
        self._uid += 1
        made: Object = json.loads(json.dumps(manifest))
        made["metadata"] |= {
            "uid": f"uid-{self._uid}",
            "creationTimestamp": self.stamp(),
            "resourceVersion": self.version(),
        }
        kind[made["metadata"]["name"]] = made
        return made

    def version(self) -> str:
        """Return a new resourceVersion."""
        self._version += 1
        return str(self._version)

    def warn(self, kind: str, name: str, reason: str, message: str) -> None:
        """Create a warning Event, unless the object has one with this reason."""
        about = {"kind": kind, "name": name}
        found = {
            "involvedObject": about,
            "type": "Warning",
            "reason": reason,
            "message": message,
            "lastTimestamp": self.stamp(),
        }
        if not any(
            event["involvedObject"] == about and event["reason"] == reason for event in self.events
        ):
            self.events.append(found)

    # ---- the Job controller

    def pods_of(self, job: Object) -> list[Object]:
        """Return the pods of a Job."""
        uid = job["metadata"]["uid"]
        return [
            pod for pod in self.pods.values() if pod["metadata"]["ownerReferences"][0]["uid"] == uid
        ]

    def _control(self, job: Object) -> None:
        meta, spec, status = job["metadata"], job["spec"], job.setdefault("status", {})
        pods = self.pods_of(job)
        if finished(job):
            self._time_out(job)
            return
        if "deletionTimestamp" in meta:  # deleted in the foreground, so pods go first
            for pod in pods:
                self.delete_pod(pod)
            if not pods:
                del self.jobs[meta["name"]]
            return
        self._count(job, pods)
        target = condition(job, "FailureTarget")
        if spec.get("suspend"):
            status.pop("startTime", None)
        if target or spec.get("suspend"):
            self._stop_pods(job, pods, target)
            return
        status.setdefault("startTime", self.stamp())
        started = seconds(status["startTime"])
        if self.now - started > spec.get("activeDeadlineSeconds", float("inf")):
            set_condition(
                job,
                "FailureTarget",
                "DeadlineExceeded",
                "Job was active longer than specified deadline",
            )
        elif sum(pod["status"]["phase"] == "Succeeded" for pod in pods) >= spec["completions"]:
            self._conclude(
                job, "Complete", "CompletionsReached", "Reached expected number of succeeded pods"
            )
        else:
            self._make_pods(job, pods)

    def _count(self, job: Object, pods: list[Object]) -> None:
        """Count pods that have ended.

        The object of an evicted pod vanishes once it is counted, before or after the Job fails.
        """
        for pod in pods:
            if not ended(pod) or pod["metadata"].get("counted"):
                continue
            if (
                pod["metadata"].setdefault("seen_ended", self.now) == self.now
                and self.rng.random() < 0.3
            ):
                continue  # the controller counts it later
            pod["metadata"]["counted"] = True
            if pod["status"]["phase"] == "Failed" and not condition(job, "FailureTarget"):
                reason, message = matching_rule(job, pod)
                if not job["spec"].get("suspend") or reason == "PodFailurePolicy":
                    set_condition(job, "FailureTarget", reason, message)
            if "deletionTimestamp" in pod["metadata"] and self.rng.random() < 0.5:
                del self.pods[pod["metadata"]["name"]]

    def _stop_pods(self, job: Object, pods: list[Object], target: Object | None) -> None:
        living = [pod for pod in pods if not ended(pod)]
        for pod in living:
            self.delete_pod(pod)
        if target and not living:
            self._conclude(job, "Failed", target["reason"], target["message"])

    def _conclude(self, job: Object, kind: str, reason: str, message: str) -> None:
        set_condition(job, kind, reason, message)
        job["status"]["completionTime"] = self.stamp()

    def _time_out(self, job: Object) -> None:
        over = seconds(job["status"]["completionTime"])
        if self.now - over > job["spec"].get("ttlSecondsAfterFinished", float("inf")):
            del self.jobs[job["metadata"]["name"]]

    def _make_pods(self, job: Object, pods: list[Object]) -> None:
        if self.refuses_pods:
            self.warn(
                "Job",
                job["metadata"]["name"],
                "FailedCreate",
                f"Error creating: {self.refuses_pods}",
            )
            return
        indexed = job["spec"].get("completionMode") == "Indexed"
        for index in range(job["spec"]["parallelism"]):
            if any(pod["metadata"]["labels"].get(INDEX, "0") == str(index) for pod in pods):
                continue
            meta = job["metadata"]
            template = job["spec"]["template"]
            name = f"{meta['name']}-{index}-" if indexed else f"{meta['name']}-"
            name = name[:58] + "".join(self.rng.choices("bcdfghjklmnpqrstvwxz2456789", k=5))
            labels = {**template["metadata"]["labels"], JOB_NAME: meta["name"]} | (
                {INDEX: str(index)} if indexed else {}
            )
            owner = {"kind": "Job", "name": meta["name"], "uid": meta["uid"]}
            pod = {
                "metadata": {"name": name, "labels": labels, "ownerReferences": [owner]},
                "spec": dict(template["spec"]),
            }
            made = self.added(self.pods, pod)
            made["status"] = {"phase": "Pending", "conditions": []}
            self.nodes[name] = Node()

    def _collect_garbage(self) -> None:
        owners = {
            found["metadata"]["uid"] for found in (*self.jobs.values(), *self.config_maps.values())
        }
        for name, job in list(self.jobs.items()):
            references = job["metadata"].get("ownerReferences", [])
            if references and references[0]["uid"] not in owners:
                del self.jobs[name]
        for name, pod in list(self.pods.items()):
            if pod["metadata"]["ownerReferences"][0]["uid"] not in owners:
                self.delete_pod(pod)
                if ended(pod):
                    del self.pods[name]
            elif (
                ended(pod)
                and "deletionTimestamp" in pod["metadata"]
                and pod["metadata"].get("counted")
            ):
                del self.pods[name]

    # ---- kubelets and nodes

    def delete_pod(self, pod: Object, disrupted: str = "") -> None:
        """Delete a pod, or evict it for the reason `disrupted`. It ends within its grace period."""
        if disrupted:
            set_condition(pod, "DisruptionTarget", disrupted, "the cluster removes the pod")
        grace = pod["spec"].get("terminationGracePeriodSeconds", 30)
        pod["metadata"].setdefault("deletionTimestamp", self.stamp(self.now + grace))

    def node_of(self, pod: str) -> Node:
        """Return the node of a pod."""
        return self.nodes[pod]

    def change_node(self, pod: str, state: Literal["up", "dead", "cut"]) -> None:
        """Power a pod's node off, cut it off, or let it rejoin."""
        node = self.nodes[pod]
        node.state, node.since = state, self.now
        if state == "up" and pod in self.pods and condition(self.pods[pod], "Ready", "False"):
            set_condition(self.pods[pod], "Ready", "", "")

    def _run(self, pod: Object) -> None:
        name, meta, status = pod["metadata"]["name"], pod["metadata"], pod["status"]
        node, container = self.nodes[name], self.containers.get(name)
        if ended(pod) or node.state == "dead":
            return
        if node.state == "cut":
            if container is not None:
                container.tick()
            return
        age = self.now - seconds(meta["creationTimestamp"])
        if container is None and "deletionTimestamp" in meta:
            status["phase"] = "Failed"
        elif not condition(pod, "PodScheduled"):
            self._schedule(pod, age)
        elif container is None:
            self._begin(pod)
        else:
            self._go_on(pod, container)

    def _schedule(self, pod: Object, age: float) -> None:
        if age >= self.schedule_s(pod):
            set_condition(pod, "PodScheduled", "", "", at=self.stamp())
            pod["metadata"]["scheduled"] = self.now
        else:
            set_condition(pod, "PodScheduled", "Unschedulable", "0/3 nodes are available", "False")
            self.warn(
                "Pod",
                pod["metadata"]["name"],
                "FailedScheduling",
                "0/3 nodes are available: 3 Insufficient nvidia.com/gpu",
            )

    def _begin(self, pod: Object) -> None:
        name, waited = pod["metadata"]["name"], self.now - pod["metadata"]["scheduled"]
        state: Object = {"waiting": {"reason": "ContainerCreating"}}
        if waited >= self.pull_s(pod):
            self.containers[name] = self.start(pod)
            state = {"running": {"startedAt": self.stamp()}}
            pod["status"]["phase"] = "Running"
            set_condition(pod, "Ready", "", "")
        elif self.pull_s(pod) == float("inf"):
            state = {"waiting": {"reason": "ImagePullBackOff", "message": "Back-off pulling image"}}
            self.warn("Pod", name, "Failed", "Failed to pull image: not found")
        pod["status"]["containerStatuses"] = [{"name": "medjob", "state": state}]

    def _go_on(self, pod: Object, container: Container) -> None:
        if "deletionTimestamp" in pod["metadata"]:
            container.terminate()
            if (
                self.now >= seconds(pod["metadata"]["deletionTimestamp"])
                and container.exit_code is None
            ):
                container.exit_code = 137
        if container.exit_code is None:
            container.tick()
        if container.exit_code is not None:
            reason = container.reason or ("Completed" if container.exit_code == 0 else "Error")
            terminated = {
                "exitCode": container.exit_code,
                "reason": reason,
                "message": container.message,
            }
            state = {"terminated": terminated}
            kept_alive = self.sidecar and "deletionTimestamp" not in pod["metadata"]
            # The phase changes one tick after the state of the container.
            if pod["status"]["containerStatuses"][-1]["state"] == state and not kept_alive:
                pod["status"]["phase"] = "Failed" if container.exit_code else "Succeeded"
            proxy = [{"name": "proxy", "state": {"running": {}}}] if self.sidecar else []
            pod["status"]["containerStatuses"] = [*proxy, {"name": "medjob", "state": state}]
            set_condition(pod, "Ready", "ContainersNotReady", "", "False")

    def _watch_nodes(self) -> None:
        for name, pod in self.pods.items():
            node = self.nodes[name]
            if node.state != "up" and not ended(pod):
                if self.now - node.since >= NOT_READY_S:
                    set_condition(pod, "Ready", "NodeNotReady", "", "False")
                if self.now - node.since >= EVICTED_S:
                    self.delete_pod(pod, "DeletionByTaintManager")


def _nothing_to_run(_: Object) -> Container:
    raise AssertionError("the test did not set Cluster.start")
