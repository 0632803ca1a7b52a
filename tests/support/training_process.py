"""A fake training process: `worker.main`, with a script of a test in place of a stage.

    training_process.py DESCRIPTOR SPEC_FILE

The spec is a JSON object with `directory`, `script` (the path of a Python file) and `world`. The
script uses the names that `TrainingProcess.script_names` returns. Processes and test communicate
through files in the directory.
"""

import json
import logging
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NoReturn

from medjob.errors import DataError, Preempted, RetryError
from medjob.runtime.link import Link, World


class _EmptyModule(ModuleType):
    """A module in which each name is None."""

    def __getattr__(self, name: str) -> None:
        return None


class TrainingProcess:
    """The methods that a script calls as functions."""

    def __init__(self, directory: Path, script: Path, link: Link) -> None:
        self.directory = directory
        self.script = script
        self.link = link
        self.rank = link.world.rank
        self.metrics: dict[str, Any] = {}

    def run(self) -> dict[str, Any]:
        """Execute the script. Returns the metrics that it has set."""
        self.mark(f"pid-{self.rank}", str(os.getpid()))
        code = compile(self.script.read_text(), str(self.script), "exec")
        exec(code, self.script_names())
        return self.metrics

    def script_names(self) -> dict[str, Any]:
        """The global names of the script."""
        functions = (self.hang, self.mark, self.save, self.stop_agreed, self.train, self.wait_for)
        modules = (logging, os, shutil, signal, sys, time)
        errors = (DataError, Preempted, RetryError)
        return {
            "here": self.directory,
            "link": self.link,
            "log": logging.getLogger("medjob.fake_training"),
            "metrics": self.metrics,
            "rank": self.rank,
            "SimpleNamespace": SimpleNamespace,
            **{item.__name__: item for item in (*functions, *modules, *errors)},
        }

    def mark(self, name: str, text: str = "") -> None:
        """Create a file for the test or for another process to wait for."""
        hidden = self.directory / f".{name}"
        hidden.write_text(text)
        hidden.rename(self.directory / name)

    def wait_for(self, name: str) -> None:
        """Wait for a file that the test or another process creates."""
        while not (self.directory / name).exists():
            time.sleep(0.01)

    def save(self, step: int, best: int | None = None, seconds: float = 0.1) -> None:
        """Save a checkpoint and report it."""
        folder = self.directory / "trainer" / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "state.txt").write_text(f"state after {step}")
        self.link.saved(step, seconds, best)

    def stop_agreed(self) -> bool:
        """Whether any process was asked to stop; `asked-<rank>` names the process."""
        if self.link.stop_requested:
            self.mark(f"asked-{self.rank}")
            self.mark("stop")
        return (self.directory / "stop").exists()

    def train(self, first: int = 1) -> NoReturn:
        """Take steps until a process is asked to stop, then save."""
        step = first
        while True:
            time.sleep(0.02)
            if self.rank == 0:
                self.link.step(step, 0.02, {"loss": 1.0})
            self.mark(f"trains-{self.rank}")
            if self.stop_agreed():
                break
            step += 1
        if self.rank == 0:
            self.save(step)
        raise Preempted(f"stopped after step {step}; the state is saved")

    def hang(self) -> NoReturn:
        """Never return."""
        self.mark(f"hangs-{self.rank}")
        while True:
            time.sleep(60)


def main(descriptor: str, spec_file: str) -> None:
    """Run `worker.main` without the configuration and the stages."""
    for name in ("medjob.launch.spec", "medjob.stage"):  # half of the start-up time
        sys.modules[name] = _EmptyModule(name)
    from medjob.launch import worker

    values: dict[str, Any] = json.loads(Path(spec_file).read_text())
    world, work = World(**values["world"]), Path(values["directory"])
    spec = SimpleNamespace(world=world, work=work, resume_step=None, external=False, debug=False)

    def run(_: object, link: Link) -> dict[str, Any]:
        return TrainingProcess(Path(values["directory"]), Path(values["script"]), link).run()

    vars(worker).update(Spec=SimpleNamespace(load=lambda _: spec), _run=run)
    worker.main(descriptor, spec_file)


if __name__ == "__main__":
    main(*sys.argv[1:])
