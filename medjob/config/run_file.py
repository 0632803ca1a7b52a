"""The tree: `run` (what to compute), `resources` (with how much), `cluster` (where), `pipeline` (in which steps)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from medjob.config.base import Count, Kubernetes, ModelRef, Name, Strict
from medjob.config.cluster import Cluster
from medjob.config.judge import CandidatesParams, EvaluateParams, ExportParams, JudgeParams
from medjob.config.pipeline import PipelineParams
from medjob.config.prepare import PrepareParams, PromptParams
from medjob.config.train import DpoParams, LoraParams, Method, SftParams, Zero


class Run(Strict):
    """What to compute. Every field but name and description enters the keys of the stages that read it."""

    name: Name
    """Identity of the run: the first path segment of its artifacts."""
    description: str = ""
    """What the run is for and where its numbers come from."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    """Seed of splits, shuffling, initial adapter weights and sampling."""
    base_model: ModelRef
    """The model to improve."""
    method: Method = "qlora"
    """`qlora`: LoRA over a 4-bit NF4 base; `lora`: over the base as it is; `full`: all weights."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Weights and compute; float16 (with loss scaling) for GPUs without bfloat16, such as a T4."""
    lora: LoraParams = LoraParams()
    """The adapter of `qlora` and `lora`."""
    prompt: PromptParams = PromptParams()
    """Prompt and answer layout."""
    prepare: PrepareParams
    """Data preparation."""
    sft: SftParams = SftParams()
    """Supervised fine-tuning."""
    candidates: CandidatesParams = CandidatesParams()
    """Sampled answers."""
    judge: JudgeParams = JudgeParams()
    """Scores and pairs."""
    dpo: DpoParams = DpoParams()
    """Preference optimization."""
    evaluate: EvaluateParams = EvaluateParams()
    """Comparison."""
    export: ExportParams = ExportParams()
    """Merged model."""


class StageResources(Kubernetes):
    """What one stage gets. None of it changes what is computed, so none of it is in a key."""

    profile: Name | None = None
    """The kind of node, a name in `cluster.profiles`."""
    gpus: Annotated[int, Field(ge=0)] = 1
    """GPUs per node; a training stage has one process each, candidates, judge and evaluate take one at most, fetch, prepare and
    export none. 0 asks for none. A machine without GPUs uses its CPU."""
    nodes: Count = 1
    """Nodes of a training stage; the others run on one."""
    micro_batch_size: Literal["auto"] | Count = "auto"
    """Training: rows in one forward pass on one device. Gradient accumulation makes up the global batch.
    `auto`: as many as make 8,192 tokens, if they fit; 1 on a CPU."""
    batch_size: Count = 16
    """Generation and scoring: rows in one padded batch."""
    gradient_checkpointing: Literal["auto"] | bool = "auto"
    """Training: recompute activations in the backward pass; less memory for about a third more time.
    `auto`: in as few layers as the memory asks for."""
    deepspeed: Literal["auto"] | Zero = "auto"
    """Training: what DeepSpeed shards over the devices. `auto`: nothing on one device; the optimizer and gradients (ZeRO-2)
    on several; the weights too (ZeRO-3) where they do not fit otherwise. A resumed training keeps what it began with."""
    attn_implementation: Literal["auto", "sdpa", "eager", "flash_attention_2", "flex_attention"] = (
        "auto"
    )
    """Attention kernel of transformers. `auto`: FlashAttention 2 on a GPU where it is installed, else sdpa."""
    active_deadline_seconds: Count | None = None
    """On a cluster: the stage is stopped for good after this long. Default: never."""
    torch_compile: bool = False
    """Training: compile the model; minutes at the start for about a quarter more speed."""

    @property
    def world_size(self) -> int:
        """Training processes: one per GPU, one on a machine without."""
        return max(self.gpus, 1) * self.nodes


class OneProcessResources(StageResources):
    """What a stage gets that is one process: more than it can use would only be paid for."""

    gpus: Literal[0, 1] = 1
    """GPUs: one process uses one."""
    nodes: Literal[1] = 1
    """Nodes: one process runs on one."""


class CpuStageResources(StageResources):
    """What a stage gets that has no use for a GPU."""

    gpus: Literal[0] = 0
    """GPUs: none."""
    nodes: Literal[1] = 1
    """Nodes: one process runs on one."""


class Resources(Kubernetes):
    """Resources of each stage."""

    fetch: CpuStageResources = CpuStageResources()
    """Pinning and mirroring."""
    prepare: CpuStageResources = CpuStageResources()
    """Data preparation."""
    sft: StageResources = StageResources()
    """Supervised fine-tuning."""
    candidates: OneProcessResources = OneProcessResources()
    """Sampled answers."""
    judge: OneProcessResources = OneProcessResources()
    """Scores and pairs."""
    dpo: StageResources = StageResources()
    """Preference optimization."""
    evaluate: OneProcessResources = OneProcessResources()
    """Comparison."""
    export: CpuStageResources = CpuStageResources()
    """Merging; a CPU does it."""


class RunFile(Strict):
    """A run file, with its defaults filled in."""

    run: Run
    """What to compute."""
    resources: Resources = Resources()
    """With how much."""
    cluster: Cluster = Cluster()
    """Where."""
    pipeline: PipelineParams = PipelineParams()
    """In which steps, on a cluster."""

    @model_validator(mode="after")
    def _profiles_exist(self) -> RunFile:
        for stage in type(self.resources).model_fields:
            name = getattr(self.resources, stage).profile
            if name is not None and name not in self.cluster.profiles:
                known = (
                    ", ".join(self.cluster.profiles) or "none; add -f jobs/clusters/<cluster>.yaml"
                )
                raise ValueError(
                    f"resources.{stage}.profile: {name!r} is not in cluster.profiles ({known})"
                )
        return self

    @model_validator(mode="after")
    def _batches_divide(self) -> RunFile:
        for stage in ("sft", "dpo"):
            size = getattr(self.run, stage).global_batch_size
            resources: StageResources = getattr(self.resources, stage)
            micro = 1 if resources.micro_batch_size == "auto" else resources.micro_batch_size
            step = micro * resources.world_size
            if size % step:
                raise ValueError(
                    f"run.{stage}.global_batch_size ({size}) must be a multiple of resources.{stage}.microBatchSize x gpus x nodes ({step})"
                )
        return self
