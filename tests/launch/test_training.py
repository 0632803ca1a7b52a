"""How a training ends: well, killed, hanging, and at odds."""

import json
import logging
import time
from collections.abc import Callable

import pytest

from medjob.errors import DataError, RetryError
from medjob.launch.training import UnexpectedError
from tests.trials import BEGIN, HANG, Trial, alive, until, wait_for


def test_a_training_ends_with_its_metrics_and_its_checkpoints(
    trial: Callable[..., Trial], caplog: pytest.LogCaptureFixture
) -> None:
    script = """
        link.begin(4, 0)
        for step in (1, 2, 3, 4):
            link.step(step, 0.1, {"loss": 1 / step})
            save(step, best=min(step, 2))
        metrics["loss"] = 0.25
    """
    caplog.set_level(logging.INFO)
    one = trial(
        script,
        "log.info('rank %d says %s', rank, 'this')\nlogging.getLogger('a.library').warning('and that')",
    )
    assert one.outcome(20) == {"loss": 0.25}
    assert one.stored() == {
        f"step-0000000{step}-1": "finished" for step in (2, 3, 4)
    }  # the last two, and the best
    state = (
        one.here
        / "store"
        / one.artifact.path("checkpoints", "step-00000004-1", "part-0", "state.txt")
    )
    assert state.read_text() == "state after 4"
    assert sorted(path.name for path in one.folder.iterdir()) == ["checkpoint-2", "checkpoint-4"]
    progress = json.loads((one.here / "store" / one.artifact.path("progress.json")).read_text())
    assert (progress["step"], progress["total"], progress["loss"]) == (4, 4, 0.25)
    assert ("medjob.trial", logging.INFO, "rank 1 says this") in caplog.record_tuples
    assert ("a.library", logging.WARNING, "and that") in caplog.record_tuples


def test_a_process_waits_in_saved_until_its_checkpoint_is_taken(
    trial: Callable[..., Trial],
) -> None:
    """Then the folder is its own again, although the bytes are still on their way."""
    one = trial(
        f"{BEGIN}mark('saves')\nsave(7)\nmark('goes on')\nshutil.rmtree(here / 'trainer/checkpoint-7')",
        slow_s=0.3,
    )
    one.wait_for("saves")
    wait_for(one.folder / "checkpoint-7/state.txt")
    time.sleep(0.3)
    assert not (one.here / "goes on").exists()
    one.outcome(20)
    assert (one.here / "goes on").exists()
    assert one.stored() == {"step-00000007-1": "finished"}
    state = (
        one.here
        / "store"
        / one.artifact.path("checkpoints", "step-00000007-1", "part-0", "state.txt")
    )
    assert state.read_text() == "state after 7"


def test_a_log_call_that_cannot_be_formatted_ends_nothing(trial: Callable[..., Trial]) -> None:
    one = trial("log.warning('%d', 'no number')\nmetrics['after'] = 1")
    assert one.outcome(20) == {"after": 1}


def test_a_tracker_may_finish_before_its_process_is_ended(trial: Callable[..., Trial]) -> None:
    script = """
        def finish():
            mark('finishes')
            time.sleep(0.5)
            mark('finished')
        sys.modules['wandb'] = SimpleNamespace(finish=finish)
    """
    one = trial(script)
    one.outcome(10)
    assert (one.here / "finished").exists()


def test_a_tracker_that_cannot_finish_costs_nothing(trial: Callable[..., Trial]) -> None:
    one = trial(
        "sys.modules['wandb'] = SimpleNamespace(finish=lambda: mark('fails') or 1 / 0)\nmetrics['loss'] = 1.0"
    )
    one.begin()
    one.wait_for("fails")
    assert one.result(10) == {"loss": 1.0}


def test_metrics_that_cannot_be_sent_are_a_fault_of_ours(trial: Callable[..., Trial]) -> None:
    with pytest.raises(UnexpectedError, match="TypeError"):
        trial("metrics['loss'] = {1}").outcome(10)


def test_a_killed_process_is_told_and_takes_the_others_along(trial: Callable[..., Trial]) -> None:
    one = trial(HANG, HANG)
    one.begin()
    for rank in (0, 1):
        one.wait_for(f"hangs-{rank}")
    one.ranks[1].process.kill()
    with pytest.raises(RetryError, match="training process 1 was ended by SIGKILL") as caught:
        one.result(8)
    assert caught.value.exit_code == 75
    assert one.exits() == [-9, -9]


def test_bad_data_in_one_process_ends_the_others_that_hang(trial: Callable[..., Trial]) -> None:
    deaf = "for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT): signal.signal(number, signal.SIG_IGN)\n"
    one = trial("wait_for('hangs-1')\nraise DataError('row 3 is wrong', 'mend it')", deaf + HANG)
    with pytest.raises(DataError) as caught:
        one.outcome(10)
    assert (caught.value.message, caught.value.hint) == ("row 3 is wrong", "mend it")
    assert one.exits() == [65, -9]


@pytest.mark.parametrize("peer_first", [False, True])
def test_the_fault_is_raised_and_not_what_it_caused(
    trial: Callable[..., Trial], monkeypatch: pytest.MonkeyPatch, peer_first: bool
) -> None:
    """A peer that lost its connection may be heard first."""
    monkeypatch.setattr("medjob.launch.training._ROOT_CAUSE_S", 5.0)
    first, second = "mark('first')", "wait_for('first')\ntime.sleep(0.2)\nmark('second')"
    fault = "raise ValueError('boom')"
    lost = "raise RuntimeError('[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4242')"
    one = trial(
        f"{second if peer_first else first}\n{fault}", f"{first if peer_first else second}\n{lost}"
    )
    with pytest.raises(UnexpectedError, match="ValueError: boom") as caught:
        one.outcome(10)
    assert "in script" in caught.value.__notes__[0]  # where it happened
    assert (one.here / "second").exists()  # both had spoken


def test_bad_data_counts_for_more_than_the_abort_that_it_caused(
    trial: Callable[..., Trial],
) -> None:
    one = trial(
        "raise DataError('row 3 is wrong')",
        "wait_for('pid-0')\ntime.sleep(0.3)\nmark('aborts')\nos.abort()",
    )
    one.begin()
    one.wait_for("aborts")
    with pytest.raises(DataError):
        one.result(8)


HELPER = """
    if os.fork() == 0:
        mark('helper', str(os.getpid()))
        time.sleep(60)
    wait_for('helper')
"""


def test_a_killed_process_is_noticed_although_its_helper_lives(trial: Callable[..., Trial]) -> None:
    one = trial(HELPER + "    os.kill(os.getpid(), signal.SIGKILL)")
    one.begin()
    one.wait_for("helper")
    until(lambda: one.exits() == [-9], 5, "the kill")
    with pytest.raises(RetryError, match="SIGKILL"):
        one.result(4)


def test_helpers_of_a_process_end_with_the_training(trial: Callable[..., Trial]) -> None:
    one = trial("wait_for('helper')\nraise DataError('row 3 is wrong')", HELPER + "    hang()")
    with pytest.raises(DataError):
        one.outcome(10)
    until(lambda: not alive(int(one.wait_for("helper"))), 4, "the helper's end")


def test_a_lost_node_ends_the_training_here_too(trial: Callable[..., Trial]) -> None:
    one = trial(BEGIN + HANG)
    one.join_node()
    one.begin()
    one.wait_for("hangs-0")
    one.lose_node()
    with pytest.raises(RetryError, match="node 1 is gone"):
        one.result(10)
    assert one.exits() == [-9]


def test_a_node_lost_before_its_last_part_is_stored_is_noticed(
    trial: Callable[..., Trial], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medjob.artifacts.checkpoints.PEERS_S", 8.0)
    one = trial(BEGIN + "save(1)", nodes=2)
    one.join_node()
    one.begin()
    until(lambda: one.exits() == [0], 10, "the processes' end")
    one.lose_node()
    with pytest.raises(RetryError, match="node 1 is gone"):
        one.result(4)
