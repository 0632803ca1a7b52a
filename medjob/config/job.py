"""The tree: `run` (what to compute), `resources` (with how much), `cluster` (where)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from medjob.config.base import Count, Kubernetes, ModelRef, Name, Strict
from medjob.config.judge import CandidatesParams, EvaluateParams, ExportParams, JudgeParams
from medjob.config.prepare import PrepareParams, PromptParams
from medjob.config.store import StoreRef
from medjob.config.train import DpoParams, LoraParams, Method, SftParams, Zero


class Run(Strict):
    """What to compute. Every field but name and description enters the keys of the stages that read it."""

    name: Name
    """Identity of the run: the first path segment of its artifacts."""
    description: str = ""
    """What the run is for and where its numbers come from."""
    seed: int = 42
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


class Profile(Kubernetes):
    """A kind of GPU node."""

    accelerator: str | None = None
    """The GPU, as `medjob plan` and NVIDIA name it: T4, L4, A10G, L40S, A100-40, A100-80, H100, H200, B200."""
    price_per_gpu_hour: Annotated[float, Field(ge=0)] | None = None
    """What a GPU and its share of the node cost in an hour, in `cluster.currency`."""


class StageResources(Kubernetes):
    """What one stage gets. None of it changes what is computed, so none of it is in a key."""

    profile: Name | None = None
    """The kind of node, a name in `cluster.profiles`."""
    gpus: Annotated[int, Field(ge=0)] = 1
    """GPUs per node; a training stage has one process each. 0 asks for none. A machine without GPUs uses its CPU."""
    nodes: Count = 1
    """Nodes of a training stage."""
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
    attn_implementation: Literal["auto", "sdpa", "eager", "flash_attention_2", "flex_attention"] = "auto"
    """Attention kernel of transformers. `auto`: FlashAttention 2 on a GPU where it is installed, else sdpa."""
    torch_compile: bool = False
    """Training: compile the model; minutes at the start for about a quarter more speed."""

    @property
    def world_size(self) -> int:
        """Training processes: one per GPU, one on a machine without."""
        return max(self.gpus, 1) * self.nodes


class Resources(Kubernetes):
    """Resources of each stage; those of `fetch` and `prepare` are a CPU's."""

    sft: StageResources = StageResources()
    """Supervised fine-tuning."""
    candidates: StageResources = StageResources()
    """Sampled answers."""
    judge: StageResources = StageResources()
    """Scores and pairs."""
    dpo: StageResources = StageResources()
    """Preference optimization."""
    evaluate: StageResources = StageResources()
    """Comparison."""


class Cluster(Kubernetes):
    """Where a run lives."""

    store: StoreRef = StoreRef()
    """Where artifacts are kept."""
    work_dir: str = ".medjob"
    """Scratch folder of running stages and converted models; safe to delete while nothing runs."""
    profiles: dict[Name, Profile] = Field(default_factory=dict)
    """Kinds of GPU nodes, by the names that `resources` uses."""
    currency: str = "USD"
    """Of the prices in `profiles`."""
    report_to: list[Literal["wandb", "mlflow", "tensorboard"]] = Field(default_factory=list)
    """Experiment trackers of the training stages. Default: nothing is sent anywhere."""
    grace_seconds: Annotated[float, Field(gt=2)] = 30
    """Seconds between the signal to stop and the end: a training saves and stores its state within them, or does not begin to.
    Kubernetes gives 30 unless told otherwise; a GKE Spot node leaves about 13."""
    checkpoints_to_keep: Count = 2
    """Newest checkpoints of a training stage that stay in the store; the best one stays besides."""


class Job(Strict):
    """A run file, with its defaults filled in."""

    run: Run
    """What to compute."""
    resources: Resources = Resources()
    """With how much."""
    cluster: Cluster = Cluster()
    """Where."""

    @model_validator(mode="after")
    def _profiles_exist(self) -> Job:
        for stage in type(self.resources).model_fields:
            name = getattr(self.resources, stage).profile
            if name is not None and name not in self.cluster.profiles:
                known = ", ".join(self.cluster.profiles) or "none; add -f jobs/clusters/<cluster>.yaml"
                raise ValueError(f"resources.{stage}.profile: {name!r} is not in cluster.profiles ({known})")
        return self

    @model_validator(mode="after")
    def _batches_divide(self) -> Job:
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
