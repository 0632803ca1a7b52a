"""Runs a training stage in the process of the test, without a parent that stores its checkpoints."""

from pathlib import Path
from typing import Any

from medjob.artifacts.artifact import Attempt
from medjob.pipeline.context import build_context
from medjob.pipeline.runner import Pipeline
from medjob.runtime.link import World
from medjob.stage import TrainingContext, TrainingExtras, get_stage


class NoParent:
    """A link whose messages are dropped."""

    world, resume_step, stop_requested = World(), None, False

    def begin(self, total: int, done: int) -> None: ...

    def step(self, step: int, seconds: float, numbers: Any) -> None: ...

    def saved(self, step: int, seconds: float, best_step: int | None) -> None: ...


def in_this_process(pipeline: Pipeline, name: str) -> TrainingContext:
    """The context that the stage gets in a training process."""
    stage, snapshot = get_stage(name), pipeline.snapshot()
    attempt = Attempt.begin(snapshot.artifact(stage), "test")
    work = Path(pipeline.run_file.cluster.work_dir) / "work" / f"{name}-{attempt.epoch}"
    context = build_context(pipeline.run_file, snapshot, stage, work)
    (context.work / "trainer").mkdir()
    return context.with_extras(TrainingExtras(NoParent()))  # type: ignore[arg-type]
