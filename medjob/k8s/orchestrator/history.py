"""The attempt history of a run, kept in the store because the orchestrator has no state.

<run>/orchestrator/<stage>/<key12>/a<attempt>.begun.json   a started attempt; create-only
<run>/orchestrator/<stage>/<key12>/a<attempt>.json         its outcome; create-only

The attempts of a shard are in `<key12>-<shard>`, such as `0123456789ab-0-of-3`.
"""

from __future__ import annotations

import contextlib
import json
import logging
from dataclasses import asdict, dataclass, fields
from typing import Any

from medjob.artifacts.artifact import Artifact
from medjob.artifacts.checkpoints import states, step_and_epoch
from medjob.errors import RetryError
from medjob.k8s.observe import Job
from medjob.k8s.orchestrator.outcome import Outcome
from medjob.pipeline.outcome import parse_record, specificity_rank
from medjob.runtime.files import parse_json
from medjob.store import Conflict, Store

_FOLDER = "orchestrator"
_STARTED = ".begun.json"
_POD_PREFIX = 58  # characters of a Job's name that Kubernetes keeps in the names of its pods
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StartedAttempt:
    """A started attempt. It must get an outcome, even if its Job is deleted without a trace."""

    job: str
    attempt: int
    submission: str
    at: float


class AttemptHistory:
    """Started attempts and outcomes of a run's stages.

    These objects never change, so each one is read once.
    """

    def __init__(self, store: Store, run: str) -> None:
        self._store = store
        self._run = run
        self._outcomes: dict[str, Outcome] = {}
        self._started: dict[str, StartedAttempt] = {}

    def outcomes(self, stage: str, key: str, shard: str = "") -> list[Outcome]:
        """Return the outcomes of the attempts at a stage or one of its shards, oldest first."""
        prefix = self._prefix(stage, key, shard)
        self._load(prefix)
        found = (outcome for name, outcome in self._outcomes.items() if name.startswith(prefix))
        return sorted(found, key=lambda outcome: outcome.attempt)

    def all_outcomes(self, stage: str, key: str) -> list[Outcome]:
        """Return the outcomes of a stage's attempts and of those at its shards."""
        prefix = self._prefix(stage, key).removesuffix("/")
        self._load(prefix)
        return [outcome for name, outcome in self._outcomes.items() if name.startswith(prefix)]

    def started(self, stage: str, key: str, shard: str = "") -> list[StartedAttempt]:
        """Return the started attempts, as of the last call of `outcomes`."""
        prefix = self._prefix(stage, key, shard)
        return [start for name, start in self._started.items() if name.startswith(prefix)]

    def record_start(self, stage: str, key: str, job: Job) -> Outcome | None:
        """Record that an attempt was started, and return its outcome if it has one.

        An active Job with an outcome was to be stopped, but the orchestrator died before that.
        """
        prefix = self._prefix(stage, key, job.shard)
        name = f"{prefix}a{job.attempt:04d}"
        if f"{name}{_STARTED}" not in self._started:
            at = job.began_at or job.created_at
            started = StartedAttempt(job.name, job.attempt, job.submission, at)
            with contextlib.suppress(Conflict):
                self._store.create(f"{name}{_STARTED}", _to_json(asdict(started)))
            self._load(prefix)
        return self._outcomes.get(f"{name}.json")

    def record_outcome(self, stage: str, key: str, outcome: Outcome, shard: str = "") -> None:
        """Record an outcome. If the attempt has one already, keep that one."""
        prefix = self._prefix(stage, key, shard)
        name = f"{prefix}a{outcome.attempt:04d}.json"
        try:
            self._store.create(name, _to_json(outcome.as_dict()))
            self._outcomes[name] = outcome
        except Conflict:
            self._load(prefix)

    def _prefix(self, stage: str, key: str, shard: str = "") -> str:
        part = f"-{shard}" if shard else ""
        return f"{self._run}/{_FOLDER}/{stage}/{key[:12]}{part}/"

    def _load(self, prefix: str) -> None:
        for entry in self._store.list(prefix):
            name = entry.key
            if name in self._outcomes or name in self._started:
                continue
            blob = self._store.get(name)
            if blob is None:
                continue
            if name.endswith(_STARTED):
                self._started[name] = _parse_started(blob.data, name)
            else:
                self._outcomes[name] = _parse_outcome(blob.data, name)


def _to_json(content: dict[str, Any]) -> bytes:
    return json.dumps(content, indent=1).encode()


def _parse_outcome(data: bytes, name: str) -> Outcome:
    """Parse an outcome. A damaged one counts as a failure.

    So it does not end the run, and it cannot allow endless retries either.
    """
    try:
        return Outcome(**_known_fields(data, Outcome))
    except (ValueError, TypeError, AttributeError):
        _log.warning("%s is damaged and counts as a failure", name)
        return Outcome(
            attempt=_attempt_number(name),
            kind="failed",
            code=RetryError.exit_code,
            reason="the record of its outcome is damaged",
            reach=0,
            job="",
            submission="",
            at=0.0,
            seconds=0.0,
        )


def _parse_started(data: bytes, name: str) -> StartedAttempt:
    try:
        return StartedAttempt(**_known_fields(data, StartedAttempt))
    except (ValueError, TypeError, AttributeError):
        return StartedAttempt("", _attempt_number(name), "", 0.0)


def _known_fields(data: bytes, kind: type) -> dict[str, Any]:
    """Parse an object and drop the fields of other versions of medjob."""
    names = {field.name for field in fields(kind)}
    return {name: value for name, value in parse_json(data).items() if name in names}


def _attempt_number(name: str) -> int:
    return int(name.rpartition("/a")[2].partition(".")[0])


# ---- what a stage stores while it runs


def stored_progress(artifact: Artifact) -> int:
    """Return the step of the newest finished checkpoint, or the number of finished batches of rows.

    LATEST.json is not enough: a new attempt continues from the checkpoints of earlier ones, but its
    own LATEST.json names none until it saves.
    """
    finished = [name for name, state in states(artifact).items() if state == "finished"]
    if finished:
        return max(step_and_epoch(name)[0] for name in finished)
    return sum(1 for _ in artifact.store.list(artifact.path("parts", "")))


def exit_record(artifact: Artifact, job: str) -> dict[str, Any] | None:
    """Return what the Job's attempt stored about its end, or None.

    If several nodes stored a record, return the one with the most specific exit code.
    """
    pod_prefix = f"{job}-"[:_POD_PREFIX]
    found = []
    for entry in artifact.store.list(artifact.path("attempts", "")):
        blob = artifact.store.get(entry.key)
        record = parse_record(blob.data) if blob else {}
        is_of_job = str(record.get("host", "")).startswith(pod_prefix)
        if is_of_job and isinstance(record.get("exit_code"), int):
            found.append(record)
    return min(found, key=lambda record: specificity_rank(record["exit_code"]), default=None)


def heartbeat(artifact: Artifact) -> bytes:
    """Return bytes that change while the stage works and reaches the store."""
    blob = artifact.store.get(artifact.path("progress.json"))
    return blob.data if blob else b""
