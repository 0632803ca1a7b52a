"""A Lease whose API is slow."""

import random

import pytest

from medjob.k8s.orchestrator.lease import Lease
from tests.fakes.cluster import Cluster
from tests.fakes.cluster_api import ModelApi


@pytest.mark.parametrize(("slow_s", "kept"), [(4.0, True), (14.0, False)])
def test_a_lease_whose_answers_took_longer_than_it_is_sure_for_is_not_ours(
    slow_s: float, kept: bool
) -> None:
    now = [0.0]

    def slow(moment: str, name: str, mutates: bool) -> None:
        if moment == "after":
            now[0] += slow_s

    lease = Lease(ModelApi(Cluster(random.Random(0)), slow), "l", "one", lambda: now[0])
    assert lease.acquire() is kept
    assert lease.held is kept
