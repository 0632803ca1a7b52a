"""A training with real processes and connections, whose steps are a script of the test.

The processes run `worker.main`; see `training_process` for the names that a script can use.
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
from dataclasses import asdict
from pathlib import Path
from typing import Any

import medjob
from medjob.artifacts.artifact import Artifact, Attempt
from medjob.artifacts.checkpoints import Checkpoints, states
from medjob.artifacts.progress import Progress
from medjob.errors import RetryError
from medjob.launch.nodes import Membership
from medjob.launch.ranks import Rank, Ranks
from medjob.launch.training import Training
from medjob.runtime.files import fingerprint
from medjob.runtime.link import World
from medjob.store import LocalStore
from tests.support.waiting import is_alive, wait_for_file

CODE = Path(medjob.__file__).parents[1]
TRAINING_PROCESS = Path(__file__).with_name("training_process.py")
BEGIN = "link.begin(100, 0)\n"
HANG = "hang()"


class SlowStore(LocalStore):
    """A store that takes `slow_s` seconds for each checkpoint, and then stores it or fails."""

    slow_s = 0.0
    fails = False

    def create(self, key: str, data: bytes) -> str:
        if key.endswith("/part-0.json"):
            time.sleep(self.slow_s)
            if self.fails:
                raise RetryError("the store is unavailable")
        return super().create(key, data)


class FakeTraining:
    """A training of one process per script, with its store and its parent."""

    def __init__(
        self,
        directory: Path,
        *scripts: str,
        nodes: int = 1,
        slow_s: float = 0.0,
        store_fails: bool = False,
    ) -> None:
        self.directory = directory
        self.folder = directory / "trainer"
        self.folder.mkdir()
        store = SlowStore(directory / "store")
        store.slow_s = slow_s
        store.fails = store_fails
        self.artifact = Artifact(store, "run", "sft", fingerprint("fake training"))
        attempt = Attempt.begin(self.artifact, "me")
        self.checkpoints = Checkpoints(attempt, 2, directory / "uploads", nodes=nodes)
        self.processes: list[subprocess.Popen[bytes]] = []
        self.ranks = [
            self._start(World(rank, len(scripts), rank, len(scripts)), script)
            for rank, script in enumerate(scripts)
        ]
        self.group = Ranks(self.ranks)
        self.membership: Membership | None = None
        self._other_node: socket.socket | None = None
        self._metrics: dict[str, Any] = {}
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None

    def _start(self, world: World, script: str) -> Rank:
        script_file = self.directory / f"script-{world.rank}.py"
        script_file.write_text(textwrap.dedent(script))
        values = {
            "directory": str(self.directory),
            "script": str(script_file),
            "world": asdict(world),
        }
        spec_file = self.directory / f"rank-{world.rank}.json"
        spec_file.write_text(json.dumps(values))
        parent_end, worker_end = socket.socketpair()
        descriptor = worker_end.fileno()
        with worker_end:
            process = subprocess.Popen(
                [sys.executable, str(TRAINING_PROCESS), str(descriptor), str(spec_file)],
                pass_fds=[descriptor],
                stdout=2,
                start_new_session=True,
                env={**os.environ, "PYTHONPATH": str(CODE)},
            )
        self.processes.append(process)
        return Rank(process, parent_end, world)

    def connect_node(self) -> None:
        """Add a second node, which does nothing."""
        connection, self._other_node = socket.socketpair()
        self.membership = Membership({}, {1: connection})

    def messages_to_node(self) -> list[str]:
        """The messages that the second node has received so far."""
        assert self._other_node
        return self._other_node.recv(4096).decode().splitlines()

    def disconnect_node(self) -> None:
        """Lose the second node."""
        assert self._other_node
        self._other_node.close()

    def run(self, grace_s: float = 30.0) -> dict[str, Any]:
        """Run the parent in this thread, and kill the processes afterwards."""
        try:
            with Progress("sft", self.artifact).task("train", total=0) as task:
                return Training(
                    self.group, self.folder, self.checkpoints, task, self.membership, grace_s
                ).run()
        finally:
            self.group.kill()

    def start(self, grace_s: float = 30.0) -> None:
        """Run the parent in a thread."""

        def run() -> None:
            try:
                self._metrics = self.run(grace_s)
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()

    def result(self, timeout_s: float) -> dict[str, Any]:
        """Wait, and return or raise what `run` did. No process may be left."""
        assert self._thread
        self._thread.join(timeout_s)
        assert not self._thread.is_alive(), f"still running after {timeout_s} s"
        assert not any(is_alive(process.pid) for process in self.processes), "a process is left"
        if self._error:
            raise self._error
        return self._metrics

    def run_to_end(self, timeout_s: float, grace_s: float = 30.0) -> dict[str, Any]:
        """Run the parent in a thread and wait for its result."""
        self.start(grace_s)
        return self.result(timeout_s)

    def wait_for(self, name: str) -> str:
        """Wait until a process has marked `name`, and return the text of the mark."""
        return wait_for_file(self.directory / name).read_text()

    def marked(self, name: str) -> bool:
        """Whether a process has marked `name`."""
        return (self.directory / name).exists()

    def checkpoint_states(self) -> dict[str, Any]:
        return dict(states(self.artifact))

    def stored_state(self, checkpoint: str) -> str:
        """The file that `save` writes, as the store has it."""
        key = self.artifact.path("checkpoints", checkpoint, "part-0", "state.txt")
        return (self.directory / "store" / key).read_text()

    def exit_codes(self) -> list[int | None]:
        return [process.poll() for process in self.processes]

    def clean_up(self) -> None:
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if self.membership and self._other_node:
            self._other_node.close()
            self.membership.close()
        if self._thread:
            self._thread.join(10)


def process_ids(directory: Path, count: int) -> list[int]:
    """Wait until `count` training processes run, and return their process ids."""
    return [int(wait_for_file(directory / f"pid-{rank}").read_text()) for rank in range(count)]
