"""SIGTERM, Ctrl-C and a closed terminal end the process with exit code 143.

Most stages can stop at any time, because their finished rows are already in the store. A training
has to save its state first, so it defers the exit to the end of a step.

This module imports nothing heavy. The command line installs the handlers before it loads large
libraries, so that no early signal is lost.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from medjob.errors import Preempted

_CALLBACK_TIMEOUT_S = 5.0
_stop_requested = threading.Event()
_sent_by_user = threading.Event()
_exit_deferred = threading.Event()
_failing = threading.Event()
_exit_callbacks: list[Callable[[], None]] = []


def install() -> None:
    """Install the handlers of SIGTERM, SIGINT and SIGHUP. `nohup` has SIGHUP ignored, and so it
    stays."""
    _failing.clear()
    signal.signal(signal.SIGTERM, _handle)
    signal.signal(signal.SIGINT, _handle)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signal.signal(signal.SIGHUP, _handle)


def stop_requested() -> bool:
    """Whether a signal has asked this process to stop."""
    return _stop_requested.is_set()


def kill_will_follow() -> bool:
    """Whether SIGKILL will follow.

    A cluster sends it after the grace period; Ctrl-C has no deadline.
    """
    return stop_requested() and not _sent_by_user.is_set()


@contextlib.contextmanager
def before_exit(callback: Callable[[], None]) -> Iterator[None]:
    """Inside the context, call `callback` before a signal ends the process."""
    _exit_callbacks.append(callback)
    try:
        yield
    finally:
        _exit_callbacks.remove(callback)


@contextlib.contextmanager
def defer_exit() -> Iterator[None]:
    """Inside the context, the first signal only sets `stop_requested()`.

    A second signal ends the process at once. After an exception the first one has no effect either:
    the process ends because of the exception, and reports it. A launcher sends a signal then,
    because another process has failed for the same reason.

    Raises:
        Preempted: on leaving the context, if a signal has arrived.
    """
    _exit_deferred.set()
    try:
        yield
    except BaseException:
        _failing.set()
        raise
    finally:
        _exit_deferred.clear()
    if stop_requested():
        raise Preempted(
            "stopped by a signal; the state is saved", "run the same command again to resume"
        )


def _handle(number: int, _frame: FrameType | None) -> None:
    if number == signal.SIGINT and not stop_requested():
        _sent_by_user.set()
    if _failing.is_set() and not stop_requested():
        _stop_requested.set()
        return
    if _exit_deferred.is_set() and not stop_requested():
        _stop_requested.set()
        # Not through sys.stderr: the signal may have interrupted a write to it.
        with contextlib.suppress(OSError):  # the terminal may be closed
            os.write(2, b"\nsaving before the stop; run the same command again to resume\n")
        return
    _stop_requested.set()
    _run_exit_callbacks()
    os._exit(Preempted.exit_code)


def _run_exit_callbacks() -> None:
    """Run the callbacks in threads, with a time-out.

    The signal may have interrupted a request of the main thread whose locks a callback needs.
    """
    threads = [threading.Thread(target=callback, daemon=True) for callback in _exit_callbacks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(_CALLBACK_TIMEOUT_S)
