"""The state of a training, as its parent knows it. `training` acts on it; here is no I/O."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from medjob.errors import Preempted
from medjob.launch.failures import exit_error, reported_error
from medjob.runtime.link import Event

_RESERVED_S = 1.0  # of the grace period, to record the outcome of the attempt


class Phase(Enum):
    """What the parent waits for."""

    RUNNING = "running"
    """The end of the training."""
    STOPPING = "stopping"
    """A save: a signal has arrived, and the processes save at the end of the step."""
    SAVED = "saved"
    """The upload of the state that the processes have saved, and the end of the other processes."""
    FAILED = "failed"
    """Further errors, for a moment: the first error may be a consequence of another one."""


@dataclass(frozen=True, slots=True)
class Save:
    """A checkpoint on this node's disk. The process that saved it waits for an acknowledgement."""

    local_rank: int
    step: int
    seconds: float
    best_step: int | None


@dataclass(slots=True)
class GracePeriod:
    """The time from a stop request until SIGKILL."""

    seconds: float
    deadline: float | None = None
    """In monotonic time. None before a stop request, infinite after Ctrl-C."""

    def start(self, now: float, limited: bool) -> None:
        """Set the deadline."""
        self.deadline = now + self.seconds if limited else math.inf

    @property
    def started(self) -> bool:
        """Whether a stop was requested."""
        return self.deadline is not None

    @property
    def limited(self) -> bool:
        """Whether SIGKILL will follow."""
        return self.deadline is not None and self.deadline != math.inf

    def fits(self, seconds: float) -> bool:
        """Whether something that takes `seconds` can finish within a whole grace period."""
        return seconds <= self.seconds - _RESERVED_S

    def seconds_left(self, now: float) -> float | None:
        """None without a deadline."""
        if self.deadline is None or not self.limited:
            return None
        return max(0.0, self.deadline - _RESERVED_S - now)

    def expired(self, now: float) -> bool:
        """Whether no time is left."""
        return self.deadline is not None and now > self.deadline - _RESERVED_S


@dataclass(slots=True)
class TrainingState:
    """What the processes have reported, and the phase that follows from it."""

    grace: GracePeriod
    step: int = 0
    """The last optimizer step."""
    step_s: float = 0.0
    save_s: float = 0.0
    """Duration of the last save to disk."""
    metrics: dict[str, Any] = field(default_factory=dict)
    ended: set[int] = field(default_factory=set)
    """Local ranks that have ended or reported their end."""
    errors: list[BaseException] = field(default_factory=list)
    """Errors of processes and lost nodes, in order of arrival. `Preempted` reports a stop."""
    first_error_at: float = math.inf
    pending_save: Save | None = None
    """A save that waits until the upload of the checkpoint before it has finished."""
    accepted_step: int = -1
    """The last step whose checkpoint is being uploaded or is in the store."""

    @property
    def phase(self) -> Phase:
        """The phase that follows from the reports, in whatever order they arrived.

        Each process has its own socket, so the parent can read a report of one process before an
        earlier report of another.

            RUNNING           -> STOPPING  a signal arrives
            RUNNING, STOPPING -> SAVED     a process reports a stop, and the save of its step
            RUNNING, STOPPING -> FAILED    a process fails, or a node is lost
            FAILED            -> SAVED     the report of the stop or of the save arrives late
            SAVED             -> FAILED    the report of a newer step arrives late
        """
        if self.errors:
            return Phase.SAVED if self._is_saved() else Phase.FAILED
        return Phase.STOPPING if self.grace.started else Phase.RUNNING

    def _is_saved(self) -> bool:
        """Whether a process has stopped, and the state of its step is in the parent's hands.

        The report of one process is enough: it has passed the barrier that follows the save.
        """
        if not any(isinstance(error, Preempted) for error in self.errors):
            return False
        return self.pending_save is not None or self.accepted_step >= self.step

    def update(self, local_rank: int, event: Event, now: float) -> None:
        """Apply an event of a process."""
        match event["event"]:
            case "step":
                self.step = event["step"]
                self.step_s = event["seconds"]
            case "saved":
                self.pending_save = Save(
                    local_rank, event["step"], event["seconds"], event["best_step"]
                )
            case "done":
                self.metrics |= event["metrics"]
                self.ended.add(local_rank)
            case "error":
                self.ended.add(local_rank)
                self.add_error(reported_error(event), now)
            case "exit" if local_rank not in self.ended:
                self.ended.add(local_rank)
                self.add_error(exit_error(event["status"], local_rank), now)

    def add_error(self, error: BaseException, now: float) -> None:
        """Record an error of a process, or a lost node."""
        self.errors.append(error)
        self.first_error_at = min(self.first_error_at, now)

    def accept_save(self) -> Save | None:
        """Take the pending save, to upload it."""
        save = self.pending_save
        if save is not None:
            self.pending_save = None
            self.accepted_step = save.step
            self.save_s = save.seconds
        return save
