"""Fixtures of the simulated cluster."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.k8s.world import simulated

__all__ = ["simulated"]


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder in memory where there is one: a simulated run writes some hundred small files."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as made:
        yield Path(made)
