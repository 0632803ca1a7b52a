"""Runs in which many things go wrong at once, by a seed: a failure names it, and `-k` with MEDJOB_SEED runs it alone."""

import os
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from medjob.errors import RetryError
from medjob.k8s.orchestrator.history import AttemptHistory
from medjob.pipeline.runner import Pipeline
from medjob.stage import get_stage
from tests.fakes.workload import Fault
from tests.k8s.world import Died, Moment, OrchestratorProcess, World

pytestmark = pytest.mark.usefixtures("simulated")

KINDS = (
    "crash",
    "oom",
    "child_oom",
    "exit0",
    "evict",
    "vanish",
    "delete_pod",
    "delete_job",
    "dead",
    "cut",
)
STAGES = ("fetch", "prepare", "sft")
RUNS = int(os.environ.get("MEDJOB_RUNS", "50"))


class RandomFailures:
    """Kills the orchestrator, loses requests and answers, and lets it stand still in the middle of a look."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.dies = rng.choice([0.0, 0.002, 0.01])
        self.lost = rng.choice([0.0, 0.01, 0.05])
        self.stalls = rng.choice([0.0, 0.0, 0.01])
        self.done: Counter[str] = Counter()

    def __call__(
        self, process: OrchestratorProcess, moment: Moment, name: str, mutates: bool
    ) -> None:
        if self.done["died"] < 8 and self.rng.random() < self.dies:
            self.done["died"] += 1
            raise Died
        if self.rng.random() < self.lost:
            self.done[f"lost {moment}"] += 1
            raise RetryError(f"{name}: no answer")
        if not mutates and self.rng.random() < self.stalls:
            self.done["stalled"] += 1
            process.yield_until(process.world.time() + self.rng.randint(1, 40))


def some_faults(rng: random.Random, nodes: int, stage: str) -> list[Fault]:
    """Up to three, which a stage survives: of those that only a second try survives, one."""
    kinds = rng.choices(KINDS, k=rng.randint(0, 3))
    while sum(kind.endswith("oom") for kind in kinds) > 1:
        kinds.remove(next(kind for kind in kinds if kind.endswith("oom")))
    index = [rng.randrange(nodes) if stage == "sft" else 0 for _ in kinds]
    codes = [rng.choice([1, 75, 139, 143]) if kind == "crash" else 1 for kind in kinds]
    return [
        Fault(
            kind,
            after=rng.randint(1, 11),
            code=code,
            recorded=rng.random() < 0.7,
            index=i,
            seconds=rng.randint(10, 500),
        )
        for kind, code, i in zip(kinds, codes, index, strict=True)
    ]


def people(world: World, rng: random.Random) -> Iterator[str]:
    """Let people and surroundings act at random times; what they do."""

    def at(low: int, high: int) -> float:
        return world.cluster.now + rng.randint(low, high)

    if rng.random() < 0.3:
        begin = at(1, 150)
        world.planned += [
            (begin, lambda: world.pause(True)),
            (begin + rng.randint(1, 100), lambda: world.pause(False)),
        ]
        yield "pause"
    if rng.random() < 0.3:
        begin, seconds = at(1, 100), rng.randint(1, 40)
        world.planned.append((begin, lambda: setattr(world, "unavailable_until", begin + seconds)))
        yield "store away"
    if world.queue:
        begin = at(20, 200)
        world.planned.append((begin, lambda: hold(world, rng.randint(5, 100))))
        yield "queue"
    if rng.random() < 0.4:
        changes: dict[str, Any] = {
            "pipeline": PIPELINE | {"onChange": rng.choice(["wait", "replace"])}
        }
        changes["run"] = rng.choice([{}, {"seed": 7}, {"sft": {"learning_rate": 0.001}}])
        world.planned.append(
            (
                at(5, 150),
                lambda: world.submit(
                    world.configured(changes), overlap_s=rng.choice([0, 1, 30, 200])
                ),
            )
        )
        yield (
            f"upgrade {changes['pipeline']['onChange']}" if changes["run"] else "upgrade of nothing"
        )


def hold(world: World, seconds: int) -> None:
    """A queue takes the place of what runs away, and gives it back later."""
    for job in world.active():
        name = job["metadata"]["name"]
        world.admit(name, False)
        world.planned.append(
            (world.cluster.now + seconds, lambda name=name: world.admit(name, True))
        )  # type: ignore[misc]


PIPELINE = {"retries": 9, "preemptions": 12}


def complete(world: World) -> None:
    """What must be so once a run has ended well."""
    assert not world.active()
    assert set(world.digests()) == set(STAGES)
    pipeline = Pipeline(world.run_file, world.store)
    attempts = AttemptHistory(world.store, "t")
    for stage in STAGES:
        key = pipeline.artifact(get_stage(stage)).key
        made = [name for s, k, name in world.created if (s, k) == (stage, key[:12])]
        classified = {outcome.job for outcome in attempts.outcomes(stage, key)}
        assert set(made) - set(made[-1:]) <= classified, "an ended attempt has no verdict"


def undisturbed(folder: Path, changes: dict[str, Any]) -> dict[str, str]:
    """The digests of a run without faults."""
    world = World(folder, changes=changes)
    world.run()
    return world.digests()


def seeds(count: int) -> range:
    """All, or the one that is asked for."""
    only = os.environ.get("MEDJOB_SEED")
    return range(int(only), int(only) + 1) if only else range(count)


def test_whatever_goes_wrong_a_run_that_can_be_saved_ends_as_if_nothing_had(folder: Path) -> None:
    expected = {}
    for number, run in enumerate(({}, {"seed": 7}, {"sft": {"learning_rate": 0.001}})):
        expected[str(run)] = undisturbed(folder / f"expected{number}", {"run": run})
    assert len({str(digests) for digests in expected.values()}) == 3
    met: Counter[str] = Counter()
    for seed in seeds(RUNS):
        rng = random.Random(seed)
        nodes = rng.choice([1, 1, 2])
        world = World(
            folder / str(seed), seed, nodes, rng.choice([0, 0, 0, 100]), {"pipeline": PIPELINE}
        )
        world.workload.faults = {stage: some_faults(rng, nodes, stage) for stage in STAGES}
        planned = str(world.workload.faults)
        failures = world.on_call = RandomFailures(rng)
        did = list(people(world, rng))
        try:
            assert "published and verified" in str(world.run(20000))
            complete(world)
            assert world.digests() in expected.values()
        except BaseException as failed:
            failed.add_note(f"seed {seed}: {nodes} nodes, {did}, {failures.done}, {planned}")
            raise
        met.update(did)
        met.update(failures.done)
        met.update(fault.kind for _, fault in world.workload.injected)
    if len(seeds(RUNS)) > 1:
        least = [
            *KINDS,
            "died",
            "lost before",
            "lost after",
            "stalled",
            "pause",
            "store away",
            "queue",
            "upgrade wait",
            "upgrade replace",
        ]
        assert {name: met[name] for name in least if met[name] < 3} == {}, (
            "these faults were hardly injected"
        )


def test_budgets_hold_and_the_right_code_ends_a_run_that_cannot_be_saved(folder: Path) -> None:
    for seed in seeds(RUNS // 2):
        rng = random.Random(seed)
        retries, final = rng.randint(0, 3), rng.random() < 0.5
        world = World(
            folder / str(seed), seed, changes={"pipeline": {"retries": retries, "preemptions": 5}}
        )
        stage, code = rng.choice(STAGES), rng.choice([64, 65, 66, 67])
        failing = [
            Fault("crash", after=2, code=rng.choice([1, 75, 139]), recorded=rng.random() < 0.5)
            for _ in range(retries)
        ]
        taken = [
            Fault(rng.choice(["vanish", "delete_pod"]), after=1) for _ in range(rng.randint(0, 5))
        ]
        before = [*failing, *taken]
        rng.shuffle(before)
        last = (
            Fault("crash", after=2, code=code, recorded=rng.random() < 0.5)
            if final
            else Fault("crash", after=2)
        )
        world.workload.faults[stage] = [*before, last, last, last]
        world.workload.save_probability = world.workload.ignore_sigterm_probability = (
            0.0  # a step further would refund what went before
        )
        world.on_call = RandomFailures(rng)
        try:
            error = world.run(20000)
            assert getattr(error, "exit_code", 0) == (code if final else 75), str(error)
            assert [fault for _, fault in world.workload.injected] == [*before, last]
            assert not world.active()
            assert len([name for s, _, name in world.created if s == stage]) == len(before) + 1
            assert world.created[-1][0] == stage, "nothing comes after it"
        except BaseException as failed:
            failed.add_note(f"seed {seed}: {stage}, {retries} retries, {world.workload.injected}")
            raise
