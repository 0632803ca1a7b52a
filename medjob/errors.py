"""Exceptions, and the exit code of each.

    MedjobError
    |-- ConfigError      64  invalid run file or command-line option
    |-- DataError        65  unusable rows, or too few rows
    |-- InputError       66  missing or damaged input
    |-- GateError        67  the judge is not calibrated
    |-- RetryError       75  temporary failure, such as an unreachable store or too little memory
    |-- SupersededError  76  a newer attempt owns the artifact
    `-- Preempted       143  stopped by a signal, after saving its state

The exit codes are part of the container's contract: a cluster uses them to decide on retries.
"""

from __future__ import annotations

import errno


class MedjobError(Exception):
    """An error that a user or a cluster can act on, printed as `error:` and `hint:`."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\nhint: {self.hint}" if self.hint else self.message


class ConfigError(MedjobError):
    """The run file or a command-line option is invalid."""

    exit_code = 64


class DataError(MedjobError):
    """Rows are unusable, or there are too few."""

    exit_code = 65


class InputError(MedjobError):
    """An input is missing or damaged."""

    exit_code = 66


class GateError(MedjobError):
    """The judge is not calibrated well enough to build preference pairs."""

    exit_code = 67


class RetryError(MedjobError):
    """Temporary failure, such as an unreachable store; the same command may succeed later."""

    exit_code = 75


class SupersededError(MedjobError):
    """A newer attempt owns the artifact; this attempt published nothing."""

    exit_code = 76


class Preempted(MedjobError):
    """Stopped by a signal, after saving its state."""

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
EXIT_CODES: dict[int, str] = {0: "Success: the artifacts are published."} | {
    error.exit_code: (error.__doc__ or "").split("\n")[0] for error in _ERRORS
}


def error_of(code: int) -> type[MedjobError]:
    """The exception class of an exit code, to re-raise an error that another process reported."""
    return next(error for error in _ERRORS if error.exit_code == code)


_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)
_PEER_LOST = ("DistBackendError", "DistNetworkError", "DistStoreError")
# Messages of the plain RuntimeError that gloo raises when the connection to a peer is lost.
_PEER_LOST_MESSAGES = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Socket closed",
    "Broken pipe [",
    "Connection refused [",
)


def translate(error: BaseException) -> BaseException:
    """Translate known library errors; return others unchanged.

    CUDA out of memory is matched by class name, as torch is not imported here.
    """
    name = type(error).__name__
    text = str(error)
    if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
        return RetryError(
            f"{error.filename}: {error.strerror}",
            "free disk space and check permissions, or change cluster.workDir or cluster.store",
        )
    if name in _PEER_LOST or any(message in text for message in _PEER_LOST_MESSAGES):
        summary = " ".join(text.split())[:200]
        return RetryError(f"lost the connection to another training process: {summary}")
    if name == "UnpicklingError":  # its message quotes the file
        return InputError(
            "a checkpoint or model file holds objects other than tensors, which could run code",
            "use safetensors; delete an unfinished artifact to train from the start",
        )
    if isinstance(error, ModuleNotFoundError) and _is_third_party(error.name):
        return ConfigError(
            f"the Python package {error.name} is not installed",
            "pip install 'medjob[train]'; in a container, use the image medjob, not medjob-core",
        )
    if name == "OutOfMemoryError":
        return RetryError(
            f"out of GPU memory: {text.splitlines()[0]}",
            "lower resources.<stage>.microBatchSize or batchSize, or use a larger GPU",
        )
    return error


def _is_third_party(module: str | None) -> bool:
    return bool(module) and not str(module).startswith("medjob")
