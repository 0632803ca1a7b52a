"""Nodes connect to each other, stay connected, and end together."""

import contextlib
import socket
import time
from collections.abc import Callable

import pytest

from medjob.errors import ConfigError, RetryError
from medjob.launch import nodes
from medjob.launch.nodes import Node
from tests.support.node_group import ATTEMPT, HEARTBEAT_TIMEOUT_S, BackgroundCall, NodeGroup
from tests.support.waiting import wait_until

VARIABLES = ("NODE_RANK", "JOB_COMPLETION_INDEX", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def node_from(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Node]:
    """Read the node from these environment variables and no others."""

    def read(count: int = 3, **values: str) -> Node:
        for name in VARIABLES:
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)
        return Node.from_environment("sft", count)

    return read


def test_node_is_read_from_torchrun_or_job_variables(node_from: Callable[..., Node]) -> None:
    assert node_from(NODE_RANK="2", MASTER_ADDR="a", MASTER_PORT="4000") == Node(2, 3, "a", 4000)
    assert node_from(JOB_COMPLETION_INDEX="1", MASTER_ADDR="a") == Node(1, 3, "a", 29500)
    assert node_from(NODE_RANK="0", JOB_COMPLETION_INDEX="1", MASTER_ADDR="a").rank == 0
    assert node_from(count=1) == Node()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, r"resources\.sft\.nodes is 3.*NODE_RANK \(0 to 2\) and MASTER_ADDR"),
        ({"NODE_RANK": "1"}, "NODE_RANK.*MASTER_ADDR"),
        ({"MASTER_ADDR": "a"}, "NODE_RANK.*MASTER_ADDR"),
        ({"NODE_RANK": "3", "MASTER_ADDR": "a"}, "NODE_RANK must be 0 to 2"),
        ({"NODE_RANK": "-1", "MASTER_ADDR": "a"}, "NODE_RANK must be 0 to 2"),
        ({"NODE_RANK": "one", "MASTER_ADDR": "a"}, "NODE_RANK must be 0 to 2"),
        (
            {"NODE_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "http"},
            "MASTER_PORT must be 1 to 65534",
        ),
    ],
)
def test_missing_or_invalid_variable_is_named(
    node_from: Callable[..., Node], values: dict[str, str], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        node_from(**values)
    assert caught.match(f"(?s){message}")
    assert caught.value.exit_code == 64


@pytest.mark.parametrize("port", ["70000", "65535", "0"])
def test_port_without_a_valid_next_port_is_refused(
    node_from: Callable[..., Node], port: str
) -> None:
    """The training processes use the next port."""
    with pytest.raises(ConfigError, match="MASTER_PORT"):
        node_from(NODE_RANK="1", MASTER_ADDR="a", MASTER_PORT=port)


@pytest.mark.usefixtures("short_timeouts")
def test_three_nodes_connect_stay_and_end_together(
    make_group: Callable[..., NodeGroup],
) -> None:
    group = make_group(3)
    early = group.start_follower(2)
    time.sleep(0.2)  # this follower tries to connect before there is a leader
    leading = group.start_leader()
    late = group.start_follower(1)
    leader = leading.membership()
    followers = [early.membership(), late.membership()]
    assert [dict(member.attempt) for member in (leader, *followers)] == [ATTEMPT] * 3
    time.sleep(1.5)  # longer than the time-out: heartbeats keep the connections alive
    assert not any(member.error for member in (leader, *followers))
    waiting = [BackgroundCall(follower.wait_until_published) for follower in followers]
    time.sleep(0.3)
    assert all(call.running for call in waiting)
    leader.announce_published()
    leader.close()
    for connection in leader._connections.values():
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)  # as when the process ends
    for call in waiting:
        call.result(timeout_s=2)
    time.sleep(0.3)
    # After the publication, a leader that leaves is not lost.
    assert not any(follower.error for follower in followers)


@pytest.mark.usefixtures("short_timeouts")
def test_follower_stays_connected_while_the_leader_waits(
    make_group: Callable[..., NodeGroup],
) -> None:
    group = make_group(3)
    attempts: list[int] = []
    leading = group.start_leader()
    first = group.start_follower(1, lambda: bool(attempts.append(1)))
    time.sleep(HEARTBEAT_TIMEOUT_S + 0.5)
    group.start_follower(2)
    assert leading.membership().error is None
    assert first.membership().attempt == ATTEMPT
    assert len(attempts) == 1  # it connected once


def test_node_that_announced_its_stop_is_not_lost(make_group: Callable[..., NodeGroup]) -> None:
    group = make_group(3)
    leading = group.start_leader()
    first = group.start_follower(1)
    second = group.start_follower(2)
    leader = leading.membership()
    first.membership().announce_stopped()
    first.membership().close()
    time.sleep(0.3)
    assert leader.error is None
    second.membership().close()
    wait_until(lambda: leader.error, 3, "the second follower is lost")


@pytest.mark.usefixtures("short_timeouts")
def test_follower_returns_if_the_artifact_is_published(
    make_group: Callable[..., NodeGroup],
) -> None:
    answers: list[bool] = []

    def is_published() -> bool:
        answers.append(len(answers) == 1)
        return answers[-1]

    assert make_group(2).start_follower(1, is_published).result() is None
    assert answers == [False, True]  # first there was no leader, then the artifact was published


def test_nodes_that_do_not_connect_are_named(
    make_group: Callable[..., NodeGroup], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nodes, "RENDEZVOUS_TIMEOUT_S", 0.2)
    group = make_group(4)
    leading = group.start_leader()
    group.start_follower(2)
    time.sleep(0.3)
    group.connect_client(b"{}\n")  # the leader checks the time-out after each connection
    with pytest.raises(RetryError, match=r"nodes \[1, 3\] did not connect"):
        leading.result()


@pytest.mark.usefixtures("short_timeouts")
def test_leader_that_does_not_answer_is_named(
    make_group: Callable[..., NodeGroup], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nodes, "RENDEZVOUS_TIMEOUT_S", 0.5)
    group = make_group(2)
    with pytest.raises(
        RetryError, match=rf"node 0 \(127.0.0.1:{group.port}\) did not answer"
    ) as caught:
        group.start_follower(1).result()
    assert "MASTER_ADDR" in caught.value.hint


def test_error_for_a_port_in_use_says_which_variable_to_set(
    make_group: Callable[..., NodeGroup],
) -> None:
    group = make_group(2)
    with (
        socket.create_server(("", group.port)),
        pytest.raises(RetryError, match=rf"cannot listen on port {group.port}") as caught,
    ):
        nodes.accept_followers(group.node(0), ATTEMPT)
    assert "MASTER_PORT" in caught.value.hint


def has_ipv6() -> bool:
    with contextlib.suppress(OSError), socket.create_server(("::1", 0), family=socket.AF_INET6):
        return True
    return False


@pytest.mark.usefixtures("short_timeouts")
@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
def test_nodes_connect_over_ipv6(
    make_group: Callable[..., NodeGroup], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nodes, "RENDEZVOUS_TIMEOUT_S", 5.0)
    group = make_group(2, "::1")
    group.start_leader()
    assert group.start_follower(1).membership().attempt == ATTEMPT
