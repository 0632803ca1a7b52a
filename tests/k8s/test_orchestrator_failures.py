"""Orchestrators that are killed, or lose an answer, at each change that they make."""

from collections.abc import Callable
from pathlib import Path

import pytest

from medjob.errors import RetryError
from tests.fakes.workload import Fault
from tests.k8s.world import Died, Moment, OrchestratorProcess, World

pytestmark = pytest.mark.usefixtures("simulated")


class FailAtChange:
    """A hook that raises at one change, counted from 0, and records the names of all changes."""

    def __init__(
        self, number: int, moment: Moment, error: type[BaseException], skipped: tuple[str, ...] = ()
    ) -> None:
        self.number, self.moment, self.error, self.skipped = number, moment, error, skipped
        self.names: list[str] = []
        self.hit = ""

    def __call__(
        self, process: OrchestratorProcess, moment: Moment, name: str, mutates: bool
    ) -> None:
        if not mutates or moment != self.moment or name in self.skipped or self.hit:
            return
        self.names.append(name)
        if len(self.names) == self.number + 1:
            self.hit = name
            raise self.error("no answer")


def plain(folder: Path) -> World:
    """Return a run of three stages without faults."""
    return World(folder, changes={"pipeline": {"retries": 1}})


def eventful(folder: Path) -> World:
    """Return a run with a crash, a lost node, a pause, and an upgrade that replaces an attempt."""
    world = World(folder, changes={"pipeline": {"retries": 1, "onChange": "replace"}})
    world.workload.faults = {
        "prepare": [Fault("crash", after=4)],
        "sft": [Fault("dead", after=5, seconds=10**6)],
    }
    world.planned += [
        (world.cluster.now + 47, lambda: world.pause(True)),
        (world.cluster.now + 65, lambda: world.pause(False)),
    ]
    other = world.configured(
        {
            "pipeline": {"retries": 1, "onChange": "replace"},
            "run": {"sft": {"learning_rate": 0.001}},
        }
    )
    world.planned.append((world.cluster.now + 82, lambda: world.submit(other)))
    return world


def digests_after(world: World, at: FailAtChange) -> dict[str, str]:
    """Run to the end with the hook, and return the digests of the published artifacts."""
    world.on_call = at
    assert "are published" in str(world.run())
    assert not world.active()
    return world.digests()


def test_recorded_stop_is_carried_out_by_the_next_orchestrator(
    folder: Path,
) -> None:
    world = World(folder)
    world.workload.step_s = 20
    world.planned.append((world.cluster.now + 160, lambda: world.pause(True)))

    def die(process: OrchestratorProcess, moment: Moment, name: str, mutates: bool) -> None:
        if name == "delete_job" and moment == "before" and not world.deaths:
            world.pause(False)
            raise Died

    world.on_call = die
    assert "published" in str(world.run())
    assert world.deaths == 1
    assert [name.rpartition("-")[2] for stage, _, name in world.created if stage == "sft"] == [
        "a1",
        "a2",
    ]
    ends = [code for name, code in world.workload.ends if name == world.created[2][2]]
    assert ends in ([143], []), "the attempt published although its stop was recorded"


# Changes that only report the status or renew the lease.
REPORTING = ("patch_job", "create_event", "put", "replace_lease", "create_lease")


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize(
    ("make", "error", "skipped", "least"),
    [
        (plain, Died, (), 25),
        (eventful, Died, REPORTING, 17),
        (eventful, RetryError, REPORTING, 17),
        (plain, RetryError, ("put", "patch_job"), 15),
    ],
    ids=["plain-killed", "eventful-killed", "eventful-unanswered", "plain-unanswered"],
)
def test_run_ends_the_same_whichever_change_fails(
    folder: Path,
    moment: Moment,
    make: Callable[[Path], World],
    error: type[BaseException],
    skipped: tuple[str, ...],
    least: int,
) -> None:
    undisturbed = FailAtChange(-1, moment, error, skipped)
    expected = digests_after(make(folder / "undisturbed"), undisturbed)
    assert len(expected) == 3
    assert len(undisturbed.names) >= least
    for number, name in enumerate(undisturbed.names):
        world, at = make(folder / str(number)), FailAtChange(number, moment, error, skipped)
        try:
            assert digests_after(world, at) == expected
            assert at.hit == name
            assert world.deaths >= (error is Died)
        except BaseException as failed:
            failed.add_note(f"{error.__name__} {moment} change {number}, {at.hit}")
            raise
