"""What a training will take: tokens, steps, memory, hours and money, before anything is spent."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from medjob.config.cluster import Profile
from medjob.config.run_file import RunFile, StageResources
from medjob.config.train import DpoParams, SftParams
from medjob.plan import gpus
from medjob.plan.gpus import Choice, Gpu
from medjob.plan.settings import setup_of
from medjob.plan.shape import ModelShape

MFU = 0.35
"""Share of the peak that hours are reckoned with: 0.41 was published for LoRA of an 8B model in bfloat16 on one H100 with packed
rows (NVIDIA NeMo, 2026), and 4-bit weights, several nodes and short rows cost some of it. An assumption, not a measurement."""


@dataclass(frozen=True, slots=True)
class Data:
    """What is known of the rows before they are trained on."""

    rows: int
    """Training rows; pairs for DPO."""
    mean_length: float
    """Tokens of a row; of both sides of a pair."""
    exact: bool
    """False where it is a bound and not a count."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """One stage's."""

    stage: str
    resources: StageResources
    choice: Choice
    gpu: Gpu | None
    """None for a CPU."""
    data: Data | None
    steps: int | None
    tokens: float | None
    hours: float | None
    """None where the tokens are not known, or on a CPU."""
    price_per_gpu_hour: float | None

    @property
    def gpu_hours(self) -> float | None:
        """Over all devices."""
        return None if self.hours is None else self.hours * self.resources.world_size

    @property
    def cost(self) -> float | None:
        """In the cluster's currency."""
        return (
            None
            if self.gpu_hours is None or self.price_per_gpu_hour is None
            else self.gpu_hours * self.price_per_gpu_hour
        )


def forecast(
    run_file: RunFile,
    params: SftParams | DpoParams,
    shape: ModelShape,
    gpu: Gpu | None,
    data: Data | None,
    host_bytes: float,
) -> Forecast:
    """What the stage of `params` will take on `gpu`; on a CPU with `host_bytes` of memory where that is None."""
    stage = "sft" if isinstance(params, SftParams) else "dpo"
    resources: StageResources = getattr(run_file.resources, stage)
    wanted = setup_of(
        run_file.run,
        params,
        run_file.run.lora,
        resources,
        _attention(resources),
        "cuda" if gpu else "cpu",
    )
    budget = gpu.usable_bytes if gpu else host_bytes / max(resources.gpus, 1)
    choice = gpus.choose(
        shape, wanted.setup, budget, auto=wanted.auto, global_batch_size=params.global_batch_size
    )
    steps = _steps(params, data, choice.setup.packed)
    tokens = _tokens(params, data, steps, choice.setup.packed)
    return Forecast(
        stage=stage,
        resources=resources,
        choice=choice,
        gpu=gpu,
        data=data,
        steps=steps,
        tokens=tokens,
        hours=_hours(shape, choice, gpu, tokens, data),
        price_per_gpu_hour=profile_of(run_file, resources).price_per_gpu_hour,
    )


def profile_of(run_file: RunFile, resources: StageResources) -> Profile:
    """The kind of node that a stage asks for."""
    return run_file.cluster.profiles[resources.profile] if resources.profile else Profile()


def _attention(resources: StageResources) -> Literal["sdpa", "flash", "eager"]:
    """What `auto` comes to where FlashAttention is not installed; the memory is the same or less where it is."""
    match resources.attn_implementation:
        case "flash_attention_2":
            return "flash"
        case "eager":
            return "eager"
        case _:
            return "sdpa"


def _steps(params: SftParams | DpoParams, data: Data | None, packed: bool) -> int | None:
    if params.max_steps:
        return params.max_steps
    if data is None:
        return None
    rows = math.ceil(data.rows * data.mean_length / params.max_length) if packed else data.rows
    return math.ceil(rows / params.global_batch_size) * math.ceil(params.num_train_epochs)


def _tokens(
    params: SftParams | DpoParams, data: Data | None, steps: int | None, packed: bool
) -> float | None:
    """Tokens trained on, without padding."""
    if data is None or steps is None:
        return None
    return steps * params.global_batch_size * (params.max_length if packed else data.mean_length)


def _hours(
    shape: ModelShape, choice: Choice, gpu: Gpu | None, tokens: float | None, data: Data | None
) -> float | None:
    if gpu is None or tokens is None or data is None:
        return None
    setup = choice.setup
    flops = shape.training_flops_per_token(setup.method, data.mean_length, setup.stage)
    flops += shape.recompute_flops_per_token(setup.checkpoint_every, data.mean_length)
    return tokens * flops / (gpu.peak_tflops * 1e12 * MFU * setup.world_size) / 3600
