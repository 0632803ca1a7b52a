"""Exceptions, and the exit code that each of them ends the process with.

    MedjobError
    |-- ConfigError      64  the run file, or a flag, is wrong
    |-- DataError        65  the rows are wrong
    |-- InputError       66  an input is missing or damaged
    |-- GateError        67  a gate refused: the judge is not calibrated
    |-- RetryError       75  try again: the store is away, the machine is out of memory
    |-- SupersededError  76  a newer attempt owns the artifact
    `-- Preempted       143  stopped by a signal, after a save

The table is part of the container's contract: a cluster decides by these codes what to retry.
"""

from __future__ import annotations

import errno


class MedjobError(Exception):
    """Something that a user or a cluster can act on: printed as `error:` and `hint:`, never as a traceback."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\nhint: {self.hint}" if self.hint else self.message


class ConfigError(MedjobError):
    """The run file, or a flag, is wrong."""

    exit_code = 64


class DataError(MedjobError):
    """The rows are wrong."""

    exit_code = 65


class InputError(MedjobError):
    """An input is missing or damaged."""

    exit_code = 66


class GateError(MedjobError):
    """A gate refused to go on."""

    exit_code = 67


class RetryError(MedjobError):
    """The same command may succeed later."""

    exit_code = 75


class SupersededError(MedjobError):
    """A newer attempt owns the artifact; this one published nothing."""

    exit_code = 76


class Preempted(MedjobError):
    """Stopped by a signal after what was finished had been saved."""

    exit_code = 143


_ERRORS: tuple[type[MedjobError], ...] = (
    ConfigError,
    DataError,
    InputError,
    GateError,
    RetryError,
    SupersededError,
    Preempted,
)
EXIT_CODES: dict[int, str] = {0: "published and verified"} | {
    error.exit_code: (error.__doc__ or "").split("\n")[0] for error in _ERRORS
}


def error_of(code: int) -> type[MedjobError]:
    """The exception that an exit code stands for: how an error crosses from a training process to its parent."""
    return next(error for error in _ERRORS if error.exit_code == code)


# What gloo raises as a plain RuntimeError once a peer's socket is closed.
_PEER_GONE = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Socket closed",
    "Broken pipe [",
    "Connection refused [",
)


def translate(error: BaseException) -> BaseException:
    """`error`, or what it means to a user. (Running out of memory goes by its name: torch is not imported here.)"""
    if isinstance(error, OSError) and error.errno in (
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EACCES,
        errno.EROFS,
    ):
        return RetryError(
            f"{error.filename}: {error.strerror}",
            "free some space, or name another cluster.workDir or cluster.store",
        )
    if type(error).__name__ in ("DistBackendError", "DistNetworkError", "DistStoreError") or any(
        text in str(error) for text in _PEER_GONE
    ):
        return RetryError(f"another training process is gone: {' '.join(str(error).split())[:200]}")
    if (
        isinstance(error, ModuleNotFoundError)
        and error.name
        and not error.name.startswith("medjob")
    ):
        return ConfigError(
            f"this needs the Python package {error.name}",
            "pip install 'medjob[train]'; in a container: the image medjob, not medjob-core",
        )
    if type(error).__name__ == "OutOfMemoryError":
        first = str(error).splitlines()[0]
        return RetryError(
            f"out of GPU memory: {first}",
            "lower resources.<stage>.microBatchSize or batchSize, or run on a larger GPU",
        )
    return error
