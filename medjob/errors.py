"""Exceptions, and the exit code of each.

    MedjobError
    |-- ConfigError      64  invalid run file or command-line option
    |-- DataError        65  unusable rows, or too few rows
    |-- InputError       66  missing or damaged input
    |-- GateError        67  the judge is not calibrated, or an endpoint's maxCost is spent
    |-- RetryError       75  temporary failure, such as an unreachable store or too little memory
    |-- SupersededError  76  a newer attempt owns the artifact
    `-- Preempted       143  stopped by a signal, after saving its state

The exit codes are part of the container's contract: a cluster uses them to decide on retries.
"""

from __future__ import annotations

import errno
import os
import re
import traceback


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
    """The judge is not calibrated well enough to build pairs, or an endpoint's maxCost is spent."""

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


# Errors of the disk or of the machine that can pass, or that an administrator can repair.
_DISK_ERRORS = (
    errno.EACCES,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EIO,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENODEV,
    errno.ENOLCK,
    errno.ENOMEM,
    errno.ENOSPC,
    errno.ENOTCONN,  # a FUSE mount whose process has ended
    errno.ENXIO,
    errno.EPERM,
    errno.EROFS,
    errno.ESTALE,
)
_UNSUPPORTED = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
_DISK_HINT = (
    "free disk space and check permissions, there and in caches such as HF_HOME; "
    "or change cluster.workDir or cluster.store"
)
_HINTS = {
    errno.EMFILE: "raise the limit of open files (`ulimit -n`)",
    errno.ENFILE: "raise the limit of open files (`ulimit -n`)",
    errno.ENOMEM: "give the stage more memory",
    errno.ENOLCK: "use a disk that supports file locks for cluster.workDir and cluster.store",
}
# Libraries whose files are written in C++ or Rust report a full disk in exceptions of their own.
_WRITE_ERRORS = (
    "ArrowException",
    "Error",  # of shutil
    "Exception",
    "OSError",
    "OperationalError",
    "RuntimeError",
    "SafetensorError",
    "UnpicklingError",
    "ValueError",
)
_WRITE_MESSAGES = re.compile(
    r"No space left on device|Disk quota exceeded|Read-only file system|\(os error (28|30|122)\)"
    r"|database or disk is full|disk I/O error|PytorchStreamWriter failed"
    r"|inline_container\.cc.*unexpected pos|^\d+ requested and \d+ written$"
    r"|basic_ios::clear: iostream error|^Parent directory .* does not exist"
    r"|^File .* cannot be opened",
    re.DOTALL,
)
_PEER_LOST = ("DistBackendError", "DistNetworkError", "DistStoreError")
# Messages of the plain RuntimeError that gloo raises when the connection to a peer is lost.
_PEER_LOST_MESSAGES = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Socket closed",
    "Broken pipe [",
    "Connection refused [",
)


def translate(error: BaseException, folder: str = "") -> BaseException:
    """Translate known library errors; return others unchanged.

    CUDA out of memory is matched by class name, as torch is not imported here.

    Args:
        folder: Where this process writes its files. Names the disk in errors that name no file.
    """
    name = type(error).__name__
    text = str(error)
    disk = _disk_error(error, folder)
    if disk is not None:
        return disk
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
    if isinstance(error, MemoryError) or name == "OutOfMemoryError":
        return _out_of_memory(error)
    return error


class UnexpectedError(Exception):
    """An exception of a library, without its own message, which may quote a row."""


def without_text(error: BaseException) -> BaseException:
    """Replace an exception that medjob does not know by its type and place, because its message can
    quote a row. Those of medjob do not, and name what to do, so they are kept."""
    if isinstance(error, MedjobError | UnexpectedError) or not isinstance(error, Exception):
        return error
    places = traceback.extract_tb(error.__traceback__)
    own = [place for place in places if f"{os.sep}medjob{os.sep}" in place.filename] or places
    where = f" in {own[-1].filename.rpartition(os.sep)[2]}:{own[-1].lineno}" if own else ""
    hidden = "run.prepare.sensitive is true, so its message is not shown"
    return UnexpectedError(f"{type(error).__name__}{where} ({hidden})")


def _out_of_memory(error: BaseException) -> RetryError:
    if isinstance(error, MemoryError):
        return RetryError("out of memory", _HINTS[errno.ENOMEM])
    return RetryError(
        f"out of GPU memory: {str(error).splitlines()[0]}",
        "lower resources.<stage>.microBatchSize or batchSize, or use a larger GPU",
    )


def _disk_error(error: BaseException, folder: str) -> MedjobError | None:
    """The error for a disk that is full, not writable or broken. None for any other error."""
    if isinstance(error, MedjobError):
        return None
    if isinstance(error, OSError) and error.errno is not None:
        return _os_error(error, folder)
    found = _WRITE_MESSAGES.search(str(error))
    if found is None or type(error).__name__ not in _WRITE_ERRORS:
        return None
    where = folder or "the disk of cluster.workDir"
    text = f"{type(error).__name__}: {found[0][:80]}"
    return RetryError(f"{where}: a file cannot be written ({text})", _DISK_HINT)


def _os_error(error: OSError, folder: str) -> MedjobError | None:
    # A failed copy names its source first.
    named = error.filename2 or error.filename
    where = named or folder or "the disk of cluster.workDir or cluster.store"
    if error.errno == errno.ENAMETOOLONG:
        name = max(str(named or "").split("/"), key=len)
        return ConfigError(
            f"a file name is too long for this disk: {name[:40]}... ({len(name.encode())} bytes)",
            "rename the file, or use another disk; most allow 255 bytes",
        )
    if error.errno in _UNSUPPORTED:
        return ConfigError(
            f"{where}: the disk does not support an operation ({error.strerror})",
            "use another folder for cluster.workDir or cluster.store, or a bucket",
        )
    if error.errno in _DISK_ERRORS:
        hint = _HINTS.get(error.errno or 0, _DISK_HINT)
        return RetryError(f"{where}: {error.strerror}", hint)
    if isinstance(error, FileNotFoundError) and folder and not os.path.exists(folder):  # noqa: PTH110
        return RetryError(f"{folder} was deleted while it was in use", "run the same command again")
    return None


def _is_third_party(module: str | None) -> bool:
    return bool(module) and not str(module).startswith("medjob")
