"""`pipeline`: how a cluster walks the line."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from medjob.config.base import Count, Kubernetes

StageName = Literal["fetch", "prepare", "sft", "candidates", "judge", "dpo", "evaluate", "export"]


class PipelineParams(Kubernetes):
    """How a cluster walks the line. None of it changes what is computed."""

    mode: Literal["orchestrated", "direct"] = "orchestrated"
    """`orchestrated`: a small pod starts each stage's Job when its inputs are published. `direct`: the chart is one Job of one stage."""
    stage: StageName | None = None
    """direct: which."""
    until: StageName = "export"
    """orchestrated: the last stage to run."""
    on_change: Literal["wait", "replace"] = "wait"
    """When an upgrade changes a stage that is running: let it finish first, or stop it (it saves) and start the new one."""
    retries: Annotated[int, Field(ge=0)] = 3
    """Failures of a stage (crash, exit code 75) that are tried again, each counted until the stage has got further."""
    preemptions: int = 20
    """Preemptions in a row without a step further after which the stage counts as stuck."""
    start_deadline_seconds: Count = 600
    """A pod that has not started by then (image, Secret, quota) ends the run with what its Events say."""
    unschedulable_deadline_seconds: Count = 3600
    """The same for one that no node takes: autoscalers need minutes, and GPUs may be scarce."""
    ttl_seconds_after_finished: Count = 604800
    """How long ended Jobs and their logs stay. Nothing rests on them."""

    @model_validator(mode="after")
    def _direct_names_a_stage(self) -> PipelineParams:
        if self.mode == "direct" and self.stage is None:
            raise ValueError("pipeline.stage: is required with pipeline.mode: direct")
        return self
