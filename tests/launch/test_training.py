"""A training as its parent lives through it: real processes on real links, killed, stopped, hanging and at odds.

The processes run `worker.main`; only what it would train is replaced, by a few lines of each test.
"""

import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import pytest

import medjob
from medjob import preempt
from medjob.artifact import Artifact, Attempt
from medjob.checkpoints import Checkpoints, states
from medjob.errors import DataError, Preempted, RetryError, SupersededError
from medjob.files import fingerprint
from medjob.launch.nodes import Peers
from medjob.launch.ranks import Rank, Ranks
from medjob.launch.training import Training, UnexpectedError
from medjob.link import Place
from medjob.progress import Progress
from medjob.store import LocalStore

CODE = Path(medjob.__file__).parents[1]
ROOT = Path(__file__).parents[2]
_RANK = """
import json, logging, os, shutil, signal, sys, time
from pathlib import Path
from types import ModuleType, SimpleNamespace


class Unneeded(ModuleType):
    def __getattr__(self, name):
        return None


for name in ("medjob.config", "medjob.config.job", "medjob.stage"):  # half of the time that a process takes to start
    sys.modules[name] = Unneeded(name)

from medjob.errors import DataError, Preempted, RetryError
from medjob.launch import worker
from medjob.link import Place

log, metrics = logging.getLogger("medjob.trial"), {}
link: worker.Link


def load(text):
    global here, rank
    spec = json.loads(text)
    here, rank = Path(spec["here"]), spec["place"]["rank"]
    return SimpleNamespace(place=Place(**spec["place"]), resume_step=None, debug=False)


def run(_, given):
    global link
    link = given
    mark(f"pid-{rank}", str(os.getpid()))
    script()
    return metrics


def mark(name, text=""):
    (here / f".{name}").write_text(text)
    (here / f".{name}").rename(here / name)


def wait_for(name):
    while not (here / name).exists():
        time.sleep(0.01)


def save(step, best=None, seconds=0.1):
    folder = here / "trainer" / f"checkpoint-{step}"
    folder.mkdir()
    (folder / "state.txt").write_text(f"state after {step}")
    link.saved(step, seconds, best)


def stop_agreed():
    if link.stop_requested:
        mark(f"asked-{rank}")
        mark("stop")
    return (here / "stop").exists()


def train(first=1):
    "Steps, until one process of all is asked to stop."
    for step in range(first, 100000):
        time.sleep(0.02)
        if rank == 0:
            link.step(step, 0.02, {"loss": 1.0})
        mark(f"trains-{rank}")
        if stop_agreed():
            if rank == 0:
                save(step)
            raise Preempted(f"stopped after step {step}; the state is saved")


def hang():
    mark(f"hangs-{rank}")
    while True:
        time.sleep(60)


def script():
"""
_ENDING = """

worker.Spec, worker._run = SimpleNamespace(load=load), run
worker.main(*sys.argv[1:])
"""
BEGIN = "link.begin(100, 0)\n"
HANG = "hang()"


class SlowStore(LocalStore):
    """Takes `slow_s` for each checkpoint."""

    slow_s = 0.0

    def create(self, key: str, data: bytes) -> str:
        if key.endswith("/part-0.json"):
            time.sleep(self.slow_s)
        return super().create(key, data)


class Trial:
    """One training by scripted processes, and all that it stands on."""

    def __init__(self, here: Path, *scripts: str, nodes: int = 1, slow_s: float = 0.0) -> None:
        self.here, self.folder = here, here / "trainer"
        self.folder.mkdir()
        store = SlowStore(here / "store")
        store.slow_s = slow_s
        self.artifact = Artifact(store, "run", "sft", fingerprint("trial"))
        attempt = Attempt.begin(self.artifact, "me")
        self.checkpoints = Checkpoints(attempt, 2, here / "uploads", nodes=nodes)
        self.ranks = [self._start(Place(n, len(scripts), n, len(scripts)), script) for n, script in enumerate(scripts)]
        self.group = Ranks(self.ranks)
        self.peers: Peers | None = None
        self.other_node: socket.socket | None = None
        self._ended: dict[str, Any] = {}
        self._thread: threading.Thread | None = None

    def _start(self, place: Place, script: str) -> Rank:
        ours, theirs = socket.socketpair()
        file, spec = self.here / f"rank-{place.rank}.py", self.here / f"rank-{place.rank}.json"
        file.write_text(_RANK + textwrap.indent(textwrap.dedent(script), "    ") + _ENDING)
        spec.write_text(json.dumps({"here": str(self.here), "place": asdict(place)}))
        with theirs:
            process = subprocess.Popen(
                [sys.executable, str(file), str(theirs.fileno()), str(spec)],
                pass_fds=[theirs.fileno()],
                stdout=2,
                start_new_session=True,
                env={**os.environ, "PYTHONPATH": str(CODE)},
            )
        return Rank(process, ours, place)

    def join_node(self) -> None:
        """Let there be another node, at the other end of a connection."""
        ours, self.other_node = socket.socketpair()
        self.peers = Peers({}, {1: ours})

    def lose_node(self) -> None:
        """The other node is gone."""
        assert self.other_node
        self.other_node.close()

    def run(self, grace_s: float = 30.0) -> dict[str, Any]:
        """As the runner does it."""
        try:
            with Progress("sft", self.artifact).task("train", total=0) as task:
                return Training(self.group, self.folder, self.checkpoints, task, self.peers, grace_s).run()
        finally:
            self.group.kill()

    def begin(self, grace_s: float = 30.0) -> None:
        """Run in the background."""

        def work() -> None:
            try:
                self._ended["metrics"] = self.run(grace_s)
            except BaseException as error:
                self._ended["error"] = error

        self._thread = threading.Thread(target=work, daemon=True)
        self._thread.start()

    def result(self, within_s: float) -> dict[str, Any]:
        """What `run` returned or raised."""
        assert self._thread
        self._thread.join(within_s)
        assert not self._thread.is_alive(), f"still running after {within_s} s"
        assert not [rank for rank in self.ranks if alive(rank.process.pid)], "a process is left"
        if "error" in self._ended:
            raise self._ended["error"]
        return self._ended["metrics"]

    def outcome(self, within_s: float, grace_s: float = 30.0) -> dict[str, Any]:
        """Run to the end."""
        self.begin(grace_s)
        return self.result(within_s)

    def wait_for(self, name: str) -> str:
        """Wait until a process has said `name`."""
        return wait_for(self.here / name).read_text()

    def stored(self) -> dict[str, Any]:
        return dict(states(self.artifact))

    def exits(self) -> list[int | None]:
        return [rank.process.poll() for rank in self.ranks]

    def clean_up(self) -> None:
        for rank in self.ranks:  # and what it has started
            with contextlib.suppress(ProcessLookupError):
                os.killpg(rank.process.pid, signal.SIGKILL)
            rank.process.wait()
        if self.peers and self.other_node:
            self.other_node.close()
            self.peers.close()
        if self._thread:
            self._thread.join(10)


def alive(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def wait_for(path: Path, within_s: float = 20.0) -> Path:
    until(path.exists, within_s, str(path))
    return path


def until(condition: Callable[[], object], within_s: float, what: str) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {within_s} s: {what}"
        time.sleep(0.01)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """These processes are not slow to notice that another one has failed."""
    monkeypatch.setattr("medjob.launch.training._ROOT_CAUSE_S", 0.4)


@pytest.fixture
def trial(tmp_path: Path) -> Iterator[Callable[..., Trial]]:
    made: list[Trial] = []

    def make(*scripts: str, **options: Any) -> Trial:
        made.append(Trial(tmp_path, *scripts, **options))
        return made[-1]

    yield make
    for each in made:
        each.clean_up()


@pytest.fixture
def stop(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set it, and a signal has come."""
    asked = threading.Event()
    monkeypatch.setattr(preempt, "requested", asked.is_set)
    return asked


# ------------------------------------------------------------------------------------------------ what goes well


def test_a_training_ends_with_its_metrics_and_its_checkpoints(trial: Callable[..., Trial], caplog: pytest.LogCaptureFixture) -> None:
    script = """
        link.begin(4, 0)
        for step in (1, 2, 3, 4):
            link.step(step, 0.1, {"loss": 1 / step})
            save(step, best=min(step, 2))
        metrics["loss"] = 0.25
    """
    caplog.set_level(logging.INFO)
    one = trial(script, "log.info('rank %d says %s', rank, 'this')\nlogging.getLogger('a.library').warning('and that')")
    assert one.outcome(20) == {"loss": 0.25}
    assert one.stored() == {f"step-0000000{step}-1": "finished" for step in (2, 3, 4)}  # the last two, and the best
    state = one.here / "store" / one.artifact.path("checkpoints", "step-00000004-1", "part-0", "state.txt")
    assert state.read_text() == "state after 4"
    assert sorted(path.name for path in one.folder.iterdir()) == ["checkpoint-2", "checkpoint-4"]
    progress = json.loads((one.here / "store" / one.artifact.path("progress.json")).read_text())
    assert (progress["step"], progress["total"], progress["loss"]) == (4, 4, 0.25)
    assert ("medjob.trial", logging.INFO, "rank 1 says this") in caplog.record_tuples
    assert ("a.library", logging.WARNING, "and that") in caplog.record_tuples


def test_a_process_waits_in_saved_until_its_checkpoint_is_taken(trial: Callable[..., Trial]) -> None:
    """Then the folder is its own again, although the bytes are still on their way."""
    one = trial(f"{BEGIN}mark('saves')\nsave(7)\nmark('goes on')\nshutil.rmtree(here / 'trainer/checkpoint-7')", slow_s=0.3)
    one.wait_for("saves")
    wait_for(one.folder / "checkpoint-7/state.txt")
    time.sleep(0.3)
    assert not (one.here / "goes on").exists()
    one.outcome(20)
    assert (one.here / "goes on").exists()
    assert one.stored() == {"step-00000007-1": "finished"}
    state = one.here / "store" / one.artifact.path("checkpoints", "step-00000007-1", "part-0", "state.txt")
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
    one = trial("sys.modules['wandb'] = SimpleNamespace(finish=lambda: mark('fails') or 1 / 0)\nmetrics['loss'] = 1.0")
    one.begin()
    one.wait_for("fails")
    assert one.result(10) == {"loss": 1.0}


def test_metrics_that_cannot_be_sent_are_a_fault_of_ours(trial: Callable[..., Trial]) -> None:
    with pytest.raises(UnexpectedError, match="TypeError"):
        trial("metrics['loss'] = {1}").outcome(10)


# ------------------------------------------------------------------------------------------------ one process fails


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
def test_the_fault_is_raised_and_not_what_it_caused(trial: Callable[..., Trial], monkeypatch: pytest.MonkeyPatch, peer_first: bool) -> None:
    """A peer that lost its connection may be heard first."""
    monkeypatch.setattr("medjob.launch.training._ROOT_CAUSE_S", 5.0)
    first, second = "mark('first')", "wait_for('first')\ntime.sleep(0.2)\nmark('second')"
    fault = "raise ValueError('boom')"
    lost = "raise RuntimeError('[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4242')"
    one = trial(f"{second if peer_first else first}\n{fault}", f"{first if peer_first else second}\n{lost}")
    with pytest.raises(UnexpectedError, match="ValueError: boom") as caught:
        one.outcome(10)
    assert "in script" in caught.value.__notes__[0]  # where it happened
    assert (one.here / "second").exists()  # both had spoken


def test_bad_data_counts_for_more_than_the_abort_that_it_caused(trial: Callable[..., Trial]) -> None:
    one = trial("raise DataError('row 3 is wrong')", "wait_for('pid-0')\ntime.sleep(0.3)\nmark('aborts')\nos.abort()")
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


def test_a_node_lost_before_its_last_part_is_stored_is_noticed(trial: Callable[..., Trial], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medjob.checkpoints.PEERS_S", 8.0)
    one = trial(BEGIN + "save(1)", nodes=2)
    one.join_node()
    one.begin()
    until(lambda: one.exits() == [0], 10, "the processes' end")
    one.lose_node()
    with pytest.raises(RetryError, match="node 1 is gone"):
        one.result(4)


# ------------------------------------------------------------------------------------------------ a stop


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


def test_a_grace_too_short_for_a_save_is_not_spent_on_one(trial: Callable[..., Trial], stop: threading.Event) -> None:
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


def test_a_grace_that_ends_in_a_save_names_the_checkpoint_that_counts(trial: Callable[..., Trial], stop: threading.Event) -> None:
    one = trial(BEGIN + "save(12)\nmark('trains')\nwhile not stop_agreed(): time.sleep(0.01)\nhang()")
    one.begin(grace_s=2.0)
    one.wait_for("trains")
    until(lambda: one.checkpoints.newest_step, 10, "the first checkpoint")
    stop.set()
    with pytest.raises(RetryError, match=r"the grace of 2 s ended .* checkpoint of step 12") as caught:
        one.result(2.5)
    assert (one.here / "hangs-0").exists()
    assert caught.value.exit_code == 75
    assert one.exits() == [-9]


def test_a_process_that_hangs_after_the_save_does_not_hold_all_for_ever(
    trial: Callable[..., Trial], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medjob.launch.training._STRAGGLER_S", 1.0)
    one = trial(BEGIN + "wait_for('hangs-1')\nsave(1)\nraise Preempted('stopped after step 1; the state is saved')", HANG)
    one.begin(grace_s=1.2)
    until(lambda: one.exits()[0] == 143, 10, "the first process's end")
    with pytest.raises((Preempted, RetryError)):
        one.result(5)


def test_143_is_never_said_before_the_state_is_stored(trial: Callable[..., Trial]) -> None:
    one = trial(
        BEGIN + "save(1)\nmark('saved')\nraise Preempted('stopped after step 1; the state is saved')",
        "wait_for('saved')\ntime.sleep(0.2)\nraise RetryError('another training process is gone')",
        slow_s=1.0,
    )
    try:
        one.outcome(10)
    except Preempted:
        assert one.exits() == [143, 75]
        assert one.stored() == {"step-00000001-1": "finished"}
    except RetryError:
        pass


def test_a_node_that_stopped_and_left_first_is_not_lost(trial: Callable[..., Trial], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medjob.launch.training._ROOT_CAUSE_S", 5.0)
    one = trial(BEGIN + "save(1)\nmark('saved')\nwait_for('left')\nraise Preempted('stopped after step 1; the state is saved')")
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


def test_143_covers_a_save_that_waits_for_the_one_before_it(trial: Callable[..., Trial], monkeypatch: pytest.MonkeyPatch) -> None:
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
    one = trial(f"{BEGIN}wait_for('stopped')\nos.kill(os.getpid(), signal.SIGKILL)", f"mark('stopped')\n{STOPPED}")
    with pytest.raises(RetryError, match="SIGKILL"):
        one.outcome(10)
    assert one.exits()[0] == -9


def test_a_node_lost_after_a_stop_is_noticed(trial: Callable[..., Trial], monkeypatch: pytest.MonkeyPatch) -> None:
    """As a spot machine is that was given too little time."""
    monkeypatch.setattr("medjob.launch.training._STRAGGLER_S", 0.3)
    monkeypatch.setattr("medjob.checkpoints.PEERS_S", 2.5)
    one = trial(f"{BEGIN}save(1)\n{STOPPED}", nodes=2)
    one.join_node()
    one.begin()
    until(lambda: one.exits() == [143], 5, "the process's end")
    one.lose_node()
    with pytest.raises(RetryError):
        one.result(1.5)


def test_a_signal_after_a_process_has_stopped_sets_the_grace(trial: Callable[..., Trial], stop: threading.Event) -> None:
    one = trial(f"{BEGIN}save(1)\n{STOPPED}", slow_s=3)
    one.begin(grace_s=1.2)
    until(lambda: one.exits() == [143], 5, "the process's end")
    time.sleep(0.3)
    stop.set()
    with pytest.raises(RetryError, match="grace"):
        one.result(1.5)


# ------------------------------------------------------------------------------------------------ a newer attempt


def test_a_superseded_training_ends_with_76_and_stores_nothing_more(trial: Callable[..., Trial]) -> None:
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


# ------------------------------------------------------------------------------------------------ the parent itself

_PARENT = """
import json, sys, threading
from pathlib import Path
from unittest import mock

from medjob import cli
from medjob.launch import training
from tests.launch.test_training import Trial, wait_for

options = json.loads(sys.argv[1])
here = Path(options["here"])


def run(_):
    trial = Trial(here, *options["scripts"], nodes=options["nodes"], slow_s=options["slow_s"])
    if options["nodes"] > 1:
        trial.join_node()
        threading.Thread(target=lambda: (wait_for(here / "lose the node"), trial.lose_node()), daemon=True).start()
    trial.run(options["grace_s"])


with mock.patch.object(cli, "_run", run), mock.patch.object(training, "_ROOT_CAUSE_S", 0.4):
    cli.main(["sft", "-f", "x.yaml"])
"""
Parent = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def parent(tmp_path: Path) -> Iterator[Parent]:
    """Start a process that is the parent of such a training, and ends as `medjob` does."""
    started: list[subprocess.Popen[str]] = []

    def start(*scripts: str, grace_s: float = 30.0, nodes: int = 1, slow_s: float = 0.0) -> subprocess.Popen[str]:
        options = {"here": str(tmp_path), "scripts": scripts, "grace_s": grace_s, "nodes": nodes, "slow_s": slow_s}
        with (tmp_path / "errors").open("w") as errors:
            process = subprocess.Popen([sys.executable, "-c", _PARENT, json.dumps(options)], cwd=ROOT, stderr=errors, text=True)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
    for file in tmp_path.glob("pid-*"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(file.read_text()), signal.SIGKILL)


def children(here: Path, count: int) -> list[int]:
    return [int(wait_for(here / f"pid-{rank}").read_text()) for rank in range(count)]


def test_sigterm_reaches_all_processes_and_ends_with_143_once_the_state_is_stored(parent: Parent, tmp_path: Path) -> None:
    process = parent(BEGIN + "save(1)\ntrain(first=2)", "train()", slow_s=0.3)
    pids = children(tmp_path, 2)
    wait_for(tmp_path / "trains-0")
    wait_for(tmp_path / "trains-1")
    process.terminate()
    assert process.wait(15) == 143, (tmp_path / "errors").read_text()
    assert list(tmp_path.glob("asked-*"))
    assert len(list(tmp_path.glob("store/run/sft/*/checkpoints/*/MANIFEST.json"))) == 2
    assert not any(map(alive, pids))


def test_sigterm_before_the_training_begins_ends_all_at_once(parent: Parent, tmp_path: Path) -> None:
    process = parent(HANG, HANG)
    wait_for(tmp_path / "hangs-0")
    pids = children(tmp_path, 2)
    process.terminate()
    assert process.wait(5) == 143
    until(lambda: not any(map(alive, pids)), 5, "the processes' end")


def test_a_second_sigterm_waits_for_nothing(parent: Parent, tmp_path: Path) -> None:
    process = parent(BEGIN + "mark('begun')\nwhile not stop_agreed(): time.sleep(0.01)\nhang()", HANG)
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


def test_a_parent_killed_before_it_read_all_takes_its_processes_along(parent: Parent, tmp_path: Path) -> None:
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


def test_a_parent_that_lost_a_node_ends_although_a_part_is_awaited(parent: Parent, tmp_path: Path) -> None:
    process = parent(BEGIN + "save(1)\nhang()", nodes=2)
    until(lambda: list(tmp_path.glob("store/run/sft/*/checkpoints/*/part-0.json")), 10, "our own part")
    (tmp_path / "lose the node").touch()
    until(lambda: "node 1 is gone" in (tmp_path / "errors").read_text(), 10, "the error")
    assert process.wait(5) == 75


def test_a_slow_store_does_not_hold_the_parent_beyond_the_grace(parent: Parent, tmp_path: Path) -> None:
    process = parent(BEGIN + "save(1)\nmark('second')\nsave(2)\nhang()", grace_s=1.5, slow_s=8)
    wait_for(tmp_path / "second")
    wait_for(tmp_path / "trainer/checkpoint-2")
    time.sleep(0.3)
    process.terminate()
    assert process.wait(4) == 75
