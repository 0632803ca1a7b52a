"""A training process's way to its parent: it trains, the parent does everything that touches a network.

One JSON value a line over a socket pair. What a process sends: `begin`, `step`, `saved`, `log`, `error`, `done`; what it
is sent: one `go` for each `saved`. It knows nothing of stores, and a parent that is gone takes it along.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import signal
import socket
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from medjob.errors import RetryError

Event = dict[str, Any]


@dataclass(frozen=True, slots=True)
class World:
    """Where a training process stands among the others; the names are torch.distributed's."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    node: int = 0
    nodes: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    @property
    def environment(self) -> dict[str, str]:
        """The variables that torch, accelerate and DeepSpeed read."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_world_size),
            "LOCAL_SIZE": str(self.local_world_size),  # DeepSpeed's name for it
            "GROUP_RANK": str(self.node),
        }


class Link:
    """The process's end of the link."""

    def __init__(
        self, connection: socket.socket, world: World, resume_step: int | None = None
    ) -> None:
        self.world = world
        self.resume_step = resume_step
        """Step of `checkpoint-<step>` in the trainer's folder to go on from; None at the start."""
        self._connection = connection
        self._answers: queue.Queue[Event] = queue.Queue()
        self._sending = threading.Lock()
        self._stop = threading.Event()
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, lambda *_: self._stop.set())
        threading.Thread(target=self._listen, daemon=True, name="link").start()

    @property
    def stop_requested(self) -> bool:
        """Whether this process was asked to save and stop. The others may not know yet: agree before acting on it."""
        return self._stop.is_set()

    def begin(self, total: int, done: int) -> None:
        """Training begins: from here on a signal waits for the end of a step."""
        self.send({"event": "begin", "total": total, "done": done})

    def step(self, step: int, seconds: float, numbers: Mapping[str, float]) -> None:
        """An optimizer step is done; it took `seconds`."""
        self.send({"event": "step", "step": step, "seconds": seconds, "numbers": dict(numbers)})

    def saved(self, step: int, seconds: float, best_step: int | None) -> None:
        """`checkpoint-<step>` is whole on this node's disk, saving took `seconds`. Returns once the parent has taken it."""
        self.send({"event": "saved", "step": step, "seconds": seconds, "best_step": best_step})
        self._answers.get()

    def send(self, event: Event) -> None:
        """Send one event; a parent that is gone ends this process."""
        with self._sending:
            try:
                self._connection.sendall(json.dumps(event).encode() + b"\n")
            except OSError:
                os._exit(RetryError.exit_code)

    def _listen(self) -> None:
        try:
            with self._connection.makefile("rb") as lines:
                for line in lines:
                    self._answers.put(json.loads(line))
        finally:
            os._exit(
                RetryError.exit_code
            )  # the parent is gone: nobody would store what this process computes


class LinkHandler(logging.Handler):
    """Hands log records to the parent, which owns the terminal."""

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
        except Exception:  # a call whose arguments do not fit its text
            self.handleError(record)
