"""The parent of the training processes: stores checkpoints, handles signals and failures."""

from __future__ import annotations

import contextlib
import logging
import shutil
import time
from pathlib import Path
from typing import Any

from medjob.artifacts.checkpoints import Checkpoints
from medjob.artifacts.progress import Task
from medjob.errors import Preempted, RetryError
from medjob.launch.failures import root_cause
from medjob.launch.nodes import Membership
from medjob.launch.ranks import Ranks
from medjob.launch.state import GracePeriod, Phase, TrainingState
from medjob.runtime import signals
from medjob.runtime.link import Event

_log = logging.getLogger(__name__)
_POLL_S = 0.2
_ROOT_CAUSE_S = 2.0  # how long to collect errors of other processes after the first one
_STRAGGLER_S = 10.0  # how long the other processes may run after the first has saved and stopped


class Training:
    """One training on this node."""

    def __init__(
        self,
        ranks: Ranks,
        folder: Path,
        checkpoints: Checkpoints,
        task: Task,
        membership: Membership | None,
        grace_s: float,
    ) -> None:
        """`folder` is the trainer's directory, which holds `checkpoint-<step>`."""
        self._ranks = ranks
        self._folder = folder
        self._checkpoints = checkpoints
        self._task = task
        self._membership = membership
        self._state = TrainingState(GracePeriod(grace_s))
        self._grace_reported = False
        self._exit_deferred = contextlib.ExitStack()
        self._is_deferred = False

    def run(self) -> dict[str, Any]:
        """Serve the processes until all have ended. Returns the stage's metrics.

        Raises:
            Preempted: a signal arrived, and the state to resume from is in the store.
            RetryError: a process or a node is lost, or the grace period ended before the state was
                stored.
            MedjobError: a process reported this error.
        """
        with self._exit_deferred:
            while self._is_active():
                received = self._ranks.next_event(_POLL_S)
                if received:
                    local_rank, event = received
                    self._state.update(local_rank, event, time.monotonic())
                    self._show(local_rank, event)
                self._defer_exit_after_error()
                self._upload_pending_save()
                self._handle_signal()
                self._act()
            if self._state.errors:
                raise self._final_error()
            self._checkpoints.wait()
        return self._state.metrics

    def _is_active(self) -> bool:
        return (
            len(self._state.ended) < len(self._ranks)
            or self._state.pending_save is not None
            or self._checkpoints.under_way
        )

    def _show(self, local_rank: int, event: Event) -> None:
        """Show logs and progress."""
        match event["event"]:
            case "log":
                logging.getLogger(event["logger"]).log(event["level"], "%s", event["message"])
            case "begin":
                self._task.begin(total=event["total"], done=event["done"])
                self._defer_exit()
            case "step":
                self._task.advance(1, **event["numbers"])
            case "error" if event["traceback"]:
                _log.debug("rank %d:\n%s", local_rank, event["traceback"])

    def _defer_exit_after_error(self) -> None:
        """Keep a launcher that stops all processes after the failure of one from hiding it."""
        if self._state.errors and not self._is_deferred:
            self._defer_exit()

    def _defer_exit(self) -> None:
        self._is_deferred = True
        self._exit_deferred.enter_context(signals.defer_exit())

    def _upload_pending_save(self) -> None:
        """Start to upload a save, unless another upload is under way.

        Until then the process that saved waits, so that uploads slower than saves slow down the
        training. The parent does not wait: it has to answer signals.
        """
        if self._checkpoints.under_way:
            return
        save = self._state.accept_save()
        if save is None:
            return
        newest = f"checkpoint-{save.step}"
        self._checkpoints.save(save.step, self._folder / newest, save.best_step)
        for checkpoint in self._folder.glob("checkpoint-*"):
            if checkpoint.name not in (newest, f"checkpoint-{save.best_step}"):
                shutil.rmtree(checkpoint)  # the trainer needs only the newest and the best
        self._ranks.acknowledge_save(save.local_rank)

    def _handle_signal(self) -> None:
        """Start the grace period when a signal has arrived, and request a save."""
        if self._state.grace.started or not signals.stop_requested():
            return
        self._state.grace.start(time.monotonic(), limited=signals.kill_will_follow())
        if self._state.phase is Phase.STOPPING:
            self._request_save()

    def _act(self) -> None:
        """Do what the phase requires."""
        if self._state.grace.expired(time.monotonic()):
            raise self._grace_error()
        match self._state.phase:
            case Phase.RUNNING | Phase.STOPPING:
                self._check_checkpoints_and_nodes()
            case Phase.SAVED:
                self._check_stragglers()
            case Phase.FAILED:
                if self._seconds_since_first_error() > _ROOT_CAUSE_S:
                    raise self._final_error()

    def _check_checkpoints_and_nodes(self) -> None:
        self._checkpoints.check()
        self._report_grace()
        lost = self._lost_node()
        if lost:
            self._state.add_error(lost, time.monotonic())

    def _check_stragglers(self) -> None:
        """Wait for the upload without a limit, and then for the other processes with a limit."""
        if self._checkpoints.under_way:
            lost = self._lost_node()
            if lost:
                raise lost  # its part of the checkpoint will not arrive
        elif self._state.pending_save is None and self._seconds_since_first_error() > _STRAGGLER_S:
            raise self._final_error()

    def _lost_node(self) -> RetryError | None:
        return self._membership.error if self._membership else None

    def _seconds_since_first_error(self) -> float:
        return time.monotonic() - self._state.first_error_at

    def _final_error(self) -> BaseException:
        """The error that ends the training: a stop after a save, or the root cause of a failure."""
        if self._state.phase is Phase.SAVED:
            return self._finish_stop()
        # A process can lose its peer before this parent has noticed that the node is lost.
        lost = self._lost_node()
        error = root_cause([lost, *self._state.errors] if lost else self._state.errors)
        if isinstance(error, Preempted):
            return RetryError(f"stopped after step {self._state.step}, but no state was saved")
        return error

    def _finish_stop(self) -> Preempted | RetryError:
        """Wait until the state is stored, within the grace period."""
        try:
            self._checkpoints.wait(self._state.grace.seconds_left(time.monotonic()))
        except TimeoutError:
            return self._grace_error()
        if self._membership:
            self._membership.announce_stopped()
        return Preempted(
            f"stopped by a signal after step {self._state.step}; the state is saved",
            "run the same command again to resume",
        )

    def _request_save(self) -> None:
        """Ask the processes to save and stop.

        SIGKILL would cut off a save that does not fit into the grace period. In that case the
        training ends at once, and the next attempt resumes from the last checkpoint.

        Raises:
            Preempted: there is not enough time.
        """
        grace = self._state.grace
        needed = self._seconds_to_store()
        if needed is None:
            _log.info("stop requested: saving after this step")
        elif grace.limited and not grace.fits(needed):
            raise Preempted(
                f"stopped by a signal after step {self._state.step} without a save: saving and "
                f"storing the state takes about {needed:.0f} s, more than "
                f"cluster.graceSeconds ({grace.seconds:.0f}); {self._resume_point()}",
                "raise cluster.graceSeconds if the platform allows it, or lower "
                "run.<stage>.save_steps",
            )
        else:
            _log.info("stop requested: saving after this step (about %.0f s)", needed)
        self._ranks.request_save()

    def _report_grace(self) -> None:
        """Report once, after the first upload, whether a save fits into the grace period."""
        needed = self._seconds_to_store()
        if self._grace_reported or needed is None:
            return
        self._grace_reported = True
        grace = self._state.grace
        if grace.fits(needed):
            _log.info(
                "after a stop request, saving and storing the state takes about %.0f s, within "
                "the grace period of %.0f s",
                needed,
                grace.seconds,
            )
        else:
            _log.warning(
                "after a stop request, the training will resume from the last periodic "
                "checkpoint: saving and storing the state takes about %.0f s, more than "
                "cluster.graceSeconds (%.0f)",
                needed,
                grace.seconds,
            )

    def _seconds_to_store(self) -> float | None:
        """Estimate the time until a save now would be in the store, from the last checkpoint.

        None before the first checkpoint is stored.
        """
        upload_s = self._checkpoints.seconds
        if upload_s is None:
            return None
        uploads = 2 if self._checkpoints.under_way else 1
        return self._state.step_s + self._state.save_s + uploads * upload_s

    def _grace_error(self) -> RetryError:
        return RetryError(
            f"the grace period of {self._state.grace.seconds:.0f} s ended before the state was "
            f"stored; {self._resume_point()}"
        )

    def _resume_point(self) -> str:
        newest = self._checkpoints.newest_step
        if not newest:
            return "there is no checkpoint yet"
        return f"the next attempt resumes from the checkpoint of step {newest}"
