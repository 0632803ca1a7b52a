"""One step of `medjob orchestrate`: read the state of a run, then do at most one thing.

The orchestrator keeps no state. It derives the state of the run from the published artifacts, the
attempt history and the Jobs, so it can be killed at any time and started again.
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
from medjob.k8s.orchestrator.history import (
    AttemptHistory,
    exit_record,
    heartbeat,
    stored_progress,
)
from medjob.k8s.orchestrator.lease import Lease, owner_reference
from medjob.k8s.orchestrator.outcome import Cause, Outcome, classify, outcome_of
from medjob.k8s.orchestrator.retry_policy import GiveUp, Retry, next_action
from medjob.k8s.orchestrator.watchdog import Watchdog
from medjob.k8s.report import stage_row
from medjob.pipeline.runner import Pipeline
from medjob.pipeline.snapshot import Snapshot
from medjob.runtime.files import fingerprint
from medjob.stage import STAGES, Stage, get_stage, stages_of

PAUSED = "medjob/paused"
LINGER_S = 60.0  # how long a Job may take to end after its stage is published
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Release:
    """The Helm release of the run, and the names of its objects."""

    name: str
    instance: str
    submission: str
    """Identifies the orchestrator's own Job. Each submission starts with new retry budgets."""

    @property
    def config_map(self) -> str:
        """Name of the ConfigMap that owns the Jobs of all stages."""
        return f"{self.name}-pipeline"

    @property
    def selector(self) -> str:
        """Label selector of all objects of the release."""
        return f"{observe.RELEASE}={self.instance}"


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step found or did."""

    state: str
    """waiting, running, paused, done or failed."""
    text: str
    stage: str = ""
    code: int = 0


@dataclass(frozen=True, slots=True)
class UnpublishedStage:
    """The first stage of the run whose artifact is not published yet."""

    stage: Stage
    key: str
    artifact: Artifact | None
    """None while the key of `fetch` is unknown; see `Orchestrator._artifact`."""

    @property
    def name(self) -> str:
        """Name of the stage."""
        return self.stage.name


@dataclass(slots=True)
class Orchestrator:
    """Runs the pipeline of one run on a cluster."""

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
    """Each stage's newest stored step, and when this or an earlier orchestrator first saw it."""
    _snapshot: Snapshot = field(init=False)
    _published: dict[str, str] = field(default_factory=dict)
    """Key of each stage whose artifact is published, and whose files were checked."""
    _lingering: dict[str, float] = field(default_factory=dict)
    """When each Job or pod that outlives its stage was first seen."""
    _term: int = 0
    """Term of the lease in which the current step started."""

    def __post_init__(self) -> None:
        self._snapshot = self.pipeline.snapshot()
        self.attempts = AttemptHistory(self.pipeline.store, self.run_file.run.name)
        self.watchdog = Watchdog(self.api, self.run_file.pipeline, self.clock)

    @property
    def stages(self) -> Sequence[Stage]:
        """The stages of the run, in order."""
        return stages_of(self.run_file.run, self.run_file.pipeline.until)

    def step(self) -> StepResult:
        """Read the state of the run and do the next thing.

        Raises:
            ConfigError: the release was uninstalled.
            RetryError: the store or the API server is unavailable; a later step may succeed.
        """
        self._term = self.lease.term
        owner = self.api.config_map(self.release.config_map)
        if owner is None:
            raise ConfigError(
                f"the ConfigMap {self.release.config_map} of this release is gone",
                "helm uninstall deletes it; install the release again",
            )
        paused = PAUSED in owner["metadata"].get("annotations", {})
        self._snapshot = self.pipeline.snapshot()
        view = self._view()
        current = self._first_unpublished()
        if current is None:
            return self._handle_other_jobs(view, paused) or self._done()
        return self._advance(current, view, owner, paused)

    def stage_rows(self) -> list[dict[str, Any]]:
        """Return the status of each stage, for `medjob status`."""
        self._snapshot = self.pipeline.snapshot()
        view = self._view()
        rows = []
        for stage in self.stages:
            artifact = self._artifact_if_known(stage)
            outcomes = self.attempts.outcomes(stage.name, self._key(stage, artifact))
            row = stage_row(self.pipeline, stage.name, artifact, outcomes, view, self.clock())
            if row.get("saved"):
                row["saved_at"] = self._first_seen(stage, row["saved"])
            rows.append(row)
        return rows

    def _first_seen(self, stage: Stage, saved: int) -> float:
        if self.saved.get(stage.name, (0, 0.0))[0] != saved:
            self.saved[stage.name] = (saved, self.clock())
        return self.saved[stage.name][1]

    def _view(self) -> View:
        jobs = self.api.jobs(self.release.selector)
        attempts = (job for job in jobs if observe.ATTEMPT in job["metadata"]["labels"])
        return observe.view_of(attempts, self.api.pods(self.release.selector))

    def _done(self) -> StepResult:
        last = self.stages[-1].name
        text = f"{self.run_file.run.name}: all stages up to {last} are published"
        return StepResult("done", text)

    # ---- the first unpublished stage

    def _advance(
        self, current: UnpublishedStage, view: View, owner: Mapping[str, Any], paused: bool
    ) -> StepResult:
        """Supervise the attempt of the first unpublished stage, or decide what follows it."""
        key = current.key[:12]
        jobs = [job for job in view.jobs if job.stage == current.name and job.key == key]
        active = next((job for job in jobs if job.active), None)
        if active is not None:
            text = f"{current.name}: attempt {active.attempt} ({active.name})"
            running = StepResult("running", text, current.name)
            return self._supervise(active, current.artifact, paused) or running
        outcomes = self._record_ended_attempts(current, jobs, view)
        blocked = self._handle_other_jobs(view, paused) or self._wait_for_pods(view)
        if blocked:
            return blocked
        if paused:
            text = f"{current.name}: paused; medjob resume continues the run"
            return StepResult("paused", text, current.name)
        not_yet = self._apply_retry_policy(current, outcomes)
        if not_yet:
            return not_yet
        numbers = [*(outcome.attempt for outcome in outcomes), *(job.attempt for job in jobs)]
        return self._create_job(current, max(numbers, default=0) + 1, owner)

    def _supervise(self, job: Job, artifact: Artifact | None, paused: bool) -> StepResult | None:
        """Stop an active attempt if it must end. Return None if it may continue."""
        decided = self.attempts.record_start(job.stage, job.key, job) if self._may_write() else None
        if decided is not None:  # an orchestrator recorded the outcome, but died before stopping it
            return self._stop(job, artifact, (decided.kind, decided.code, decided.reason))
        if job.finished:
            return self._end_finished(job, artifact)
        if paused:
            return self._stop(job, artifact, ("paused", 0, "medjob pause"))
        problem = self.watchdog.check(job, lambda: heartbeat(artifact) if artifact else b"")
        if problem is None:
            return None
        return self._stop(job, artifact, (problem.kind, problem.code, problem.reason))

    def _end_finished(self, job: Job, artifact: Artifact | None) -> StepResult:
        """End an attempt whose pods are kept alive by other containers, such as a mesh's proxy.

        Pods without such containers end by themselves within this time, and keep their logs.
        """
        if self._lingers(job.name):
            record = exit_record(artifact, job.name) if artifact else None
            return self._stop(job, artifact, classify(job, record))
        text = f"{job.stage}: attempt {job.attempt} has ended; waiting for its pods to end"
        return StepResult("waiting", text, job.stage)

    def _lingers(self, name: str) -> bool:
        """Whether a Job or pod has lived on for LINGER_S since the first call with its name."""
        since = self._lingering.setdefault(name, self.clock())
        return self.clock() - since >= LINGER_S

    def _stop(self, job: Job, artifact: Artifact | None, cause: Cause) -> StepResult:
        """Stop an active attempt.

        The outcome is recorded before the Job is deleted. If this process dies in between, the next
        one reads the outcome and deletes the Job.
        """
        reach = stored_progress(artifact) if artifact else 0
        outcome = outcome_of(job, cause, reach, self.clock())
        self._write(lambda: self.attempts.record_outcome(job.stage, job.key, outcome))
        self._write(lambda: self.api.delete_job(job.name))
        text = f"{job.stage}: stopping attempt {job.attempt}: {outcome.reason}"
        return StepResult("waiting", text, job.stage)

    def _record_ended_attempts(
        self, current: UnpublishedStage, jobs: Sequence[Job], view: View
    ) -> list[Outcome]:
        """Record the outcomes of attempts that have ended, and return all outcomes of the stage."""
        known = self.attempts.outcomes(current.name, current.key)
        recorded = {outcome.attempt for outcome in known}
        for job in (*jobs, *self._deleted_jobs(current, view)):
            ending = job.state == "deleted" and any(self._is_alive(pod) for pod in job.pods)
            if job.attempt not in recorded and not job.active and not ending:
                self._record_ended_attempt(current, job)
        return self.attempts.outcomes(current.name, current.key)

    def _record_ended_attempt(self, current: UnpublishedStage, job: Job) -> None:
        record = exit_record(current.artifact, job.name) if current.artifact else None
        reach = stored_progress(current.artifact) if current.artifact else 0
        outcome = outcome_of(job, classify(job, record), reach, self.clock())
        self._write(lambda: self.attempts.record_outcome(current.name, current.key, outcome))
        text = "%s: attempt %d ended (%s): %s"
        _log.warning(text, current.name, outcome.attempt, outcome.kind, outcome.reason)

    def _deleted_jobs(self, current: UnpublishedStage, view: View) -> Iterator[Job]:
        """Yield started attempts whose Job is gone: deleted by a user, or after its TTL."""
        names = {job.name for job in view.jobs}
        for started in self.attempts.started(current.name, current.key):
            if started.job not in names:
                yield Job(
                    name=started.job,
                    stage=current.name,
                    key=current.key[:12],
                    attempt=started.attempt,
                    submission=started.submission,
                    nodes=1,
                    created_at=started.at,
                    began_at=started.at,
                    state="deleted",
                    reason="",
                    message="the Job was deleted and left no record",
                    pods=tuple(pod for pod in view.pods if pod.job == started.job),
                )

    def _apply_retry_policy(
        self, current: UnpublishedStage, outcomes: Sequence[Outcome]
    ) -> StepResult | None:
        """Return the end of the run or a delay; None if an attempt may start now."""
        submission = self.release.submission
        own = [outcome for outcome in outcomes if outcome.submission == submission]
        match next_action(own, self.run_file.pipeline):
            case GiveUp(code, reason):
                return StepResult("failed", f"{current.name}: {reason}", current.name, code)
            case Retry(at) if at > self.clock():
                delay = f"next attempt in {at - self.clock():.0f} s"
                text = f"{current.name}: {delay}; the last one ended: {outcomes[-1].reason}"
                return StepResult("waiting", text, current.name)
        return None

    def _create_job(
        self, current: UnpublishedStage, attempt: int, owner: Mapping[str, Any]
    ) -> StepResult:
        manifest = copy.deepcopy(self.manifests[current.name])
        meta = manifest["metadata"]
        meta["name"] = f"{meta['name']}-{current.key[:8]}-a{attempt}"
        meta["namespace"] = self.api.namespace  # a post-renderer may have moved the release
        meta["labels"] |= {
            observe.KEY: current.key[:12],
            observe.ATTEMPT: str(attempt),
            observe.SUBMISSION: self.release.submission,
        }
        meta["ownerReferences"] = [owner_reference(owner)]
        try:
            self._write(lambda: self.api.create_job(manifest))
        except AlreadyExists:  # an earlier request succeeded, but its answer was lost
            _log.debug("Job %s already exists", meta["name"])
        text = f"{current.name}: starting attempt {attempt} ({meta['name']})"
        return StepResult("running", text, current.name)

    # ---- Jobs and pods that must end before the next attempt

    def _handle_other_jobs(self, view: View, paused: bool) -> StepResult | None:
        """Handle an active Job of another stage or configuration. Return None if there is none."""
        for job in view.jobs:
            if job.active and self._has_published(job):
                return self._wait_for_published(job)
            if job.active:
                return self._handle_outdated(job, paused)
        return None

    def _has_published(self, job: Job) -> bool:
        """Whether the artifact of the Job is published.

        A Job's label has the stage's key, or the fallback if the key was not known when the Job was
        created.
        """
        key = self._published.get(job.stage)
        if key is None:
            return False
        fallback = self._key(get_stage(job.stage), None)
        return job.key in (key[:12], fallback[:12])

    def _wait_for_published(self, job: Job) -> StepResult:
        """Wait until the Job of a published stage ends, and delete it after a while.

        A Job does not end by itself if a queue holds it, its node is lost, or another container
        keeps its pod alive.
        """
        if self._lingers(job.name):
            self._write(lambda: self.api.delete_job(job.name))
        text = f"{job.stage}: the artifact is published, but {job.name} has not ended yet"
        return StepResult("waiting", text, job.stage)

    def _handle_outdated(self, job: Job, paused: bool) -> StepResult:
        """Stop or supervise a Job of an earlier configuration, as pipeline.onChange demands."""
        artifact = Artifact(self.pipeline.store, self.run_file.run.name, job.stage, job.key)
        if self.run_file.pipeline.on_change == "replace":
            reason = "it belongs to an earlier configuration (pipeline.onChange: replace)"
            return self._stop(job, artifact, ("replaced", 0, reason))
        text = (
            f"{job.stage}: waiting for {job.name} of an earlier configuration to end "
            "(pipeline.onChange: wait)"
        )
        return self._supervise(job, artifact, paused) or StepResult("running", text, job.stage)

    def _wait_for_pods(self, view: View) -> StepResult | None:
        """Wait for pods of earlier attempts. The store would fence them off, but they use GPUs."""
        names = {stage.name for stage in STAGES}
        for pod in view.pods:
            if pod.stage in names and self._is_alive(pod):
                text = f"waiting for pod {pod.name} of an earlier attempt to end"
                return StepResult("waiting", text)
        return None

    def _is_alive(self, pod: Pod) -> bool:
        """Whether a pod may still work or hold a GPU.

        A pod that nobody deletes may be kept by another container. It is not waited for.
        """
        if pod.ended or pod.overdue(self.clock()):
            return False
        return not (pod.finished and self._lingers(pod.name))

    # ---- writes

    def _write(self, change: Callable[[], Any]) -> None:
        """Make a change if this process has held the lease since the step started."""
        if not self._may_write():
            raise RetryError("another orchestrator may be active: this one does not hold the lease")
        change()

    def _may_write(self) -> bool:
        return self.lease.acquire() and self.lease.term == self._term

    # ---- artifacts

    def _first_unpublished(self) -> UnpublishedStage | None:
        for stage in self.stages:
            artifact = self._artifact(stage)
            if artifact is None or not self._is_published(stage, artifact):
                return UnpublishedStage(stage, self._key(stage, artifact), artifact)
        return None

    def _key(self, stage: Stage, artifact: Artifact | None) -> str:
        """Return the stage's key, or a fallback from the run file while the key is unknown."""
        if artifact is not None:
            return artifact.key
        run = self.run_file.run.model_dump(mode="json")
        return fingerprint({"stage": stage.name, "run": run})

    def _artifact(self, stage: Stage) -> Artifact | None:
        """Return the stage's artifact, or None while its key is unknown.

        The key of `fetch` is unknown if it depends on files that only the image of the stages has.

        Raises:
            InputError: an input is damaged.
        """
        try:
            return self._snapshot.artifact(stage)
        except InputError:
            if stage is not STAGES[0]:
                raise
            return None

    def _artifact_if_known(self, stage: Stage) -> Artifact | None:
        with contextlib.suppress(InputError):  # its inputs are not published yet
            return self._artifact(stage)
        return None

    def _is_published(self, stage: Stage, artifact: Artifact) -> bool:
        """Whether the artifact is published. It is verified once per process."""
        if self._published.get(stage.name) == artifact.key:
            return True
        manifest = self._snapshot.manifest(artifact)
        if manifest is None:
            return False
        artifact.verify(manifest)
        self._published[stage.name] = artifact.key
        return True
