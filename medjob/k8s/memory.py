"""What the orchestrator keeps in the store, since it keeps nothing itself.

<run>/orchestrator/<stage>/<key12>/a<attempt>.json   the verdict on an attempt; create-only
<run>/orchestrator/status.json                       for `medjob status`; overwritten
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from medjob.artifact import LATEST, Artifact
from medjob.errors import InputError
from medjob.k8s.observe import Job
from medjob.k8s.verdict import Verdict
from medjob.store import Conflict, Store

_FOLDER = "orchestrator"


class Memory:
    """The orchestrator's part of a run in the store."""

    def __init__(self, store: Store, run: str) -> None:
        self._store, self._run = store, run
        self._read: dict[str, Verdict] = {}  # they never change

    def history(self, stage: str, key: str) -> list[Verdict]:
        """The verdicts on a stage's attempts, oldest first."""
        for entry in self._store.list(f"{self._run}/{_FOLDER}/{stage}/{key[:12]}/"):
            if entry.key not in self._read:
                blob = self._store.get(entry.key)
                if blob is not None:
                    self._read[entry.key] = _verdict(blob.data, entry.key)
        prefix = f"{self._run}/{_FOLDER}/{stage}/{key[:12]}/"
        return sorted((v for name, v in self._read.items() if name.startswith(prefix)), key=lambda verdict: verdict.attempt)

    def record(self, stage: str, key: str, verdict: Verdict) -> None:
        """Keep a verdict. The first one on an attempt stands."""
        name = f"{self._run}/{_FOLDER}/{stage}/{key[:12]}/a{verdict.attempt:04d}.json"
        try:
            self._store.create(name, json.dumps(verdict.as_dict(), indent=1).encode())
        except Conflict:
            return

    def write_status(self, status: Mapping[str, Any]) -> None:
        """Show how the run stands."""
        self._store.put(f"{self._run}/{_FOLDER}/status.json", json.dumps(status, indent=1).encode())


def read_status(store: Store, run: str) -> dict[str, Any] | None:
    """How the run stands, as its orchestrator last said; None if none ever ran."""
    blob = store.get(f"{run}/{_FOLDER}/status.json")
    return dict(json.loads(blob.data)) if blob else None


def _verdict(data: bytes, name: str) -> Verdict:
    try:
        return Verdict(**json.loads(data))
    except (ValueError, TypeError):
        raise InputError(f"{name}: is damaged", "delete it; the attempt will not be counted") from None


def reach(artifact: Artifact) -> int:
    """How far an unfinished stage has got: the newest stored step of a training, or the number of finished batches of rows."""
    latest = artifact.store.get(artifact.path(LATEST))
    name = json.loads(latest.data).get("checkpoint") if latest else None
    if name:
        return int(name.split("-")[1])
    return sum(1 for _ in artifact.store.list(artifact.path("parts", "")))


def record_of(artifact: Artifact, job: Job) -> dict[str, Any] | None:
    """What the attempt itself has stored of its end, if it got that far; of several nodes' records the one that tells most."""
    found = []
    for entry in artifact.store.list(artifact.path("attempts", "")):
        blob = artifact.store.get(entry.key)
        if blob is not None:
            record = json.loads(blob.data)
            if str(record.get("host", "")).startswith(f"{job.name}-"):
                found.append(record)
    return min(found, key=_tells_most, default=None)


def _tells_most(record: Mapping[str, Any]) -> int:
    """Final codes before failures before preemptions before mere consequences of another's end."""
    code = int(record["exit_code"])
    return {75: 3, 143: 2, 0: 4}.get(code, 0 if 64 <= code <= 67 else 1)


def heartbeat(artifact: Artifact) -> bytes:
    """Something that changes while the stage is at work and reaches the store."""
    blob = artifact.store.get(artifact.path("progress.json"))
    return blob.data if blob else b""
