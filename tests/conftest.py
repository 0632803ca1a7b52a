"""Fixtures that tests of several packages use: the tiny model, and a small run over it."""

import os

# torch reads these when it is imported. Tests run side by side, and two torch threads that wait for
# each other actively collapse beside any other process.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may ask a hub

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medjob.config import RunFile
from medjob.config.load import merge, validate
from medjob.pipeline.runner import Pipeline
from medjob.stage import get_stage
from tests.support.build_once import build_once, session_folder
from tests.support.small_run import small_run
from tests.support.tiny_model import make_tiny_model


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder for what all workers of the session share, to use with `build_once`."""
    return session_folder(tmp_path_factory) / "shared"


@pytest.fixture(scope="session", autouse=True)
def own_seal_key(shared: Path) -> None:
    """Keep the key that seals artifacts in folders away from the user's own."""
    os.environ["XDG_CONFIG_HOME"] = str(shared / "config")


@pytest.fixture(scope="session")
def tiny(shared: Path) -> Path:
    """Folder of the tiny model. Tests must not change it."""
    return build_once(shared / "tiny", make_tiny_model)


@pytest.fixture
def tree(tmp_path: Path, tiny: Path) -> dict[str, Any]:
    """The small run as plain data."""
    return small_run(tmp_path, tiny)


@pytest.fixture(scope="session")
def trained_store(shared: Path, tiny: Path) -> Path:
    """Store in which fetch, prepare and sft of the small run are published. Tests must not change it."""

    def train(folder: Path) -> None:
        pipeline = Pipeline.open(validate(small_run(folder, tiny)))
        for name in ("fetch", "prepare", "sft"):
            pipeline.run(get_stage(name))

    return build_once(shared / "trained", train) / "store"


@pytest.fixture
def trained(trained_store: Path, tree: dict[str, Any], tmp_path: Path) -> None:
    """Put the published fetch, prepare and sft of the small run into the store of `tree`.

    A run that changes no field of their keys skips them.
    """
    shutil.copytree(trained_store, tmp_path / "store")


@pytest.fixture
def make_run_file(tree: dict[str, Any]) -> Callable[..., RunFile]:
    """Make a run file from `tree` with changes merged into it."""
    return lambda changes=None: validate(merge(tree, changes or {}))
