"""Trials of a training, and processes that are the parent of one."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from medjob.launch import nodes
from medjob.runtime import signals
from tests.sites import BEAT_S, SILENCE_S, Site
from tests.trials import Trial


@pytest.fixture(autouse=True)
def quick_to_blame(monkeypatch: pytest.MonkeyPatch) -> None:
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
    monkeypatch.setattr(signals, "requested", asked.is_set)
    return asked


_PARENT = """
import json, sys, threading
from pathlib import Path
from unittest import mock

from medjob.cli import main as cli
from medjob.launch import training
from tests.trials import Trial, wait_for

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

    def start(
        *scripts: str, grace_s: float = 30.0, nodes: int = 1, slow_s: float = 0.0
    ) -> subprocess.Popen[str]:
        options = {
            "here": str(tmp_path),
            "scripts": scripts,
            "grace_s": grace_s,
            "nodes": nodes,
            "slow_s": slow_s,
        }
        with (tmp_path / "errors").open("w") as errors:
            process = subprocess.Popen(
                [sys.executable, "-c", _PARENT, json.dumps(options)],
                cwd=Path(__file__).parents[2],
                stderr=errors,
                text=True,
            )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
    for file in tmp_path.glob("pid-*"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(file.read_text()), signal.SIGKILL)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """All within a second that else takes eight."""
    monkeypatch.setattr(nodes, "SILENCE_S", SILENCE_S)
    monkeypatch.setattr(nodes, "_BEAT_S", BEAT_S)
    monkeypatch.setattr(
        nodes,
        "time",
        SimpleNamespace(monotonic=time.monotonic, sleep=lambda seconds: time.sleep(seconds / 5)),
    )


@pytest.fixture
def site() -> Iterator[Callable[..., Site]]:
    made: list[Site] = []

    def make(*arguments: Any) -> Site:
        made.append(Site(*arguments))
        return made[-1]

    yield make
    for each in made:
        each.clean_up()
