"""Trainings that are stopped: what is saved and stored, within which time, and the exit code."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import MagicMock

import pytest

from medjob.artifacts.artifact import Attempt
from medjob.errors import Preempted, RetryError, SupersededError
from medjob.launch.training import Training
from tests.support.fake_training import BEGIN, HANG, FakeTraining
from tests.support.waiting import wait_until

STOP = "raise Preempted('stopped after step 1; the state is saved')"


def test_signal_to_one_process_stores_the_state_of_all(
    make_training: Callable[..., FakeTraining],
) -> None:
    training = make_training(BEGIN + "train()", "train()", slow_s=0.4)
    training.start()
    for rank in (0, 1):
        training.wait_for(f"trains-{rank}")
    training.processes[1].terminate()
    with pytest.raises(Preempted) as caught:
        training.result(15)
    assert not training.marked("asked-0")
    assert training.marked("asked-1")
    assert caught.value.exit_code == 143
    # The upload has finished before the parent returns.
    assert list(training.checkpoint_states().values()) == ["finished"]


def test_no_save_is_requested_if_the_grace_period_is_too_short(
    make_training: Callable[..., FakeTraining], stop_request: threading.Event
) -> None:
    training = make_training(BEGIN + "save(12, seconds=40)\ntrain(first=13)", "train()")
    training.start(grace_s=20)
    wait_until(lambda: training.checkpoints.newest_step, 10, "the first checkpoint")
    training.wait_for("trains-0")
    stop_request.set()
    with pytest.raises(Preempted) as caught:
        training.result(3)
    assert "cluster.graceSeconds (20)" in caught.value.message
    assert "checkpoint of step 12" in caught.value.message
    assert not list(training.directory.glob("asked-*"))
    assert training.exit_codes() == [-9, -9]
    assert training.checkpoint_states() == {"step-00000012-1": "finished"}


def test_expired_grace_period_names_the_checkpoint_to_resume_from(
    make_training: Callable[..., FakeTraining], stop_request: threading.Event
) -> None:
    script = f"""
        {BEGIN}
        save(12)
        mark('trains')
        while not stop_agreed(): time.sleep(0.01)
        hang()
    """
    training = make_training(script)
    training.start(grace_s=2.0)
    training.wait_for("trains")
    wait_until(lambda: training.checkpoints.newest_step, 10, "the first checkpoint")
    stop_request.set()
    with pytest.raises(
        RetryError, match=r"the grace period of 2 s ended .* checkpoint of step 12"
    ) as caught:
        training.result(2.5)
    assert training.marked("hangs-0")
    assert caught.value.exit_code == 75
    assert training.exit_codes() == [-9]


def test_process_that_hangs_after_the_save_is_not_awaited_for_ever(
    make_training: Callable[..., FakeTraining], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medjob.launch.training._STRAGGLER_S", 1.0)
    training = make_training(f"{BEGIN}wait_for('hangs-1')\nsave(1)\n{STOP}", HANG)
    training.start(grace_s=1.2)
    wait_until(lambda: training.exit_codes()[0] == 143, 10, "the first process has ended")
    with pytest.raises((Preempted, RetryError)):
        training.result(5)


def test_exit_code_143_means_that_the_state_is_stored(
    make_training: Callable[..., FakeTraining],
) -> None:
    lost_peer = "raise RetryError('lost the connection to another training process')"
    training = make_training(
        f"{BEGIN}save(1)\nmark('saved')\n{STOP}",
        f"wait_for('saved')\ntime.sleep(0.2)\n{lost_peer}",
        slow_s=1.0,
    )
    with pytest.raises(Preempted):
        training.run_to_end(10)
    assert training.exit_codes() == [143, 75]
    assert training.checkpoint_states() == {"step-00000001-1": "finished"}


def test_node_that_stopped_and_left_first_is_not_lost(
    make_training: Callable[..., FakeTraining], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medjob.launch.training._ROOT_CAUSE_S", 5.0)
    training = make_training(f"{BEGIN}save(1)\nmark('saved')\nwait_for('left')\n{STOP}")
    training.connect_node()
    training.start()
    training.wait_for("saved")
    training.disconnect_node()
    membership = training.membership
    assert membership
    wait_until(lambda: membership.error, 5, "the node is lost")
    time.sleep(0.3)
    (training.directory / "left").touch()
    with pytest.raises(Preempted):
        training.result(8)


def test_stop_is_announced_to_the_other_nodes(make_training: Callable[..., FakeTraining]) -> None:
    training = make_training(f"{BEGIN}save(1)\n{STOP}")
    training.connect_node()
    with pytest.raises(Preempted):
        training.run_to_end(10)
    assert '{"stopped": true}' in training.messages_to_node()


def test_exit_code_143_covers_a_save_that_waits_for_an_upload(
    make_training: Callable[..., FakeTraining], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medjob.launch.training._STRAGGLER_S", 0.3)
    stop_during_second_save = f"""
        wait_for('second')
        wait_for('trainer/checkpoint-2/state.txt')
        time.sleep(0.2)
        {STOP}
    """
    training = make_training(
        f"{BEGIN}save(1)\nmark('second')\nlink.step(2, 0.1, {{}})\nsave(2)\n{STOP}",
        stop_during_second_save,
        slow_s=1.2,
    )
    with pytest.raises(Preempted):
        training.run_to_end(10)
    assert training.checkpoint_states() == {
        "step-00000001-1": "finished",
        "step-00000002-1": "finished",
    }


def test_failed_upload_after_a_stop_does_not_exit_with_143(
    make_training: Callable[..., FakeTraining],
) -> None:
    training = make_training(f"{BEGIN}save(1)\n{STOP}", slow_s=0.3, store_fails=True)
    with pytest.raises(RetryError, match="the store is unavailable") as caught:
        training.run_to_end(10)
    assert caught.value.exit_code == 75
    assert training.exit_codes() == [143]


def test_save_of_a_killed_process_is_stored_before_exit_143(
    make_training: Callable[..., FakeTraining],
) -> None:
    """All processes have ended, and the second save still waits for the upload of the first."""
    stop_during_second_save = f"wait_for('trainer/checkpoint-2/state.txt')\ntime.sleep(0.2)\n{STOP}"
    training = make_training(
        f"{BEGIN}save(1)\nlink.step(2, 0.1, {{}})\nsave(2)\n{STOP}",
        stop_during_second_save,
        slow_s=1.2,
    )
    training.start()
    wait_until(lambda: training.exit_codes()[1] == 143, 10, "the second process has ended")
    training.processes[0].kill()
    with pytest.raises(Preempted):
        training.result(10)
    assert training.checkpoint_states() == {
        "step-00000001-1": "finished",
        "step-00000002-1": "finished",
    }


def test_save_is_stored_if_an_upload_ends_between_two_checks(tmp_path: Path) -> None:
    """All processes have ended when the upload before the last save ends."""
    stop = {"event": "error", "code": 143, "message": "", "hint": "", "traceback": ""}
    save = {"event": "saved", "step": 2, "seconds": 0.1, "best_step": None}
    events: list[tuple[int, dict[str, Any]]] = [
        (0, save),
        (1, stop),
        (0, {"event": "exit", "status": -9}),
    ]
    answers_after_last_event = [True, True]  # at the upload and for the phase

    class Checkpoints:
        saved_steps: ClassVar[list[int]] = []
        seconds = None
        newest_step = None

        @property
        def under_way(self) -> bool:
            if events:
                return True
            return answers_after_last_event.pop() if answers_after_last_event else False

        def save(self, step: int, *_: object) -> None:
            self.saved_steps.append(step)

        def wait(self, timeout: float | None = None) -> None: ...

        def check(self) -> None: ...

    ranks = MagicMock()
    ranks.__len__.return_value = 2
    ranks.next_event.side_effect = lambda _: events.pop(0) if events else None
    checkpoints: Any = Checkpoints()
    with pytest.raises(Preempted):
        Training(ranks, tmp_path, checkpoints, MagicMock(), None, grace_s=30.0).run()
    assert checkpoints.saved_steps == [2]


def test_stop_without_a_save_does_not_exit_with_143(
    make_training: Callable[..., FakeTraining],
) -> None:
    training = make_training(
        f"{BEGIN}wait_for('stopped')\nos.kill(os.getpid(), signal.SIGKILL)",
        f"mark('stopped')\n{STOP}",
    )
    with pytest.raises(RetryError, match="SIGKILL"):
        training.run_to_end(10)
    assert training.exit_codes()[0] == -9


def test_stop_of_all_processes_without_a_save_is_retried(
    make_training: Callable[..., FakeTraining],
) -> None:
    training = make_training(f"{BEGIN}link.step(1, 0.1, {{}})\n{STOP}")
    with pytest.raises(RetryError, match="stopped after step 1, but no state was saved") as caught:
        training.run_to_end(10)
    assert caught.value.exit_code == 75


def test_node_lost_after_a_stop_is_noticed(
    make_training: Callable[..., FakeTraining], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A spot machine can disappear before it has stored its part."""
    monkeypatch.setattr("medjob.launch.training._STRAGGLER_S", 0.3)
    monkeypatch.setattr("medjob.artifacts.checkpoints.PEER_TIMEOUT_S", 2.5)
    training = make_training(f"{BEGIN}save(1)\n{STOP}", nodes=2)
    training.connect_node()
    training.start()
    wait_until(lambda: training.exit_codes() == [143], 5, "the process has ended")
    training.disconnect_node()
    with pytest.raises(RetryError):
        training.result(1.5)


def test_signal_after_a_process_has_stopped_starts_the_grace_period(
    make_training: Callable[..., FakeTraining], stop_request: threading.Event
) -> None:
    training = make_training(f"{BEGIN}save(1)\n{STOP}", slow_s=3)
    training.start(grace_s=1.2)
    wait_until(lambda: training.exit_codes() == [143], 5, "the process has ended")
    time.sleep(0.3)
    stop_request.set()
    with pytest.raises(RetryError, match="grace"):
        training.result(1.5)


def test_superseded_training_stores_no_more_and_exits_with_76(
    make_training: Callable[..., FakeTraining],
) -> None:
    training = make_training(BEGIN + "save(1)\nwait_for('newer')\nsave(2)\ntrain(first=3)", HANG)
    training.start()
    wait_until(lambda: training.checkpoints.newest_step, 10, "the first checkpoint")
    assert Attempt.begin(training.artifact, "newer").epoch == 2
    (training.directory / "newer").touch()
    with pytest.raises(SupersededError) as caught:
        training.result(8)
    assert caught.value.exit_code == 76
    assert training.checkpoint_states() == {"step-00000001-1": "finished"}
    assert training.exit_codes() == [-9, -9]
