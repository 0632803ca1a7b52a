"""Fixtures of the simulated cluster."""

import os
import tempfile
import threading
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

from medjob.k8s.orchestrator import main as walk
from tests.k8s.world import OWN_JOB, Actor


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test waits for time or for the disk."""

    def sleep(seconds: float) -> None:
        actor = threading.current_thread()
        assert isinstance(actor, Actor)
        actor.yield_until(actor.world.time() + seconds)

    def now() -> float:
        actor = threading.current_thread()
        return actor.world.time() if isinstance(actor, Actor) else 0.0

    monkeypatch.setattr(walk, "time", types.SimpleNamespace(sleep=sleep, monotonic=now, time=now))
    monkeypatch.setattr(
        walk, "STATUS_S", 30.0
    )  # word of how it stands costs more than all the rest
    monkeypatch.setattr("os.fsync", lambda _: None)
    monkeypatch.setenv("JOB_NAME", OWN_JOB)


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder in memory where there is one: a simulated run writes some hundred small files."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as made:
        yield Path(made)
