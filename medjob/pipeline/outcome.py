"""The record of how an attempt ended: writing it, and finding the newest one."""

from __future__ import annotations

import contextlib
import logging
import platform
import re
import time
from collections.abc import Iterator
from typing import Any

from medjob.artifacts.artifact import Artifact, Attempt
from medjob.errors import (
    ConfigError,
    DataError,
    GateError,
    InputError,
    MedjobError,
    Preempted,
    RetryError,
    SupersededError,
    translate,
    without_text,
)
from medjob.runtime import signals
from medjob.runtime.files import parse_json

FINAL = (ConfigError.exit_code, DataError.exit_code, InputError.exit_code, GateError.exit_code)
CRASH_RANK = 1
_RANKS = {
    Preempted.exit_code: 2,
    RetryError.exit_code: 3,
    SupersededError.exit_code: 3,
    137: 4,
    0: 5,
}
_log = logging.getLogger(__name__)


@contextlib.contextmanager
def recorded(attempt: Attempt, sensitive: bool = False) -> Iterator[None]:
    """Record the outcome of the attempt, and translate known exceptions into MedjobErrors.

    The orchestrator reads the record: after an eviction it is all that is left of the exit code.

    Args:
        sensitive: Whether messages must not contain text of a row. See `without_text`.
    """
    began = time.monotonic()

    def record_stop() -> None:
        attempt.record(_failure(Preempted("stopped by a signal"), time.monotonic() - began))

    try:
        with signals.before_exit(record_stop):
            yield
    except BaseException as error:
        error = translate(error)
        if sensitive:
            error = without_text(error)
        failure = _failure(error, time.monotonic() - began)
        # A launcher may stop all processes because of this very failure.
        with (
            contextlib.suppress(Exception),  # the error matters more than its record
            signals.before_exit(lambda: attempt.record(failure)),
        ):
            attempt.record(failure)
        raise error from None if isinstance(error, MedjobError) else error.__cause__
    seconds = time.monotonic() - began
    attempt.record({"exit_code": 0, "seconds": round(seconds, 1), "host": platform.node()})
    _log.info(
        "%s: published %s in %.0f s", attempt.artifact.stage, attempt.artifact.prefix, seconds
    )


def _failure(error: BaseException, seconds: float) -> dict[str, Any]:
    return {
        "exit_code": error.exit_code if isinstance(error, MedjobError) else 1,
        "reason": f"{type(error).__name__}: {error}",
        "seconds": round(seconds, 1),
        "host": platform.node(),
    }


def newest_record(artifact: Artifact) -> dict[str, Any] | None:
    """Return what the newest attempt stored about its end; None if it runs, or was killed.

    If several nodes stored a record, return the one with the most specific exit code.
    """
    name = re.compile(rf"{artifact.epoch()}(-node\d+)?\.json")
    folder = artifact.path("attempts", "")
    found = []
    for entry in artifact.store.list(folder):
        blob = artifact.store.get(entry.key) if name.fullmatch(entry.key[len(folder) :]) else None
        record = parse_record(blob.data) if blob else {}
        if isinstance(record.get("exit_code"), int):
            found.append(record)
    return min(found, key=lambda record: specificity_rank(record["exit_code"]), default=None)


def parse_record(data: bytes) -> dict[str, Any]:
    """Parse a record; empty if it is damaged."""
    try:
        return dict(parse_json(data))
    except (ValueError, TypeError):
        return {}


def specificity_rank(code: int) -> int:
    """Rank an exit code by how specific it is about the cause; 0 is the most specific.

    On several nodes each pod has its own code, and only one of them failed first. Peers exit with
    75 after losing a node, 143 when asked to stop, and 137 when killed after the grace period.
    """
    if code in FINAL:
        return 0
    return _RANKS.get(code, CRASH_RANK)
