"""Fake trainings, their parents in processes, and groups of nodes."""

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
from tests.support.fake_training import FakeTraining
from tests.support.node_group import HEARTBEAT_INTERVAL_S, HEARTBEAT_TIMEOUT_S, NodeGroup

StartParent = Callable[..., subprocess.Popen[str]]


@pytest.fixture(autouse=True)
def short_wait_for_the_root_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake processes notice the failure of another one at once."""
    monkeypatch.setattr("medjob.launch.training._ROOT_CAUSE_S", 0.4)


@pytest.fixture
def make_training(tmp_path: Path) -> Iterator[Callable[..., FakeTraining]]:
    """Start the processes of a fake training, one per script."""
    trainings: list[FakeTraining] = []

    def make(*scripts: str, **options: Any) -> FakeTraining:
        trainings.append(FakeTraining(tmp_path, *scripts, **options))
        return trainings[-1]

    yield make
    for training in trainings:
        training.clean_up()


@pytest.fixture
def stop_request(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set the event to simulate a signal."""
    event = threading.Event()
    monkeypatch.setattr(signals, "stop_requested", event.is_set)
    return event


@pytest.fixture
def start_parent(tmp_path: Path) -> Iterator[StartParent]:
    """Start the parent of a fake training in its own process. Its stderr is `tmp_path/errors`."""
    parents: list[subprocess.Popen[str]] = []

    def start(
        *scripts: str, grace_s: float = 30.0, nodes: int = 1, slow_s: float = 0.0
    ) -> subprocess.Popen[str]:
        options = {
            "directory": str(tmp_path),
            "scripts": scripts,
            "grace_s": grace_s,
            "nodes": nodes,
            "slow_s": slow_s,
        }
        with (tmp_path / "errors").open("w") as errors:
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.support.parent_process", json.dumps(options)],
                cwd=Path(__file__).parents[2],
                stderr=errors,
                text=True,
            )
        parents.append(process)
        return process

    yield start
    for parent in parents:
        parent.kill()
        parent.wait()
    for file in tmp_path.glob("pid-*"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(file.read_text()), signal.SIGKILL)


@pytest.fixture
def short_timeouts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the time-out of heartbeats from eight seconds to one, and pauses to a fifth."""
    monkeypatch.setattr(nodes, "HEARTBEAT_TIMEOUT_S", HEARTBEAT_TIMEOUT_S)
    monkeypatch.setattr(nodes, "_HEARTBEAT_INTERVAL_S", HEARTBEAT_INTERVAL_S)
    clock = SimpleNamespace(monotonic=time.monotonic, sleep=lambda seconds: time.sleep(seconds / 5))
    monkeypatch.setattr(nodes, "time", clock)


@pytest.fixture
def make_group() -> Iterator[Callable[..., NodeGroup]]:
    """Create groups of nodes, and end their processes and connections after the test."""
    groups: list[NodeGroup] = []

    def make(*arguments: Any) -> NodeGroup:
        groups.append(NodeGroup(*arguments))
        return groups[-1]

    yield make
    for group in groups:
        group.clean_up()
