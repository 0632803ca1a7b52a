"""How a training stops: what is saved, stored, and said of it."""

import threading
import time
from collections.abc import Callable

import pytest

from medjob.artifacts.artifact import Attempt
from medjob.errors import Preempted, RetryError, SupersededError
from tests.trials import BEGIN, HANG, Trial, until


def test_a_signal_to_one_process_stores_the_state_of_all(trial: Callable[..., Trial]) -> None:
    one = trial(BEGIN + "train()", "train()", slow_s=0.4)
    one.begin()
    for rank in (0, 1):
        one.wait_for(f"trains-{rank}")
    one.ranks[1].process.terminate()
    with pytest.raises(Preempted) as caught:
        one.result(15)
    assert [(one.here / f"asked-{rank}").exists() for rank in (0, 1)] == [False, True]
    assert caught.value.exit_code == 143
    assert list(one.stored().values()) == ["finished"]  # before it returned


def test_a_grace_too_short_for_a_save_is_not_spent_on_one(
    trial: Callable[..., Trial], stop: threading.Event
) -> None:
    one = trial(BEGIN + "save(12, seconds=40)\ntrain(first=13)", "train()")
    one.begin(grace_s=20)
    until(lambda: one.checkpoints.newest_step, 10, "the first checkpoint")
    one.wait_for("trains-0")
    stop.set()
    with pytest.raises(Preempted) as caught:
        one.result(3)
    assert "cluster.graceSeconds (20)" in caught.value.message
    assert "checkpoint of step 12" in caught.value.message
    assert not list(one.here.glob("asked-*"))
    assert one.exits() == [-9, -9]
    assert one.stored() == {"step-00000012-1": "finished"}


def test_a_grace_that_ends_in_a_save_names_the_checkpoint_that_counts(
    trial: Callable[..., Trial], stop: threading.Event
) -> None:
    one = trial(
        BEGIN + "save(12)\nmark('trains')\nwhile not stop_agreed(): time.sleep(0.01)\nhang()"
    )
    one.begin(grace_s=2.0)
    one.wait_for("trains")
    until(lambda: one.checkpoints.newest_step, 10, "the first checkpoint")
    stop.set()
    with pytest.raises(
        RetryError, match=r"the grace of 2 s ended .* checkpoint of step 12"
    ) as caught:
        one.result(2.5)
    assert (one.here / "hangs-0").exists()
    assert caught.value.exit_code == 75
    assert one.exits() == [-9]


def test_a_process_that_hangs_after_the_save_does_not_hold_all_for_ever(
    trial: Callable[..., Trial], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medjob.launch.training._STRAGGLER_S", 1.0)
    one = trial(
        BEGIN
        + "wait_for('hangs-1')\nsave(1)\nraise Preempted('stopped after step 1; the state is saved')",
        HANG,
    )
    one.begin(grace_s=1.2)
    until(lambda: one.exits()[0] == 143, 10, "the first process's end")
    with pytest.raises((Preempted, RetryError)):
        one.result(5)


def test_143_is_never_said_before_the_state_is_stored(trial: Callable[..., Trial]) -> None:
    one = trial(
        BEGIN
        + "save(1)\nmark('saved')\nraise Preempted('stopped after step 1; the state is saved')",
        "wait_for('saved')\ntime.sleep(0.2)\nraise RetryError('another training process is gone')",
        slow_s=1.0,
    )
    with pytest.raises(Preempted):
        one.outcome(10)
    assert one.exits() == [143, 75]
    assert one.stored() == {"step-00000001-1": "finished"}


def test_a_node_that_stopped_and_left_first_is_not_lost(
    trial: Callable[..., Trial], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medjob.launch.training._ROOT_CAUSE_S", 5.0)
    one = trial(
        BEGIN
        + "save(1)\nmark('saved')\nwait_for('left')\nraise Preempted('stopped after step 1; the state is saved')"
    )
    one.join_node()
    one.begin()
    one.wait_for("saved")
    one.lose_node()
    assert one.peers
    until(lambda: one.peers and one.peers.lost, 5, "the lost node")
    time.sleep(0.3)
    (one.here / "left").touch()
    with pytest.raises(Preempted):
        one.result(8)


STOPPED = "raise Preempted('stopped after this step; the state is saved')"


def test_143_covers_a_save_that_waits_for_the_one_before_it(
    trial: Callable[..., Trial], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medjob.launch.training._STRAGGLER_S", 0.3)
    one = trial(
        f"{BEGIN}save(1)\nmark('second')\nsave(2)\n{STOPPED}",
        f"wait_for('second')\nwait_for('trainer/checkpoint-2/state.txt')\ntime.sleep(0.2)\n{STOPPED}",
        slow_s=1.2,
    )
    with pytest.raises(Preempted):
        one.outcome(10)
    assert one.stored() == {"step-00000001-1": "finished", "step-00000002-1": "finished"}


def test_143_is_not_said_where_nothing_was_handed_over(trial: Callable[..., Trial]) -> None:
    one = trial(
        f"{BEGIN}wait_for('stopped')\nos.kill(os.getpid(), signal.SIGKILL)",
        f"mark('stopped')\n{STOPPED}",
    )
    with pytest.raises(RetryError, match="SIGKILL"):
        one.outcome(10)
    assert one.exits()[0] == -9


def test_a_node_lost_after_a_stop_is_noticed(
    trial: Callable[..., Trial], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a spot machine is that was given too little time."""
    monkeypatch.setattr("medjob.launch.training._STRAGGLER_S", 0.3)
    monkeypatch.setattr("medjob.artifacts.checkpoints.PEERS_S", 2.5)
    one = trial(f"{BEGIN}save(1)\n{STOPPED}", nodes=2)
    one.join_node()
    one.begin()
    until(lambda: one.exits() == [143], 5, "the process's end")
    one.lose_node()
    with pytest.raises(RetryError):
        one.result(1.5)


def test_a_signal_after_a_process_has_stopped_sets_the_grace(
    trial: Callable[..., Trial], stop: threading.Event
) -> None:
    one = trial(f"{BEGIN}save(1)\n{STOPPED}", slow_s=3)
    one.begin(grace_s=1.2)
    until(lambda: one.exits() == [143], 5, "the process's end")
    time.sleep(0.3)
    stop.set()
    with pytest.raises(RetryError, match="grace"):
        one.result(1.5)


def test_a_superseded_training_ends_with_76_and_stores_nothing_more(
    trial: Callable[..., Trial],
) -> None:
    one = trial(BEGIN + "save(1)\nwait_for('newer')\nsave(2)\ntrain(first=3)", HANG)
    one.begin()
    until(lambda: one.checkpoints.newest_step, 10, "the first checkpoint")
    assert Attempt.begin(one.artifact, "newer").epoch == 2
    (one.here / "newer").touch()
    with pytest.raises(SupersededError) as caught:
        one.result(8)
    assert caught.value.exit_code == 76
    assert one.stored() == {"step-00000001-1": "finished"}
    assert one.exits() == [-9, -9]
