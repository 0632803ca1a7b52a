"""What one step of the orchestrator works on, and its result."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from medjob.artifacts.artifact import Artifact
from medjob.k8s.observe import Job, Pod
from medjob.k8s.orchestrator.outcome import Outcome
from medjob.k8s.orchestrator.work import Work, count_of
from medjob.stage import Stage


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


@dataclass(frozen=True, slots=True)
class Idle:
    """Work without an active Job."""

    work: Work
    jobs: Sequence[Job]
    """The Jobs of its attempts, which have ended."""
    outcomes: Sequence[Outcome]

    @property
    def next_attempt(self) -> int:
        """Number of the next attempt."""
        numbers = [*(outcome.attempt for outcome in self.outcomes)]
        numbers += [job.attempt for job in self.jobs]
        return max(numbers, default=0) + 1


def name_of(job: Job) -> str:
    """Name of the Job's stage, or of its shard, for messages."""
    return f"{job.stage} {job.shard}" if job.shard else job.stage


def is_other_shard(pod: Pod, work: Work) -> bool:
    """Whether the pod computes another of the shards that `work` is one of."""
    if work.is_join or not pod.shard or pod.stage != work.stage.name:
        return False
    return count_of(pod.shard) == count_of(work.shard) and pod.shard != work.shard


def summary(current: UnpublishedStage, results: Sequence[StepResult]) -> StepResult:
    """Return one result for all shards of a stage. The text quotes the first that does not run."""
    if len(results) == 1:
        return results[0]
    count = Counter(result.state for result in results)
    state = next(state for state in ("running", "waiting", "paused") if count[state])
    numbers = ", ".join(f"{number} {state}" for state, number in sorted(count.items()))
    quoted = next((f"; {result.text}" for result in results if result.state != "running"), "")
    return StepResult(state, f"{current.name}: shards: {numbers}{quoted}", current.name)
