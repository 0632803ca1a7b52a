"""DeepSpeed's configuration, and its checkpoints when the number of processes changes."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError

from medjob.config.train import Zero
from medjob.errors import ConfigError, InputError
from medjob.runtime.link import WEIGHTS_ONLY, World

_log = logging.getLogger(__name__)
STATE = "medjob.json"  # file in a checkpoint: how its optimizer state is laid out


def deepspeed_config(zero: Zero, load_universal: bool) -> dict[str, Any] | None:
    """Build the value of `TrainingArguments(deepspeed=...)`; None without DeepSpeed.

    The optimizer and the schedule are left to transformers.
    """
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


class _Layout(BaseModel):
    model_config = ConfigDict(strict=True)
    deepspeed: Zero
    world_size: PositiveInt


def write_layout(checkpoint: Path, zero: Zero, world_size: int) -> None:
    """Record in a checkpoint how its optimizer state is laid out."""
    layout = _Layout(deepspeed=zero, world_size=world_size)
    (checkpoint / STATE).write_text(layout.model_dump_json())


def read_layout(checkpoint: Path) -> tuple[Zero, int]:
    """Read what `write_layout` recorded: the ZeRO stage and the number of processes.

    Raises:
        InputError: the file is damaged.
    """
    try:
        layout = _Layout.model_validate_json((checkpoint / STATE).read_bytes())
    except (OSError, ValidationError):
        raise InputError(
            f"{checkpoint.name}: {STATE} does not describe the layout of the checkpoint",
            "delete the unfinished artifact to train from the start",
        ) from None
    return layout.deepspeed, layout.world_size


def zero_of(wanted: str, chosen: Zero, checkpoint: Path | None, stage: str) -> Zero:
    """Choose the sharding to train with, one that can read the checkpoint.

    Args:
        wanted: The run file's value.
        chosen: The stage to use if `wanted` is `auto`.

    Raises:
        ConfigError: `wanted` cannot read the checkpoint.
    """
    zero: Zero = chosen if wanted == "auto" else wanted  # type: ignore[assignment]
    if checkpoint is None:
        return zero
    began_with, _ = read_layout(checkpoint)
    if _format(began_with) == _format(zero):
        return zero
    if wanted == "auto":
        _log.info(
            "%s: deepspeed %s, because the checkpoint was written with it (otherwise %s)",
            stage,
            began_with,
            zero,
        )
        return began_with
    raise ConfigError(
        f"resources.{stage}.deepspeed: {zero} cannot read the checkpoint of {began_with}",
        f"--set resources.{stage}.deepspeed=auto continues with {began_with}",
    )


def _format(zero: Zero) -> str:
    return "none" if zero == "none" else "zero3" if zero == "zero3" else "zero1 or zero2"


def make_universal(checkpoint: Path) -> None:
    """Convert a checkpoint in place to DeepSpeed's universal format, which any number of processes
    can load (Lian et al. 2024, "Universal Checkpointing").

    ZeRO's own files hold one shard per process, and `load_checkpoint` refuses a different number.
    `--inject_missing_state` is needed because transformers does not write the header.

    Raises:
        InputError: the converter failed.
    """
    source = _states_of(checkpoint)
    target = source.with_name(f"{source.name}_universal")
    converter = [sys.executable, "-P", "-m", "medjob.train.states"]
    folders = ["--input_folder", str(source), "--output_folder", str(target)]
    workers = ["--num_extract_workers", "1", "--num_merge_workers", "1"]
    done = subprocess.run(
        [*converter, "--inject_missing_state", *folders, *workers],
        capture_output=True,
        text=True,
        check=False,
        env=_without_ranks(),
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise InputError(
            f"{checkpoint.name}: cannot be converted for a different number of processes: "
            f"{lines[-1][:300]}",
            "delete the unfinished artifact to train from the start",
        )


def _states_of(checkpoint: Path) -> Path:
    for path in sorted(checkpoint.glob("global_step*")):
        if not path.name.endswith("_universal"):
            return path
    raise InputError(
        f"{checkpoint.name}: there are no DeepSpeed states in it",
        "delete the unfinished artifact to train from the start",
    )


def _without_ranks() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in World().environment}
    return kept | WEIGHTS_ONLY
