"""What a process takes from the variables of an external launcher, and what it refuses."""

import os
import socket
import threading
from pathlib import Path

import pytest

from medjob.errors import ConfigError, RetryError
from medjob.launch import external
from medjob.launch.external import LocalRanks, world_of
from medjob.launch.messages import receive, send
from medjob.launch.nodes import checked_host
from medjob.runtime.link import World


def environment(**changes: str | None) -> dict[str, str]:
    values = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"} | changes
    return {name: value for name, value in values.items() if value is not None}


def test_world_of_torchrun() -> None:
    expected = World(rank=5, world_size=8, local_rank=1, local_world_size=4, node=1, nodes=2)
    assert world_of("sft", 1, environment()) == expected


def test_nodes_of_the_run_file_replace_a_missing_local_size() -> None:
    expected = World(rank=5, world_size=8, local_rank=1, local_world_size=4, node=1, nodes=2)
    assert world_of("sft", 2, environment(LOCAL_WORLD_SIZE=None)) == expected
    assert world_of("sft", 1, {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}).nodes == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"RANK": None}, "resources.sft.launcher is external, but RANK is not set"),
        ({"WORLD_SIZE": None}, "but WORLD_SIZE is not set"),
        ({"LOCAL_RANK": None}, "but LOCAL_RANK is not set"),
        ({"RANK": "-1"}, "RANK must be a number from 0 to 99999"),
        ({"RANK": "\u0665"}, "RANK must be a number from 0 to 99999"),  # an Arabic 5
        ({"RANK": ""}, "RANK must be a number"),
        ({"WORLD_SIZE": "9" * 5000}, "WORLD_SIZE must be a number"),
        ({"WORLD_SIZE": "1000000000"}, "WORLD_SIZE must be a number"),
        ({"RANK": "8"}, "do not fit WORLD_SIZE=8"),
        ({"LOCAL_RANK": "0"}, "ranks must be consecutive on every node"),
        ({"LOCAL_WORLD_SIZE": "0"}, "do not fit"),
        ({"LOCAL_WORLD_SIZE": "3"}, "do not fit"),
        ({"WORLD_SIZE": "0"}, "do not fit"),
        ({"WORLD_SIZE": "7", "LOCAL_WORLD_SIZE": None}, "multiple of resources.sft.nodes"),
    ],
)
def test_contradicting_variables_are_refused(changes: dict[str, str | None], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        world_of("sft", 2, environment(**changes))
    assert message in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("address", ["a b", "a\nb", "a" * 300, "a" * 64 + ".b", "\ud800", ""])
def test_impossible_host_names_are_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="MASTER_ADDR must be a host name"):
        checked_host(address)


@pytest.mark.parametrize("address", ["node-0", "10.0.0.1", "fe80::1%eth0", "a.b.svc"])
def test_host_names_and_addresses_are_kept(address: str) -> None:
    assert checked_host(address) == address


@pytest.mark.parametrize("kind", ["file", "dangling link", "wide folder"])
def test_socket_folder_of_somebody_else_is_refused(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = tmp_path / f"medjob-{os.getuid()}"
    if kind == "file":
        folder.touch()
    elif kind == "dangling link":
        folder.symlink_to(tmp_path / "nothing")
    else:
        folder.mkdir()
        folder.chmod(0o777)
    with pytest.raises(ConfigError, match="is not a folder that only this user can use"):
        external._socket_path("a" * 64)


def test_long_temporary_folder_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Unix socket's path has at most 107 bytes on Linux, and 103 on a Mac."""
    monkeypatch.setattr("tempfile.tempdir", "/tmp/" + "a" * 90)
    with pytest.raises(ConfigError, match="must have at most 100 bytes"):
        external._socket_path("a" * 64)


def joined(path: Path, local_rank: int) -> socket.socket:
    connection = external._connect(path)
    assert connection
    send(connection, {"local_rank": local_rank})
    return connection


def test_processes_end_with_the_code_of_their_parent(tmp_path: Path) -> None:
    ranks = LocalRanks(tmp_path / "s", 3)
    first, second = joined(tmp_path / "s", 1), joined(tmp_path / "s", 2)
    assert set(ranks.connect(5)) == {1, 2}
    ranks.end(75)
    assert receive(first, 5) == receive(second, 5) == {"event": "end", "code": 75}
    assert not (tmp_path / "s").exists()


def test_late_process_is_ended_too(tmp_path: Path) -> None:
    """The parent can be done before the others have started: the artifact was published."""
    ranks = LocalRanks(tmp_path / "s", 2)
    ended = threading.Thread(target=ranks.end, args=(0,))
    ended.start()
    late = joined(tmp_path / "s", 1)
    assert receive(late, 5) == {"event": "end", "code": 0}
    ended.join(5)


@pytest.mark.parametrize("local_rank", [0, 2, -1, "1", None])
def test_wrong_ranks_are_not_admitted(local_rank: int, tmp_path: Path) -> None:
    ranks = LocalRanks(tmp_path / "s", 2)
    wrong = joined(tmp_path / "s", local_rank)
    right = joined(tmp_path / "s", 1)
    assert set(ranks.connect(5)) == {1}
    assert receive(wrong, 5) is None
    second = joined(tmp_path / "s", 1)
    ranks.end(0)
    assert receive(right, 5) == {"event": "end", "code": 0}
    assert receive(second, 5) is None


def test_missing_process_is_named(tmp_path: Path) -> None:
    with pytest.raises(RetryError, match=r"local ranks \[1, 2\] did not connect"):
        LocalRanks(tmp_path / "s", 3).connect(0.2)


def test_socket_of_an_earlier_process_is_replaced(tmp_path: Path) -> None:
    socket.socket(socket.AF_UNIX).bind(str(tmp_path / "s"))
    ranks = LocalRanks(tmp_path / "s", 1)
    with pytest.raises(RetryError, match="another process with local rank 0"):
        LocalRanks(tmp_path / "s", 1)
    ranks.end(0)
