"""The settings of a training: those that the run file fixes, and those that `auto` leaves open."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from medjob.config import Run
from medjob.config.run_file import StageResources
from medjob.config.train import DpoParams, LoraParams, SftParams
from medjob.errors import ConfigError
from medjob.plan.gpus import Auto
from medjob.plan.memory import Attention, Device, Setup
from medjob.plan.shape import Stage

EVALUATION_ROWS = 4
"""Minimum rows in a validation batch."""


@dataclass(frozen=True, slots=True)
class PartialSetup:
    """A setup in which the fields named in `auto` are still to be chosen."""

    setup: Setup
    auto: frozenset[Auto]


def setup_of(
    run: Run,
    params: SftParams | DpoParams,
    lora: LoraParams,
    resources: StageResources,
    attention: Attention,
    device: Device,
) -> PartialSetup:
    """Collect the settings of one training.

    A CPU gets single rows and no packing. It has no kernel launches to save, and padding costs it
    more time than attention does.

    Raises:
        ConfigError: the adapter cannot be trained with this ZeRO stage.
    """
    micro_batch_size = resources.micro_batch_size
    checkpoint_every = resources.gradient_checkpointing
    zero = resources.deepspeed
    stage: Stage = "sft" if isinstance(params, SftParams) else "dpo"
    setup = Setup(
        stage=stage,
        method=run.method,
        dtype=run.dtype,
        lora=lora,
        zero="none" if zero == "auto" else zero,
        world_size=resources.world_size,
        micro_batch_size=1 if micro_batch_size == "auto" else micro_batch_size,
        max_length=params.max_length,
        checkpoint_every=0 if checkpoint_every == "auto" else int(checkpoint_every),
        attention=attention,
        optim=params.optim,
        packing=isinstance(params, SftParams) and params.packing and device != "cpu",
        evaluation_rows=EVALUATION_ROWS,
        device=device,
    )
    if zero == "zero3" and not setup.allows_zero3:
        setting = "use_dora" if lora.use_dora else "trainable_token_indices"
        raise ConfigError(
            f"resources.{stage}.deepspeed: zero3 shards weights that run.lora.{setting} reads as a "
            "whole (PEFT 0.21)",
            f"--set resources.{stage}.deepspeed=zero2",
        )
    is_open: dict[Auto, bool] = {
        "micro_batch_size": micro_batch_size == "auto" and device == "cuda",
        "checkpoint_every": checkpoint_every == "auto",
        "zero": zero == "auto",
    }
    return PartialSetup(setup, frozenset(name for name, is_auto in is_open.items() if is_auto))


def choose_attention(
    requested: str, device: str, dtype: str, flash_attention_installed: bool
) -> Attention:
    """Return transformers' name of the attention kernel: `requested`, or for `auto` the fastest.
    All kernels compute the same."""
    match requested:
        case "sdpa" | "eager" | "flash_attention_2" | "flex_attention":
            return requested
    if device == "cuda" and dtype != "float32" and flash_attention_installed:
        return "flash_attention_2"
    return "sdpa"


def position_limit(config: Any) -> int | None:
    """Return how many tokens a model can read, or None if its configuration names no limit.

    Args:
        config: A configuration of transformers. Multimodal models nest their language part in it.
    """
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
    return int(limit) if limit else None
