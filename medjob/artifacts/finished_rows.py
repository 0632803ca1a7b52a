"""Finished rows of an unfinished stage: what was sampled or scored once is never drawn again.

Each batch becomes one immutable object `parts/<epoch>-<number>.jsonl`, so that a kill loses one batch at most.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable
from typing import Any

from medjob.artifacts.artifact import Attempt

Row = dict[str, Any]
_log = logging.getLogger(__name__)


class FinishedRows:
    """Rows with an `id` each, of this attempt and those before it."""

    def __init__(self, attempt: Attempt) -> None:
        self._attempt = attempt
        self._count = 0

    def read(self, kind: str) -> dict[str, Row]:
        """Finished rows of one `kind` by id; of two with one id, the first written stands. A damaged batch is made again."""
        rows: dict[str, Row] = {}
        store, prefix = self._attempt.artifact.store, self._attempt.artifact.path("parts", kind, "")
        for entry in store.list(prefix):
            blob = store.get(entry.key)
            batch = _parse(blob.data) if blob else []
            if batch is None:
                _log.warning("%s: is damaged; its rows are made again", entry.key)
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
        self._attempt.artifact.store.create(key, _seal(lines) + lines)


def _seal(lines: bytes) -> bytes:
    """The first line of a batch: without it a flipped byte would be a row like any other."""
    return json.dumps({"sha256": hashlib.sha256(lines).hexdigest()}).encode() + b"\n"


def _parse(data: bytes) -> list[Row] | None:
    seal, newline, lines = data.partition(b"\n")
    if seal + newline != _seal(lines):
        return None
    return [json.loads(line) for line in lines.splitlines()]
