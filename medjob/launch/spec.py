"""The specification that a parent passes to a training process."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from medjob.config import Run
from medjob.config.run_file import StageResources
from medjob.runtime.link import Link, World
from medjob.sources.locations import Location
from medjob.stage import StageContext, TrainingContext, TrainingExtras, get_stage, select


class Spec(BaseModel):
    """Everything that a training process needs to run its stage, as JSON."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    stage: str
    run: Run
    resources: StageResources
    locations: dict[str, Location]
    inputs: dict[str, Path]
    output: Path
    work: Path
    report_to: tuple[str, ...]
    tensorboard: Path
    world: World
    resume_step: int | None
    rendezvous: str
    """HOST:PORT where the processes find each other; empty for a single process."""
    listener: int | None
    """Rank 0: the listening socket of the rendezvous. The parent opens it, so that no other program
    can take the port in between."""
    external: bool
    """Whether an external launcher has started the process, which then ends when its parent says
    so."""
    debug: bool

    def dump(self) -> str:
        """Serialize to JSON."""
        return self.model_dump_json(by_alias=True)

    @classmethod
    def load(cls, text: str) -> Spec:
        """Parse the result of `dump`."""
        return cls.model_validate_json(text)

    def context(self, link: Link) -> TrainingContext:
        """Build the context of the stage's function."""
        return StageContext(
            run=select(self.run, get_stage(self.stage).fields(self.run)),
            resources=self.resources,
            locations=self.locations,
            inputs=self.inputs,
            output=self.output,
            work=self.work,
            report_to=self.report_to,
            tensorboard=self.tensorboard,
            extras=TrainingExtras(link),
        )
