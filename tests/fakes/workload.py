"""Containers of stages on the simulated cluster. They use the store through medjob's own code."""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medjob.artifacts.artifact import Artifact, Attempt
from medjob.artifacts.checkpoints import Checkpoints, states, step_and_epoch
from medjob.artifacts.finished_rows import FinishedRows
from medjob.artifacts.shard import Shard, shard_of, unfinished_shards
from medjob.config import RunFile
from medjob.errors import MedjobError, RetryError
from medjob.pipeline.runner import Pipeline
from medjob.pipeline.shards import shard_count
from medjob.stage import get_stage
from medjob.store import Store
from tests.fakes.cluster import Cluster
from tests.fakes.objects import INDEX, JOB_NAME, Object

UNITS = 3  # steps or batches of rows of each stage


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault of one pod of one attempt, `after` seconds from its start."""

    kind: str
    after: int = 4
    code: int = 1
    recorded: bool = True
    index: int = 0
    seconds: int = 100


@dataclass
class Workload:
    """What all containers share: cluster, store, faults and probabilities."""

    cluster: Cluster
    store: Store
    folder: Path
    rng: random.Random
    run_file: Callable[[], RunFile]
    """Returns the run file that the ConfigMap contains."""
    faults: dict[str, list[Fault]] = field(default_factory=dict)
    """Faults of each stage's next attempts, one per attempt. Those of a shard are under its stage and
    label, such as `candidates 0-of-3`."""
    fault_of: dict[str, Fault] = field(default_factory=dict)
    """Fault of each Job, by uid."""
    injected: list[tuple[str, Fault]] = field(default_factory=list)
    """Job and fault, for each fault that has happened."""
    spent: set[str] = field(default_factory=set)
    """Uids of the Jobs whose fault has happened."""
    ends: list[tuple[str, int]] = field(default_factory=list)
    """Job and exit code, for each container that ended by itself."""
    rejoin: list[tuple[float, str]] = field(default_factory=list)
    """Time and pod, for each node that will rejoin."""
    on_fault: dict[str, Callable[[], None]] = field(default_factory=dict)
    """Actions of users or the cluster that stand for a kind of fault."""
    begun: list[tuple[str, str]] = field(default_factory=list)
    """Pod and artifact's prefix, for each attempt that a container began."""
    step_s: int = 3
    """Duration of a step, in seconds."""
    save_probability: float = 0.5
    """Probability that a container saves when it receives SIGTERM."""
    ignore_sigterm_probability: float = 0.05
    """Probability that a container ignores SIGTERM."""
    frozen_s: float = 0.0
    """How long a container makes no progress after its node is cut off, in seconds."""

    def start(self, pod: Object) -> "StageContainer":
        """Start the container of a pod."""
        labels = pod["metadata"]["labels"]
        job, stage = labels[JOB_NAME], labels["medjob/component"]
        uid = pod["metadata"]["ownerReferences"][0]["uid"]
        key = f"{stage} {labels['medjob/shard']}" if "medjob/shard" in labels else stage
        if uid not in self.fault_of and self.faults.get(key):
            self.fault_of[uid] = self.faults[key].pop(0)
        return StageContainer(self, pod, job, stage, int(labels.get(INDEX, 0)))

    def peer(self, container: "StageContainer") -> "StageContainer | None":
        """Return the started container on the other node, or None."""
        others = self.cluster.containers.values()
        found = (
            other
            for other in others
            if isinstance(other, StageContainer) and other.uid == container.uid
        )
        return next((other for other in found if other.index != container.index), None)


class StageContainer:
    """The container of one pod."""

    def __init__(self, workload: Workload, pod: Object, job: str, stage: str, index: int) -> None:
        self._workload = workload
        self._pod = pod
        self.job = job
        self.stage = stage
        self.index = index
        self.name = pod["metadata"]["name"]
        self.uid = pod["metadata"]["ownerReferences"][0]["uid"]
        self._config = workload.run_file()
        self.exit_code: int | None = None
        self.reason = self.message = ""
        self.attempt: Attempt | None = None
        self._artifact: Artifact | None = None
        self._age = 0
        self._done = 0
        self._stop_at: int | None = None
        self._seconds_without_peer = 0
        fault = workload.fault_of.get(self.uid)
        self._fault = fault if fault and fault.index == index else None
        self._whole: Artifact | None = None
        """The stage's artifact, if this computes one of its shards."""
        self._hangs = False
        self._stops_with: int | None = None
        self._ignores_sigterm = workload.rng.random() < workload.ignore_sigterm_probability

    @property
    def host(self) -> str:
        """The name that `platform.node()` returns in the container."""
        return f"{self.job}-{self.index}" if INDEX in self._pod["metadata"]["labels"] else self.name

    def terminate(self) -> None:
        """Receive SIGTERM. Later signals have no effect."""
        if self._stop_at is None and not self._ignores_sigterm:
            self._stop_at = self._age + self._workload.rng.randint(0, 4)

    def tick(self) -> None:
        """Advance the container by one second."""
        if self.exit_code is not None:
            return
        node = self._workload.cluster.node_of(self.name)
        if self._hangs or (
            node.state == "cut"
            and self._workload.cluster.now - node.since < self._workload.frozen_s
        ):
            return
        self._age += 1
        try:
            self._go_on()
        except MedjobError as error:
            self._exit(error.exit_code, f"{type(error).__name__}: {error.message}")

    def _go_on(self) -> None:
        if self._stop_at is not None:
            if self._age > self._stop_at:
                self._stop()
            return
        if self._has_lost_peer():
            self._seconds_without_peer += 1
            if self._seconds_without_peer > 3:
                raise RetryError("another training process has ended")
            return
        if self._artifact is None:
            self._begin()
        elif (
            self._fault
            and self._age >= self._fault.after
            and ("publish" not in self._fault.kind or self._artifact.manifest() is not None)
        ):
            self._apply_fault(self._fault)
        elif self._age % self._workload.step_s == 0:
            self._work()

    def _begin(self) -> None:
        pipeline = Pipeline(self._config, self._workload.store)
        artifact = pipeline.artifact(get_stage(self.stage))
        if artifact.manifest() is not None:
            self.exit_code = 0
            return
        shard = self._shard()
        if shard.count > 1:
            self._whole = artifact
            artifact = shard_of(artifact, shard)
            if artifact.manifest() is not None:
                self._join()
                return
        lead = self._workload.peer(self) if self.index else None
        if self.index:
            if lead is None or lead.attempt is None or lead.exit_code is not None:
                return
            self.attempt = Attempt.join(
                artifact, lead.attempt.epoch, lead.attempt.owner, self.index
            )
        else:
            self.attempt = Attempt.begin(artifact, self.host)
            self._workload.begun.append((self.name, artifact.prefix))
        self._artifact, self._done = artifact, reached(artifact)

    def _shard(self) -> Shard:
        """Which shard this is: the index is in the environment, and the count in the run file."""
        count = shard_count(self._config, get_stage(self.stage))
        variables = self._pod["spec"]["containers"][0].get("env", [])
        values = {variable["name"]: variable["value"] for variable in variables}
        return Shard(int(values.get("MEDJOB_SHARD", "0")), count)

    def _join(self) -> None:
        """Publish the stage if all of its shards are published."""
        assert self._whole is not None
        if unfinished_shards(self._whole, self._shard().count):
            self._exit(0)
            return
        self._artifact, self._done = self._whole, UNITS
        self.attempt = Attempt.begin(self._whole, self.host)
        self._workload.begun.append((self.name, self._whole.prefix))
        self._whole = None

    def _work(self) -> None:
        assert self._artifact is not None
        assert self.attempt is not None
        if self.index:
            if self._artifact.manifest() is not None:
                self._exit(0)
            return
        if self._done >= UNITS or self.stage == "fetch":
            self._publish(self.attempt)
            return
        self._done += 1
        self._save(self.attempt)
        beat = {"step": self._done, "total": UNITS, "age": self._age, "host": self.host}
        self._workload.store.put(self._artifact.path("progress.json"), json.dumps(beat).encode())

    def _save(self, attempt: Attempt) -> None:
        if self.stage != "sft":
            FinishedRows(attempt).add(f"rows{self._done}", [{"id": str(self._done)}])
            return
        folder = self._workload.folder / "state"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "weights.bin").write_text(f"after {self._done}")
        checkpoints = Checkpoints(attempt, 2, self._workload.folder / "snapshots")
        checkpoints.save(self._done, folder)
        checkpoints.wait()

    def _publish(self, attempt: Attempt) -> None:
        folder = self._workload.folder / "output" / self.name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "result.txt").write_text(f"{self.stage} {attempt.artifact.key}")
        if self.stage == "fetch":
            (folder / "pins.json").write_text('{"hub": {}}')
        times = {"started": "2027-01-01T00:00:00+00:00", "finished": "2027-01-01T00:00:10+00:00"}
        attempt.publish(folder, {}, {}, {}, times)
        if self._whole is not None:
            attempt.record({"exit_code": 0, "seconds": float(self._age), "host": self.host})
            self._join()
        elif self._fault is None:
            self._exit(0)

    def _stop(self) -> None:
        if self._stops_with is not None:
            self._exit(self._stops_with, "failed while stopping")
            return
        unfinished = (
            self.attempt is not None
            and not self.index
            and self._done < UNITS
            and self.stage != "fetch"
        )
        if (
            self.attempt is not None
            and unfinished
            and self._workload.rng.random() < self._workload.save_probability
        ):
            self._done += 1
            self._save(self.attempt)
        self._exit(143, "Preempted: stopped by a signal")

    def _has_lost_peer(self) -> bool:
        peer = self._workload.peer(self)
        if peer is None or self._artifact is None:
            return False
        published = self._artifact.manifest() is not None
        if self._workload.cluster.node_of(peer.name).state == "dead":
            return True
        return peer.exit_code is not None and not published

    def _apply_fault(self, fault: Fault) -> None:
        self._fault = None
        self._stops_with = fault.code if fault.code != 1 else None
        if self.uid in self._workload.spent:  # an earlier pod of the same Job had the fault
            return
        self._workload.spent.add(self.uid)
        self._workload.injected.append((self.job, fault))
        cluster = self._workload.cluster
        pod = self._pod
        match fault.kind:
            case "crash":
                self._exit(fault.code, "RuntimeError: a layer failed" if fault.recorded else None)
            case "oom":
                self.exit_code = 137
                self.reason = "OOMKilled"
            case "child_oom":
                self._exit(75, "RetryError: a training process has ended")
                self.reason = "OOMKilled"
            case "exit0":
                self.exit_code = 0
            case "evict" | "vanish":
                self._hangs = self._ignores_sigterm = fault.kind == "vanish"
                cluster.delete_pod(pod, "EvictionByEvictionAPI")
            case "delete_pod":
                cluster.delete_pod(pod)
            case "delete_job":
                cluster.jobs.pop(self.job, None)
            case "dead" | "cut" | "dead_after_publishing":
                cluster.change_node(self.name, "cut" if fault.kind == "cut" else "dead")
                self._workload.rejoin.append((cluster.now + fault.seconds, self.name))
            case kind:
                self._workload.on_fault[kind]()

    def _exit(self, code: int, reason: str | None = "") -> None:
        self.exit_code = code
        self.message = reason or ""
        self._workload.ends.append((self.job, code))
        if self.attempt is None or reason is None:
            return
        outcome: dict[str, Any] = {
            "exit_code": code,
            "seconds": float(self._age),
            "host": self.host,
        }
        try:
            self.attempt.record(outcome | ({"reason": reason} if reason else {}))
        except MedjobError:
            return


def reached(artifact: Artifact) -> int:
    """Return the number of stored units."""
    if artifact.stage == "sft":
        return max(
            (
                step_and_epoch(name)[0]
                for name, state in states(artifact).items()
                if state == "finished"
            ),
            default=0,
        )
    return sum(1 for _ in artifact.store.list(artifact.path("parts", "")))
