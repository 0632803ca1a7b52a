"""A training as its parent lives through it: real processes on real links, whose work is a few lines of a test.

The processes run `worker.main`; only what it would train is replaced.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

import medjob
from medjob.artifacts.artifact import Artifact, Attempt
from medjob.artifacts.checkpoints import Checkpoints, states
from medjob.artifacts.progress import Progress
from medjob.launch.nodes import Peers
from medjob.launch.ranks import Rank, Ranks
from medjob.launch.training import Training
from medjob.runtime.files import fingerprint
from medjob.runtime.link import World
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


for name in ("medjob.config", "medjob.launch.spec", "medjob.stage"):  # half of the time that a process takes to start
    sys.modules[name] = Unneeded(name)

from medjob.errors import DataError, Preempted, RetryError
from medjob.launch import worker
from medjob.runtime.link import World

log, metrics = logging.getLogger("medjob.trial"), {}
link: worker.Link


def load(text):
    global here, rank
    spec = json.loads(text)
    here, rank = Path(spec["here"]), spec["world"]["rank"]
    return SimpleNamespace(world=World(**spec["world"]), resume_step=None, debug=False)


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
        self.ranks = [
            self._start(World(n, len(scripts), n, len(scripts)), script)
            for n, script in enumerate(scripts)
        ]
        self.group = Ranks(self.ranks)
        self.peers: Peers | None = None
        self.other_node: socket.socket | None = None
        self._ended: dict[str, Any] = {}
        self._thread: threading.Thread | None = None

    def _start(self, world: World, script: str) -> Rank:
        ours, theirs = socket.socketpair()
        file, spec = self.here / f"rank-{world.rank}.py", self.here / f"rank-{world.rank}.json"
        file.write_text(_RANK + textwrap.indent(textwrap.dedent(script), "    ") + _ENDING)
        spec.write_text(json.dumps({"here": str(self.here), "world": asdict(world)}))
        with theirs:
            process = subprocess.Popen(
                [sys.executable, str(file), str(theirs.fileno()), str(spec)],
                pass_fds=[theirs.fileno()],
                stdout=2,
                start_new_session=True,
                env={**os.environ, "PYTHONPATH": str(CODE)},
            )
        return Rank(process, ours, world)

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
                return Training(
                    self.group, self.folder, self.checkpoints, task, self.peers, grace_s
                ).run()
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


def children(here: Path, count: int) -> list[int]:
    return [int(wait_for(here / f"pid-{rank}").read_text()) for rank in range(count)]
