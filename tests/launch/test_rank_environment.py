"""Variables that a training process gets for the libraries that it imports."""

from types import SimpleNamespace
from typing import Any, cast

import pytest

from medjob.launch import ranks
from medjob.runtime.link import World
from medjob.sources.locations import Location


def environment(world: World, trackers: tuple[str, ...] = (), hub: bool = False) -> dict[str, str]:
    """The environment of a training process."""
    model = Location("org/model", "org/model", on_hub=hub)
    spec = SimpleNamespace(world=world, report_to=trackers, locations={"m": model})
    return ranks.environment(cast("Any", spec))


@pytest.fixture(autouse=True)
def four_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "cpus", lambda: 4)
    monkeypatch.delenv("OMP_NUM_THREADS")


@pytest.mark.parametrize(("processes", "threads"), [(1, "4"), (2, "2"), (8, "1")])
def test_processes_share_the_cores_of_their_node(processes: int, threads: str) -> None:
    assert environment(World(0, processes, 0, processes))["OMP_NUM_THREADS"] == threads


def test_threads_that_the_user_sets_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert environment(World(0, 2, 0, 2))["OMP_NUM_THREADS"] == "3"


def test_one_process_is_not_distributed() -> None:
    assert "WORLD_SIZE" not in environment(World())
    assert environment(World(1, 2, 1, 2))["WORLD_SIZE"] == "2"


def test_processes_import_no_files_of_the_working_directory_and_unpickle_no_code() -> None:
    variables = environment(World())
    assert variables["PYTHONSAFEPATH"] == "1"
    assert variables["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] == "1"


@pytest.mark.parametrize("name", ["LOCAL_RANK", "OMPI_COMM_WORLD_RANK", "TORCHELASTIC_RUN_ID"])
def test_one_process_is_not_distributed_below_a_launcher(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "0")
    assert name not in environment(World())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("AWS_SECRET_ACCESS_KEY", {}),
        ("AWS_SHARED_CREDENTIALS_FILE", {}),
        ("GOOGLE_APPLICATION_CREDENTIALS", {}),
        ("HF_TOKEN", {"hub": True}),
        ("HF_TOKEN_PATH", {"hub": True}),
        ("WANDB_API_KEY", {"trackers": ("wandb",)}),
        ("MLFLOW_TRACKING_TOKEN", {"trackers": ("mlflow",)}),
    ],
)
def test_processes_get_no_secrets_that_they_do_not_need(
    name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The parent alone has access to the store."""
    monkeypatch.setenv(name, "secret")
    assert name not in environment(World())
    if options:
        assert environment(World(), **options)[name] == "secret"
