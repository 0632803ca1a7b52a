"""A training as its parent sees it: what the processes report is stored and shown, a signal becomes a checkpoint."""

from __future__ import annotations

import contextlib
import logging
import math
import shutil
import signal
import time
from pathlib import Path
from typing import Any

from medjob.artifacts.checkpoints import Checkpoints
from medjob.artifacts.progress import Task
from medjob.errors import MedjobError, Preempted, RetryError, error_of
from medjob.launch.nodes import Peers
from medjob.launch.ranks import Ranks
from medjob.runtime import signals
from medjob.runtime.link import Event

_log = logging.getLogger(__name__)
_ROOT_CAUSE_S = (
    2.0  # when one process fails the others do too; how long to listen before one of them is blamed
)
_STRAGGLER_S = 10.0  # after the first has saved and left: they all stop at one step
_MARGIN_S = 1.0  # of the grace, for the attempt's record


class Training:
    """One training on this node, from its start to its end."""

    def __init__(
        self,
        ranks: Ranks,
        folder: Path,
        checkpoints: Checkpoints,
        task: Task,
        peers: Peers | None,
        grace_s: float,
    ) -> None:
        """`folder` is the trainer's; it holds `checkpoint-<step>`."""
        self._folder = folder
        self._ranks, self._checkpoints, self._task, self._peers, self._grace_s = (
            ranks,
            checkpoints,
            task,
            peers,
            grace_s,
        )
        self._failures: list[_Failure] = []
        self._ended: set[int] = set()
        self._metrics: dict[str, Any] = {}
        self._step = 0
        self._step_s = self._save_s = 0.0
        self._stop_by: float | None = None
        self._saved: tuple[int, Event] | None = None
        self._taken_step = -1
        self._told_grace = False
        self._waits_for_save = contextlib.ExitStack()

    def run(self) -> dict[str, Any]:
        """Serve the processes until all have ended; the stage's metrics.

        Raises:
            Preempted: a signal came; what the next attempt begins with is in the store.
            RetryError: a process or a node is gone, or the grace ran out before the state was stored.
            MedjobError: what a process ended with.
        """
        with self._waits_for_save:
            while len(self._ended) < len(self._ranks) or self._checkpoints.under_way:
                found = self._ranks.next_event(0.2)
                if found:
                    self._handle(*found)
                self._take_saved()
                self._look_around()
            if self._failures:
                raise self._root_cause()
            self._checkpoints.wait()
        return self._metrics

    def _look_around(self) -> None:
        if self._stop_by is None and signals.requested():
            self._stop_by = time.monotonic() + self._grace_s if signals.has_deadline() else math.inf
            if not self._failures:
                self._ask_for_save()
        if self._stop_by is not None and time.monotonic() > self._stop_by - _MARGIN_S:
            raise self._out_of_time()
        lost = self._peers.lost if self._peers else None
        if self._failures:
            if lost and self._stopped() and self._checkpoints.under_way:
                raise lost  # its part of the checkpoint will never come
            if time.monotonic() > self._failures[0].at + self._patience_s():
                raise self._root_cause()
            return
        self._checkpoints.check()
        self._tell_grace()
        if lost:
            self._failures.append(_Failure(lost, time.monotonic()))

    def _patience_s(self) -> float:
        """How long to listen to the others after the first process has ended."""
        if not self._stopped():
            return _ROOT_CAUSE_S
        return math.inf if self._saved or self._checkpoints.under_way else _STRAGGLER_S

    def _handle(self, local_rank: int, event: Event) -> None:
        match event["event"]:
            case "log":
                logging.getLogger(event["logger"]).log(event["level"], "%s", event["message"])
            case "begin":
                self._task.begin(total=event["total"], done=event["done"])
                self._waits_for_save.enter_context(signals.wait_for_save())
            case "step":
                self._step, self._step_s = event["step"], event["seconds"]
                self._task.advance(1, **event["numbers"])
            case "saved":
                self._saved = (local_rank, event)
            case "done":
                self._metrics |= event["metrics"]
                self._ended.add(local_rank)
            case "error":
                self._fail(local_rank, _told(event), event["traceback"])
            case "exit" if local_rank not in self._ended:
                self._fail(local_rank, _ended_by(event["status"], local_rank))

    def _fail(self, local_rank: int, error: BaseException, traceback: str = "") -> None:
        self._ended.add(local_rank)
        if traceback:
            _log.debug("rank %d:\n%s", local_rank, traceback)
        self._failures.append(_Failure(error, time.monotonic()))

    def _take_saved(self) -> None:
        """Store what was saved, once the checkpoint before it is stored: until then the process waits, and we do not."""
        if self._saved is None or self._checkpoints.under_way:
            return
        local_rank, event = self._saved
        self._saved, self._save_s = None, event["seconds"]
        self._taken_step = step = event["step"]
        best = event["best_step"]
        self._checkpoints.save(step, self._folder / f"checkpoint-{step}", best)
        for old in self._folder.glob(
            "checkpoint-*"
        ):  # on this disk the newest and the best are enough
            if old.name not in (f"checkpoint-{step}", f"checkpoint-{best}"):
                shutil.rmtree(old)
        self._ranks.go_on(local_rank)

    def _tell_grace(self) -> None:
        """Say once, after the first checkpoint, what a stop will mean."""
        needed = self._estimate_s()
        if self._told_grace or needed is None:
            return
        self._told_grace = True
        if self._fits_grace(needed):
            _log.info(
                "on a stop the state is saved and stored in about %.0f s, within the grace of %.0f",
                needed,
                self._grace_s,
            )
        else:
            _log.warning(
                "on a stop the last periodic checkpoint is what counts: to save and store one takes about %.0f s, and "
                "cluster.graceSeconds is %.0f",
                needed,
                self._grace_s,
            )

    def _fits_grace(self, needed: float) -> bool:
        return needed <= self._grace_s - _MARGIN_S

    def _ask_for_save(self) -> None:
        """Have the state saved, if there is time for it: a save cut off by the end of the grace is of no use."""
        needed = self._estimate_s()
        if needed is not None and not self._fits_grace(needed) and self._stop_by != math.inf:
            raise Preempted(
                f"stopped by a signal after step {self._step}: to save and store the state takes about {needed:.0f} s, more than "
                f"cluster.graceSeconds ({self._grace_s:.0f}); {self._what_counts()}",
                "raise the grace where the platform allows it, or lower run.<stage>.save_steps",
            )
        _log.info(
            "stop requested: saving after this step%s",
            f" (about {needed:.0f} s)" if needed is not None else "",
        )
        self._ranks.ask_to_stop()

    def _estimate_s(self) -> float | None:
        """Seconds until the state would be stored, from the last checkpoint's; None before there was one."""
        if self._checkpoints.seconds is None:
            return None
        uploads = 2 if self._checkpoints.under_way else 1
        return self._step_s + self._save_s + uploads * self._checkpoints.seconds

    def _seconds_left(self) -> float | None:
        """Of the grace; None where nothing ends it."""
        if self._stop_by is None or self._stop_by == math.inf:
            return None
        return max(0.0, self._stop_by - _MARGIN_S - time.monotonic())

    def _out_of_time(self) -> RetryError:
        return RetryError(
            f"the grace of {self._grace_s:.0f} s ended before the state was stored; {self._what_counts()}"
        )

    def _what_counts(self) -> str:
        newest = self._checkpoints.newest_step
        return (
            f"the checkpoint of step {newest} is what the next attempt begins with"
            if newest
            else "there is no checkpoint yet"
        )

    def _stopped(self) -> bool:
        """Whether the state is saved. One process that says so is enough: it has passed the barrier behind the save."""
        says_so = any(isinstance(failure.error, Preempted) for failure in self._failures)
        return says_so and (self._saved is not None or self._taken_step >= self._step)

    def _root_cause(self) -> BaseException:
        if not self._stopped():
            error = min(self._failures, key=lambda failure: failure.rank_of_blame).error
            return (
                RetryError(f"stopped after step {self._step}, but nothing was saved")
                if isinstance(error, Preempted)
                else error
            )
        try:
            self._checkpoints.wait(self._seconds_left())
        except TimeoutError:
            return self._out_of_time()
        if self._peers:
            self._peers.announce_stopped()
        return Preempted(
            f"stopped by a signal after step {self._step}; the state is saved",
            "the same command goes on from here",
        )


class _Failure:
    """How one process ended."""

    def __init__(self, error: BaseException, at: float) -> None:
        self.error, self.at = error, at

    @property
    def rank_of_blame(self) -> int:
        """0 for what says most: bad data before an abort that followed from it, and a lost peer last."""
        if isinstance(self.error, Killed):
            return 1
        code = self.error.exit_code if isinstance(self.error, MedjobError) else 1
        return {1: 2, RetryError.exit_code: 3, Preempted.exit_code: 4}.get(code, 0)


class Killed(RetryError):
    """A training process was ended from outside."""


class UnexpectedError(Exception):
    """A fault of ours, or of a library, in a training process."""


def _told(event: Event) -> BaseException:
    if event["code"] == 1:
        error = UnexpectedError(event["message"])
        error.add_note(event["traceback"])  # shown with --debug
        return error
    return error_of(event["code"])(event["message"], event["hint"])


def _ended_by(status: int, local_rank: int) -> RetryError:
    if status < 0:
        name = signal.Signals(-status).name
        hint = "out of host memory, most likely: give the stage more" if name == "SIGKILL" else ""
        return Killed(f"training process {local_rank} was ended by {name}", hint)
    return Killed(f"training process {local_rank} ended with {status} and said nothing")
