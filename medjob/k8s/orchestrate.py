"""`medjob orchestrate`: walks the line on a cluster, one stage's Job after the other.

It keeps no state: what is published, the verdicts on attempts and the Jobs themselves say where the run stands, so it may be
killed at any moment and started again. Each `step` looks, and does at most one thing.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from medjob.artifact import Artifact
from medjob.config import Job as Config
from medjob.errors import ConfigError, InputError, RetryError
from medjob.files import fingerprint
from medjob.k8s import memory, observe
from medjob.k8s.api import AlreadyExists, Api
from medjob.k8s.lease import Lease
from medjob.k8s.memory import Memory
from medjob.k8s.observe import Job, Pod, View
from medjob.k8s.report import stage_row
from medjob.k8s.verdict import Again, Stop, Verdict, decide, judge
from medjob.k8s.watchdog import Watchdog
from medjob.keys import Look
from medjob.runner import Line
from medjob.stage import STAGES, Stage, get_stage

PAUSED = "medjob/paused"
OVERDUE_S = 60.0  # a pod that is still there so long after its grace has no node that could end it
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Release:
    """Which release this is, and by what name its objects go."""

    name: str
    instance: str
    submission: str
    """Identity of this orchestrator's own Job: a new submission has new budgets."""

    @property
    def config_map(self) -> str:
        """The ConfigMap that owns every stage's Job."""
        return f"{self.name}-pipeline"

    @property
    def selector(self) -> str:
        """Labels of every stage's Job."""
        return f"app.kubernetes.io/instance={self.instance},{observe.MANAGED}"


@dataclass(frozen=True, slots=True)
class Turn:
    """What one step found or did."""

    state: str
    """waiting, running, paused, done or failed."""
    text: str
    stage: str = ""
    code: int = 0


@dataclass(slots=True)
class Orchestrator:
    """Walks one run."""

    config: Config
    line: Line
    api: Api
    release: Release
    manifests: Mapping[str, dict[str, Any]]
    """Each stage's Job as Helm rendered it."""
    lease: Lease
    memory: Memory = field(init=False)
    watchdog: Watchdog = field(init=False)
    clock: Callable[[], float] = time.time
    _look: Look = field(init=False)
    _published: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._look = self.line.look()
        self.memory = Memory(self.line.store, self.config.run.name)
        self.watchdog = Watchdog(self.api, self.config.pipeline, self.clock)

    @property
    def stages(self) -> Sequence[Stage]:
        """Those that the run is to walk."""
        return STAGES[: STAGES.index(get_stage(self.config.pipeline.until)) + 1]

    def rows(self) -> list[dict[str, Any]]:
        """How each stage stands, for people."""
        self._look = self.line.look()
        view, rows = self._view(), []
        for stage in self.stages:
            artifact = self._artifact(stage)
            key = self._key(stage, artifact)
            rows.append(stage_row(self.line, stage.name, artifact, self.memory.history(stage.name, key), view, self.clock()))
        return rows

    def step(self) -> Turn:
        """Look, and do the next thing.

        Raises:
            RetryError: the store or the API server is away; the next step may find it.
        """
        owner = self.api.config_map(self.release.config_map)
        if owner is None:
            raise ConfigError(
                f"{self.release.config_map}: the ConfigMap of this release is gone", "helm uninstall was called, or install it again"
            )
        self._look = self.line.look()
        view = self._view()
        for stage in self.stages:
            artifact = self._artifact(stage)
            if artifact is None or not self._is_published(stage, artifact):
                return self._advance(stage, artifact, view, owner)
        return self._others(view) or Turn(
            "done", f"{self.config.run.name}: everything up to {self.stages[-1].name} is published and verified"
        )

    def _view(self) -> View:
        return observe.view_of(self.api.jobs(self.release.selector), self.api.pods(f"app.kubernetes.io/instance={self.release.instance}"))

    def _key(self, stage: Stage, artifact: Artifact | None) -> str:
        """The stage's key; while that cannot be known, what the run file says stands for it."""
        return artifact.key if artifact else fingerprint({"stage": stage.name, "run": self.config.run.model_dump(mode="json")})

    # ---- one stage

    def _advance(self, stage: Stage, artifact: Artifact | None, view: View, owner: Mapping[str, Any]) -> Turn:
        key = self._key(stage, artifact)
        mine = [job for job in view.jobs if job.stage == stage.name and job.key == key[:12]]
        paused = PAUSED in owner["metadata"].get("annotations", {})
        active = next((job for job in mine if job.active), None)
        if active is not None:
            return self._attend(stage, key, artifact, active, paused)
        history = self._settle(stage, key, artifact, mine)
        busy = self._others(view) or self._ending(view)
        if busy:
            return busy
        if paused:
            return Turn("paused", f"{stage.name}: paused; medjob resume goes on", stage.name)
        match decide([verdict for verdict in history if verdict.submission == self.release.submission], self.config.pipeline):
            case Stop(code, reason):
                return Turn("failed", f"{stage.name}: {reason}", stage.name, code)
            case Again(at) if at > self.clock():
                return Turn("waiting", f"{stage.name}: next attempt in {at - self.clock():.0f} s: {history[-1].reason}", stage.name)
        return self._create(stage, key, max([0, *(v.attempt for v in history), *(job.attempt for job in mine)]) + 1, owner)

    def _attend(self, stage: Stage, key: str, artifact: Artifact | None, job: Job, paused: bool) -> Turn:
        """Look after an attempt that runs."""
        if paused:
            return self._end(stage, key, artifact, job, "paused", 0, "medjob pause")
        trouble = self.watchdog.look(job, lambda: memory.heartbeat(artifact) if artifact else b"")
        if trouble is not None:
            return self._end(stage, key, artifact, job, trouble.kind, trouble.code, trouble.reason)
        return Turn("running", f"{stage.name}: attempt {job.attempt} ({job.name})", stage.name)

    def _end(self, stage: Stage, key: str, artifact: Artifact | None, job: Job, kind: Any, code: int, reason: str) -> Turn:
        """End an attempt that would not end, or should. The verdict first: were we to die in between, it would look like a preemption."""
        reach = memory.reach(artifact) if artifact else 0
        now = self.clock()
        verdict = Verdict(job.attempt, kind, code, reason, reach, job.name, job.submission, now, now - job.created_at)
        self._write(lambda: self.memory.record(stage.name, key, verdict))
        self._write(lambda: self.api.delete_job(job.name))
        return Turn("waiting", f"{stage.name}: attempt {job.attempt} is stopped: {reason}", stage.name)

    def _settle(self, stage: Stage, key: str, artifact: Artifact | None, mine: Sequence[Job]) -> list[Verdict]:
        """The verdicts on all attempts that have ended, those just now included."""
        history = self.memory.history(stage.name, key)
        known = {verdict.attempt for verdict in history}
        for job in mine:
            if job.attempt not in known and not job.active:
                record = memory.record_of(artifact, job) if artifact else None
                verdict = judge(job, record, memory.reach(artifact) if artifact else 0, self.clock())
                self._write(lambda verdict=verdict: self.memory.record(stage.name, key, verdict))  # type: ignore[misc]
                _log.warning("%s: attempt %d ended: %s: %s", stage.name, verdict.attempt, verdict.kind, verdict.reason)
        return self.memory.history(stage.name, key) if {job.attempt for job in mine} - known else history

    def _others(self, view: View) -> Turn | None:
        """What to do about Jobs of another configuration that still run; None if there are none."""
        for job in view.jobs:
            if job.active and self._key_now(job.stage) != job.key:
                if self.config.pipeline.on_change == "replace":
                    self._write(lambda job=job: self.api.delete_job(job.name))  # type: ignore[misc]
                    return Turn("waiting", f"{job.stage}: {job.name} belongs to an earlier configuration and is stopped", job.stage)
                return Turn(
                    "running",
                    f"{job.stage}: {job.name} belongs to an earlier configuration and may end first (pipeline.onChange)",
                    job.stage,
                )
        return None

    def _key_now(self, stage: str) -> str:
        artifact = self._artifact(get_stage(stage))
        return artifact.key[:12] if artifact else ""

    def _ending(self, view: View) -> Turn | None:
        """Whether pods of earlier attempts still run: a second writer would be fenced off, and would waste its GPUs."""
        stages = {stage.name for stage in STAGES}
        alive = next((pod for pod in view.pods if pod.stage in stages and self._lives(pod)), None)
        return Turn("waiting", f"{alive.name}: an earlier attempt's pod has not ended yet") if alive else None

    def _lives(self, pod: Pod) -> bool:
        return not pod.ended and (pod.deleted_at is None or self.clock() < pod.deleted_at + OVERDUE_S)

    def _create(self, stage: Stage, key: str, attempt: int, owner: Mapping[str, Any]) -> Turn:
        manifest = copy.deepcopy(self.manifests[stage.name])
        meta = manifest["metadata"]
        meta["name"] = f"{meta['name']}-{key[:8]}-a{attempt}"
        meta["labels"] |= {observe.KEY: key[:12], observe.ATTEMPT: str(attempt), observe.SUBMISSION: self.release.submission}
        # Without blockOwnerDeletion: setting it needs a right on finalizers where OwnerReferencesPermissionEnforcement is on.
        reference = {"apiVersion": "v1", "kind": "ConfigMap", "name": self.release.config_map, "uid": owner["metadata"]["uid"]}
        meta["ownerReferences"] = [reference]
        try:
            self._write(lambda: self.api.create_job(manifest))
        except AlreadyExists:  # the answer to an earlier try was lost
            _log.debug("%s is there already", meta["name"])
        return Turn("running", f"{stage.name}: attempt {attempt} begins ({meta['name']})", stage.name)

    def _write(self, change: Callable[[], Any]) -> None:
        """Change something, as long as nobody else may."""
        if not self.lease.held:
            raise RetryError("another orchestrator may be at work: the lease is not ours")
        change()

    # ---- what is published

    def _artifact(self, stage: Stage) -> Artifact | None:
        """Where the stage's artifact will be; None while that cannot be known (`fetch` of what only the stages' image holds)."""
        try:
            return self._look.artifact(stage)
        except InputError:
            return None

    def _is_published(self, stage: Stage, artifact: Artifact) -> bool:
        if self._published.get(stage.name) == artifact.key:
            return True
        manifest = self._look.manifest(artifact)
        if manifest is None:
            return False
        artifact.verify(manifest)
        self._published[stage.name] = artifact.key
        return True
