"""Variables that a training process gets for the libraries that it imports."""

import pytest

from medjob.launch import ranks
from medjob.runtime.link import World


@pytest.fixture(autouse=True)
def four_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "cpus", lambda: 4)
    monkeypatch.delenv("OMP_NUM_THREADS")


@pytest.mark.parametrize(("processes", "threads"), [(1, "4"), (2, "2"), (8, "1")])
def test_processes_share_the_cores_of_their_node(processes: int, threads: str) -> None:
    assert ranks.environment(World(0, processes, 0, processes))["OMP_NUM_THREADS"] == threads


def test_threads_that_the_user_sets_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert ranks.environment(World(0, 2, 0, 2))["OMP_NUM_THREADS"] == "3"


def test_one_process_is_not_distributed() -> None:
    assert "WORLD_SIZE" not in ranks.environment(World())
    assert ranks.environment(World(1, 2, 1, 2))["WORLD_SIZE"] == "2"


def test_processes_import_no_files_of_the_working_directory_and_unpickle_no_code() -> None:
    environment = ranks.environment(World())
    assert environment["PYTHONSAFEPATH"] == "1"
    assert environment["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] == "1"


@pytest.mark.parametrize("name", ["LOCAL_RANK", "OMPI_COMM_WORLD_RANK", "TORCHELASTIC_RUN_ID"])
def test_one_process_is_not_distributed_below_a_launcher(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "0")
    assert name not in ranks.environment(World())
