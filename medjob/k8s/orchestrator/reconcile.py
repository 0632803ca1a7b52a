"""`medjob orchestrate`: walks the line on a cluster, one stage's Job after the other.

It keeps no state: what is published, the verdicts on attempts and the Jobs themselves say where the run stands, so it may be
killed at any moment and started again. Each `step` looks, and does at most one thing.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from medjob.artifacts.artifact import Artifact
from medjob.config import RunFile
from medjob.errors import ConfigError, InputError, RetryError
from medjob.k8s import observe
from medjob.k8s.api import AlreadyExists, Api
from medjob.k8s.observe import Job, Pod, View
from medjob.k8s.orchestrator import history as attempt_history
from medjob.k8s.orchestrator.history import AttemptHistory
from medjob.k8s.orchestrator.lease import Lease, owner_reference
from medjob.k8s.orchestrator.retry_policy import GiveUp, Kind, Outcome, Retry, classify, next_action
from medjob.k8s.orchestrator.watchdog import Watchdog
from medjob.k8s.report import stage_row
from medjob.pipeline.runner import Pipeline
from medjob.pipeline.snapshot import Snapshot
from medjob.runtime.files import fingerprint
from medjob.stage import STAGES, Stage, get_stage

PAUSED = "medjob/paused"
LINGER_S = 60.0  # what a Job gets to end once its stage is published
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
class StepResult:
    """What one step found or did."""

    state: str
    """waiting, running, paused, done or failed."""
    text: str
    stage: str = ""
    code: int = 0


@dataclass(slots=True)
class Orchestrator:
    """Walks one run."""

    run_file: RunFile
    pipeline: Pipeline
    api: Api
    release: Release
    manifests: Mapping[str, dict[str, Any]]
    """Each stage's Job as Helm rendered it."""
    lease: Lease
    attempts: AttemptHistory = field(init=False)
    watchdog: Watchdog = field(init=False)
    clock: Callable[[], float] = time.time
    saved: dict[str, tuple[int, float]] = field(default_factory=dict)
    """The newest stored step of each stage, and when it was first seen, perhaps by the orchestrator before."""
    _snapshot: Snapshot = field(init=False)
    _published: dict[str, str] = field(default_factory=dict)
    _lingering: dict[str, float] = field(default_factory=dict)
    _term: int = 0

    def __post_init__(self) -> None:
        self._snapshot = self.pipeline.snapshot()
        self.attempts = AttemptHistory(self.pipeline.store, self.run_file.run.name)
        self.watchdog = Watchdog(self.api, self.run_file.pipeline, self.clock)

    @property
    def stages(self) -> Sequence[Stage]:
        """Those that the run is to walk."""
        return STAGES[: STAGES.index(get_stage(self.run_file.pipeline.until)) + 1]

    def rows(self) -> list[dict[str, Any]]:
        """How each stage stands, for people."""
        self._snapshot = self.pipeline.snapshot()
        view, rows = self._view(), []
        for stage in self.stages:
            artifact = self._known_artifact(stage)
            key = self._key(stage, artifact)
            row = stage_row(
                self.pipeline,
                stage.name,
                artifact,
                self.attempts.history(stage.name, key),
                view,
                self.clock(),
            )
            if row.get("saved"):
                if self.saved.get(stage.name, (0, 0.0))[0] != row["saved"]:
                    self.saved[stage.name] = (row["saved"], self.clock())
                row["saved_at"] = self.saved[stage.name][1]
            rows.append(row)
        return rows

    def step(self) -> StepResult:
        """Look, and do the next thing.

        Raises:
            RetryError: the store or the API server is away; the next step may find it.
        """
        self._term = self.lease.term
        owner = self.api.config_map(self.release.config_map)
        if owner is None:
            raise ConfigError(
                f"{self.release.config_map}: the ConfigMap of this release is gone",
                "helm uninstall was called, or install it again",
            )
        self._snapshot = self.pipeline.snapshot()
        view = self._view()
        for stage in self.stages:
            artifact = self._artifact(stage)
            if artifact is None or not self._is_published(stage, artifact):
                return self._advance(stage, artifact, view, owner)
        text = f"{self.run_file.run.name}: everything up to {self.stages[-1].name} is published and verified"
        return self._others(view, _is_paused(owner)) or StepResult("done", text)

    def _view(self) -> View:
        return observe.view_of(
            self.api.jobs(self.release.selector),
            self.api.pods(f"app.kubernetes.io/instance={self.release.instance}"),
        )

    def _key(self, stage: Stage, artifact: Artifact | None) -> str:
        """The stage's key; while that cannot be known, what the run file says stands for it."""
        return (
            artifact.key
            if artifact
            else fingerprint(
                {"stage": stage.name, "run": self.run_file.run.model_dump(mode="json")}
            )
        )

    # ---- one stage

    def _advance(
        self, stage: Stage, artifact: Artifact | None, view: View, owner: Mapping[str, Any]
    ) -> StepResult:
        key = self._key(stage, artifact)
        mine = [job for job in view.jobs if job.stage == stage.name and job.key == key[:12]]
        paused = _is_paused(owner)
        active = next((job for job in mine if job.active), None)
        if active is not None:
            running = StepResult(
                "running", f"{stage.name}: attempt {active.attempt} ({active.name})", stage.name
            )
            return self._attend(active, artifact, paused) or running
        history = self._settle(stage, key, artifact, mine, view)
        busy = self._others(view, paused) or self._ending(view)
        if busy:
            return busy
        if paused:
            return StepResult("paused", f"{stage.name}: paused; medjob resume goes on", stage.name)
        match next_action(
            [outcome for outcome in history if outcome.submission == self.release.submission],
            self.run_file.pipeline,
        ):
            case GiveUp(code, reason):
                return StepResult("failed", f"{stage.name}: {reason}", stage.name, code)
            case Retry(at) if at > self.clock():
                return StepResult(
                    "waiting",
                    f"{stage.name}: next attempt in {at - self.clock():.0f} s: {history[-1].reason}",
                    stage.name,
                )
        return self._create(
            stage,
            key,
            max([0, *(v.attempt for v in history), *(job.attempt for job in mine)]) + 1,
            owner,
        )

    def _attend(self, job: Job, artifact: Artifact | None, paused: bool) -> StepResult | None:
        """Look after an attempt that runs; None while all is well."""
        outcome = self.attempts.begin(job.stage, job.key, job) if self._may_write() else None
        if outcome is not None:  # whoever decided on it did not get so far as to end it
            return self._end(job, artifact, outcome.kind, outcome.code, outcome.reason)
        if paused:
            return self._end(job, artifact, "paused", 0, "medjob pause")
        problem = self.watchdog.look(
            job, lambda: attempt_history.heartbeat(artifact) if artifact else b""
        )
        return (
            self._end(job, artifact, problem.kind, problem.code, problem.reason)
            if problem
            else None
        )

    def _end(
        self, job: Job, artifact: Artifact | None, kind: Kind, code: int, reason: str
    ) -> StepResult:
        """End an attempt that would not end, or should. The verdict first: were we to die in between, it would be lost."""
        reach = attempt_history.reach(artifact) if artifact else 0
        now = self.clock()
        outcome = Outcome(
            job.attempt,
            kind,
            code,
            reason,
            reach,
            job.name,
            job.submission,
            now,
            now - (job.began_at or now),
        )
        self._write(lambda: self.attempts.record(job.stage, job.key, outcome))
        self._write(lambda: self.api.delete_job(job.name))
        return StepResult(
            "waiting", f"{job.stage}: attempt {job.attempt} is stopped: {reason}", job.stage
        )

    def _settle(
        self, stage: Stage, key: str, artifact: Artifact | None, mine: Sequence[Job], view: View
    ) -> list[Outcome]:
        """The verdicts on all attempts that have ended, those just now included."""
        known = {outcome.attempt for outcome in self.attempts.history(stage.name, key)}
        for job in (*mine, *self._deleted(stage, key, view)):
            still = job.state == "deleted" and any(self._lives(pod) for pod in job.pods)
            if job.attempt not in known and not job.active and not still:
                record = attempt_history.record_of(artifact, job.name) if artifact else None
                outcome = classify(
                    job, record, attempt_history.reach(artifact) if artifact else 0, self.clock()
                )
                self._write(lambda outcome=outcome: self.attempts.record(stage.name, key, outcome))  # type: ignore[misc]
                _log.warning(
                    "%s: attempt %d ended: %s: %s",
                    stage.name,
                    outcome.attempt,
                    outcome.kind,
                    outcome.reason,
                )
        return self.attempts.history(stage.name, key)

    def _deleted(self, stage: Stage, key: str, view: View) -> Iterator[Job]:
        """Attempts that were at work and whose Jobs are gone: deleted by hand, or by their time to live."""
        names = {job.name for job in view.jobs}
        for begun in self.attempts.begun(stage.name, key):
            if begun.job not in names:
                pods = tuple(pod for pod in view.pods if pod.job == begun.job)
                said = "its Job was deleted, and left no record"
                labels = (begun.job, stage.name, key[:12], begun.attempt, begun.submission)
                yield Job(*labels, 1, begun.at, begun.at, "deleted", "", said, pods)

    def _others(self, view: View, paused: bool) -> StepResult | None:
        """What to do about Jobs other than the one that is due; None if there are none."""
        for job in view.jobs:
            if job.active:
                return self._finish(job) if self._has_published(job) else self._outlive(job, paused)
        return None

    def _has_published(self, job: Job) -> bool:
        """Whether what it is for is published. (It bears the stage's own key, or what stood for it while that could not be known.)"""
        key = self._published.get(job.stage)
        return key is not None and job.key in (key[:12], self._key(get_stage(job.stage), None)[:12])

    def _finish(self, job: Job) -> StepResult:
        """Its stage is published: it gets a while to end. One that a queue holds, or whose node is gone, would never."""
        since = self._lingering.setdefault(job.name, self.clock())
        if self.clock() - since >= LINGER_S:
            self._write(lambda: self.api.delete_job(job.name))
        return StepResult(
            "waiting", f"{job.stage}: is published; {job.name} has not ended yet", job.stage
        )

    def _outlive(self, job: Job, paused: bool) -> StepResult:
        """It belongs to an earlier configuration."""
        artifact = Artifact(self.pipeline.store, self.run_file.run.name, job.stage, job.key)
        if self.run_file.pipeline.on_change == "replace":
            return self._end(
                job,
                artifact,
                "replaced",
                0,
                "it belongs to an earlier configuration (pipeline.onChange)",
            )
        text = f"{job.stage}: {job.name} belongs to an earlier configuration and may end first (pipeline.onChange)"
        return self._attend(job, artifact, paused) or StepResult("running", text, job.stage)

    def _ending(self, view: View) -> StepResult | None:
        """Whether pods of earlier attempts still run: a second writer would be fenced off, and would waste its GPUs."""
        stages = {stage.name for stage in STAGES}
        alive = next((pod for pod in view.pods if pod.stage in stages and self._lives(pod)), None)
        return (
            StepResult("waiting", f"{alive.name}: an earlier attempt's pod has not ended yet")
            if alive
            else None
        )

    def _lives(self, pod: Pod) -> bool:
        return not pod.ended and not pod.overdue(self.clock())

    def _create(self, stage: Stage, key: str, attempt: int, owner: Mapping[str, Any]) -> StepResult:
        manifest = copy.deepcopy(self.manifests[stage.name])
        meta = manifest["metadata"]
        meta["name"] = f"{meta['name']}-{key[:8]}-a{attempt}"
        meta["labels"] |= {
            observe.KEY: key[:12],
            observe.ATTEMPT: str(attempt),
            observe.SUBMISSION: self.release.submission,
        }
        meta["ownerReferences"] = [owner_reference(owner)]
        try:
            self._write(lambda: self.api.create_job(manifest))
        except AlreadyExists:  # the answer to an earlier try was lost
            _log.debug("%s is there already", meta["name"])
        return StepResult(
            "running", f"{stage.name}: attempt {attempt} begins ({meta['name']})", stage.name
        )

    def _write(self, change: Callable[[], Any]) -> None:
        """Change something, as long as nobody else may, nor might have since this step began to look."""
        if not self._may_write():
            raise RetryError("another orchestrator may be at work: the lease is not ours")
        change()

    def _may_write(self) -> bool:
        return self.lease.keep() and self.lease.term == self._term

    # ---- what is published

    def _artifact(self, stage: Stage) -> Artifact | None:
        """Where the stage's artifact will be; None while that cannot be known (`fetch` of what only the stages' image holds).

        Raises:
            InputError: an input is damaged.
        """
        try:
            return self._snapshot.artifact(stage)
        except InputError:
            if stage is not STAGES[0]:
                raise
            return None

    def _known_artifact(self, stage: Stage) -> Artifact | None:
        with contextlib.suppress(InputError):  # its inputs are not published yet
            return self._artifact(stage)
        return None

    def _is_published(self, stage: Stage, artifact: Artifact) -> bool:
        if self._published.get(stage.name) == artifact.key:
            return True
        manifest = self._snapshot.manifest(artifact)
        if manifest is None:
            return False
        artifact.verify(manifest)
        self._published[stage.name] = artifact.key
        return True


def _is_paused(owner: Mapping[str, Any]) -> bool:
    return PAUSED in owner["metadata"].get("annotations", {})
