"""Runs with many random faults. A failure names its seed; MEDJOB_SEED runs that seed alone."""

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
ALL_FAULTS = (
    *KINDS,
    "died",
    "lost before",
    "lost after",
    "stalled",
    "pause",
    "store unavailable",
    "queue",
    "upgrade wait",
    "upgrade replace",
)
STAGES = ("fetch", "prepare", "sft")
RUNS = int(os.environ.get("MEDJOB_RUNS", "50"))


class RandomFailures:
    """Hook that kills the orchestrator, loses requests and answers, and delays reads."""

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
    """Return up to three faults that a stage survives. Only one of them may be out of memory."""
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


def plan_actions(world: World, rng: random.Random) -> Iterator[str]:
    """Plan actions of users, queue and store at random times, and yield their names."""

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
        yield "store unavailable"
    if world.queue:
        begin = at(20, 200)
        world.planned.append((begin, lambda: suspend_for_a_while(world, rng.randint(5, 100))))
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


def suspend_for_a_while(world: World, seconds: int) -> None:
    """Suspend the active Job, as a queue does, and admit it again later."""
    for job in world.active():
        name = job["metadata"]["name"]
        world.admit(name, False)
        world.planned.append(
            (world.cluster.now + seconds, lambda name=name: world.admit(name, True))
        )


PIPELINE = {"retries": 9, "preemptions": 12}


def check_end(world: World) -> None:
    """Check the state after a successful run."""
    assert not world.active()
    assert set(world.digests()) == set(STAGES)
    pipeline = Pipeline(world.run_file, world.store)
    attempts = AttemptHistory(world.store, "t")
    for stage in STAGES:
        key = pipeline.artifact(get_stage(stage)).key
        made = [name for s, k, name in world.created if (s, k) == (stage, key[:12])]
        classified = {outcome.job for outcome in attempts.outcomes(stage, key)}
        assert set(made) - set(made[-1:]) <= classified, "an ended attempt has no outcome"


def undisturbed(folder: Path, changes: dict[str, Any]) -> dict[str, str]:
    """Return the digests of a run without faults."""
    world = World(folder, changes=changes)
    world.run()
    return world.digests()


def seeds(count: int) -> range:
    """Return the seeds to run: MEDJOB_SEED alone if it is set."""
    only = os.environ.get("MEDJOB_SEED")
    return range(int(only), int(only) + 1) if only else range(count)


def published_without_faults(folder: Path) -> list[dict[str, str]]:
    """Return the digests of each run file that `plan_actions` may submit."""
    changes = ({}, {"seed": 7}, {"sft": {"learning_rate": 0.001}})
    found = [
        undisturbed(folder / f"expected{number}", {"run": run})
        for number, run in enumerate(changes)
    ]
    assert len({str(digests) for digests in found}) == len(changes)
    return found


def run_with_faults(folder: Path, seed: int, expected: list[dict[str, str]]) -> Counter[str]:
    """Run to a successful end with random faults, and count what was injected."""
    rng = random.Random(seed)
    nodes = rng.choice([1, 1, 2])
    queue = rng.choice([0, 0, 0, 100])
    changes = {"pipeline": PIPELINE}
    world = World(folder / str(seed), seed, nodes, queue, changes, sidecar=seed % 4 == 0)
    world.workload.faults = {stage: some_faults(rng, nodes, stage) for stage in STAGES}
    planned_faults = str(world.workload.faults)
    failures = RandomFailures(rng)
    world.on_call = failures
    actions = list(plan_actions(world, rng))
    try:
        assert "are published" in str(world.run(20000))
        check_end(world)
        assert world.digests() in expected
    except BaseException as failed:
        details = f"{nodes} nodes, {actions}, {failures.done}, {planned_faults}"
        failed.add_note(f"seed {seed}: {details}")
        raise
    injected = Counter(actions)
    injected.update(failures.done)
    injected.update(fault.kind for _, fault in world.workload.injected)
    return injected


def test_recoverable_faults_do_not_change_the_artifacts(folder: Path) -> None:
    expected = published_without_faults(folder)
    injected: Counter[str] = Counter()
    for seed in seeds(RUNS):
        injected += run_with_faults(folder, seed, expected)
    if len(seeds(RUNS)) > 1:
        rare = {name: injected[name] for name in ALL_FAULTS if injected[name] < 3}
        assert rare == {}, "these faults were injected too rarely"


def test_unrecoverable_run_ends_within_its_budgets_with_the_right_code(folder: Path) -> None:
    for seed in seeds(RUNS // 2):
        rng = random.Random(seed)
        retries = rng.randint(0, 3)
        final = rng.random() < 0.5
        budgets = {"retries": retries, "preemptions": 5}
        changes = {"pipeline": budgets}
        world = World(folder / str(seed), seed, changes=changes, sidecar=seed % 4 == 0)
        stage = rng.choice(STAGES)
        code = rng.choice([64, 65, 66, 67])
        failing = [
            Fault("crash", after=2, code=rng.choice([1, 75, 139]), recorded=rng.random() < 0.5)
            for _ in range(retries)
        ]
        taken = [
            Fault(rng.choice(["vanish", "delete_pod"]), after=1) for _ in range(rng.randint(0, 5))
        ]
        before = [*failing, *taken]
        rng.shuffle(before)
        last = Fault("crash", after=2)
        if final:
            last = Fault("crash", after=2, code=code, recorded=rng.random() < 0.5)
        world.workload.faults[stage] = [*before, last, last, last]
        world.workload.save_probability = 0.0  # a new step would refund the failures before it
        world.workload.ignore_sigterm_probability = 0.0
        world.on_call = RandomFailures(rng)
        try:
            error = world.run(20000)
            assert getattr(error, "exit_code", 0) == (code if final else 75), str(error)
            assert [fault for _, fault in world.workload.injected] == [*before, last]
            assert not world.active()
            assert len([name for s, _, name in world.created if s == stage]) == len(before) + 1
            assert world.created[-1][0] == stage, "a later stage was started"
        except BaseException as failed:
            failed.add_note(f"seed {seed}: {stage}, {retries} retries, {world.workload.injected}")
            raise


def test_recoverable_faults_of_shards_do_not_change_the_artifacts(folder: Path) -> None:
    """Each shard has faults of its own, at the same time as the others."""
    count = 3
    calm = World(folder / "calm", shards=count)
    calm.run()
    injected: Counter[str] = Counter()
    for seed in seeds(RUNS // 3):
        rng = random.Random(seed)
        queue = rng.choice([0, 0, 100])
        changes = {"pipeline": PIPELINE}
        world = World(
            folder / str(seed), seed, 1, queue, changes, sidecar=seed % 4 == 0, shards=count
        )
        for index in range(count):
            faults = some_faults(rng, 1, "candidates")
            world.workload.faults[f"candidates {index}-of-{count}"] = faults
        planned_faults = str(world.workload.faults)
        failures = RandomFailures(rng)
        world.on_call = failures
        if rng.random() < 0.3:
            begin = world.cluster.now + rng.randint(1, 150)
            world.planned += [
                (begin, lambda world=world: world.pause(True)),
                (begin + rng.randint(1, 100), lambda world=world: world.pause(False)),
            ]
        try:
            assert "are published" in str(world.run(20000))
            assert not world.active()
            assert world.digests() == calm.digests()
        except BaseException as failed:
            failed.add_note(f"seed {seed}: {failures.done}, {planned_faults}")
            raise
        injected.update(fault.kind for _, fault in world.workload.injected)
    assert len(seeds(RUNS)) == 1 or set(injected) == set(KINDS)
