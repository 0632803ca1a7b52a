"""The connection from a training process to its parent.

The process computes; the parent does all network I/O. Both send JSON objects, one per line, over a
socket pair. The process sends the events `begin`, `step`, `saved`, `log`, `error` and `done`. The
parent answers each `saved` with `acknowledged`, and sends `stop` to have the state saved.

The process has no access to a store. It ends if its parent is lost, because no one would store its
results.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import signal
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from medjob.errors import RetryError

Event = dict[str, Any]
WEIGHTS_ONLY = {"TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1"}
"""Environment of every process that loads states, which are pickles. torch then overrides an
explicit `weights_only=False`."""


@dataclass(frozen=True, slots=True)
class World:
    """The processes of one training, and this process's rank among them. Names as in torchrun."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    node: int = 0
    nodes: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes the files that only one process may write."""
        return self.rank == 0

    @property
    def environment(self) -> dict[str, str]:
        """The variables that torch, accelerate and DeepSpeed read."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_world_size),
            "LOCAL_SIZE": str(self.local_world_size),  # DeepSpeed's name for LOCAL_WORLD_SIZE
            "GROUP_RANK": str(self.node),
        }


class Link:
    """The training process's end of the connection."""

    def __init__(
        self, connection: socket.socket, world: World, resume_step: int | None = None
    ) -> None:
        self.world = world
        self.resume_step = resume_step
        """Resume from `checkpoint-<step>` in the trainer's directory; None to start at step 0."""
        self._connection = connection
        self._acknowledgements: queue.Queue[Event] = queue.Queue()
        self._send_lock = threading.Lock()
        self._stop = threading.Event()
        signal.signal(signal.SIGTERM, lambda *_: self._stop.set())
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])  # see `external.become_rank`
        threading.Thread(target=self._receive, daemon=True, name="link").start()

    @property
    def stop_requested(self) -> bool:
        """Whether this process was asked to save and stop.

        Other processes may not know yet. All processes must agree before one of them stops.
        """
        return self._stop.is_set()

    def begin(self, total: int, done: int) -> None:
        """Report the first step. From now on the parent answers a signal with a save."""
        self.send({"event": "begin", "total": total, "done": done})

    def step(self, step: int, seconds: float, numbers: Mapping[str, float]) -> None:
        """Report a finished optimizer step and its duration."""
        self.send({"event": "step", "step": step, "seconds": seconds, "numbers": dict(numbers)})

    def saved(self, step: int, seconds: float, best_step: int | None) -> None:
        """Report that `checkpoint-<step>` is complete on this node's disk, and how long that took.

        Returns when the parent has taken a copy. Until then the directory must not change.
        """
        self.send({"event": "saved", "step": step, "seconds": seconds, "best_step": best_step})
        self._acknowledgements.get()

    def send(self, event: Event) -> None:
        """Send one event. Ends this process if the parent is lost."""
        with self._send_lock:
            try:
                self._connection.sendall(json.dumps(event).encode() + b"\n")
            except OSError:
                os._exit(RetryError.exit_code)

    def wait_for_end(self) -> NoReturn:
        """Wait until the parent ends this process."""
        while True:
            time.sleep(3600)

    def _receive(self) -> None:
        """Receive the parent's messages, and end this process when it says so or is lost."""
        code = RetryError.exit_code
        try:
            with self._connection.makefile("rb") as lines:
                for line in lines:
                    message = json.loads(line)
                    match message["event"]:
                        case "acknowledged":
                            self._acknowledgements.put(message)
                        case "stop":
                            self._stop.set()
                        case "end":
                            code = message["code"]
                            return
        finally:
            os._exit(code)


class LinkHandler(logging.Handler):
    """Sends log records to the parent, because only the parent writes to the terminal."""

    def __init__(self, link: Link) -> None:
        super().__init__()
        self._link = link

    def emit(self, record: logging.LogRecord) -> None:
        """Send one record."""
        try:
            self._link.send(
                {
                    "event": "log",
                    "level": record.levelno,
                    "logger": record.name,
                    "message": record.getMessage(),
                }
            )
        except Exception:  # the arguments of the call do not fit its format string
            self.handleError(record)
