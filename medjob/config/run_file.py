"""The run file: `run` (what to compute), `resources`, `cluster` (where) and `pipeline` (how)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, model_validator

from medjob.config.base import ADDED_LATER, Count, CountOrZero, Kubernetes, ModelRef, Name, Strict
from medjob.config.cluster import Cluster
from medjob.config.judge import CandidatesParams, EvaluateParams, ExportParams, JudgeParams
from medjob.config.pipeline import PipelineParams
from medjob.config.prepare import PrepareParams, PromptParams
from medjob.config.stages import StageName, check_stages, resolve_stages, trained_models
from medjob.config.train import DpoParams, LoraParams, Method, SftParams, Zero


class Run(Strict):
    """What to compute. All fields but `name`, `description` and `stages` are in the keys of stages
    that read them."""

    name: Name
    """Name of the run, and the first path segment of its artifacts in the store."""
    description: str = ""
    """What the run is for, and where its numbers come from."""
    stages: Annotated[list[StageName], Field(min_length=1)] | None = None
    """Stages of the run, in any order; `fetch` belongs to every run. Default: what the rest of the
    run file implies. That is `prepare`; `sft` with `prepare.sources`; `dpo` with
    `prepare.preference_rows` or `preference_sources`, and then `candidates` and `judge` as well
    unless `dpo.pairs` is `data`; `evaluate` with evaluation rows; `export` with a trained model."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    """Random seed for splits, shuffling, initial adapter weights and sampling."""
    base_model: ModelRef
    """The model to fine-tune."""
    adapter: Annotated[ModelRef | None, ADDED_LATER] = None
    """LoRA adapter of `base_model` to start from, such as `run:other-run/sft`: the first training
    continues it, with its own rank and layers, and `base` in the comparison is the base model with
    it. A directory of an adapter in `base_model` is the same as its base there and the directory
    here. Default: start from the base model."""
    method: Method = "qlora"
    """What to train. `qlora`: a LoRA adapter on a base model quantized to 4-bit NF4. `lora`: a LoRA
    adapter on the unquantized base model. `full`: all weights."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Data type of weights and computation. Use float16, which adds loss scaling, on GPUs without
    bfloat16, such as the T4."""
    lora: LoraParams = LoraParams()
    """LoRA adapter, used if `method` is `qlora` or `lora`."""
    prompt: PromptParams = PromptParams()
    """Layout of prompts and answers."""
    prepare: PrepareParams
    """Data preparation: sources, splits and filters."""
    sft: SftParams = SftParams()
    """Supervised fine-tuning."""
    candidates: CandidatesParams = CandidatesParams()
    """Sampling of candidate answers."""
    judge: JudgeParams = JudgeParams()
    """Scoring of candidates and building of preference pairs."""
    dpo: DpoParams = DpoParams()
    """Direct preference optimization."""
    evaluate: EvaluateParams = EvaluateParams()
    """Comparison of models."""
    export: ExportParams = ExportParams()
    """Export of the merged model."""

    @model_validator(mode="after")
    def _adapter_is_continued(self) -> Run:
        if self.adapter is not None and self.method == "full":
            raise ValueError(
                "adapter: is continued as an adapter, which needs method qlora or lora; for full "
                "fine-tuning, merge it first, and name the merged model in base_model"
            )
        return self

    @model_validator(mode="after")
    def _endpoints_have_no_weights(self) -> Run:
        for name in ("base_model", "adapter"):
            reference: ModelRef | None = getattr(self, name)
            if reference is not None and reference.is_endpoint:
                raise ValueError(
                    f"{name}: {reference} is an endpoint, and its weights are not here; endpoints "
                    "can be named in run.judge.model and run.evaluate.extra_models"
                )
        return self

    @model_validator(mode="after")
    def _stages_have_what_they_need(self) -> Run:
        stages = resolve_stages(self)
        trained = trained_models(stages)
        values: dict[str, object] = {"stages": stages}
        if "models" not in self.evaluate.model_fields_set:
            values["evaluate"] = self.evaluate.model_copy(update={"models": ["base", *trained]})
        if trained and "source" not in self.export.model_fields_set:
            values["export"] = self.export.model_copy(update={"source": trained[-1]})
        vars(self).update(values)  # the model is frozen, and what is filled in was not given
        check_stages(self, stages)
        return self


class StageResources(Kubernetes):
    """Resources of one stage. They are not part of any key, as they do not change what is
    computed."""

    profile: Name | None = None
    """Node type, by its name in `cluster.profiles`."""
    gpus: CountOrZero = 1
    """GPUs per node. Training stages run one process per GPU; candidates, judge and evaluate use
    them for each shard; fetch, prepare and export use none. 0 requests no GPU. A machine without a
    GPU uses its CPU."""
    nodes: Count = 1
    """Nodes of a training stage. All other stages run on one node."""
    launcher: Literal["medjob", "external"] = "medjob"
    """Training: what starts the processes. `medjob`: the command itself, one per GPU. `external`:
    torchrun, srun, mpirun or a Kubeflow TrainJob; each process then takes its place from RANK,
    WORLD_SIZE, LOCAL_RANK and MASTER_ADDR, and `gpus` and `nodes` follow from them."""
    micro_batch_size: Literal["auto"] | Count = "auto"
    """Training: rows per device in one forward pass. `global_batch_size` must be divisible by
    `microBatchSize` x `gpus` x `nodes`; gradient accumulation does the rest. `auto`: rows for about
    8,192 tokens if they fit into memory, and 1 on a CPU."""
    batch_size: Count = 16
    """Generation and scoring: rows per padded batch."""
    gradient_checkpointing: Literal["auto"] | bool = "auto"
    """Training: recompute activations in the backward pass, which saves memory and takes about a
    third more time. `auto`: in as few layers as are needed to fit into memory."""
    deepspeed: Literal["auto"] | Zero = "auto"
    """Training: what DeepSpeed shards across devices. `auto`: nothing on one device; on several,
    the optimizer state and gradients (ZeRO-2), and also the weights (ZeRO-3) if they do not fit
    otherwise. A resumed training keeps its first choice."""
    attn_implementation: Literal["auto", "sdpa", "eager", "flash_attention_2", "flex_attention"] = (
        "auto"
    )
    """Attention implementation of transformers. `auto`: FlashAttention 2 if it is installed and
    there is a GPU, otherwise sdpa."""
    active_deadline_seconds: Count | None = None
    """On a cluster: seconds after which the stage is stopped and not retried. Default: no limit."""
    torch_compile: bool = False
    """Training: compile the model. Costs minutes at the start; training is then about a quarter
    faster."""

    @property
    def world_size(self) -> int:
        """Number of training processes: one per GPU, or one per node without GPUs."""
        return max(self.gpus, 1) * self.nodes


EngineName = Literal["auto", "vllm", "transformers", "openai"]


class RowResources(StageResources):
    """Resources of a stage that works through rows: its shards, each one process."""

    gpus: CountOrZero = 1
    """GPUs of each shard. The engine vllm spreads a model over all of them (tensor parallelism);
    the others use at most one. 0 requests no GPU. A machine without a GPU uses its CPU."""
    nodes: Literal[1] = 1
    """Nodes of each shard. It is one process and runs on one node."""
    launcher: Literal["medjob"] = "medjob"
    """What starts the processes: the command itself, or on a cluster one pod per shard."""
    engine: EngineName = "auto"
    """What generates and scores text. `vllm`: vLLM in this process. `transformers`: continuous
    batching on a GPU, padded batches on a CPU. `openai`: an endpoint. `auto`: vLLM if it is
    installed, there is a GPU, and it supports the model; otherwise transformers."""
    shards: Annotated[int, Field(ge=1, le=1000)] = 1
    """Number of processes among which the rows are divided. On a cluster they run at once, in one
    pod each. On one machine as many run at once as it has GPUs for. No row is computed
    twice."""


class CpuStageResources(StageResources):
    """Resources of a stage that uses no GPU."""

    gpus: Literal[0] = 0
    """GPUs. The stage uses none."""
    nodes: Literal[1] = 1
    """Nodes. The stage is one process and runs on one node."""
    launcher: Literal["medjob"] = "medjob"
    """What starts the process: the command itself."""


class Resources(Kubernetes):
    """Resources of each stage."""

    fetch: CpuStageResources = CpuStageResources()
    """Pinning of models and data sets, and copies of those in buckets."""
    prepare: CpuStageResources = CpuStageResources()
    """Data preparation. Uses no GPU."""
    sft: StageResources = StageResources()
    """Supervised fine-tuning."""
    candidates: RowResources = RowResources()
    """Sampling of candidate answers."""
    judge: RowResources = RowResources()
    """Scoring of candidates and building of preference pairs."""
    dpo: StageResources = StageResources()
    """Direct preference optimization."""
    evaluate: RowResources = RowResources()
    """Comparison of models."""
    export: CpuStageResources = CpuStageResources()
    """Export of the merged model. Uses no GPU."""


def named_endpoints(run: Run) -> Iterator[tuple[str, ModelRef]]:
    """Yield the models of endpoints that a run names, each with its key in the run file."""
    named = [("run.judge.model", run.judge.model)] if run.judge.kind == "model" else []
    for section in ("judge", "evaluate"):
        for number, reference in enumerate(getattr(run, section).extra_models):
            named.append((f"run.{section}.extra_models.{number}", reference))
    for key, reference in named:
        if reference is not None and reference.is_endpoint:
            yield key, reference


class RunFile(Strict):
    """A validated run file with all defaults filled in."""

    run: Run
    """What to compute."""
    resources: Resources = Resources()
    """GPUs, nodes and batch sizes of each stage."""
    cluster: Cluster = Cluster()
    """Where the run executes and where its artifacts are stored."""
    pipeline: PipelineParams = PipelineParams()
    """How a cluster runs the stages."""

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
    def _engines_fit(self) -> RunFile:
        for stage in filter(self._has, ("candidates", "judge", "evaluate")):
            resources: RowResources = getattr(self.resources, stage)
            key, engine = f"resources.{stage}", resources.engine
            if engine == "transformers" and resources.gpus > 1:
                raise ValueError(
                    f"{key}.gpus: the engine transformers uses one GPU per shard (got "
                    f"{resources.gpus}); set {key}.shards, or {key}.engine: vllm"
                )
            if engine == "openai" and stage != "judge":
                raise ValueError(
                    f"{key}.engine: the models of this run answer in {stage}, so an endpoint "
                    "cannot (got openai); use vllm or transformers; endpoints in "
                    "run.evaluate.extra_models use the engine openai anyway"
                )
            if engine == "vllm" and stage != "judge":
                self._refuse_for_vllm(f"{key}.engine")
        return self

    def _refuse_for_vllm(self, key: str) -> None:
        """Raise ValueError for adapters that vLLM does not load (vllm/lora/peft_helper.py)."""
        setting = self.run.lora.unsupported_by_vllm
        if setting and self.run.method != "full":
            raise ValueError(
                f"{key}: vLLM does not load adapters with run.lora.{setting}; use "
                f"{key.removesuffix('.engine')}.engine: transformers, or leave {setting} out"
            )

    @model_validator(mode="after")
    def _judge_fits_its_engine(self) -> RunFile:
        engine = self.resources.judge.engine
        models = [model or self.run.base_model for model in self.run.judge.models]
        endpoints = [model for model in models if model.is_endpoint]
        if models and engine in ("vllm", "transformers") and endpoints == models:
            raise ValueError(
                f"resources.judge.engine: {models[0]} is an endpoint, which needs the engine "
                f"openai or auto (got {engine})"
            )
        if engine == "openai" and endpoints != models:
            local = next(model for model in models if not model.is_endpoint)
            raise ValueError(
                "resources.judge.engine: openai needs an endpoint; set "
                f"run.judge.model=endpoint:NAME/MODEL (got {local})"
            )
        return self

    @model_validator(mode="after")
    def _endpoints_exist(self) -> RunFile:
        for key, reference in named_endpoints(self.run):
            if reference.endpoint not in self.cluster.endpoints:
                known = ", ".join(self.cluster.endpoints) or "none"
                raise ValueError(
                    f"{key}: {reference.endpoint} is not in cluster.endpoints ({known}); add "
                    f"cluster.endpoints.{reference.endpoint}.url"
                )
        return self

    @model_validator(mode="after")
    def _sensitive_rows_stay(self) -> RunFile:
        found = next(self._ways_out(), None)
        if self.run.prepare.sensitive and found is not None:
            raise ValueError(
                f"{found}, but the rows must not leave (run.prepare.sensitive is true); leave it "
                "out, or set run.prepare.sensitive=false"
            )
        return self

    def _ways_out(self) -> Iterator[str]:
        """Describe what would send rows, or what is made from them, to other places."""
        for key, reference in named_endpoints(self.run):
            url = self.cluster.endpoints[reference.endpoint].url
            yield f"{key}: {reference} sends rows to {url}"
        if self.run.export.hub_model_id:
            hub_id = self.run.export.hub_model_id
            yield f"run.export.hub_model_id: {hub_id} is a repository on a hub"
        for tracker in self.cluster.report_to:
            if tracker != "tensorboard":
                yield f"cluster.reportTo: {tracker} is an outside tracker"

    @model_validator(mode="after")
    def _quantized_weights_stay(self) -> RunFile:
        if self.run.method == "qlora" and self.run.lora.changes_base:
            raise ValueError(
                f"run.lora.init_lora_weights: {self.run.lora.init_lora_weights} subtracts the "
                "adapter from the base's weights, and 4 bits cannot hold the rest exactly; use "
                "run.method: lora, or leave it out"
            )
        return self

    @model_validator(mode="after")
    def _best_checkpoint_needs_validation(self) -> RunFile:
        rows = {
            "sft": ("run.prepare.validation_rows", self.run.prepare.validation_rows),
            "dpo": ("run.dpo.validation_fraction", self.run.dpo.validation_fraction),
        }
        for stage, (key, value) in rows.items():
            if not self._has(stage):
                continue
            setting = getattr(self.run, stage).needs_validation
            if setting and not value:
                raise ValueError(
                    f"{key} is 0, but run.{stage}.{setting} needs validation rows; raise it, or "
                    f"leave out run.{stage}.{setting}"
                )
        return self

    @model_validator(mode="after")
    def _batches_divide(self) -> RunFile:
        for stage in filter(self._has, ("sft", "dpo")):
            size = getattr(self.run, stage).global_batch_size
            resources: StageResources = getattr(self.resources, stage)
            micro = 1 if resources.micro_batch_size == "auto" else resources.micro_batch_size
            step = micro * resources.world_size
            if size % step:
                raise ValueError(
                    f"run.{stage}.global_batch_size ({size}) must be a multiple of "
                    f"resources.{stage}.microBatchSize x gpus x nodes ({step})"
                )
        return self

    @model_validator(mode="after")
    def _direct_stage_belongs_to_the_run(self) -> RunFile:
        stage = self.pipeline.stage
        if self.pipeline.mode == "direct" and stage and not self._has(stage):
            raise ValueError(
                f"pipeline.stage: {stage} is not a stage of this run (run.stages: "
                f"{', '.join(self.run.stages or [])})"
            )
        return self

    def _has(self, stage: str) -> bool:
        return stage == "fetch" or stage in (self.run.stages or [])
