"""Nodes that are lost or restart, and clients that are not nodes."""

import contextlib
import signal
import time
from collections.abc import Callable

import psutil
import pytest

from medjob.errors import RetryError
from medjob.launch import nodes
from tests.support.node_group import (
    ATTEMPT,
    HEARTBEAT_TIMEOUT_S,
    BackgroundCall,
    NodeGroup,
    is_connected,
)
from tests.support.waiting import wait_until


def test_leader_notices_a_killed_follower_at_once(make_group: Callable[..., NodeGroup]) -> None:
    group = make_group(3)
    leading = group.start_leader()
    victim = group.start_process(1)
    other = group.start_follower(2).membership()
    leader = leading.membership()
    assert not leader.error
    victim.kill()
    wait_until(lambda: leader.error, 3, "the follower is lost")
    assert victim.wait() == -9
    assert leader.error
    assert leader.error.message == "lost the connection to node 1"
    assert leader.error.exit_code == 75
    # The other follower is connected to the leader alone, and ends when the leader does.
    assert other.error is None


def test_follower_notices_a_killed_leader_at_once(make_group: Callable[..., NodeGroup]) -> None:
    group = make_group(2)
    victim = group.start_process(0)
    follower = group.start_follower(1).membership()
    assert follower.error is None
    victim.kill()
    with pytest.raises(RetryError, match="lost the connection to node 0"):
        BackgroundCall(follower.wait_until_published).result(timeout_s=3)
    assert victim.wait() == -9


@pytest.mark.usefixtures("short_timeouts")
def test_node_without_power_is_noticed_by_missing_heartbeats(
    make_group: Callable[..., NodeGroup],
) -> None:
    """A suspended process closes no connection, and neither does a machine without power."""
    group_of_three = make_group(3)
    group_of_two = make_group(2)
    leading = group_of_three.start_leader()
    victims = [group_of_three.start_process(1), group_of_two.start_process(0)]
    healthy = group_of_three.start_process(2)
    follower = group_of_two.start_follower(1).membership()
    leader = leading.membership()
    assert leader.error is None
    assert follower.error is None
    for victim in victims:
        victim.send_signal(signal.SIGSTOP)
    wait_until(
        lambda: leader.error and follower.error, HEARTBEAT_TIMEOUT_S + 3, "both nodes are lost"
    )
    for victim in victims:
        assert psutil.Process(victim.pid).status() == psutil.STATUS_STOPPED
    assert str(leader.error).startswith("lost the connection to node 1\n")
    assert str(follower.error).startswith("lost the connection to node 0\n")
    assert healthy.poll() is None


def test_lost_node_is_noticed_within_ten_seconds() -> None:
    """The test above shortens these times."""
    assert 3 * nodes._HEARTBEAT_INTERVAL_S < nodes.HEARTBEAT_TIMEOUT_S
    assert nodes.HEARTBEAT_TIMEOUT_S < 10 - nodes._HEARTBEAT_INTERVAL_S


def test_node_that_closes_its_connection_is_lost_at_once(
    make_group: Callable[..., NodeGroup],
) -> None:
    group = make_group(2)
    leading = group.start_leader()
    follower = group.start_follower(1).membership()
    leader = leading.membership()
    assert not follower.error
    leader.close()
    wait_until(lambda: follower.error, 3, "the leader is lost")
    assert str(follower.error).startswith("lost the connection to node 0\n")


def test_restarted_follower_replaces_its_earlier_connection(
    make_group: Callable[..., NodeGroup],
) -> None:
    group = make_group(3)
    leading = group.start_leader()
    first = group.start_process(1)
    wait_until(lambda: is_connected(first), 5, "the first connection")
    time.sleep(0.3)
    first.kill()
    assert first.wait() == -9
    restarted = group.start_follower(1)
    time.sleep(0.3)
    group.start_follower(2)
    leader = leading.membership()
    time.sleep(0.3)
    assert leader.error is None
    assert restarted.membership(timeout_s=3).attempt == ATTEMPT


@pytest.mark.usefixtures("short_timeouts")
def test_follower_notices_a_lost_leader_during_the_rendezvous(
    make_group: Callable[..., NodeGroup],
) -> None:
    group = make_group(3)
    victim = group.start_process(0)

    def is_suspended() -> bool:
        if victim.poll() is not None:
            return False
        return bool(psutil.Process(victim.pid).status() == psutil.STATUS_STOPPED)

    # The follower checks for a publication before each connection.
    following = group.start_follower(1, is_published=is_suspended)
    wait_until(lambda: is_connected(victim), 5, "the connection")
    time.sleep(0.3)
    victim.send_signal(signal.SIGSTOP)
    assert following.result(timeout_s=HEARTBEAT_TIMEOUT_S + 4) is None


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01\x02\x00\xff\n",
        b'{"node": 7}\n',
        b'{"node": 0}\n',
        b"{}\n",
        b'{"node": [1]}\n',
        b"half a line",
    ],
    ids=["http", "tls", "node 7", "node 0", "no node", "a list", "half"],
)
def test_client_that_is_not_a_node_is_refused(
    make_group: Callable[..., NodeGroup], data: bytes
) -> None:
    group = make_group(2)
    leading = group.start_leader()
    client = group.connect_client(data)
    if data == b"half a line":
        client.close()
    following = group.start_follower(1)
    assert following.membership().attempt == ATTEMPT
    assert leading.membership().error is None


@pytest.mark.parametrize("data", [b"null\n", b"1\n", b"[1]\n"])
def test_client_that_sends_other_json_is_refused(
    make_group: Callable[..., NodeGroup], data: bytes
) -> None:
    group = make_group(2)
    leading = group.start_leader()
    group.connect_client(data)
    time.sleep(0.2)
    group.start_follower(1)
    assert leading.membership(timeout_s=4).error is None


def test_second_node_with_the_same_rank_is_refused(make_group: Callable[..., NodeGroup]) -> None:
    group = make_group(3)
    leading = group.start_leader()
    first = group.start_follower(1)
    time.sleep(0.3)
    second = group.connect_client(b'{"node": 1}\n')
    time.sleep(0.2)
    other = group.start_follower(2)
    assert first.membership().attempt == ATTEMPT
    assert other.membership().attempt == ATTEMPT
    assert leading.membership().error is None
    second.settimeout(1)
    with contextlib.suppress(OSError):
        second.recv(200)  # the leader's proof that it knows the token
        assert second.recv(100) == b""


def test_refused_node_does_not_reconnect_in_a_tight_loop(
    make_group: Callable[..., NodeGroup],
) -> None:
    group = make_group(3)
    leading = group.start_leader()
    attempts: list[bool] = []

    def is_published() -> bool:
        attempts.append(len(attempts) > 500)
        return attempts[-1]

    group.start_follower(1)
    time.sleep(0.3)
    group.start_follower(1, is_published)
    time.sleep(1.2)
    group.start_follower(2)
    assert leading.membership().error is None
    assert attempts
    assert len(attempts) < 10


@pytest.mark.usefixtures("short_timeouts")
def test_silent_client_does_not_block_the_rendezvous(
    make_group: Callable[..., NodeGroup],
) -> None:
    group = make_group(2)
    leading = group.start_leader()
    client = group.connect_client()
    time.sleep(0.2)
    following = group.start_follower(1)
    try:
        assert following.membership(timeout_s=5).attempt == ATTEMPT
        assert leading.membership().error is None
    finally:
        client.close()
