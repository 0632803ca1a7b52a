"""Finished rows of an unfinished stage, so that no row is sampled or scored twice.

Each batch is one immutable object `parts/<kind>/<epoch>-<number>.jsonl`, so a kill loses at most
one batch. The first line of a batch is its seal, which covers the artifact's key and the path, so
that a batch copied from another artifact is not used.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
from collections.abc import Iterable
from typing import Any

from medjob.artifacts.artifact import Artifact, Attempt
from medjob.artifacts.seal import seal
from medjob.runtime.files import parse_json
from medjob.runtime.printable import printable

Row = dict[str, Any]
_log = logging.getLogger(__name__)


class FinishedRows:
    """Rows, each with an `id`, that this attempt and earlier ones finished."""

    def __init__(self, attempt: Attempt) -> None:
        self._attempt = attempt
        self._count = 0

    def read(self, kind: str) -> dict[str, Row]:
        """Return the finished rows of one `kind` by id.

        If two rows have the same id, the first one written wins. Batches that are damaged, or were
        written for another place, are skipped, so their rows are computed again.
        """
        rows: dict[str, Row] = {}
        artifact = self._attempt.artifact
        for entry in artifact.store.list(artifact.path("parts", kind, "")):
            blob = artifact.store.get(entry.key)
            batch = _parse(blob.data, artifact, entry.key) if blob else []
            if batch is None:
                _log.warning(
                    "%s is damaged, or was not written there; its rows are computed again",
                    printable(entry.key),
                )
                continue
            for row in batch:
                rows.setdefault(row["id"], row)
        return rows

    def add(self, kind: str, rows: Iterable[Row]) -> None:
        """Store one batch.

        Raises:
            SupersededError: a newer attempt has taken over.
        """
        self._attempt.check()
        self._count += 1
        key = self._attempt.artifact.path(
            "parts", kind, f"{self._attempt.epoch:06d}-{self._count:08d}.jsonl"
        )
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        artifact = self._attempt.artifact
        artifact.store.create(key, _first_line(lines, artifact, key) + lines)


def _first_line(lines: bytes, artifact: Artifact, key: str) -> bytes:
    """Return the first line of the batch `key`, which holds the seal of the others."""
    content = {
        "run": artifact.run,
        "stage": artifact.stage,
        "key": artifact.key,
        "path": key.removeprefix(artifact.path("")),
        "sha256": hashlib.sha256(lines).hexdigest(),
    }
    return json.dumps({"seal": seal(content, artifact.store)}).encode() + b"\n"


def _parse(data: bytes, artifact: Artifact, key: str) -> list[Row] | None:
    """Parse the batch `key`. Return None if it is damaged, or was written for another place."""
    first, newline, lines = data.partition(b"\n")
    if not hmac.compare_digest(first + newline, _first_line(lines, artifact, key)):
        return None
    try:
        rows = [parse_json(line) for line in lines.splitlines()]
    except ValueError:
        return None
    are_rows = all(isinstance(row, dict) and isinstance(row.get("id"), str) for row in rows)
    return rows if are_rows else None
