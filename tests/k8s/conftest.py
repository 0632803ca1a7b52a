"""Fixtures of the simulated cluster."""

import os
import tempfile
import threading
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

from medjob.k8s.orchestrator import main, status_reporter
from tests.k8s.world import OWN_JOB, OrchestratorProcess


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace clocks, sleeping and fsync, so that no test waits for time or for the disk."""

    def sleep(seconds: float) -> None:
        process = threading.current_thread()
        assert isinstance(process, OrchestratorProcess)
        process.yield_until(process.world.time() + seconds)

    def now() -> float:
        process = threading.current_thread()
        return process.world.time() if isinstance(process, OrchestratorProcess) else 0.0

    clock = types.SimpleNamespace(sleep=sleep, monotonic=now, time=now)
    monkeypatch.setattr(main, "time", clock)
    monkeypatch.setattr(status_reporter, "time", clock)
    # Collecting the status costs more than everything else, so it happens less often than in a pod.
    monkeypatch.setattr(status_reporter, "STATUS_S", 30.0)
    monkeypatch.setattr("os.fsync", lambda _: None)
    monkeypatch.setenv("JOB_NAME", OWN_JOB)


@pytest.fixture
def folder() -> Iterator[Path]:
    """Temporary folder, in memory if possible: a simulated run writes hundreds of small files."""
    parent = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=parent) as name:
        yield Path(name)
