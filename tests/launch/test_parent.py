"""The parent in its own process: signals, exit codes, and orphaned training processes."""

import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from tests.support.fake_training import BEGIN, HANG, process_ids
from tests.support.waiting import is_alive, wait_for_file, wait_until

StartParent = Callable[..., subprocess.Popen[str]]


def wait_until_ended(pids: list[int]) -> None:
    wait_until(lambda: not any(map(is_alive, pids)), 5, "the training processes have ended")


def test_sigterm_stores_the_state_and_exits_with_143(
    start_parent: StartParent, tmp_path: Path
) -> None:
    parent = start_parent(BEGIN + "save(1)\ntrain(first=2)", "train()", slow_s=0.3)
    pids = process_ids(tmp_path, 2)
    wait_for_file(tmp_path / "trains-0")
    wait_for_file(tmp_path / "trains-1")
    parent.terminate()
    assert parent.wait(15) == 143, (tmp_path / "errors").read_text()
    assert list(tmp_path.glob("asked-*"))
    assert len(list(tmp_path.glob("store/run/sft/*/checkpoints/*/MANIFEST.json"))) == 2
    assert not any(map(is_alive, pids))


def test_sigterm_before_the_first_step_ends_all_at_once(
    start_parent: StartParent, tmp_path: Path
) -> None:
    parent = start_parent(HANG, HANG)
    wait_for_file(tmp_path / "hangs-0")
    pids = process_ids(tmp_path, 2)
    parent.terminate()
    assert parent.wait(5) == 143
    wait_until_ended(pids)


def test_sigterm_after_a_failure_does_not_hide_it(
    start_parent: StartParent, tmp_path: Path
) -> None:
    """torchrun stops all processes as soon as one has failed."""
    fails = "wait_for('hangs-1')\nmark('fails')\nraise DataError('row 3 is wrong')"
    parent = start_parent(fails, HANG)
    pids = process_ids(tmp_path, 2)
    wait_until_ended(pids[:1])
    time.sleep(1)  # until the parent has noticed; the test also holds if it has ended by then
    parent.terminate()
    assert parent.wait(10) == 65
    wait_until_ended(pids)


def test_second_sigterm_ends_all_at_once(start_parent: StartParent, tmp_path: Path) -> None:
    # The parent acknowledges a save only after it has handled `begin`, which defers the exit.
    waits_for_stop = "save(1)\nmark('begun')\nwhile not stop_agreed(): time.sleep(0.01)\nhang()"
    parent = start_parent(BEGIN + waits_for_stop, HANG)
    pids = process_ids(tmp_path, 2)
    wait_for_file(tmp_path / "begun")
    parent.terminate()
    wait_for_file(tmp_path / "hangs-0")
    assert parent.poll() is None
    parent.terminate()
    assert parent.wait(5) == 143
    wait_until_ended(pids)


def test_training_processes_end_when_the_parent_is_killed(
    start_parent: StartParent, tmp_path: Path
) -> None:
    parent = start_parent(BEGIN + HANG, HANG)
    pids = process_ids(tmp_path, 2)
    wait_for_file(tmp_path / "hangs-0")
    wait_for_file(tmp_path / "hangs-1")
    assert all(map(is_alive, pids))
    parent.kill()
    assert parent.wait() == -9
    wait_until_ended(pids)


def test_training_process_ends_if_its_parent_dies_with_unread_events(
    start_parent: StartParent, tmp_path: Path
) -> None:
    parent = start_parent(BEGIN + "wait_for('continue')\nmark('saves')\nsave(1)")
    pids = process_ids(tmp_path, 1)
    parent.send_signal(signal.SIGSTOP)  # a machine that swaps behaves like this
    (tmp_path / "continue").touch()
    wait_for_file(tmp_path / "saves")
    time.sleep(0.2)
    assert psutil.Process(parent.pid).status() == psutil.STATUS_STOPPED
    assert is_alive(pids[0])
    parent.kill()
    assert parent.wait() == -9
    wait_until_ended(pids)


def test_parent_that_lost_a_node_does_not_wait_for_its_part(
    start_parent: StartParent, tmp_path: Path
) -> None:
    parent = start_parent(BEGIN + "save(1)\nhang()", nodes=2)
    part = "store/run/sft/*/checkpoints/*/part-0.json"
    wait_until(lambda: list(tmp_path.glob(part)), 10, "this node's part is stored")
    (tmp_path / "lose the node").touch()
    errors = tmp_path / "errors"
    wait_until(lambda: "lost the connection to node 1" in errors.read_text(), 10, "the error")
    assert parent.wait(5) == 75


def test_slow_upload_does_not_outlast_the_grace_period(
    start_parent: StartParent, tmp_path: Path
) -> None:
    script = BEGIN + "save(1)\nmark('second')\nsave(2)\nhang()"
    parent = start_parent(script, grace_s=1.5, slow_s=8)
    wait_for_file(tmp_path / "second")
    wait_for_file(tmp_path / "trainer/checkpoint-2")
    time.sleep(0.3)
    parent.terminate()
    assert parent.wait(4) == 75
