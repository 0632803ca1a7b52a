"""The parent as a process: signals, and what is left when it is gone."""

import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from tests.trials import BEGIN, HANG, alive, children, until, wait_for

Parent = Callable[..., subprocess.Popen[str]]


def test_sigterm_reaches_all_processes_and_ends_with_143_once_the_state_is_stored(
    parent: Parent, tmp_path: Path
) -> None:
    process = parent(BEGIN + "save(1)\ntrain(first=2)", "train()", slow_s=0.3)
    pids = children(tmp_path, 2)
    wait_for(tmp_path / "trains-0")
    wait_for(tmp_path / "trains-1")
    process.terminate()
    assert process.wait(15) == 143, (tmp_path / "errors").read_text()
    assert list(tmp_path.glob("asked-*"))
    assert len(list(tmp_path.glob("store/run/sft/*/checkpoints/*/MANIFEST.json"))) == 2
    assert not any(map(alive, pids))


def test_sigterm_before_the_training_begins_ends_all_at_once(
    parent: Parent, tmp_path: Path
) -> None:
    process = parent(HANG, HANG)
    wait_for(tmp_path / "hangs-0")
    pids = children(tmp_path, 2)
    process.terminate()
    assert process.wait(5) == 143
    until(lambda: not any(map(alive, pids)), 5, "the processes' end")


def test_a_second_sigterm_waits_for_nothing(parent: Parent, tmp_path: Path) -> None:
    process = parent(
        BEGIN + "mark('begun')\nwhile not stop_agreed(): time.sleep(0.01)\nhang()", HANG
    )
    pids = children(tmp_path, 2)
    wait_for(tmp_path / "begun")
    process.terminate()
    wait_for(tmp_path / "hangs-0")
    assert process.poll() is None
    process.terminate()
    assert process.wait(5) == 143
    until(lambda: not any(map(alive, pids)), 5, "the processes' end")


def test_a_killed_parent_takes_its_processes_along(parent: Parent, tmp_path: Path) -> None:
    process = parent(BEGIN + HANG, HANG)
    pids = children(tmp_path, 2)
    wait_for(tmp_path / "hangs-0")
    wait_for(tmp_path / "hangs-1")
    assert all(map(alive, pids))
    process.kill()
    assert process.wait() == -9
    until(lambda: not any(map(alive, pids)), 5, "the processes' end")


def test_a_parent_killed_before_it_read_all_takes_its_processes_along(
    parent: Parent, tmp_path: Path
) -> None:
    process = parent(BEGIN + "wait_for('go')\nmark('saves')\nsave(1)")
    (pid,) = children(tmp_path, 1)
    process.send_signal(signal.SIGSTOP)  # as a machine that swaps does
    (tmp_path / "go").touch()
    wait_for(tmp_path / "saves")
    time.sleep(0.2)
    assert psutil.Process(process.pid).status() == psutil.STATUS_STOPPED
    assert alive(pid)
    process.kill()
    assert process.wait() == -9
    until(lambda: not alive(pid), 5, "the process's end")


def test_a_parent_that_lost_a_node_ends_although_a_part_is_awaited(
    parent: Parent, tmp_path: Path
) -> None:
    process = parent(BEGIN + "save(1)\nhang()", nodes=2)
    until(
        lambda: list(tmp_path.glob("store/run/sft/*/checkpoints/*/part-0.json")), 10, "our own part"
    )
    (tmp_path / "lose the node").touch()
    until(lambda: "node 1 is gone" in (tmp_path / "errors").read_text(), 10, "the error")
    assert process.wait(5) == 75


def test_a_slow_store_does_not_hold_the_parent_beyond_the_grace(
    parent: Parent, tmp_path: Path
) -> None:
    process = parent(BEGIN + "save(1)\nmark('second')\nsave(2)\nhang()", grace_s=1.5, slow_s=8)
    wait_for(tmp_path / "second")
    wait_for(tmp_path / "trainer/checkpoint-2")
    time.sleep(0.3)
    process.terminate()
    assert process.wait(4) == 75
