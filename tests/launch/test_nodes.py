"""Several nodes on loopback: they gather, one of them goes away in every way there is, and strangers knock."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

import medjob
from medjob.errors import ConfigError, RetryError
from medjob.launch import nodes
from medjob.launch.nodes import Node, Peers

CODE = Path(medjob.__file__).parents[1]
OFFER = {"key": "k", "epoch": 3, "owner": "me"}
SILENCE_S, BEAT_S = 1.0, 0.1
VARIABLES = ("NODE_RANK", "JOB_COMPLETION_INDEX", "MASTER_ADDR", "MASTER_PORT")
_OTHER = f"""
import sys, time
from medjob.launch import nodes

nodes.SILENCE_S, nodes._BEAT_S = {SILENCE_S}, {BEAT_S}
node = nodes.Node(int(sys.argv[1]), int(sys.argv[2]), "127.0.0.1", int(sys.argv[3]))
print("starts", flush=True)
peers = nodes.follow(node, lambda: False) if node.rank else nodes.lead(node, {{"epoch": 3}})
print("there", flush=True)
time.sleep(60)
"""


class Later:
    """A call in the background."""

    def __init__(self, work: Callable[[], Peers | None]) -> None:
        self._work, self._error = work, None
        self.peers: Peers | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.peers = self._work()
        except BaseException as error:
            self._error = error

    def result(self, within_s: float = 8.0) -> Peers | None:
        self._thread.join(within_s)
        assert not self._thread.is_alive(), f"still waiting after {within_s} s"
        if self._error:
            raise self._error
        return self.peers


class Site:
    """Nodes on one free port: in threads of this process, and in processes of their own."""

    def __init__(self, count: int, address: str = "127.0.0.1") -> None:
        self.count, self.address = count, address
        with socket.create_server(("", 0)) as probe:
            self.port = probe.getsockname()[1]
        self._later: list[Later] = []
        self._processes: list[subprocess.Popen[str]] = []
        self._strangers: list[socket.socket] = []

    def node(self, rank: int) -> Node:
        return Node(rank, self.count, self.address, self.port)

    def lead(self) -> Later:
        self._later.append(Later(lambda: nodes.lead(self.node(0), OFFER)))
        time.sleep(0.1)  # a follower that comes before the leader listens tries again a second later
        return self._later[-1]

    def follow(self, rank: int, published: Callable[[], bool] = lambda: False) -> Later:
        self._later.append(Later(lambda: nodes.follow(self.node(rank), published)))
        return self._later[-1]

    def process(self, rank: int) -> subprocess.Popen[str]:
        """A node in a process of its own."""
        command = [sys.executable, "-c", _OTHER, str(rank), str(self.count), str(self.port)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(CODE)})
        self._processes.append(process)
        assert process.stdout
        assert process.stdout.readline() == "starts\n"
        if rank == 0:
            until(lambda: any(each.status == psutil.CONN_LISTEN for each in connections(process)), 5, "a leader that listens")
        return process

    def stranger(self, says: bytes = b"") -> socket.socket:
        """Someone who connects to the leader."""
        self._strangers.append(socket.create_connection(("127.0.0.1", self.port)))
        self._strangers[-1].sendall(says)
        return self._strangers[-1]

    def clean_up(self) -> None:
        for process in self._processes:
            process.kill()
            process.communicate()
        for stranger in self._strangers:
            stranger.close()
        for later in self._later:
            if later.peers:
                later.peers.close()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """All within a second that else takes eight."""
    monkeypatch.setattr(nodes, "SILENCE_S", SILENCE_S)
    monkeypatch.setattr(nodes, "_BEAT_S", BEAT_S)
    monkeypatch.setattr(nodes, "time", SimpleNamespace(monotonic=time.monotonic, sleep=lambda seconds: time.sleep(seconds / 5)))


@pytest.fixture
def site() -> Iterator[Callable[..., Site]]:
    made: list[Site] = []

    def make(*arguments: Any) -> Site:
        made.append(Site(*arguments))
        return made[-1]

    yield make
    for each in made:
        each.clean_up()


def until(condition: Callable[[], object], within_s: float, what: str) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {within_s} s: {what}"
        time.sleep(0.02)


def connections(process: subprocess.Popen[str]) -> list[Any]:
    return list(psutil.Process(process.pid).net_connections("tcp"))


def connected(process: subprocess.Popen[str]) -> bool:
    return any(each.status == psutil.CONN_ESTABLISHED for each in connections(process))


def whole(peers: Peers | None) -> Peers:
    assert peers
    return peers


# ------------------------------------------------------------------------------------------------ which node is this?


@pytest.fixture
def variables(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Node]:
    def read(count: int = 3, **values: str) -> Node:
        for name in VARIABLES:
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)
        return Node.from_environment("sft", count)

    return read


def test_a_node_knows_itself_from_torchrun_s_variables_or_an_indexed_job_s(variables: Callable[..., Node]) -> None:
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
        ({"NODE_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "http"}, "MASTER_PORT: must be 1 to 65534"),
    ],
)
def test_a_node_that_cannot_know_itself_says_what_to_set(variables: Callable[..., Node], values: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        variables(**values)
    assert caught.match(f"(?s){message}")
    assert caught.value.exit_code == 64


@pytest.mark.parametrize("port", ["70000", "65535", "0"])  # the processes meet on the port after it
def test_a_port_that_does_not_exist_is_refused(variables: Callable[..., Node], port: str) -> None:
    with pytest.raises(ConfigError, match="MASTER_PORT"):
        variables(NODE_RANK="1", MASTER_ADDR="a", MASTER_PORT=port)


# ------------------------------------------------------------------------------------------------ together


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
    assert not any(each.lost for each in followers)  # that the leader has left since is as it should be


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
    leader, (stopped, closed) = whole(leading.result()), [whole(each.result()) for each in following]
    stopped.announce_stopped()
    stopped.close()
    time.sleep(0.3)
    assert leader.lost is None
    closed.close()
    until(lambda: leader.lost, 3, "the loss of the other one")


@pytest.mark.usefixtures("impatient")
def test_a_follower_of_what_is_published_meanwhile_has_nothing_to_do(site: Callable[..., Site]) -> None:
    asked: list[bool] = []

    def published() -> bool:
        asked.append(len(asked) == 1)
        return asked[-1]

    assert site(2).follow(1, published).result() is None
    assert asked == [False, True]  # there was no leader, and then it was published


def test_nodes_that_never_come_are_named(site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "GATHER_S", 0.2)
    four = site(4)
    leading = four.lead()
    four.follow(2, lambda: False)
    time.sleep(0.3)
    four.stranger(b"{}\n")  # the leader looks at its clock when someone comes, or after some seconds
    with pytest.raises(RetryError, match=r"nodes \[1, 3\] did not come"):
        leading.result()


@pytest.mark.usefixtures("impatient")
def test_a_leader_that_never_answers_is_named(site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "GATHER_S", 0.5)
    two = site(2)
    with pytest.raises(RetryError, match=rf"node 0 \(127.0.0.1:{two.port}\) did not answer") as caught:
        two.follow(1).result()
    assert "MASTER_ADDR" in caught.value.hint


def test_a_taken_port_is_told_with_what_to_set(site: Callable[..., Site]) -> None:
    two = site(2)
    with socket.create_server(("", two.port)), pytest.raises(RetryError, match=rf"port {two.port} cannot be opened") as caught:
        nodes.lead(two.node(0), OFFER)
    assert "MASTER_PORT" in caught.value.hint


def has_ipv6() -> bool:
    with contextlib.suppress(OSError), socket.create_server(("::1", 0), family=socket.AF_INET6):
        return True
    return False


@pytest.mark.usefixtures("impatient")
@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
def test_nodes_gather_where_there_is_ipv6_alone(site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "GATHER_S", 5.0)
    two = site(2, "::1")
    two.lead()
    assert whole(two.follow(1).result()).offer == OFFER


# ------------------------------------------------------------------------------------------------ one goes away


def test_a_killed_follower_is_missed_at_once(site: Callable[..., Site]) -> None:
    three = site(3)
    leading = three.lead()
    victim, other = three.process(1), whole(three.follow(2).result())
    leader = whole(leading.result())
    assert leader.lost is None
    victim.kill()
    until(lambda: leader.lost, 3, "the loss")
    assert victim.wait() == -9
    assert leader.lost
    assert leader.lost.message == "node 1 is gone"
    assert leader.lost.exit_code == 75
    assert other.lost is None  # the leader is there still; its end will be the other's


def test_a_killed_leader_is_missed_at_once(site: Callable[..., Site]) -> None:
    two = site(2)
    victim = two.process(0)
    follower = whole(two.follow(1).result())
    assert follower.lost is None
    victim.kill()
    with pytest.raises(RetryError, match="node 0 is gone"):
        Later(follower.wait_until_published).result(within_s=3)  # type: ignore[arg-type]
    assert victim.wait() == -9


@pytest.mark.usefixtures("impatient")
def test_nodes_without_power_are_missed_by_their_silence(site: Callable[..., Site]) -> None:
    """A stopped process closes nothing, as a machine without power."""
    one, other = site(3), site(2)
    leading = one.lead()
    victims = [one.process(1), other.process(0)]
    healthy, follower = one.process(2), whole(other.follow(1).result())
    leader = whole(leading.result())
    assert (leader.lost, follower.lost) == (None, None)
    for victim in victims:
        victim.send_signal(signal.SIGSTOP)
    until(lambda: leader.lost and follower.lost, SILENCE_S + 3, "the losses")
    assert [psutil.Process(victim.pid).status() for victim in victims] == [psutil.STATUS_STOPPED] * 2
    assert (str(leader.lost).splitlines()[0], str(follower.lost).splitlines()[0]) == ("node 1 is gone", "node 0 is gone")
    assert healthy.poll() is None


def test_silence_is_noticed_within_ten_seconds() -> None:
    """What the test above shortens."""
    assert 3 * nodes._BEAT_S < nodes.SILENCE_S < 10 - nodes._BEAT_S


def test_a_node_that_closes_is_missed_at_once(site: Callable[..., Site]) -> None:
    two = site(2)
    leading, following = two.lead(), two.follow(1)
    leader, follower = whole(leading.result()), whole(following.result())
    leader.close()
    until(lambda: follower.lost, 3, "the loss")


def test_a_node_that_starts_anew_while_others_are_awaited_is_the_one_that_counts(site: Callable[..., Site]) -> None:
    three = site(3)
    leading = three.lead()
    first = three.process(1)
    until(lambda: connected(first), 5, "the first connection")
    time.sleep(0.3)
    first.kill()
    assert first.wait() == -9
    again = three.follow(1)
    time.sleep(0.3)
    three.follow(2)
    leader = whole(leading.result())
    time.sleep(0.3)
    assert leader.lost is None
    assert whole(again.result(within_s=3)).offer == OFFER


@pytest.mark.usefixtures("impatient")
def test_a_leader_without_power_is_missed_before_all_are_there(site: Callable[..., Site]) -> None:
    three = site(3)
    victim = three.process(0)
    asked: list[bool] = []

    def published() -> bool:
        asked.append(victim.poll() is None and psutil.Process(victim.pid).status() == psutil.STATUS_STOPPED)
        return asked[-1]

    following = three.follow(1, published)
    until(lambda: connected(victim), 5, "the connection")
    time.sleep(0.3)
    victim.send_signal(signal.SIGSTOP)
    assert following.result(within_s=SILENCE_S + 4) is None


# ------------------------------------------------------------------------------------------------ strangers


@pytest.mark.parametrize(
    "says",
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
def test_strangers_do_not_disturb_the_gathering(site: Callable[..., Site], says: bytes) -> None:
    two = site(2)
    leading = two.lead()
    stranger = two.stranger(says)
    if says == b"half a line":
        stranger.close()
    following = two.follow(1)
    assert whole(following.result()).offer == OFFER
    assert whole(leading.result()).lost is None


@pytest.mark.parametrize("says", [b"null\n", b"1\n", b"[1]\n"])
def test_strangers_that_speak_json_do_not_either(site: Callable[..., Site], says: bytes) -> None:
    two = site(2)
    leading = two.lead()
    two.stranger(says)
    time.sleep(0.2)
    two.follow(1)
    assert whole(leading.result(within_s=4)).lost is None


def test_who_claims_a_number_that_is_there_already_is_not_heard(site: Callable[..., Site]) -> None:
    three = site(3)
    leading = three.lead()
    first = three.follow(1)
    time.sleep(0.3)
    claimant = three.stranger(b'{"node": 1}\n')
    time.sleep(0.2)
    third = three.follow(2)
    assert whole(first.result()).offer == whole(third.result()).offer == OFFER
    assert whole(leading.result()).lost is None
    claimant.settimeout(1)
    with contextlib.suppress(OSError):
        assert claimant.recv(100) == b""


def test_a_node_number_given_twice_is_no_storm(site: Callable[..., Site]) -> None:
    three = site(3)
    leading, asked = three.lead(), list[bool]()

    def published() -> bool:
        asked.append(len(asked) > 500)
        return asked[-1]

    three.follow(1)
    time.sleep(0.3)
    three.follow(1, published)
    time.sleep(1.2)
    three.follow(2)
    assert whole(leading.result()).lost is None
    assert asked
    assert len(asked) < 10


@pytest.mark.usefixtures("impatient")
def test_a_stranger_who_says_nothing_does_not_hold_the_gathering(site: Callable[..., Site]) -> None:
    two = site(2)
    leading = two.lead()
    silent = two.stranger()
    time.sleep(0.2)
    following = two.follow(1)
    try:
        assert whole(following.result(within_s=5)).offer == OFFER
        assert whole(leading.result()).lost is None
    finally:
        silent.close()
