"""Forecast of one training before it runs: tokens, steps, memory, hours and cost."""

from __future__ import annotations

import math
from dataclasses import dataclass

from medjob.config.cluster import Profile
from medjob.config.run_file import RunFile, StageResources
from medjob.config.train import DpoParams, SftParams
from medjob.plan import gpus
from medjob.plan.gpus import Choice, Gpu
from medjob.plan.memory import Device
from medjob.plan.settings import choose_attention, setup_of
from medjob.plan.shape import ModelShape

MFU = 0.35
"""Model FLOPs utilisation that hours are estimated with. An assumption, not a measurement. NVIDIA
published 0.41 for LoRA of an 8B model in bfloat16 on one H100 with packed rows (NeMo, 2026). 4-bit
weights, several nodes and short rows lower it."""


@dataclass(frozen=True, slots=True)
class Data:
    """Number and length of the training rows."""

    rows: int
    """For DPO: pairs."""
    mean_length: float
    """Tokens per row. For DPO: tokens of both sides of a pair."""
    exact: bool
    """False for an upper bound."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """Forecast of one stage."""

    stage: str
    resources: StageResources
    choice: Choice
    gpu: Gpu | None
    """None for a CPU."""
    data: Data | None
    steps: int | None
    tokens: float | None
    hours: float | None
    """None if the tokens are unknown, or for a CPU or a Mac."""
    price_per_gpu_hour: float | None

    @property
    def gpu_hours(self) -> float | None:
        """Hours of all devices together."""
        return None if self.hours is None else self.hours * self.resources.world_size

    @property
    def cost(self) -> float | None:
        """Cost in the cluster's currency."""
        if self.gpu_hours is None or self.price_per_gpu_hour is None:
            return None
        return self.gpu_hours * self.price_per_gpu_hour


def forecast(
    run_file: RunFile,
    params: SftParams | DpoParams,
    shape: ModelShape,
    gpu: Gpu | None,
    data: Data | None,
    host_bytes: float,
) -> Forecast:
    """Forecast the stage that `params` belongs to.

    Args:
        gpu: None to train on a CPU.
        host_bytes: Memory that all processes on a CPU may use together.
    """
    stage = "sft" if isinstance(params, SftParams) else "dpo"
    resources: StageResources = getattr(run_file.resources, stage)
    device: Device = "cpu" if gpu is None else "mps" if gpu.is_mac else "cuda"
    # Without FlashAttention: with it, a training needs the same memory or less.
    attention = choose_attention(
        resources.attn_implementation,
        device,
        run_file.run.dtype,
        flash_attention_installed=False,
    )
    # DPO continues the adapter that SFT publishes.
    lora = run_file.run.lora if stage == "sft" else run_file.run.lora.published
    wanted = setup_of(run_file.run, params, lora, resources, attention, device)
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
    """Return the cluster profile that a stage runs on."""
    return run_file.cluster.profiles[resources.profile] if resources.profile else Profile()


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
    """Tokens that are trained on, without padding."""
    if data is None or steps is None:
        return None
    return steps * params.global_batch_size * (params.max_length if packed else data.mean_length)


def _hours(
    shape: ModelShape, choice: Choice, gpu: Gpu | None, tokens: float | None, data: Data | None
) -> float | None:
    if gpu is None or gpu.peak_tflops is None or tokens is None or data is None:
        return None
    setup = choice.setup
    flops = shape.training_flops_per_token(setup.method, data.mean_length, setup.stage)
    flops += shape.recompute_flops_per_token(setup.checkpoint_every, data.mean_length)
    return tokens * flops / (gpu.peak_tflops * 1e12 * MFU * setup.world_size) / 3600
