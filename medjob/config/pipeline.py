"""`pipeline`: how a cluster runs the stages."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from medjob.config.base import Count, CountOrZero, Kubernetes
from medjob.config.stages import StageName


class PipelineParams(Kubernetes):
    """How a cluster runs the stages. These fields do not change what is computed."""

    mode: Literal["orchestrated", "direct"] = "orchestrated"
    """`orchestrated`: an orchestrator pod creates the Job of each stage once its inputs are
    published. `direct`: the release is a single Job that runs one stage."""
    stage: StageName | None = None
    """The stage to run. Required if `mode` is `direct`, otherwise ignored."""
    until: StageName = "export"
    """The last stage to run: stages after it are left out. Ignored if `mode` is `direct`."""
    on_change: Literal["wait", "replace"] = "wait"
    """What to do if `helm upgrade` changes a running stage. `wait`: let it finish, then run the new
    one. `replace`: stop it, which saves its state, and start the new one."""
    retries: CountOrZero = 3
    """How often a stage is retried after a crash or exit code 75. The count restarts when the stage
    makes progress."""
    preemptions: CountOrZero = 20
    """How often a stage may be preempted without progress in between. One more preemption ends the
    run."""
    start_deadline_seconds: Count = 600
    """Seconds that a scheduled pod may take to start. A missing image, Secret or quota ends the run
    after this time, with the messages of the pod's Events."""
    unschedulable_deadline_seconds: Count = 3600
    """Seconds that a pod may wait for a node. Longer than `startDeadlineSeconds`, because
    autoscalers need minutes and GPUs may be scarce."""
    ttl_seconds_after_finished: Count = 604800
    """Seconds that finished Jobs and their logs are kept. medjob does not need them."""

    @model_validator(mode="after")
    def _direct_names_a_stage(self) -> PipelineParams:
        if self.mode == "direct" and self.stage is None:
            raise ValueError("pipeline.stage: is required with pipeline.mode: direct")
        return self
