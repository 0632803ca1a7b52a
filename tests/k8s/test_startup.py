"""The start of the orchestrator: waiting for the lease and the store, and preflight checks."""

import json
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medjob.errors import ConfigError, RetryError
from medjob.k8s import preflight, report
from medjob.k8s.api import AlreadyExists, QuotaExceeded
from medjob.k8s.orchestrator import main
from medjob.k8s.orchestrator.lease import Lease
from medjob.k8s.orchestrator.reconcile import Release
from medjob.pipeline.runner import Pipeline
from tests.fakes.cluster_api import ModelApi
from tests.fakes.objects import stage_job
from tests.k8s.world import OWN_JOB, World

pytestmark = pytest.mark.usefixtures("simulated")


def quiet(*_: Any) -> None:
    """Hook that does nothing."""


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Callable[..., Any]:
    """Return a function that calls `wait_until_ready` while the store is unavailable."""
    clock = [0.0]
    monkeypatch.setattr(
        main,
        "time",
        types.SimpleNamespace(
            time=lambda: clock[0],
            monotonic=lambda: clock[0],
            sleep=lambda s: clock.__setitem__(0, clock[0] + s),
        ),
    )

    def ready(world: World, back_at: float) -> Any:
        def check(*_: Any) -> None:
            if clock[0] < back_at:
                raise RetryError("the store is unavailable")

        monkeypatch.setattr(preflight, "check", check)
        monkeypatch.setattr(Pipeline, "open", lambda job: Pipeline(job, world.store))
        api = ModelApi(world.cluster, quiet)
        return main.wait_until_ready(
            world.run_file,
            api,
            Release("r", "r", "s0"),
            {},
            Lease(api, "r-orchestrator", "one", lambda: clock[0]),
        )

    return ready


def test_first_start_waits_for_the_store_until_the_deadline(
    folder: Path, started: Callable[..., Any]
) -> None:
    assert started(World(folder / "a"), back_at=500) is not None
    with pytest.raises(RetryError):
        started(World(folder / "b"), back_at=10_000)


def test_reason_for_waiting_is_shown_on_the_job(folder: Path, started: Callable[..., Any]) -> None:
    world = World(folder)
    own = world.cluster.added(world.cluster.jobs, {"metadata": {"name": OWN_JOB}})
    started(world, back_at=30)
    assert (
        json.loads(own["metadata"]["annotations"][report.ANNOTATION])["text"]
        == "the store is unavailable"
    )


def test_age_of_a_checkpoint_survives_the_orchestrator(
    folder: Path, started: Callable[..., Any]
) -> None:
    world = World(folder)
    labels = {"medjob/release": "r", "medjob/component": "orchestrator"}
    for name, saved, at in (("o-1", 30, 5.0), ("o-2", 40, 9.0), ("o-3", 40, 7.0)):
        shown = {"stages": [{"stage": "sft", "saved": saved, "saved_at": at}, {"stage": "dpo"}]}
        meta = {
            "name": name,
            "labels": labels,
            "annotations": {report.ANNOTATION: json.dumps(shown)},
        }
        world.cluster.added(world.cluster.jobs, {"metadata": meta})
    assert started(world, back_at=0).saved == {"sft": (40, 7.0)}


def test_wait_for_the_lease_does_not_count_towards_the_store_deadline(
    folder: Path, started: Callable[..., Any]
) -> None:
    world = World(folder)
    other = Lease(ModelApi(world.cluster, quiet), "r-orchestrator", "other", main.time.monotonic)
    assert other.acquire()
    plain = main.time.sleep

    def sleep(seconds: float) -> None:
        plain(seconds)
        if main.time.monotonic() < 1000:
            assert other.acquire()

    main.time.sleep = sleep
    assert started(world, back_at=1300) is not None


def test_outage_does_not_end_a_run_that_is_under_way(
    folder: Path, started: Callable[..., Any]
) -> None:
    world = World(folder)
    job = stage_job("fetch", 1, False, world.run_file)
    job["metadata"]["labels"]["medjob/submission"] = "s0"
    world.cluster.added(world.cluster.jobs, job)
    assert started(world, back_at=10_000) is not None


def test_dry_run_error_names_the_stage_and_a_full_quota_passes(
    folder: Path,
) -> None:
    world = World(folder)
    api = ModelApi(world.cluster, quiet)
    job = stage_job("sft", 1, False, world.run_file)
    preflight.check_job(api, "sft", job)
    api.refusals = {"check_pod": QuotaExceeded("exceeded quota: gpus, used 8")}
    preflight.check_job(api, "sft", job)
    api.refusals = {"create_job": AlreadyExists()}
    preflight.check_job(api, "sft", job)
    api.refusals = {"check_pod": ConfigError('violates PodSecurity "restricted"')}
    with pytest.raises(ConfigError, match="sft: violates PodSecurity"):
        preflight.check_job(api, "sft", job)
    assert list(world.cluster.jobs) == [OWN_JOB]
