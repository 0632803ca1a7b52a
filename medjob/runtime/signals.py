"""SIGTERM and Ctrl-C: exit 143, after a save where there is something to save.

Imported before anything heavy, so that an early signal is not lost. Most stages may stop anywhere: what they finished is
in the store already. Only training holds state that is not; it waits for the end of a step.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from medjob.errors import Preempted

_LAST_WORDS_S = 5.0
_requested = threading.Event()
_by_user = threading.Event()
_can_wait = threading.Event()
_last_words: list[Callable[[], None]] = []


def install() -> None:
    """Handle SIGTERM and SIGINT from here on."""
    signal.signal(signal.SIGTERM, _handle)
    signal.signal(signal.SIGINT, _handle)


def requested() -> bool:
    """Whether a signal asked this process to stop."""
    return _requested.is_set()


def has_deadline() -> bool:
    """Whether who asked will not wait: a cluster sends SIGTERM and then SIGKILL; a user who pressed Ctrl-C can press it again."""
    return requested() and not _by_user.is_set()


@contextlib.contextmanager
def before_exit(last_words: Callable[[], None]) -> Iterator[None]:
    """While inside, `last_words` is called before a signal ends the process."""
    _last_words.append(last_words)
    try:
        yield
    finally:
        _last_words.remove(last_words)


@contextlib.contextmanager
def wait_for_save() -> Iterator[None]:
    """While inside, a signal only sets `requested()`; a second one ends the process at once.

    Raises:
        Preempted: on leaving, if a signal has come.
    """
    _can_wait.set()
    try:
        yield
    finally:
        _can_wait.clear()
    if requested():
        raise Preempted(
            "stopped by a signal; the state is saved", "the same command goes on from here"
        )


def _handle(number: int, _frame: FrameType | None) -> None:
    if number == signal.SIGINT and not requested():
        _by_user.set()
    if _can_wait.is_set() and not requested():
        _requested.set()
        os.write(
            2, b"\nsaving before the stop; the same command goes on from there\n"
        )  # the main thread may be inside of stderr
        return
    _requested.set()
    _say_last_words()
    os._exit(Preempted.exit_code)


def _say_last_words() -> None:
    """In a thread, and not for long: the main thread may stand in the middle of a request whose locks it holds."""
    speakers = [threading.Thread(target=last_words, daemon=True) for last_words in _last_words]
    for speaker in speakers:
        speaker.start()
    for speaker in speakers:
        speaker.join(_LAST_WORDS_S)
