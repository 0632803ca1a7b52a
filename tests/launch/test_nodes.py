"""Nodes find one another, stay together and end together."""

import contextlib
import socket
import time
from collections.abc import Callable

import pytest

from medjob.errors import ConfigError, RetryError
from medjob.launch import nodes
from medjob.launch.nodes import Node
from tests.sites import OFFER, SILENCE_S, VARIABLES, Later, Site, until, whole


@pytest.fixture
def variables(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Node]:
    def read(count: int = 3, **values: str) -> Node:
        for name in VARIABLES:
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)
        return Node.from_environment("sft", count)

    return read


def test_a_node_knows_itself_from_torchrun_s_variables_or_an_indexed_job_s(
    variables: Callable[..., Node],
) -> None:
    assert variables(NODE_RANK="2", MASTER_ADDR="a", MASTER_PORT="4000") == Node(2, 3, "a", 4000)
    assert variables(JOB_COMPLETION_INDEX="1", MASTER_ADDR="a") == Node(1, 3, "a", 29500)
    assert variables(NODE_RANK="0", JOB_COMPLETION_INDEX="1", MASTER_ADDR="a").rank == 0
    assert variables(count=1) == Node()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, r"resources\.sft\.nodes is 3.*NODE_RANK \(0 to 2\) and MASTER_ADDR"),
        ({"NODE_RANK": "1"}, "NODE_RANK.*MASTER_ADDR"),
        ({"MASTER_ADDR": "a"}, "NODE_RANK.*MASTER_ADDR"),
        ({"NODE_RANK": "3", "MASTER_ADDR": "a"}, "NODE_RANK: must be 0 to 2"),
        ({"NODE_RANK": "-1", "MASTER_ADDR": "a"}, "NODE_RANK: must be 0 to 2"),
        ({"NODE_RANK": "one", "MASTER_ADDR": "a"}, "NODE_RANK: must be 0 to 2"),
        (
            {"NODE_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "http"},
            "MASTER_PORT: must be 1 to 65534",
        ),
    ],
)
def test_a_node_that_cannot_know_itself_says_what_to_set(
    variables: Callable[..., Node], values: dict[str, str], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        variables(**values)
    assert caught.match(f"(?s){message}")
    assert caught.value.exit_code == 64


@pytest.mark.parametrize("port", ["70000", "65535", "0"])  # the processes meet on the port after it
def test_a_port_that_does_not_exist_is_refused(variables: Callable[..., Node], port: str) -> None:
    with pytest.raises(ConfigError, match="MASTER_PORT"):
        variables(NODE_RANK="1", MASTER_ADDR="a", MASTER_PORT=port)


@pytest.mark.usefixtures("impatient")
def test_three_nodes_gather_stay_together_and_end_together(site: Callable[..., Site]) -> None:
    three = site(3)
    following = [three.follow(2)]
    time.sleep(0.2)  # it comes before there is a leader
    leading = three.lead()
    following.append(three.follow(1))
    leader, followers = whole(leading.result()), [whole(each.result()) for each in following]
    assert [dict(each.offer) for each in (leader, *followers)] == [OFFER] * 3
    time.sleep(1.5)  # they say nothing but that they are there
    assert not any(each.lost for each in (leader, *followers))
    waiting = [Later(each.wait_until_published) for each in followers]  # type: ignore[arg-type]
    time.sleep(0.3)
    assert all(each._thread.is_alive() for each in waiting)
    leader.announce_published()
    leader.close()
    for connection in leader._connections.values():
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)  # as the end of its process does
    for each in waiting:
        each.result(within_s=2)
    time.sleep(0.3)
    assert not any(
        each.lost for each in followers
    )  # that the leader has left since is as it should be


@pytest.mark.usefixtures("impatient")
def test_a_follower_stays_with_a_leader_that_waits_for_others(site: Callable[..., Site]) -> None:
    three, asked = site(3), []
    leading = three.lead()
    first = three.follow(1, lambda: bool(asked.append(1)))
    time.sleep(SILENCE_S + 0.5)
    three.follow(2)
    assert whole(leading.result()).lost is None
    assert whole(first.result()).offer == OFFER
    assert len(asked) == 1  # it connected once


def test_a_node_that_says_it_stopped_is_not_lost(site: Callable[..., Site]) -> None:
    three = site(3)
    leading, following = three.lead(), [three.follow(1), three.follow(2)]
    leader, (stopped, closed) = (
        whole(leading.result()),
        [whole(each.result()) for each in following],
    )
    stopped.announce_stopped()
    stopped.close()
    time.sleep(0.3)
    assert leader.lost is None
    closed.close()
    until(lambda: leader.lost, 3, "the loss of the other one")


@pytest.mark.usefixtures("impatient")
def test_a_follower_of_what_is_published_meanwhile_has_nothing_to_do(
    site: Callable[..., Site],
) -> None:
    asked: list[bool] = []

    def published() -> bool:
        asked.append(len(asked) == 1)
        return asked[-1]

    assert site(2).follow(1, published).result() is None
    assert asked == [False, True]  # there was no leader, and then it was published


def test_nodes_that_never_come_are_named(
    site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nodes, "GATHER_S", 0.2)
    four = site(4)
    leading = four.lead()
    four.follow(2, lambda: False)
    time.sleep(0.3)
    four.stranger(
        b"{}\n"
    )  # the leader looks at its clock when someone comes, or after some seconds
    with pytest.raises(RetryError, match=r"nodes \[1, 3\] did not come"):
        leading.result()


@pytest.mark.usefixtures("impatient")
def test_a_leader_that_never_answers_is_named(
    site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nodes, "GATHER_S", 0.5)
    two = site(2)
    with pytest.raises(
        RetryError, match=rf"node 0 \(127.0.0.1:{two.port}\) did not answer"
    ) as caught:
        two.follow(1).result()
    assert "MASTER_ADDR" in caught.value.hint


def test_a_taken_port_is_told_with_what_to_set(site: Callable[..., Site]) -> None:
    two = site(2)
    with (
        socket.create_server(("", two.port)),
        pytest.raises(RetryError, match=rf"port {two.port} cannot be opened") as caught,
    ):
        nodes.lead(two.node(0), OFFER)
    assert "MASTER_PORT" in caught.value.hint


def has_ipv6() -> bool:
    with contextlib.suppress(OSError), socket.create_server(("::1", 0), family=socket.AF_INET6):
        return True
    return False


@pytest.mark.usefixtures("impatient")
@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
def test_nodes_gather_where_there_is_ipv6_alone(
    site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nodes, "GATHER_S", 5.0)
    two = site(2, "::1")
    two.lead()
    assert whole(two.follow(1).result()).offer == OFFER
