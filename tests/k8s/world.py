"""A run on a simulated cluster, with checks after each change.

Orchestrators run as threads, one at a time, and tests inject faults between their calls.
"""

import contextlib
import random
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from medjob.config import RunFile
from medjob.config.load import merge, validate
from medjob.errors import MedjobError, RetryError
from medjob.k8s import observe
from medjob.k8s.orchestrator import main, status_reporter
from medjob.k8s.orchestrator.lease import Lease
from medjob.k8s.orchestrator.metrics import Gauges
from medjob.k8s.orchestrator.reconcile import PAUSED, Orchestrator, Release
from medjob.pipeline.runner import Pipeline
from medjob.stage import STAGES
from medjob.store import Store
from medjob.store.local import LocalStore
from tests.fakes.cluster import Cluster
from tests.fakes.cluster_api import ModelApi
from tests.fakes.objects import Object, ended, finished, stage_job
from tests.fakes.workload import Workload

OWN_JOB = "r-orchestrator"
CONFIG_MAP = "r-pipeline"
Moment = Literal["before", "after"]
CallHook = Callable[["OrchestratorProcess", Moment, str, bool], None]


class Died(BaseException):
    """The orchestrator's process was killed."""


class HookedStore:
    """A store that calls a hook before and after each operation of one process."""

    def __init__(self, inner: Store, hook: Callable[[Moment, str, bool], None]) -> None:
        self._inner, self._hook = inner, hook
        self.uri = inner.uri

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._inner, name)
        if name == "local_path":
            return method

        def call(*arguments: Any) -> Any:
            mutates = name in ("put", "create", "swap", "upload", "delete")
            self._hook("before", name, mutates)
            answer = method(*arguments)
            self._hook("after", name, mutates)
            return answer

        return call


class OrchestratorProcess(threading.Thread):
    """An orchestrator's process.

    It runs only while the world waits for it, so that the seed determines the order of all calls.
    """

    def __init__(self, world: "World", run_file: RunFile, submission: str, number: int) -> None:
        super().__init__(daemon=True, name=f"orchestrator-{number}")
        self.world = world
        self.submission = submission
        self.run_file = run_file
        self.wake = world.cluster.now
        self.kill_requested = False
        self.over = False
        self.graceful = world.rng.random() < 0.5
        """Whether the process releases the lease on SIGTERM."""
        self.outcome: str | MedjobError | Died | Exception | None = None
        self.go = threading.Semaphore(0)
        api = ModelApi(world.cluster, self.hook)
        api.created = lambda job: world.job_created(self, job)
        pipeline = Pipeline(run_file, HookedStore(world.store, self.hook))
        self.lease = Lease(api, "r-orchestrator", self.name, world.time)
        manifests = {
            stage.name: stage_job(
                stage.name, world.nodes if stage.trains else 1, bool(world.queue), run_file
            )
            for stage in STAGES
        }
        self.orchestrator = Orchestrator(
            run_file,
            pipeline,
            api,
            Release("r", "r", submission),
            manifests,
            self.lease,
            clock=world.time,
        )

    def run(self) -> None:
        self.go.acquire()
        try:
            self.outcome = main.run_until_end(self.orchestrator, Gauges("t"))
            self.lease.release()
        except (MedjobError, Died, Exception) as error:
            self.outcome = error
            killed = self.kill_requested
            self.kill_requested = False
            with contextlib.suppress(Died):
                if isinstance(error, MedjobError):
                    status_reporter.show_failure(self.orchestrator.api, error)
                if isinstance(error, MedjobError) or (killed and self.graceful):
                    self.lease.release()
        self.over = True
        self.world.returned.release()

    def yield_until(self, wake: float) -> None:
        """Let the world continue until the simulated time `wake`."""
        self.wake = wake
        self.world.returned.release()
        self.go.acquire()
        if self.kill_requested:
            raise Died

    def hook(self, moment: Moment, name: str, mutates: bool) -> None:
        """Called before and after every call to the API or the store."""
        if self.kill_requested:
            raise Died
        if name != "local_path":
            self.world.on_call(self, moment, name, mutates)
        if moment == "after" and mutates:
            self.world.check()


class World:
    """A simulated cluster, a store, and the orchestrators of one run."""

    def __init__(
        self,
        folder: Path,
        seed: int = 0,
        nodes: int = 1,
        queue: int = 0,
        changes: dict[str, Any] | None = None,
        sidecar: bool = False,
        shards: int = 1,
    ) -> None:
        self.rng = random.Random(seed)
        self.nodes = nodes
        self.shards = shards
        """If there are several: shards of candidates, which then is the last stage, without sft."""
        self.folder = folder
        self.queue = queue
        """How long a Job waits in the queue at most, in seconds; 0 without a queue."""
        self.cluster = Cluster(self.rng)
        self.cluster.sidecar = sidecar
        self.store = LocalStore(folder / "store")
        self.returned = threading.Semaphore(0)
        self.on_call: CallHook = lambda *_: None
        self.planned: list[tuple[float, Callable[[], None]]] = []
        """Actions of users and their times."""
        self.unavailable_until = 0.0
        self.created: list[tuple[str, str, str]] = []
        """Stage, key and name of each created Job, in order."""
        self.processes: list[OrchestratorProcess] = []
        self.current: OrchestratorProcess | None = None
        self.deaths = 0
        (folder / "model").mkdir(parents=True, exist_ok=True)
        (folder / "model/config.json").write_text("{}")
        (folder / "rows.jsonl").write_text("{}\n")
        self.run_file = self.configured(changes or {})
        seen = HookedStore(self.store, self._store_hook)
        self.workload = Workload(self.cluster, seen, folder, self.rng, lambda: self.run_file)
        self.cluster.start = self.workload.start
        own = {
            "metadata": {"name": OWN_JOB, "labels": {"medjob/release": "r"}},
            "spec": {"backoffLimit": 1000},
        }
        self.cluster.added(self.cluster.jobs, own)
        self.cluster.added(self.cluster.config_maps, {"metadata": {"name": CONFIG_MAP}})

    def time(self) -> float:
        """Return the simulated time."""
        return self.cluster.now

    def configured(self, changes: dict[str, Any]) -> RunFile:
        """Return the run file of a run with the stages fetch, prepare and sft."""
        run: Object = {"name": "t", "base_model": str(self.folder / "model"), "method": "lora"}
        run["prepare"] = {"sources": [{"path": str(self.folder / "rows.jsonl")}]}
        tree: Object = {"run": run, "cluster": {"store": "s3://bucket/x"}}
        tree["pipeline"] = {"until": "sft"}
        if self.shards > 1:
            run["prepare"]["preference_rows"] = 1
            run["stages"] = ["prepare", "candidates"]
            tree["pipeline"] = {"until": "candidates"}
            tree["resources"] = {"candidates": {"shards": self.shards}}
        return validate(merge(tree, changes))

    # ---- users and processes

    def submit(self, run_file: RunFile | None = None, overlap_s: float = 0.0) -> None:
        """Do `helm upgrade --install`: start an orchestrator, and later kill the one before."""
        old, self.run_file = self.current, run_file or self.run_file
        self.current = self._started(self.run_file, f"s{len(self.processes)}")
        if old is not None:
            self.planned.append((self.cluster.now + overlap_s, lambda: self.kill(old)))

    def _started(self, run_file: RunFile, submission: str) -> OrchestratorProcess:
        process = OrchestratorProcess(self, run_file, submission, len(self.processes))
        self.processes.append(process)
        process.start()
        return process

    def kill(self, process: OrchestratorProcess) -> None:
        """Send SIGTERM to an orchestrator. It releases the lease if it is graceful, and ends."""
        if not process.over:
            process.kill_requested = True

    def pause(self, paused: bool) -> None:
        """Do `medjob pause` or `medjob resume`."""
        annotations = self.cluster.config_maps[CONFIG_MAP]["metadata"].setdefault("annotations", {})
        if paused:
            annotations[PAUSED] = "true"
        else:
            annotations.pop(PAUSED, None)

    def admit(self, job: str, admitted: bool) -> None:
        """Admit or suspend a Job, as a queue does."""
        if job in self.cluster.jobs and not finished(self.cluster.jobs[job]):
            self.cluster.jobs[job]["spec"]["suspend"] = not admitted

    def _store_hook(self, moment: Moment, *_: Any) -> None:
        if moment == "before" and self.cluster.now < self.unavailable_until:
            raise RetryError("the store is unavailable")

    # ---- time

    def run(self, limit_s: float = 6000) -> str | MedjobError:
        """Run until the current orchestrator ends, and return its closing message or error."""
        if self.current is None:
            self.submit()
        end = self.cluster.now + limit_s
        try:
            while self.cluster.now < end:
                ready = [
                    process
                    for process in self.processes
                    if not process.over and process.wake <= self.cluster.now
                ]
                if not ready:
                    self.tick()
                    continue
                outcome = self._run_process(self.rng.choice(ready))
                if outcome is not None:
                    return outcome
            raise AssertionError(f"the run has not ended after {limit_s} s: {self.cluster.jobs}")
        finally:
            self.on_call = lambda *_: None
            for process in self.processes:
                process.kill_requested = True
                if not process.over:
                    process.go.release()
                    process.join()

    def _run_process(self, process: OrchestratorProcess) -> str | MedjobError | None:
        process.go.release()
        self.returned.acquire()
        if not process.over:
            return None
        if isinstance(process.outcome, Died):
            self.deaths += 1
            if process is self.current:  # the Job starts another pod
                self.current = self._started(process.run_file, process.submission)
                self.current.wake = self.cluster.now + self.rng.randint(1, 20)
            return None
        if isinstance(process.outcome, Exception) and not isinstance(process.outcome, MedjobError):
            raise process.outcome
        return process.outcome if process is self.current else None

    def tick(self) -> None:
        """Advance users, nodes and the cluster by one second."""
        for at, act in [user for user in self.planned if user[0] <= self.cluster.now]:
            self.planned.remove((at, act))
            act()
        for at, pod in [back for back in self.workload.rejoin if back[0] <= self.cluster.now]:
            self.workload.rejoin.remove((at, pod))
            if self.cluster.node_of(pod).state == "cut":
                self.cluster.change_node(pod, "up")
        self.cluster.tick()
        self.check()

    # ---- checks

    def active(self) -> list[Object]:
        """Return the stages' Jobs that have not ended and are not being deleted."""
        jobs = (job for name, job in self.cluster.jobs.items() if name != OWN_JOB)
        return [
            job for job in jobs if not finished(job) and "deletionTimestamp" not in job["metadata"]
        ]

    def check(self) -> None:
        """Check that at most one Job is active, and at most one has pods on healthy nodes.

        Of a stage with shards, that holds for each shard.
        """
        active = [job["metadata"]["name"] for job in self.active()]
        places = Counter(map(_place, self.active()))
        assert not active or max(places.values()) == 1, f"several Jobs are active: {active}"
        assert len({stage for stage, _ in places}) <= 1, f"several stages are active: {active}"
        living = [pod for pod in self.cluster.pods.values() if self._is_alive(pod)]
        owners = {(_place(pod), pod["metadata"]["ownerReferences"][0]["uid"]) for pod in living}
        names = [pod["metadata"]["name"] for pod in living]
        several = [place for place, n in Counter(place for place, _ in owners).items() if n > 1]
        assert not several, f"pods of several Jobs are alive: {names}"

    def _is_alive(self, pod: Object) -> bool:
        return not ended(pod) and self.cluster.node_of(pod["metadata"]["name"]).since == 0.0

    def job_created(self, process: OrchestratorProcess, job: Object) -> None:
        """Check that the inputs of a new Job are published, and that its attempt is new."""
        labels = job["metadata"]["labels"]
        stage = labels[observe.STAGE]
        pipeline = Pipeline(process.run_file, self.store)
        names = [s.name for s in self.stages]
        for earlier in self.stages[: names.index(stage)]:
            assert pipeline.artifact(earlier).manifest() is not None, (
                f"{stage} was started before {earlier} was published"
            )
        attempt = int(labels[observe.ATTEMPT])
        shard = f"-{labels[observe.SHARD]}" if observe.SHARD in labels else ""
        folder = f"t/orchestrator/{stage}/{labels[observe.KEY]}{shard}"
        started = f"{folder}/a{attempt:04d}.begun.json"
        assert self.store.get(started) is None, f"{job['metadata']['name']} was created twice"
        self.created.append((stage, labels[observe.KEY], job["metadata"]["name"]))
        if self.queue:
            self.planned.append(
                (
                    self.cluster.now + self.rng.randint(0, self.queue),
                    lambda: self.admit(job["metadata"]["name"], True),
                )
            )

    def digests(self) -> dict[str, str]:
        """Return the digests of published artifacts of the current run file, by stage."""
        pipeline = Pipeline(self.run_file, self.store)
        found: dict[str, str] = {}
        for stage in self.stages:
            published = pipeline.artifact(stage).manifest()
            if published is None:
                break
            found[stage.name] = published.digest
        return found

    @property
    def stages(self) -> list[Any]:
        """The stages of the run."""
        names = ("fetch", "prepare", "sft" if self.shards == 1 else "candidates")
        return [stage for stage in STAGES if stage.name in names]


def _place(found: Object) -> tuple[str, str]:
    """Stage and shard of a Job or a pod."""
    labels = found["metadata"]["labels"]
    return labels[observe.STAGE], labels.get(observe.SHARD, "")
