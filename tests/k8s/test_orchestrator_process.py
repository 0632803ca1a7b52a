"""The orchestrator's process: its reports, its end, and its behaviour beside another one."""

import json
from pathlib import Path
from typing import Any

import pytest

from medjob.errors import ConfigError, InputError, MedjobError, RetryError, error_of
from medjob.k8s.api import AlreadyExists
from medjob.k8s.orchestrator import status_reporter
from medjob.k8s.orchestrator.lease import Lease
from tests.fakes.cluster_api import ModelApi
from tests.fakes.workload import Fault
from tests.k8s.world import CONFIG_MAP, OWN_JOB, Died, Moment, OrchestratorProcess, World

pytestmark = pytest.mark.usefixtures("simulated")


def shown(world: World) -> dict[str, Any]:
    """Return the status that `medjob status` reads."""
    found: dict[str, Any] = json.loads(
        world.cluster.jobs[OWN_JOB]["metadata"]["annotations"]["medjob/status"]
    )
    return found


def quiet(*_: Any) -> None:
    """Hook that does nothing."""


# ---- reports


def test_each_change_is_one_event_and_the_end_is_shown(folder: Path) -> None:
    world = World(folder)
    world.run()
    events = [
        event for event in world.cluster.events if event["involvedObject"]["name"] == CONFIG_MAP
    ]
    assert all(event["type"] == "Normal" for event in events)
    texts = [event["message"] for event in events]
    begins = [text for text in texts if "starting attempt" in text]
    assert [text.partition(":")[0] for text in begins] == ["fetch", "prepare", "sft"]
    assert len(texts) == len(set(texts))
    assert events[-1]["reason"] == "Done"
    assert shown(world)["state"] == "done"
    assert [row["state"] for row in shown(world)["stages"]] == ["published"] * 3


@pytest.mark.parametrize("code", [64, 65, 66, 67, 75])
def test_failure_shows_its_code_and_the_pod_is_not_restarted(folder: Path, code: int) -> None:
    world = World(folder, changes={"pipeline": {"retries": 0}})
    world.workload.faults["fetch"] = [Fault("crash", after=1, code=code)]
    error = world.run()
    assert type(error) is error_of(code)
    assert world.cluster.events[-1]["type"] == "Warning"
    assert (shown(world)["state"], shown(world)["code"]) == ("failed", code)
    assert world.cluster.jobs[OWN_JOB]["spec"]["backoffLimit"] == 0


def test_end_is_shown_after_an_outage_of_the_api(folder: Path) -> None:
    world = World(folder)
    lost = []

    def fail(process: OrchestratorProcess, moment: Moment, name: str, mutates: bool) -> None:
        if name != "patch_job" or len(lost) == 7:
            return
        if len(world.digests()) == 3 and not world.active():
            lost.append(name)
            raise RetryError("the API is unavailable")

    world.on_call = fail
    world.run()
    assert len(lost) == 7
    assert shown(world)["state"] == "done"


def test_run_continues_if_the_api_rejects_events_and_status(folder: Path) -> None:
    world = World(folder)

    def refuse(process: OrchestratorProcess, moment: Moment, name: str, mutates: bool) -> None:
        if name in ("create_event", "patch_job"):
            raise ConfigError("forbidden")

    world.on_call = refuse
    assert "published" in str(world.run())


def test_time_in_a_queue_is_shown_as_queued_and_costs_nothing(folder: Path) -> None:
    world = World(folder, seed=3, queue=900)
    states: dict[str, list[str]] = {}

    def watch(process: OrchestratorProcess, moment: Moment, name: str, mutates: bool) -> None:
        if name == "patch_job" and moment == "after":
            for row in shown(world)["stages"]:
                states.setdefault(row["stage"], []).append(row["state"])
            assert sum(row["seconds"] for row in shown(world)["stages"]) < 100

    world.on_call = watch
    started = world.cluster.now
    world.run()
    assert world.cluster.now - started > 600, "no Job waited in the queue"
    for seen in states.values():
        assert set(seen) <= {"pending", "queued", "starting", "running", "published"}
        assert "queued" in seen
        assert set(seen[seen.index("published") :]) == {"published"}


def test_only_a_stage_with_a_saved_step_shows_its_age(folder: Path) -> None:
    world = World(folder)
    rows: list[Any] = []

    def watch(process: OrchestratorProcess, moment: Moment, name: str, mutates: bool) -> None:
        if name == "patch_job" and moment == "after":
            rows.extend(shown(world)["stages"])

    world.on_call = watch
    world.run()
    assert [row for row in rows if row.get("saved")], "nothing was saved"
    assert all(bool(row.get("saved")) == ("saved_at" in row) for row in rows)


def test_published_stage_is_shown_as_published_while_its_job_lingers(folder: Path) -> None:
    world = World(folder)
    world.workload.faults["prepare"] = [Fault("held_when_published", after=1, code=0)]
    world.workload.on_fault["held_when_published"] = lambda: world.admit(
        world.active()[0]["metadata"]["name"], False
    )
    seen = []

    def watch(process: OrchestratorProcess, moment: Moment, name: str, mutates: bool) -> None:
        if name == "patch_job" and moment == "after" and "prepare" in world.digests():
            seen.append(shown(world)["stages"][1]["state"])

    world.on_call = watch
    world.run()
    assert len(seen) > 2
    assert set(seen[1:]) == {"published"}


def test_waiting_orchestrator_reports_it_and_writes_nothing_to_the_store(folder: Path) -> None:
    world = World(folder)
    world.submit()
    world.planned.append((world.cluster.now + 10, lambda: world.submit(overlap_s=20)))
    messages, written = [], []

    def watch(process: OrchestratorProcess, moment: Moment, name: str, mutates: bool) -> None:
        if name in ("put", "create", "swap") and moment == "before":
            written.append(name)
            assert process.lease.held
        if process.name == "orchestrator-1" and name == "create_event" and moment == "after":
            messages.append(world.cluster.events[-1]["message"])

    world.on_call = watch
    world.run()
    assert messages[0] == "another orchestrator of this release is active"
    assert written


def test_failure_is_logged_even_if_the_api_reports_a_conflict(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    world = World(folder)

    def conflict(moment: Moment, name: str, mutates: bool) -> None:
        if name == "patch_job":
            raise AlreadyExists("modified")

    status_reporter.show_failure(ModelApi(world.cluster, conflict), InputError("the cause"))
    assert "the cause" in caplog.text


# ---- beside another orchestrator


def test_step_from_an_earlier_term_changes_nothing(folder: Path) -> None:
    world = World(folder)
    process = OrchestratorProcess(world, world.run_file, "s0", 0)
    other = Lease(ModelApi(world.cluster, quiet), "r-orchestrator", "other", world.time)
    assert process.lease.acquire()
    assert not other.acquire()

    def meanwhile(who: OrchestratorProcess, moment: Moment, name: str, mutates: bool) -> None:
        if name == "pods" and moment == "after":
            world.cluster.now += 20
            assert other.acquire()
            other.release()

    world.on_call = meanwhile
    with pytest.raises(RetryError, match="another orchestrator"):
        process.orchestrator.step()
    assert world.created == []
    world.on_call = quiet
    assert process.orchestrator.step().state == "running"
    assert len(world.created) == 1


def test_store_slower_than_the_lease_does_not_block_the_run(
    folder: Path,
) -> None:
    world = World(folder)

    def slow(process: OrchestratorProcess, moment: Moment, name: str, mutates: bool) -> None:
        if name == "list" and moment == "before":
            process.yield_until(world.time() + 12)

    world.on_call = slow
    assert "published" in str(world.run())


def test_uninstall_ends_the_orchestrator_and_leaves_no_job(folder: Path) -> None:
    world = World(folder)

    def uninstall() -> None:
        del world.cluster.config_maps[CONFIG_MAP]

    world.planned.append((world.cluster.now + 20, uninstall))
    error = world.run()
    assert isinstance(error, MedjobError)
    assert not isinstance(error, Died)
    assert "is gone" in error.message
    world.tick()
    assert world.active() == []
