"""One step of `medjob orchestrate`: read the state of a run, then do what it needs next.

A step does at most one thing, or one thing per shard if the stage has shards.

The orchestrator keeps no state. It derives the state of the run from the published artifacts, the
attempt history and the Jobs, so it can be killed at any time and started again.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from medjob.artifacts.artifact import Artifact, Manifest
from medjob.artifacts.shard import Shard, shard_of
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
from medjob.k8s.orchestrator.lease import Lease
from medjob.k8s.orchestrator.outcome import Cause, Outcome, classify, outcome_of
from medjob.k8s.orchestrator.retry_policy import GiveUp, Retry, next_action
from medjob.k8s.orchestrator.step import (
    Idle,
    StepResult,
    UnpublishedStage,
    is_other_shard,
    name_of,
    summary,
)
from medjob.k8s.orchestrator.watchdog import Watchdog
from medjob.k8s.orchestrator.work import (
    Work,
    attempted_artifact,
    count_of,
    join_work,
    shard_works,
)
from medjob.k8s.report import ShardArtifact, stage_row
from medjob.pipeline.runner import Pipeline
from medjob.pipeline.shards import shard_count
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
    _shard_manifests: dict[str, Manifest] = field(default_factory=dict)
    """Markers of published shards, by the shard's prefix."""
    _ran_at: float = 0.0
    """When a pod of the current stage ran last."""
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
            row = stage_row(
                self.pipeline,
                stage.name,
                artifact,
                self.attempts.all_outcomes(stage.name, self._key(stage, artifact)),
                view,
                self.clock(),
                self._shards_of(stage, artifact),
            )
            if row.get("saved"):
                row["saved_at"] = self._first_seen(stage, row["saved"])
            rows.append(row)
        return rows

    def _shards_of(self, stage: Stage, artifact: Artifact | None) -> list[ShardArtifact]:
        """Return the shards of a stage; empty if it has none."""
        count = shard_count(self.run_file, stage)
        if count == 1 or artifact is None:
            return []
        shards = (Shard(index, count) for index in range(count))
        artifacts = ((str(shard), shard_of(artifact, shard)) for shard in shards)
        return [ShardArtifact(name, each, self._shard_manifest(each)) for name, each in artifacts]

    def _shard_manifest(self, shard: Artifact) -> Manifest | None:
        """Return a shard's marker, which is read once; None if it is not published."""
        if shard.prefix not in self._shard_manifests:
            manifest = shard.manifest()
            if manifest is None:
                return None
            self._shard_manifests[shard.prefix] = manifest
        return self._shard_manifests[shard.prefix]

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
        """Supervise the attempts at the first unpublished stage, or decide what follows them."""
        works = self._works(current, view)
        self._end_published_shards(current, works, view)
        active, idle = self._active_and_idle(works, view)
        results = [self._supervise_active(work, job, paused, view) for work, job in active]
        if not idle:
            return summary(current, results)
        idle = [self._with_outcomes(each, view) for each in idle]
        blocked = self._handle_other_jobs(view, paused, current)
        ready = []
        for each in idle:
            result = blocked or self._reason_to_wait(each, view, paused)
            results += [result] if result else []
            ready += [] if result else [each]
        failed = next((result for result in results if result.state == "failed"), None)
        if failed:
            return self._stop_all(active, failed) or failed
        results += [self._create_job(each.work, each.next_attempt, owner) for each in ready]
        return summary(current, results)

    def _works(self, current: UnpublishedStage, view: View) -> list[Work]:
        """Return what is left to compute: the stage, its unpublished shards, or their join.

        The pod that publishes the last shard joins them. Until it ends, its Job is the join.
        """
        count = shard_count(self.run_file, current.stage)
        stage, key, artifact = current.stage, current.key, current.artifact
        if count == 1 or artifact is None:
            return [Work(stage, key, artifact)]
        shards = shard_works(stage, key, artifact, count)
        unpublished = [
            work
            for work in shards
            if work.artifact is not None and self._shard_manifest(work.artifact) is None
        ]
        if unpublished:
            return unpublished
        joining = [
            work for work in shards if any(job.active and work.owns(job) for job in view.jobs)
        ]
        return joining or [join_work(stage, key, artifact, count)]

    def _end_published_shards(
        self, current: UnpublishedStage, works: Sequence[Work], view: View
    ) -> None:
        """Delete Jobs that outlive their published shard, unless they may join the shards."""
        for job in view.jobs:
            is_left = any(work.owns(job) for work in works)
            if job.active and self._is_current(job, current) and not is_left:
                self._wait_for_published(job)

    def _is_current(self, job: Job, current: UnpublishedStage) -> bool:
        """Whether the Job computes the current artifact, in the current number of shards."""
        same_artifact = (job.stage, job.key) == (current.name, current.key[:12])
        return same_artifact and count_of(job.shard) == shard_count(self.run_file, current.stage)

    @staticmethod
    def _active_and_idle(
        works: Sequence[Work], view: View
    ) -> tuple[list[tuple[Work, Job]], list[Idle]]:
        active, idle = [], []
        for work in works:
            jobs = [job for job in view.jobs if work.owns(job)]
            running = next((job for job in jobs if job.active), None)
            if running is None:
                idle.append(Idle(work, jobs, ()))
            else:
                active.append((work, running))
        return active, idle

    def _supervise_active(self, work: Work, job: Job, paused: bool, view: View) -> StepResult:
        others = (pod for each in view.jobs if each.name != job.name for pod in each.pods)
        if any(pod.running and pod.reachable for pod in others):
            self._ran_at = self.clock()
        text = f"{work.name}: attempt {job.attempt} ({job.name})"
        running = StepResult("running", text, job.stage)
        return self._supervise(job, work.artifact, paused) or running

    def _with_outcomes(self, idle: Idle, view: View) -> Idle:
        outcomes = self._record_ended_attempts(idle.work, idle.jobs, view)
        return Idle(idle.work, idle.jobs, outcomes)

    def _reason_to_wait(self, idle: Idle, view: View, paused: bool) -> StepResult | None:
        """Return why no attempt may start now, or the end of the run; None if one may start."""
        work = idle.work
        blocked = self._wait_for_pods(view, work)
        if blocked:
            return blocked
        if paused:
            text = f"{work.name}: paused; medjob resume continues the run"
            return StepResult("paused", text, work.stage.name)
        return self._apply_retry_policy(work, idle.outcomes)

    def _supervise(self, job: Job, artifact: Artifact | None, paused: bool) -> StepResult | None:
        """Stop an active attempt if it must end. Return None if it may continue."""
        decided = self.attempts.record_start(job.stage, job.key, job) if self._may_write() else None
        if decided is not None:  # an orchestrator recorded the outcome, but died before stopping it
            return self._stop(job, artifact, (decided.kind, decided.code, decided.reason))
        if job.finished:
            return self._end_finished(job, artifact)
        if paused:
            return self._stop(job, artifact, ("paused", 0, "medjob pause"))
        beat = (lambda: heartbeat(artifact)) if artifact else (lambda: b"")
        problem = self.watchdog.check(job, beat, self._ran_at)
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
        text = f"{name_of(job)}: attempt {job.attempt} has ended; waiting for its pods to end"
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
        self._write(lambda: self.attempts.record_outcome(job.stage, job.key, outcome, job.shard))
        self._write(lambda: self.api.delete_job(job.name))
        text = f"{name_of(job)}: stopping attempt {job.attempt}: {outcome.reason}"
        return StepResult("waiting", text, job.stage)

    def _stop_all(
        self, active: Sequence[tuple[Work, Job]], failed: StepResult
    ) -> StepResult | None:
        """Stop the other shards of a stage that has failed. Return None if none is active."""
        reason = f"the stage has failed: {failed.text}"
        stopped = [self._stop(job, work.artifact, ("replaced", 0, reason)) for work, job in active]
        return stopped[0] if stopped else None

    def _record_ended_attempts(self, work: Work, jobs: Sequence[Job], view: View) -> list[Outcome]:
        """Record the outcomes of attempts that have ended, and return all outcomes of the work."""
        place = (work.stage.name, work.key, work.shard)
        recorded = {outcome.attempt for outcome in self.attempts.outcomes(*place)}
        for job in (*jobs, *self._deleted_jobs(work, view)):
            ending = job.state == "deleted" and any(self._is_alive(pod) for pod in job.pods)
            if job.attempt not in recorded and not job.active and not ending:
                self._record_ended_attempt(work, job)
        return self.attempts.outcomes(*place)

    def _record_ended_attempt(self, work: Work, job: Job) -> None:
        record = exit_record(work.artifact, job.name) if work.artifact else None
        reach = stored_progress(work.artifact) if work.artifact else 0
        outcome = outcome_of(job, classify(job, record), reach, self.clock())
        self._write(
            lambda: self.attempts.record_outcome(work.stage.name, work.key, outcome, work.shard)
        )
        text = "%s: attempt %d ended (%s): %s"
        _log.warning(text, work.name, outcome.attempt, outcome.kind, outcome.reason)

    def _deleted_jobs(self, work: Work, view: View) -> Iterator[Job]:
        """Yield started attempts whose Job is gone: deleted by a user, or after its TTL."""
        names = {job.name for job in view.jobs}
        for started in self.attempts.started(work.stage.name, work.key, work.shard):
            if started.job not in names:
                yield Job(
                    name=started.job,
                    stage=work.stage.name,
                    key=work.key[:12],
                    attempt=started.attempt,
                    submission=started.submission,
                    nodes=1,
                    created_at=started.at,
                    began_at=started.at,
                    state="deleted",
                    reason="",
                    message="the Job was deleted and left no record",
                    pods=tuple(pod for pod in view.pods if pod.job == started.job),
                    shard=work.shard,
                )

    def _apply_retry_policy(self, work: Work, outcomes: Sequence[Outcome]) -> StepResult | None:
        """Return the end of the run or a delay; None if an attempt may start now."""
        submission = self.release.submission
        own = [outcome for outcome in outcomes if outcome.submission == submission]
        match next_action(own, self.run_file.pipeline):
            case GiveUp(code, reason):
                return StepResult("failed", f"{work.name}: {reason}", work.stage.name, code)
            case Retry(at) if at > self.clock():
                delay = f"next attempt in {at - self.clock():.0f} s"
                text = f"{work.name}: {delay}; the last one ended: {outcomes[-1].reason}"
                return StepResult("waiting", text, work.stage.name)
        return None

    def _create_job(self, work: Work, attempt: int, owner: Mapping[str, Any]) -> StepResult:
        rendered = self.manifests[work.stage.name]
        manifest = work.job(rendered, attempt, self.release.submission, self.api.namespace, owner)
        name = manifest["metadata"]["name"]
        try:
            self._write(lambda: self.api.create_job(manifest))
        except AlreadyExists:  # an earlier request succeeded, but its answer was lost
            _log.debug("Job %s already exists", name)
        text = f"{work.name}: starting attempt {attempt} ({name})"
        return StepResult("running", text, work.stage.name)

    # ---- Jobs and pods that must end before the next attempt

    def _handle_other_jobs(
        self, view: View, paused: bool, current: UnpublishedStage | None = None
    ) -> StepResult | None:
        """Handle active Jobs of other stages or configurations. Return None if there are none."""
        found = []
        for job in view.jobs:
            if not job.active or (current is not None and self._is_current(job, current)):
                continue
            published = self._has_published(job)
            found.append(
                self._wait_for_published(job)
                if published
                else self._handle_outdated(job, paused, current)
            )
        return found[0] if found else None

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
        """Wait until the Job of a published stage or shard ends, and delete it after a while.

        A Job does not end by itself if a queue holds it, its node is lost, or another container
        keeps its pod alive.
        """
        if self._lingers(job.name):
            self._write(lambda: self.api.delete_job(job.name))
        text = f"{name_of(job)}: the artifact is published, but {job.name} has not ended yet"
        return StepResult("waiting", text, job.stage)

    def _handle_outdated(
        self, job: Job, paused: bool, current: UnpublishedStage | None
    ) -> StepResult:
        """Stop or supervise a Job of an earlier configuration, as pipeline.onChange demands.

        Only the number of shards may have changed. Then the Job is stopped in any case, because the
        new shards continue from its finished rows.
        """
        stage = Artifact(self.pipeline.store, self.run_file.run.name, job.stage, job.key)
        artifact = attempted_artifact(stage, job.shard)
        if current is not None and (job.stage, job.key) == (current.name, current.key[:12]):
            reason = f"the stage now has {shard_count(self.run_file, current.stage)} shard(s)"
            return self._stop(job, artifact, ("replaced", 0, reason))
        if self.run_file.pipeline.on_change == "replace":
            reason = "it belongs to an earlier configuration (pipeline.onChange: replace)"
            return self._stop(job, artifact, ("replaced", 0, reason))
        text = (
            f"{name_of(job)}: waiting for {job.name} of an earlier configuration to end "
            "(pipeline.onChange: wait)"
        )
        return self._supervise(job, artifact, paused) or StepResult("running", text, job.stage)

    def _wait_for_pods(self, view: View, work: Work) -> StepResult | None:
        """Wait for pods of earlier attempts. The store would fence them off, but they use GPUs."""
        names = {stage.name for stage in STAGES}
        for pod in view.pods:
            if pod.stage in names and not is_other_shard(pod, work) and self._is_alive(pod):
                text = f"waiting for pod {pod.name} of an earlier attempt to end"
                return StepResult("waiting", text, work.stage.name)
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
