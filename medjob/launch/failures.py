"""Errors of training processes, and which of several errors is the root cause."""

from __future__ import annotations

import signal
from collections.abc import Iterable

from medjob.errors import MedjobError, Preempted, RetryError, error_of
from medjob.runtime.link import Event


class ProcessKilled(RetryError):
    """A training process ended without a report: it was killed, or it crashed."""


class UnexpectedError(Exception):
    """An error in a training process that medjob does not know: a bug in medjob or in a library."""


def reported_error(event: Event) -> BaseException:
    """Rebuild the exception that a process has reported."""
    if event["code"] == 1:
        error = UnexpectedError(event["message"])
        error.add_note(event["traceback"])  # shown with --debug
        return error
    return error_of(event["code"])(event["message"], event["hint"])


def exit_error(status: int | None, local_rank: int) -> ProcessKilled:
    """The error for a process that ended without a report.

    Args:
        status: Negative after a signal. None if only an external launcher knows it.
    """
    if status is None:
        return ProcessKilled(
            f"training process {local_rank} ended and reported no error",
            "it was killed, or it crashed: see the launcher's output",
        )
    if status >= 0:
        return ProcessKilled(
            f"training process {local_rank} exited with {status} and reported no error"
        )
    name = signal.Signals(-status).name
    hint = ""
    if name == "SIGKILL":
        hint = "most likely out of host memory: give the stage more memory"
    return ProcessKilled(f"training process {local_rank} was killed by {name}", hint)


def root_cause(errors: Iterable[BaseException]) -> BaseException:
    """The error that most likely caused the others; the first of several equal ones.

    When one process fails, the others lose their connection to it, or are aborted by NCCL.
    """
    return min(errors, key=_priority)


def _priority(error: BaseException) -> int:
    """0 is the most likely cause."""
    if isinstance(error, Preempted):
        return 4
    if isinstance(error, ProcessKilled):
        return 1
    if isinstance(error, RetryError):  # a lost peer, among others
        return 3
    return 0 if isinstance(error, MedjobError) else 2
