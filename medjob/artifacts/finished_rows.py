"""Finished rows of an unfinished stage, so that no row is sampled or scored twice.

Each batch is one immutable object `parts/<kind>/<epoch>-<number>.jsonl`, so a kill loses at most
one batch.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from typing import Any

from medjob.artifacts.artifact import Attempt
from medjob.artifacts.seal import seal_bytes
from medjob.store import Store

Row = dict[str, Any]
_log = logging.getLogger(__name__)


class FinishedRows:
    """Rows, each with an `id`, that this attempt and earlier ones finished."""

    def __init__(self, attempt: Attempt) -> None:
        self._attempt = attempt
        self._count = 0

    def read(self, kind: str) -> dict[str, Row]:
        """Return the finished rows of one `kind` by id.

        If two rows have the same id, the first one written wins. Damaged batches are skipped, so
        their rows are computed again.
        """
        rows: dict[str, Row] = {}
        store, prefix = self._attempt.artifact.store, self._attempt.artifact.path("parts", kind, "")
        for entry in store.list(prefix):
            blob = store.get(entry.key)
            batch = _parse(blob.data, store) if blob else []
            if batch is None:
                _log.warning("%s is damaged; its rows are computed again", entry.key)
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
        store = self._attempt.artifact.store
        store.create(key, _first_line(lines, store) + lines)


def _first_line(lines: bytes, store: Store) -> bytes:
    """Return the first line of a batch, which holds the seal of the others."""
    return json.dumps({"seal": seal_bytes(lines, store)}).encode() + b"\n"


def _parse(data: bytes, store: Store) -> list[Row] | None:
    """Parse a batch. Return None if it is damaged."""
    first, newline, lines = data.partition(b"\n")
    if first + newline != _first_line(lines, store):
        return None
    return [json.loads(line) for line in lines.splitlines()]
