"""Trainings that complete, fail, or lose a process or a node."""

import json
import logging
import time
from collections.abc import Callable

import pytest

from medjob.errors import DataError, RetryError
from medjob.launch.failures import UnexpectedError
from tests.support.fake_training import BEGIN, HANG, FakeTraining
from tests.support.waiting import is_alive, wait_for_file, wait_until


def test_training_returns_metrics_and_stores_checkpoints(
    make_training: Callable[..., FakeTraining], caplog: pytest.LogCaptureFixture
) -> None:
    script = """
        link.begin(4, 0)
        for step in (1, 2, 3, 4):
            link.step(step, 0.1, {"loss": 1 / step})
            save(step, best=min(step, 2))
        metrics["loss"] = 0.25
    """
    logs = """
        log.info('from rank %d: %s', rank, 'one')
        logging.getLogger('a.library').warning('two')
    """
    caplog.set_level(logging.INFO)
    training = make_training(script, logs)
    assert training.run_to_end(20) == {"loss": 0.25}
    assert training.checkpoint_states() == {
        "step-00000002-1": "finished",  # the best
        "step-00000003-1": "finished",
        "step-00000004-1": "finished",
    }
    assert training.stored_state("step-00000004-1") == "state after 4"
    on_disk = sorted(path.name for path in training.folder.iterdir())
    assert on_disk == ["checkpoint-2", "checkpoint-4"]
    progress_file = training.directory / "store" / training.artifact.path("progress.json")
    progress = json.loads(progress_file.read_text())
    assert (progress["step"], progress["total"], progress["loss"]) == (4, 4, 0.25)
    assert ("medjob.fake_training", logging.INFO, "from rank 1: one") in caplog.record_tuples
    assert ("a.library", logging.WARNING, "two") in caplog.record_tuples


def test_saved_returns_when_the_parent_has_its_own_copy(
    make_training: Callable[..., FakeTraining],
) -> None:
    """The process may then delete the directory, although the upload is not finished."""
    script = f"""
        {BEGIN}
        mark('saves')
        save(7)
        mark('continues')
        shutil.rmtree(here / 'trainer/checkpoint-7')
    """
    training = make_training(script, slow_s=0.3)
    training.wait_for("saves")
    wait_for_file(training.folder / "checkpoint-7/state.txt")
    time.sleep(0.3)
    assert not training.marked("continues")
    training.run_to_end(20)
    assert training.marked("continues")
    assert training.checkpoint_states() == {"step-00000007-1": "finished"}
    assert training.stored_state("step-00000007-1") == "state after 7"


def test_invalid_log_call_does_not_end_the_training(
    make_training: Callable[..., FakeTraining],
) -> None:
    training = make_training("log.warning('%d', 'not a number')\nmetrics['after'] = 1")
    assert training.run_to_end(20) == {"after": 1}


def test_process_is_not_killed_before_its_tracker_finishes(
    make_training: Callable[..., FakeTraining],
) -> None:
    script = """
        def finish():
            mark('finishes')
            time.sleep(0.5)
            mark('finished')
        sys.modules['wandb'] = SimpleNamespace(finish=finish)
    """
    training = make_training(script)
    training.run_to_end(10)
    assert training.marked("finished")


def test_failing_tracker_does_not_fail_the_training(
    make_training: Callable[..., FakeTraining],
) -> None:
    script = """
        sys.modules['wandb'] = SimpleNamespace(finish=lambda: mark('fails') or 1 / 0)
        metrics['loss'] = 1.0
    """
    training = make_training(script)
    training.start()
    training.wait_for("fails")
    assert training.result(10) == {"loss": 1.0}


def test_metrics_that_are_not_json_are_an_unexpected_error(
    make_training: Callable[..., FakeTraining],
) -> None:
    with pytest.raises(UnexpectedError, match="TypeError"):
        make_training("metrics['loss'] = {1}").run_to_end(10)


def test_killed_process_is_reported_and_ends_the_others(
    make_training: Callable[..., FakeTraining],
) -> None:
    training = make_training(HANG, HANG)
    training.start()
    for rank in (0, 1):
        training.wait_for(f"hangs-{rank}")
    training.processes[1].kill()
    with pytest.raises(RetryError, match="training process 1 was killed by SIGKILL") as caught:
        training.result(8)
    assert caught.value.exit_code == 75
    assert training.exit_codes() == [-9, -9]


def test_data_error_ends_processes_that_hang(make_training: Callable[..., FakeTraining]) -> None:
    ignores_signals = """
for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
    signal.signal(number, signal.SIG_IGN)
"""
    training = make_training(
        "wait_for('hangs-1')\nraise DataError('row 3 is wrong', 'fix it')", ignores_signals + HANG
    )
    with pytest.raises(DataError) as caught:
        training.run_to_end(10)
    assert (caught.value.message, caught.value.hint) == ("row 3 is wrong", "fix it")
    assert training.exit_codes() == [65, -9]


@pytest.mark.parametrize("peer_first", [False, True])
def test_root_cause_is_raised_instead_of_its_consequence(
    make_training: Callable[..., FakeTraining], monkeypatch: pytest.MonkeyPatch, peer_first: bool
) -> None:
    """The error of a peer that lost its connection may arrive first."""
    monkeypatch.setattr("medjob.launch.training._ROOT_CAUSE_S", 5.0)
    first = "mark('first')"
    second = "wait_for('first')\ntime.sleep(0.2)\nmark('second')"
    cause = "raise ValueError('boom')"
    message = "[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4242"
    consequence = f"raise RuntimeError({message!r})"
    training = make_training(
        f"{second if peer_first else first}\n{cause}",
        f"{first if peer_first else second}\n{consequence}",
    )
    with pytest.raises(UnexpectedError, match="ValueError: boom") as caught:
        training.run_to_end(10)
    traceback = caught.value.__notes__[0]
    assert "script-0.py" in traceback
    assert cause in traceback
    assert training.marked("second")  # both processes had reported


def test_data_error_is_preferred_to_the_abort_that_it_caused(
    make_training: Callable[..., FakeTraining],
) -> None:
    training = make_training(
        "wait_for('pid-1')\nmark('fails')\nraise DataError('row 3 is wrong')",
        "wait_for('fails')\ntime.sleep(0.1)\nmark('aborts')\nos.abort()",
    )
    training.start()
    training.wait_for("aborts")
    with pytest.raises(DataError):
        training.result(8)


FORK_HELPER = """
if os.fork() == 0:
    mark('helper', str(os.getpid()))
    time.sleep(60)
wait_for('helper')
"""


def test_killed_process_is_noticed_while_its_helper_lives(
    make_training: Callable[..., FakeTraining],
) -> None:
    training = make_training(FORK_HELPER + "os.kill(os.getpid(), signal.SIGKILL)")
    training.start()
    training.wait_for("helper")
    wait_until(lambda: training.exit_codes() == [-9], 5, "the process is killed")
    with pytest.raises(RetryError, match="SIGKILL"):
        training.result(4)


def test_helper_processes_end_with_the_training(
    make_training: Callable[..., FakeTraining],
) -> None:
    training = make_training(
        "wait_for('helper')\nraise DataError('row 3 is wrong')", FORK_HELPER + "hang()"
    )
    with pytest.raises(DataError):
        training.run_to_end(10)
    helper = int(training.wait_for("helper"))
    wait_until(lambda: not is_alive(helper), 4, "the helper has ended")


def test_lost_node_ends_the_training_on_this_node(
    make_training: Callable[..., FakeTraining],
) -> None:
    training = make_training(BEGIN + HANG)
    training.connect_node()
    training.start()
    training.wait_for("hangs-0")
    training.disconnect_node()
    with pytest.raises(RetryError, match="lost the connection to node 1"):
        training.result(10)
    assert training.exit_codes() == [-9]


def test_node_lost_before_it_stores_its_last_part_is_noticed(
    make_training: Callable[..., FakeTraining], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medjob.artifacts.checkpoints.PEER_TIMEOUT_S", 8.0)
    training = make_training(BEGIN + "save(1)", nodes=2)
    training.connect_node()
    training.start()
    wait_until(lambda: training.exit_codes() == [0], 10, "the process has ended")
    training.disconnect_node()
    with pytest.raises(RetryError, match="lost the connection to node 1"):
        training.result(4)
