"""How a training uses its devices: what the run file leaves to us, decided from model, memory and number of nodes."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path

from medjob.config.train import TrainParams, Zero
from medjob.stage import TrainContext
from medjob.train.deepspeed import make_universal, read_layout, zero_of
from medjob.train.distributed import barrier, init_deepspeed
from medjob.train.model import ModelSpec

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Strategy:
    """What was decided."""

    zero: Zero
    micro_batch_size: int
    checkpoint_every: int
    """0: no activation checkpointing; n: in every n-th layer."""
    load_universal: bool = False
    """Whether the checkpoint was written by another number of processes."""


def decide(context: TrainContext, params: TrainParams, stage: str) -> Strategy:
    """Decide, say so, and make ready what the decision needs."""
    resources, place = context.resources, context.link.place
    chosen: Zero = "none" if place.world_size == 1 else "zero2"
    checkpoint = _checkpoint(context)
    zero = zero_of(resources.deepspeed, chosen, checkpoint, stage)
    micro = 1 if resources.micro_batch_size == "auto" else resources.micro_batch_size
    every = 1 if resources.gradient_checkpointing is True else 0
    strategy = Strategy(zero, micro, every, _prepare_checkpoint(context, zero, checkpoint))
    if zero != "none":
        init_deepspeed()
    if place.is_main:
        _log.info("%s: %d process(es), deepspeed %s, micro batch %d", stage, place.world_size, zero, micro)
    return strategy


def base_spec(context: TrainContext, strategy: Strategy) -> ModelSpec:
    """The base model as it is trained. Under DeepSpeed the optimizer holds the float32 weights, so `full` loads run.dtype."""
    spec = ModelSpec.base_of(context.run, context.pins, context.cache, context.resources.attn_implementation)
    return spec if strategy.zero == "none" else replace(spec, dtype=context.run.dtype)


def _checkpoint(context: TrainContext) -> Path | None:
    step = context.link.resume_step
    return None if step is None else context.work / "trainer" / f"checkpoint-{step}"


def _prepare_checkpoint(context: TrainContext, zero: Zero, checkpoint: Path | None) -> bool:
    """Convert the checkpoint if another number of processes wrote it; whether it was so."""
    if checkpoint is None or zero == "none":
        return False
    _, world_size = read_layout(checkpoint)
    place = context.link.place
    if world_size == place.world_size:
        return False
    if place.local_rank == 0:
        _log.info("the checkpoint is of %d processes, now there are %d: converting it", world_size, place.world_size)
        make_universal(checkpoint)
    barrier()
    return True
