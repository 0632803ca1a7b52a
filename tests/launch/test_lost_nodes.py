"""Nodes that are gone, that come again, and strangers."""

import contextlib
import signal
import time
from collections.abc import Callable

import psutil
import pytest

from medjob.errors import RetryError
from medjob.launch import nodes
from tests.sites import OFFER, SILENCE_S, Later, Site, connected, until, whole


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
    assert [psutil.Process(victim.pid).status() for victim in victims] == [
        psutil.STATUS_STOPPED
    ] * 2
    assert (str(leader.lost).splitlines()[0], str(follower.lost).splitlines()[0]) == (
        "node 1 is gone",
        "node 0 is gone",
    )
    assert healthy.poll() is None


def test_silence_is_noticed_within_ten_seconds() -> None:
    """What the test above shortens."""
    assert 3 * nodes._BEAT_S < nodes.SILENCE_S < 10 - nodes._BEAT_S


def test_a_node_that_closes_is_missed_at_once(site: Callable[..., Site]) -> None:
    two = site(2)
    leading, following = two.lead(), two.follow(1)
    leader, follower = whole(leading.result()), whole(following.result())
    assert not follower.lost
    leader.close()
    until(lambda: follower.lost, 3, "the loss")
    assert str(follower.lost).startswith("node 0 is gone")


def test_a_node_that_starts_anew_while_others_are_awaited_is_the_one_that_counts(
    site: Callable[..., Site],
) -> None:
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
        asked.append(
            victim.poll() is None and psutil.Process(victim.pid).status() == psutil.STATUS_STOPPED
        )
        return asked[-1]

    following = three.follow(1, published)
    until(lambda: connected(victim), 5, "the connection")
    time.sleep(0.3)
    victim.send_signal(signal.SIGSTOP)
    assert following.result(within_s=SILENCE_S + 4) is None


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
