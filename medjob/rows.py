"""Finished rows of an unfinished stage: what was sampled or scored once is never drawn again.

Each batch becomes one immutable object `parts/<epoch>-<number>.jsonl`, so that a kill loses one batch at most.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from medjob.artifact import Attempt
from medjob.errors import InputError

Row = dict[str, Any]


class FinishedRows:
    """Rows with an `id` each, of this attempt and those before it."""

    def __init__(self, attempt: Attempt) -> None:
        self._attempt = attempt
        self._count = 0

    def read(self, kind: str) -> dict[str, Row]:
        """Finished rows of one `kind` by id; of two with one id, the first written stands."""
        rows: dict[str, Row] = {}
        prefix = self._attempt.artifact.path("parts", kind, "")
        for entry in self._attempt.artifact.store.list(prefix):
            blob = self._attempt.artifact.store.get(entry.key)
            for line in blob.data.splitlines() if blob else ():
                try:
                    row = json.loads(line)
                except ValueError:
                    raise InputError(f"{entry.key}: is damaged", "delete it: its rows are made again") from None
                rows.setdefault(row["id"], row)
        return rows

    def add(self, kind: str, rows: Iterable[Row]) -> None:
        """Store one batch.

        Raises:
            SupersededError: a newer attempt has taken over.
        """
        self._attempt.check()
        self._count += 1
        key = self._attempt.artifact.path("parts", kind, f"{self._attempt.epoch:06d}-{self._count:08d}.jsonl")
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        self._attempt.artifact.store.create(key, text.encode())
