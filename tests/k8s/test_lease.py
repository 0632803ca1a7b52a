"""The Lease: one holder at a time, whatever the clocks and the API do."""

import random
from collections.abc import Callable

import pytest

from medjob.errors import RetryError
from medjob.k8s.orchestrator.lease import Lease
from tests.fakes.cluster import Cluster
from tests.fakes.cluster_api import ModelApi


class Clock:
    """A clock for all holders. Real holders have one each, of which only differences are used."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def holders() -> tuple[Clock, Callable[[str], Lease], ModelApi]:
    clock, api = Clock(), ModelApi(Cluster(random.Random(0)), lambda *_: None)
    return clock, lambda name: Lease(api, "r", name, clock), api


Holders = tuple[Clock, Callable[[str], Lease], ModelApi]


def test_lease_changes_hands_only_after_the_holder_is_silent(holders: Holders) -> None:
    clock, make, _ = holders
    one, two = make("one"), make("two")
    assert one.acquire()
    for _ in range(60):
        clock.now += 1.5
        assert one.acquire()
        assert not two.acquire()
    taken_at = None
    for _ in range(20):
        clock.now += 1.5
        if two.acquire():
            taken_at = clock.now
            break
        assert not two.held
    assert taken_at is not None
    assert taken_at - 90 > 15, "the holder may have renewed the lease just before"
    assert not one.held
    assert not one.acquire()


def test_two_processes_never_hold_the_lease_at_once(holders: Holders) -> None:
    clock, make, _ = holders
    rng = random.Random(4)
    both = [make("one"), make("two"), make("three")]
    holding = set()
    for _ in range(3000):
        clock.now += rng.choice([0.1, 1.5, 1.5, 6.0])
        rng.choice(both).acquire()
        held = [n for n, lease in enumerate(both) if lease.held]
        assert len(held) <= 1
        holding |= set(held)
        if rng.random() < 0.01:
            clock.now += 40
    assert holding == {0, 1, 2}


def test_released_lease_is_free_at_once(holders: Holders) -> None:
    _, make, _ = holders
    one, two = make("one"), make("two")
    assert one.acquire()
    assert not two.acquire()
    one.release()
    assert not one.held
    assert two.acquire()


def test_process_that_lost_the_lease_does_not_release_it(holders: Holders) -> None:
    clock, make, api = holders
    one, two = make("one"), make("two")
    assert one.acquire()
    assert not two.acquire()
    clock.now += 16
    assert two.acquire()
    one.release()
    found = api.lease("r")
    assert found is not None
    assert found["spec"]["holderIdentity"] == "two"


def test_renewal_time_of_another_holder_is_ignored(holders: Holders) -> None:
    _, make, api = holders
    assert make("one").acquire()
    found = api.lease("r")
    assert found is not None
    found["spec"]["renewTime"] = "1999-01-01T00:00:00.000000Z"
    api.replace_lease(found)
    assert not make("two").acquire()


def test_lost_answer_keeps_the_lease_and_its_term(holders: Holders) -> None:
    clock, _, api = holders
    lost = [True]

    def lose(moment: str, name: str, mutates: bool) -> None:
        if moment == "after" and name == "create_lease" and lost.pop():
            raise RetryError("no answer")

    lease = Lease(ModelApi(api._cluster, lose), "r", "one", clock)
    with pytest.raises(RetryError):
        lease.acquire()
    assert not lease.held
    assert lease.acquire()
    term = lease.term
    clock.now += 6
    assert lease.acquire()
    assert lease.term == term


def test_term_grows_if_another_process_held_the_lease_in_between(holders: Holders) -> None:
    clock, make, _ = holders
    one, two = make("one"), make("two")
    assert one.acquire()
    assert not two.acquire()
    before = one.term
    clock.now += 16
    assert two.acquire()
    two.release()
    assert one.acquire()
    assert one.term == before + 1


@pytest.mark.parametrize(("slow_s", "kept"), [(4.0, True), (14.0, False)])
def test_lease_is_not_held_if_the_answers_took_too_long(slow_s: float, kept: bool) -> None:
    now = [0.0]

    def slow(moment: str, name: str, mutates: bool) -> None:
        if moment == "after":
            now[0] += slow_s

    lease = Lease(ModelApi(Cluster(random.Random(0)), slow), "l", "one", lambda: now[0])
    assert lease.acquire() is kept
    assert lease.held is kept
