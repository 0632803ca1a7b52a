"""An API server with its Job controller, kubelets and garbage collector, in memory and in simulated time.

It does what was measured on a real cluster (v1.34): a Job is Failed only once its pods have ended; an evicted pod's object
vanishes; a node without power leaves its pod Running and not Ready, later Terminating, and never ended; deletion in the
background leaves pods through their grace; a suspended Job has no pods.
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

NOT_READY_S, EVICTED_S = 22, 322  # after a node's last word


class Container(Protocol):
    """What runs in a pod: the kubelet asks it to go on by a second at a time."""

    exit_code: int | None
    reason: str
    message: str

    def tick(self) -> None: ...
    def terminate(self) -> None: ...


class Node:
    """Where one pod runs. `cut`: its containers go on, and the API does not hear of it."""

    def __init__(self) -> None:
        self.state: Literal["up", "dead", "cut"] = "up"
        self.since = 0.0


class Cluster:
    """One namespace."""

    def __init__(self, rng: random.Random, start: float = 1_800_000_000.0) -> None:
        self.rng, self.now = rng, start
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
        """Why no pod can be made: a quota, Pod Security."""
        self._version = self._uid = 0

    # ---- time

    def tick(self) -> None:
        """One second."""
        self.now += 1
        for job in list(self.jobs.values()):
            if "template" in job["spec"]:
                self._control(job)
        self._collect_garbage()
        for pod in list(self.pods.values()):
            self._run(pod)
        self._watch_nodes()

    def stamp(self, at: float | None = None) -> str:
        """A time as the API writes it."""
        return datetime.fromtimestamp(self.now if at is None else at, UTC).strftime(
            "%Y-%m-%dT%H:%M:%SZ"
        )

    def added(self, kind: dict[str, Object], manifest: Object) -> Object:
        """Store a new object."""
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
        """A new resourceVersion."""
        self._version += 1
        return str(self._version)

    def warn(self, kind: str, name: str, reason: str, message: str) -> None:
        """The cluster's own Event."""
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
        """A Job's pods."""
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
        if "deletionTimestamp" in meta:  # in the foreground: the Job goes when its pods have gone
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
        """Look at pods that have ended. An evicted pod's object goes once it is counted, before or after the Job is Failed."""
        for pod in pods:
            if not ended(pod) or pod["metadata"].get("counted"):
                continue
            if (
                pod["metadata"].setdefault("seen_ended", self.now) == self.now
                and self.rng.random() < 0.3
            ):
                continue  # the controller takes its time
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
        """Ask for a pod's end, as a deletion or (with a reason) an eviction does."""
        if disrupted:
            set_condition(pod, "DisruptionTarget", disrupted, "the cluster takes it away")
        grace = pod["spec"].get("terminationGracePeriodSeconds", 30)
        pod["metadata"].setdefault("deletionTimestamp", self.stamp(self.now + grace))

    def node_of(self, pod: str) -> Node:
        """A pod's node."""
        return self.nodes[pod]

    def change_node(self, pod: str, state: Literal["up", "dead", "cut"]) -> None:
        """Power off, cut off, or join again."""
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
            told = {"exitCode": container.exit_code, "reason": reason, "message": container.message}
            state = {"terminated": told}
            if (
                pod["status"]["containerStatuses"][0]["state"] == state
            ):  # the phase follows a moment later
                pod["status"]["phase"] = "Failed" if container.exit_code else "Succeeded"
            pod["status"]["containerStatuses"] = [{"name": "medjob", "state": state}]
            set_condition(pod, "Ready", "PodFailed", "", "False")

    def _watch_nodes(self) -> None:
        for name, pod in self.pods.items():
            node = self.nodes[name]
            if node.state != "up" and not ended(pod):
                if self.now - node.since >= NOT_READY_S:
                    set_condition(pod, "Ready", "NodeNotReady", "", "False")
                if self.now - node.since >= EVICTED_S:
                    self.delete_pod(pod, "DeletionByTaintManager")


def _nothing_to_run(_: Object) -> Container:
    raise AssertionError("nothing was given to run")
