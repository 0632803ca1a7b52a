"""What a run file fixes of a training's settings, and what it leaves open."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from medjob.config import Run
from medjob.config.run_file import StageResources
from medjob.config.train import DpoParams, LoraParams, SftParams
from medjob.plan.gpus import Auto
from medjob.plan.memory import Setup

EVALUATION_ROWS = 4  # rows of a validation batch, at least


@dataclass(frozen=True, slots=True)
class Wanted:
    """A setup whose fields in `auto` are still to be chosen."""

    setup: Setup
    auto: frozenset[Auto]


def setup_of(
    run: Run,
    params: SftParams | DpoParams,
    lora: LoraParams,
    resources: StageResources,
    attention: Literal["sdpa", "flash", "eager"],
    device: str,
) -> Wanted:
    """The settings of `stage` on `device` (cuda, mps or cpu).

    A CPU takes single rows and no packing: it has no launches to save, and padding costs it more than attention does.
    """
    micro, every, zero = (
        resources.micro_batch_size,
        resources.gradient_checkpointing,
        resources.deepspeed,
    )
    setup = Setup(
        stage="sft" if isinstance(params, SftParams) else "dpo",
        method=run.method,
        dtype=run.dtype,
        lora=lora,
        zero="none" if zero == "auto" else zero,
        world_size=resources.world_size,
        micro_batch_size=1 if micro == "auto" else micro,
        max_length=params.max_length,
        checkpoint_every=0 if every == "auto" else int(every),
        attention=attention,
        optim=params.optim,
        packing=isinstance(params, SftParams) and params.packing and device != "cpu",
        evaluation_rows=EVALUATION_ROWS,
        device="cuda" if device == "cuda" else "cpu",
    )
    auto: dict[Auto, bool] = {
        "micro_batch_size": micro == "auto" and device == "cuda",
        "checkpoint_every": every == "auto",
        "zero": zero == "auto",
    }
    return Wanted(setup, frozenset(name for name, open_ in auto.items() if open_))
