"""Chooses the settings left to `auto`: sharding, micro batch size, recomputation, packing."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from medjob.config.base import ADAPTER_CONFIG
from medjob.config.train import DpoParams, LoraParams, SftParams, Zero
from medjob.errors import ConfigError
from medjob.plan import gpus
from medjob.plan.adapter import adapter_params
from medjob.plan.memory import GIB, Setup
from medjob.plan.settings import setup_of
from medjob.plan.shape import ModelShape
from medjob.runtime.link import World
from medjob.stage import TrainingContext
from medjob.train.deepspeed import make_universal, read_layout, zero_of
from medjob.train.device import Device, this_device
from medjob.train.distributed import barrier, init_deepspeed
from medjob.train.model import ModelSpec, attention, model_config
from medjob.train.start import starting_adapter

_log = logging.getLogger(__name__)
# Architectures whose attention keeps the rows of a packed sequence apart, as tests/train measures.
# BLOOM, Falcon, OPT, Mamba and others ignore where a row begins (transformers 5.23).
# fmt: off
PACKABLE = frozenset({
    "apertus", "arcee", "cohere", "cohere2", "deepseek_v3", "ernie4_5", "exaone4", "gemma",
    "gemma2", "gemma3", "gemma3_text", "gemma4_text", "glm", "glm4", "glm4_moe", "gpt2",
    "gpt_bigcode", "gpt_neox", "gptj", "granite", "granitemoe", "llama", "llama4", "llava",
    "ministral", "ministral3", "mistral", "mistral3", "mixtral", "mllama", "nemotron", "olmo",
    "olmo2", "olmo3", "olmoe", "phi", "phi3", "phimoe", "qwen2", "qwen2_moe", "qwen3",
    "qwen3_moe", "seed_oss", "smollm3", "stablelm", "starcoder2",
})
# fmt: on


@dataclass(frozen=True, slots=True)
class Strategy:
    """How a training uses its devices."""

    zero: Zero
    micro_batch_size: int
    checkpoint_every: int
    """Recompute activations in every n-th layer; 0 for none."""
    packing: bool
    load_universal: bool
    """Whether a different number of processes wrote the checkpoint to resume from."""
    shape: ModelShape | None
    """None for an unknown architecture. Then memory is not estimated and MFU not reported."""
    peak_flops: float | None
    """FLOP/s of all devices together; None if unknown."""


def decide(
    context: TrainingContext, params: SftParams | DpoParams, stage: Literal["sft", "dpo"]
) -> Strategy:
    """Choose and log a strategy. Convert the checkpoint and set up DeepSpeed if it needs that.

    Raises:
        ConfigError: the GPU has no bfloat16, or the checkpoint cannot be read with this setting.
    """
    resources = context.resources
    world = context.extras.link.world
    device = this_device()
    device.check_dtype(context.run.dtype)
    device.check_zero("none" if resources.deepspeed == "auto" else resources.deepspeed, stage)
    kernel = attention(resources.attn_implementation, context.run.dtype)
    wanted = setup_of(context.run, params, _lora(context), resources, kernel, device.kind)
    shape, choice = _shape(context), None
    if shape is not None:
        choice = gpus.choose(
            shape,
            wanted.setup,
            device.budget_bytes(world.local_world_size),
            auto=wanted.auto,
            global_batch_size=params.global_batch_size,
        )
    setup = choice.setup if choice else wanted.setup
    checkpoint = _checkpoint(context)
    zero = zero_of(resources.deepspeed, setup.zero, checkpoint, stage)
    gpu = gpus.find(device.name) if device.kind == "cuda" else None
    peak = gpu.peak_tflops if gpu else None
    strategy = Strategy(
        zero=zero,
        micro_batch_size=setup.micro_batch_size,
        checkpoint_every=setup.checkpoint_every,
        packing=setup.packed and _keeps_rows_apart(context),
        load_universal=_prepare_checkpoint(context, zero, checkpoint),
        shape=shape,
        peak_flops=peak * 1e12 * world.world_size if peak else None,
    )
    if zero != "none":
        init_deepspeed()
    if world.is_main:
        _log_strategy(stage, strategy, setup, choice, world, device)
    return strategy


def base_spec(context: TrainingContext, strategy: Strategy) -> ModelSpec:
    """How to load the base model for training.

    Under DeepSpeed the optimizer holds the float32 weights, so `full` loads `run.dtype`.
    """
    spec = ModelSpec.base_of(
        context.run,
        context.location(context.run.base_model),
        context.resources.attn_implementation,
    )
    return spec if strategy.zero == "none" else replace(spec, dtype=context.run.dtype)


def _log_strategy(
    stage: str,
    strategy: Strategy,
    setup: Setup,
    choice: gpus.Choice | None,
    world: World,
    device: Device,
) -> None:
    every = strategy.checkpoint_every
    recomputed = {0: "kept", 1: "recomputed"}.get(every, f"recomputed in one of {every} layers")
    budget = device.budget_bytes(world.local_world_size)
    memory = f", about {choice.memory.total / GIB:.1f} of {budget / GIB:.1f} GiB" if choice else ""
    _log.info(
        "%s: %d process(es) on %s: deepspeed %s, micro batch %d, packing %s, activations %s, "
        "attention %s%s",
        stage,
        world.world_size,
        device.name,
        strategy.zero,
        strategy.micro_batch_size,
        "on" if strategy.packing else "off",
        recomputed,
        setup.attention,
        memory,
    )
    if choice and not choice.fits:
        _log.warning("%s: may run out of memory: %s", stage, "; ".join(choice.advice))


def _lora(context: TrainingContext) -> LoraParams:
    """The adapter's parameters: the run's, or those of the adapter that the training continues."""
    folder = context.inputs.get("sft") or starting_adapter(context)
    if folder is None or not (folder / ADAPTER_CONFIG).is_file():
        return getattr(context.run, "lora", LoraParams())
    return adapter_params(folder)


def _shape(context: TrainingContext) -> ModelShape | None:
    try:
        return ModelShape.from_config(model_config(context.location(context.run.base_model)))
    except ConfigError as error:
        if context.extras.link.world.is_main:
            _log.info("not estimating memory: %s", error.message)
        return None


def _keeps_rows_apart(context: TrainingContext) -> bool:
    base = context.location(context.run.base_model)
    model_type = model_config(base).get("model_type")
    if model_type not in PACKABLE and context.extras.link.world.is_main:
        _log.warning(
            "rows are padded and not packed: the attention of model_type %s may mix packed rows",
            model_type,
        )
    return model_type in PACKABLE


def _checkpoint(context: TrainingContext) -> Path | None:
    step = context.extras.link.resume_step
    return None if step is None else context.work / "trainer" / f"checkpoint-{step}"


def _prepare_checkpoint(context: TrainingContext, zero: Zero, checkpoint: Path | None) -> bool:
    """Convert the checkpoint if a different number of processes wrote it; return whether it was."""
    if checkpoint is None or zero == "none":
        return False
    _, world_size = read_layout(checkpoint)
    world = context.extras.link.world
    if world_size == world.world_size:
        return False
    if world.local_rank == 0:
        _log.info(
            "converting the checkpoint of %d processes for %d",
            world_size,
            world.world_size,
        )
        make_universal(checkpoint)
    barrier()
    return True
