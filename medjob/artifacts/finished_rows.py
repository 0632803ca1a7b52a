"""Finished rows of an unfinished stage, so that no row is sampled or scored twice.

Each part is one immutable object `parts/<kind>/<epoch>-<number>.jsonl` below the artifact, or below
the shard that wrote it. The first line of a part is its seal, which covers the artifact's key and
the path, so that a part copied from another artifact is not used.
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
from medjob.artifacts.shard import known_shards
from medjob.runtime.files import parse_json
from medjob.runtime.printable import printable

Row = dict[str, Any]
_log = logging.getLogger(__name__)


class FinishedRows:
    """Rows, each with an `id`, that this attempt, earlier ones and other shards finished."""

    def __init__(self, attempt: Attempt, artifact: Artifact | None = None) -> None:
        """Keep rows below the attempt's artifact.

        Args:
            artifact: The stage's artifact, if the attempt is at one of its shards.
        """
        self._attempt = attempt
        self._artifact = artifact or attempt.artifact
        self._count = 0

    def read(self, kind: str) -> dict[str, Row]:
        """Return the finished rows of one `kind` by id, of all shards.

        If two rows have the same id, the first one in the order of paths wins. Parts that are
        damaged, or were written for another place, are skipped, so their rows are computed again.
        """
        rows: dict[str, Row] = {}
        for owner in (self._artifact, *known_shards(self._artifact)):
            for entry in owner.store.list(owner.path("parts", kind, "")):
                blob = owner.store.get(entry.key)
                part = _parse(blob.data, self._artifact, entry.key) if blob else []
                if part is None:
                    _log.warning(
                        "%s is damaged, or was not written there; its rows are computed again",
                        printable(entry.key),
                    )
                    continue
                for row in part:
                    rows.setdefault(row["id"], row)
        return rows

    def add(self, kind: str, rows: Iterable[Row]) -> None:
        """Store one part.

        Raises:
            SupersededError: a newer attempt has taken over.
        """
        self._attempt.check()
        self._count += 1
        key = self._attempt.artifact.path(
            "parts", kind, f"{self._attempt.epoch:06d}-{self._count:08d}.jsonl"
        )
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        store = self._artifact.store
        store.create(key, _first_line(lines, self._artifact, key) + lines)


def _first_line(lines: bytes, artifact: Artifact, key: str) -> bytes:
    """Return the first line of the part `key`, which holds the seal of the others."""
    content = {
        "run": artifact.run,
        "stage": artifact.stage,
        "key": artifact.key,
        "path": key.removeprefix(artifact.path("")),
        "sha256": hashlib.sha256(lines).hexdigest(),
    }
    return json.dumps({"seal": seal(content, artifact.store)}).encode() + b"\n"


def _parse(data: bytes, artifact: Artifact, key: str) -> list[Row] | None:
    """Parse the part `key`. Return None if it is damaged, or was written for another place."""
    first, newline, lines = data.partition(b"\n")
    if not hmac.compare_digest(first + newline, _first_line(lines, artifact, key)):
        return None
    try:
        rows = [parse_json(line) for line in lines.splitlines()]
    except ValueError:
        return None
    are_rows = all(isinstance(row, dict) and isinstance(row.get("id"), str) for row in rows)
    return rows if are_rows else None
