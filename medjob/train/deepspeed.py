"""DeepSpeed's configuration, and its checkpoints across numbers of processes."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from medjob.config.train import Zero
from medjob.errors import ConfigError, InputError
from medjob.runtime.link import World

_log = logging.getLogger(__name__)
STATE = "medjob.json"  # in a checkpoint: how its optimizer is laid out


def deepspeed_config(zero: Zero, load_universal: bool) -> dict[str, Any] | None:
    """What `TrainingArguments(deepspeed=...)` takes; None for no DeepSpeed. Optimizer and schedule are left to transformers."""
    if zero == "none":
        return None
    sharding: dict[str, Any] = {
        "stage": int(zero[-1]),
        "overlap_comm": True,
        "contiguous_gradients": True,
        "reduce_bucket_size": "auto",
    }
    if zero == "zero3":
        sharding |= {
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
            "stage3_gather_16bit_weights_on_model_save": True,
        }
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "train_batch_size": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
        "zero_optimization": sharding,
        "steps_per_print": 1_000_000_000,
        "checkpoint": {"load_universal": load_universal},
    }


def write_layout(checkpoint: Path, zero: Zero, world_size: int) -> None:
    """Say in a checkpoint how its optimizer state is laid out."""
    (checkpoint / STATE).write_text(json.dumps({"deepspeed": zero, "world_size": world_size}))


def read_layout(checkpoint: Path) -> tuple[Zero, int]:
    """What `write_layout` wrote."""
    layout = json.loads((checkpoint / STATE).read_text())
    return layout["deepspeed"], layout["world_size"]


def zero_of(wanted: str, chosen: Zero, checkpoint: Path | None, stage: str) -> Zero:
    """The sharding to train with: `wanted`, `chosen` where that is `auto`, but always one that can read the checkpoint.

    Raises:
        ConfigError: `wanted` cannot go on from the checkpoint.
    """
    zero: Zero = chosen if wanted == "auto" else wanted  # type: ignore[assignment]
    if checkpoint is None:
        return zero
    began_with, _ = read_layout(checkpoint)
    if _format(began_with) == _format(zero):
        return zero
    if wanted == "auto":
        _log.info(
            "%s: deepspeed %s, as the checkpoint was written with it (else it would be %s)",
            stage,
            began_with,
            zero,
        )
        return began_with
    raise ConfigError(
        f"resources.{stage}.deepspeed: this training began with {began_with}, whose checkpoint {zero} cannot read",
        f"--set resources.{stage}.deepspeed=auto goes on with {began_with}",
    )


def _format(zero: Zero) -> str:
    return "none" if zero == "none" else "zero3" if zero == "zero3" else "zero1 or zero2"


def make_universal(checkpoint: Path) -> None:
    """Convert a checkpoint in place into DeepSpeed's universal form, which any number of processes can load.

    ZeRO's own files hold one shard a process, and `load_checkpoint` refuses another number of them. (Lian et al. 2024,
    "Universal Checkpointing"; `--inject_missing_state` since transformers writes no such header.)

    Raises:
        InputError: the converter failed.
    """
    source = next(
        path for path in checkpoint.glob("global_step*") if not path.name.endswith("_universal")
    )
    target = source.with_name(f"{source.name}_universal")
    command = [
        sys.executable,
        "-m",
        "deepspeed.checkpoint.ds_to_universal",
        "--inject_missing_state",
    ]
    command += [
        "--input_folder",
        str(source),
        "--output_folder",
        str(target),
        "--num_extract_workers",
        "1",
        "--num_merge_workers",
        "1",
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=_without_ranks()
    )
    if done.returncode:
        raise InputError(
            f"{checkpoint.name}: cannot be converted for another number of processes: {done.stderr[-500:]}"
        )


def _without_ranks() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in World().environment}
