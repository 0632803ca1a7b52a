"""A run on a simulated cluster: orchestrators that take turns, whatever is done to them, and what must hold at every moment."""

import contextlib
import random
import threading
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

OWN_JOB, CONFIG_MAP = "r-orchestrator", "r-pipeline"
Moment = Literal["before", "after"]
CallHook = Callable[["OrchestratorProcess", Moment, str, bool], None]


class Died(BaseException):
    """The orchestrator's process is gone."""


class HookedStore:
    """A store as one process sees it."""

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
    """An orchestrator's process. It runs only while the world waits for it, so that the order of all calls is the seed's."""

    def __init__(self, world: "World", run_file: RunFile, submission: str, number: int) -> None:
        super().__init__(daemon=True, name=f"orchestrator-{number}")
        self.world, self.submission, self.run_file = world, submission, run_file
        self.wake = world.cluster.now
        self.doomed = self.over = False
        self.graceful = world.rng.random() < 0.5
        """Whether SIGTERM finds it able to hand the lease over."""
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
            killed, self.doomed = self.doomed, False
            with contextlib.suppress(Died):
                if isinstance(error, MedjobError):
                    status_reporter.show_failure(self.orchestrator.api, error)
                if isinstance(error, MedjobError) or (killed and self.graceful):
                    self.lease.release()
        self.over = True
        self.world.turn.release()

    def yield_until(self, wake: float) -> None:
        """Let the world go on."""
        self.wake = wake
        self.world.turn.release()
        self.go.acquire()
        if self.doomed:
            raise Died

    def hook(self, moment: Moment, name: str, mutates: bool) -> None:
        """Every call to the API or the store passes here, before and after its effect."""
        if self.doomed:
            raise Died
        if name != "local_path":
            self.world.on_call(self, moment, name, mutates)
        if moment == "after" and mutates:
            self.world.check()


class World:
    """All of it."""

    def __init__(
        self,
        folder: Path,
        seed: int = 0,
        nodes: int = 1,
        queue: int = 0,
        changes: dict[str, Any] | None = None,
    ) -> None:
        self.rng = random.Random(seed)
        self.nodes, self.queue, self.folder = (
            nodes,
            queue,
            folder,
        )  # a Job waits in the queue for up to so many seconds
        self.cluster = Cluster(self.rng)
        self.store = LocalStore(folder / "store")
        self.turn = threading.Semaphore(0)
        self.on_call: CallHook = lambda *_: None
        self.planned: list[tuple[float, Callable[[], None]]] = []
        """What people do, and when."""
        self.away_until = 0.0
        self.created: list[tuple[str, str, str]] = []
        """Stage, key and name of every Job, in order."""
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
            "metadata": {"name": OWN_JOB, "labels": {"app.kubernetes.io/instance": "r"}},
            "spec": {"backoffLimit": 1000},
        }
        self.cluster.added(self.cluster.jobs, own)
        self.cluster.added(self.cluster.config_maps, {"metadata": {"name": CONFIG_MAP}})

    def time(self) -> float:
        """The simulated clock."""
        return self.cluster.now

    def configured(self, changes: dict[str, Any]) -> RunFile:
        """A run of three stages: one that only writes, one of rows, one that trains."""
        run = {"name": "t", "base_model": str(self.folder / "model"), "method": "lora"}
        run["prepare"] = {"sources": [{"path": str(self.folder / "rows.jsonl")}]}
        tree = {"run": run, "cluster": {"store": "s3://bucket/x"}, "pipeline": {"until": "sft"}}
        return validate(merge(tree, changes))

    # ---- people, processes

    def submit(self, run_file: RunFile | None = None, overlap_s: float = 0.0) -> None:
        """`helm upgrade --install`: another orchestrator, and soon an end of the one before."""
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
        """SIGTERM to an orchestrator: it hands the lease over if it can, and is gone."""
        if not process.over:
            process.doomed = True

    def pause(self, paused: bool) -> None:
        """`medjob pause` and `medjob resume`."""
        annotations = self.cluster.config_maps[CONFIG_MAP]["metadata"].setdefault("annotations", {})
        if paused:
            annotations[PAUSED] = "true"
        else:
            annotations.pop(PAUSED, None)

    def admit(self, job: str, admitted: bool) -> None:
        """What a queue does."""
        if job in self.cluster.jobs and not finished(self.cluster.jobs[job]):
            self.cluster.jobs[job]["spec"]["suspend"] = not admitted

    def _store_hook(self, moment: Moment, *_: Any) -> None:
        if moment == "before" and self.cluster.now < self.away_until:
            raise RetryError("the store is away")

    # ---- time

    def run(self, limit_s: float = 6000) -> str | MedjobError:
        """Go on until the current orchestrator's run has ended: what it said, or why it failed."""
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
                outcome = self._let(self.rng.choice(ready))
                if outcome is not None:
                    return outcome
            raise AssertionError(f"not ended after {limit_s} s: {self.cluster.jobs}")
        finally:
            self.on_call = lambda *_: None
            for process in self.processes:
                process.doomed = True
                if not process.over:
                    process.go.release()
                    process.join()

    def _let(self, process: OrchestratorProcess) -> str | MedjobError | None:
        process.go.release()
        self.turn.acquire()
        if not process.over:
            return None
        if isinstance(process.outcome, Died):
            self.deaths += 1
            if process is self.current:  # its Job starts another pod
                self.current = self._started(process.run_file, process.submission)
                self.current.wake = self.cluster.now + self.rng.randint(1, 20)
            return None
        if isinstance(process.outcome, Exception) and not isinstance(process.outcome, MedjobError):
            raise process.outcome
        return process.outcome if process is self.current else None

    def tick(self) -> None:
        """One second of everything but the orchestrators."""
        for at, act in [user for user in self.planned if user[0] <= self.cluster.now]:
            self.planned.remove((at, act))
            act()
        for at, pod in [back for back in self.workload.rejoin if back[0] <= self.cluster.now]:
            self.workload.rejoin.remove((at, pod))
            if self.cluster.node_of(pod).state == "cut":
                self.cluster.change_node(pod, "up")
        self.cluster.tick()
        self.check()

    # ---- what must hold

    def active(self) -> list[Object]:
        """Stages' Jobs that may still do something."""
        jobs = (job for name, job in self.cluster.jobs.items() if name != OWN_JOB)
        return [
            job for job in jobs if not finished(job) and "deletionTimestamp" not in job["metadata"]
        ]

    def check(self) -> None:
        """At every moment: one active Job, and one Job with pods that are in reach."""
        active = [job["metadata"]["name"] for job in self.active()]
        assert len(active) <= 1, f"active at once: {active}"
        living = {
            pod["metadata"]["ownerReferences"][0]["uid"]
            for pod in self.cluster.pods.values()
            if self._lives(pod)
        }
        assert len(living) <= 1, (
            f"pods of several Jobs live at once: {[p for p, pod in self.cluster.pods.items() if self._lives(pod)]}"
        )

    def _lives(self, pod: Object) -> bool:
        return not ended(pod) and self.cluster.node_of(pod["metadata"]["name"]).since == 0.0

    def job_created(self, process: OrchestratorProcess, job: Object) -> None:
        """When a Job is made: its inputs are there, and no attempt of this name was ever seen at work."""
        labels = job["metadata"]["labels"]
        stage = labels[observe.STAGE]
        pipeline = Pipeline(process.run_file, self.store)
        for earlier in STAGES[: [s.name for s in STAGES].index(stage)]:
            assert pipeline.artifact(earlier).manifest() is not None, (
                f"{stage} before {earlier} is published"
            )
        begun = f"t/orchestrator/{stage}/{labels[observe.KEY]}/a{int(labels[observe.ATTEMPT]):04d}.begun.json"
        assert self.store.get(begun) is None, f"{job['metadata']['name']} is made twice"
        self.created.append((stage, labels[observe.KEY], job["metadata"]["name"]))
        if self.queue:
            self.planned.append(
                (
                    self.cluster.now + self.rng.randint(0, self.queue),
                    lambda: self.admit(job["metadata"]["name"], True),
                )
            )

    def digests(self) -> dict[str, str]:
        """What is published under the current configuration, by stage."""
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
        """Those of the run."""
        return [stage for stage in STAGES if stage.name in ("fetch", "prepare", "sft")]
