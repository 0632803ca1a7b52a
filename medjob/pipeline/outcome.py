"""The record of how an attempt ended."""

from __future__ import annotations

import contextlib
import logging
import platform
import time
from collections.abc import Iterator
from typing import Any

from medjob.artifacts.artifact import Attempt
from medjob.errors import MedjobError, Preempted, translate
from medjob.runtime import signals

_log = logging.getLogger(__name__)


@contextlib.contextmanager
def recorded(attempt: Attempt) -> Iterator[None]:
    """Record the outcome of the attempt, and translate known exceptions into MedjobErrors.

    The orchestrator reads the record: after an eviction it is all that is left of the exit code.
    """
    began = time.monotonic()

    def record_stop() -> None:
        attempt.record(_failure(Preempted("stopped by a signal"), time.monotonic() - began))

    try:
        with signals.before_exit(record_stop):
            yield
    except BaseException as error:
        error = translate(error)
        with contextlib.suppress(Exception):  # the error matters more than its record
            attempt.record(_failure(error, time.monotonic() - began))
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
