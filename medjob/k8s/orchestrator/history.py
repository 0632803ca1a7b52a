"""What the orchestrator keeps in the store, since it keeps nothing itself.

<run>/orchestrator/<stage>/<key12>/a<attempt>.begun.json   an attempt that was seen at work; create-only
<run>/orchestrator/<stage>/<key12>/a<attempt>.json         the verdict on it; create-only
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
from medjob.k8s.orchestrator.retry_policy import Outcome, specificity_rank
from medjob.store import Conflict, Store

_FOLDER, _BEGUN = "orchestrator", ".begun.json"
_POD_STEM = 58  # characters of a Job's name that its pods' names keep
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StartedAttempt:
    """An attempt that was seen at work: it has to get a verdict, even if its Job is deleted and nothing of it is left."""

    job: str
    attempt: int
    submission: str
    at: float


class AttemptHistory:
    """The orchestrator's part of a run in the store."""

    def __init__(self, store: Store, run: str) -> None:
        self._store, self._run = store, run
        self._outcomes: dict[str, Outcome] = {}  # they never change, nor does what has begun
        self._begun: dict[str, StartedAttempt] = {}

    def history(self, stage: str, key: str) -> list[Outcome]:
        """The verdicts on a stage's attempts, oldest first."""
        self._read(self._place(stage, key))
        found = (
            outcome
            for name, outcome in self._outcomes.items()
            if name.startswith(self._place(stage, key))
        )
        return sorted(found, key=lambda outcome: outcome.attempt)

    def begun(self, stage: str, key: str) -> list[StartedAttempt]:
        """The attempts that were seen at work, as of the last call of `history`."""
        return [
            begun for name, begun in self._begun.items() if name.startswith(self._place(stage, key))
        ]

    def begin(self, stage: str, key: str, job: Job) -> Outcome | None:
        """Keep that an attempt is at work. Its verdict, if it has one already: then its end was decided, and not carried out."""
        name = f"{self._place(stage, key)}a{job.attempt:04d}"
        if f"{name}{_BEGUN}" not in self._begun:
            begun = StartedAttempt(
                job.name, job.attempt, job.submission, job.began_at or job.created_at
            )
            with contextlib.suppress(Conflict):
                self._store.create(f"{name}{_BEGUN}", json.dumps(asdict(begun), indent=1).encode())
            self._read(self._place(stage, key))
        return self._outcomes.get(f"{name}.json")

    def record(self, stage: str, key: str, outcome: Outcome) -> None:
        """Keep a verdict. The first one on an attempt stands."""
        name = f"{self._place(stage, key)}a{outcome.attempt:04d}.json"
        try:
            self._store.create(name, json.dumps(outcome.as_dict(), indent=1).encode())
            self._outcomes[name] = outcome
        except Conflict:
            self._read(self._place(stage, key))

    def _place(self, stage: str, key: str) -> str:
        return f"{self._run}/{_FOLDER}/{stage}/{key[:12]}/"

    def _read(self, place: str) -> None:
        for entry in self._store.list(place):
            if entry.key not in self._outcomes and entry.key not in self._begun:
                blob = self._store.get(entry.key)
                if blob is not None and entry.key.endswith(_BEGUN):
                    self._begun[entry.key] = _begun(blob.data, entry.key)
                elif blob is not None:
                    self._outcomes[entry.key] = _parse_outcome(blob.data, entry.key)


def _parse_outcome(data: bytes, name: str) -> Outcome:
    """A damaged one counts as a failure: neither does the run end over it, nor has it tries without end."""
    try:
        return Outcome(**_known(data, Outcome))
    except (ValueError, TypeError, AttributeError):
        _log.warning("%s: is damaged, and counts as a failure", name)
        return Outcome(
            _attempt_of(name),
            "failed",
            RetryError.exit_code,
            "its verdict is damaged",
            0,
            "",
            "",
            0.0,
            0.0,
        )


def _begun(data: bytes, name: str) -> StartedAttempt:
    try:
        return StartedAttempt(**_known(data, StartedAttempt))
    except (ValueError, TypeError, AttributeError):
        return StartedAttempt("", _attempt_of(name), "", 0.0)


def _known(data: bytes, kind: type) -> dict[str, Any]:
    """What this version knows of an object that another version may have written."""
    names = {field.name for field in fields(kind)}
    return {name: value for name, value in json.loads(data).items() if name in names}


def _attempt_of(name: str) -> int:
    return int(name.rpartition("/a")[2].partition(".")[0])


def reach(artifact: Artifact) -> int:
    """How far an unfinished stage has got: the newest whole checkpoint's step, or the number of finished batches of rows.

    LATEST.json does not tell: an attempt that has just begun has stored nothing yet, and goes on from what is there.
    """
    steps = [
        step_and_epoch(name)[0] for name, state in states(artifact).items() if state == "finished"
    ]
    return max(steps) if steps else sum(1 for _ in artifact.store.list(artifact.path("parts", "")))


def record_of(artifact: Artifact, job: str) -> dict[str, Any] | None:
    """What the attempt itself has stored of its end, if it got that far; of several records the one that tells most."""
    pods = f"{job}-"[:_POD_STEM]
    found = []
    for entry in artifact.store.list(artifact.path("attempts", "")):
        blob = artifact.store.get(entry.key)
        record = _parsed(blob.data) if blob else {}
        if str(record.get("host", "")).startswith(pods) and isinstance(
            record.get("exit_code"), int
        ):
            found.append(record)
    return min(found, key=lambda record: specificity_rank(record["exit_code"]), default=None)


def _parsed(data: bytes) -> dict[str, Any]:
    try:
        return dict(json.loads(data))
    except (ValueError, TypeError):
        return {}


def heartbeat(artifact: Artifact) -> bytes:
    """Something that changes while the stage is at work and reaches the store."""
    blob = artifact.store.get(artifact.path("progress.json"))
    return blob.data if blob else b""
