"""SIGTERM and Ctrl-C: stop at the next safe point, save, exit 143. Imported before anything heavy, so that an early signal is not lost."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

from medjob.errors import Preempted

_requested = threading.Event()
_can_wait = threading.Event()


def install() -> None:
    """Handle SIGTERM and SIGINT from here on."""
    signal.signal(signal.SIGTERM, _handle)
    signal.signal(signal.SIGINT, _handle)


def requested() -> bool:
    """Whether a signal asked this process to stop."""
    return _requested.is_set()


@contextlib.contextmanager
def stop_at_safe_points() -> Iterator[None]:
    """While inside, a signal waits for `check()`; a second one, or one outside, ends the process at once."""
    _can_wait.set()
    try:
        yield
    finally:
        _can_wait.clear()


def check() -> None:
    """A safe point: everything finished is in the store. Raises Preempted if a signal has come."""
    if requested():
        raise Preempted("stopped by a signal; everything finished is saved", "the same command goes on from here")


def _handle(_number: int, _frame: FrameType | None) -> None:
    if _can_wait.is_set() and not requested():
        _requested.set()
        sys.stderr.write("\nstopping at the next safe point; the same command goes on from there\n")
        return
    os._exit(143)
