"""SFT and DPO with TRL: arguments, callbacks, and the loop that both share."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import math
import os
from pathlib import Path
from typing import Any

from transformers import EarlyStoppingCallback, PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from medjob import preempt
from medjob.checkpoints import Checkpoints
from medjob.config.job import StageResources
from medjob.config.train import TrainParams
from medjob.errors import ConfigError, InputError, MedjobError
from medjob.progress import Progress, Task
from medjob.train.model import device

_log = logging.getLogger(__name__)


def training_arguments(
    params: TrainParams,
    resources: StageResources,
    *,
    output: Path,
    seed: int,
    logs: Path,
    dtype: str,
    validates: bool,
    report_to: tuple[str, ...],
) -> dict[str, Any]:
    """Arguments that SFTConfig and DPOConfig share. One process here, so accumulation alone makes up the global batch."""
    target = device()
    if resources.world_size > 1:
        _log.warning(
            "this version trains in one process: %d were asked for; the global batch stays %d",
            resources.world_size,
            params.global_batch_size,
        )
    _check_trackers(report_to)
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(logs)
    steps = "steps" if validates else "no"
    eval_steps = params.eval_steps or 0.1  # below 1: a share of all steps
    return {
        "output_dir": str(output),
        "learning_rate": params.learning_rate,
        "num_train_epochs": params.num_train_epochs,
        "max_steps": params.max_steps or -1,
        "max_length": params.max_length,
        "lr_scheduler_type": params.lr_scheduler_type,
        "warmup_steps": params.warmup_steps,
        "weight_decay": params.weight_decay,
        "max_grad_norm": params.max_grad_norm,
        "optim": params.optim,
        "per_device_train_batch_size": resources.micro_batch_size,
        "per_device_eval_batch_size": max(resources.micro_batch_size, 4),
        "gradient_accumulation_steps": math.ceil(params.global_batch_size / resources.micro_batch_size),
        "activation_checkpointing": resources.gradient_checkpointing,
        "eval_strategy": steps,
        "eval_steps": eval_steps,
        "save_strategy": "steps",
        "save_steps": params.save_steps or eval_steps,
        "save_total_limit": 2,
        "load_best_model_at_end": params.keeps_best and validates,
        "metric_for_best_model": "eval_loss" if validates else None,
        "greater_is_better": False,
        "restore_callback_states_from_checkpoint": True,  # else early stopping counts from zero after a resume
        "logging_steps": 1,
        "logging_first_step": True,
        "report_to": list(report_to) or "none",
        "disable_tqdm": True,
        "seed": seed,
        "data_seed": seed,
        "bf16": dtype == "bfloat16",
        "fp16": dtype == "float16" and target == "cuda",
        "use_cpu": target == "cpu",
        "dataloader_pin_memory": target == "cuda",
    }


def _check_trackers(report_to: tuple[str, ...]) -> None:
    missing = [name for name in report_to if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"cluster.reportTo: {', '.join(missing)} is not installed", "pip install 'medjob[trackers]', or --set cluster.reportTo=[]"
        )


def train(trainer: Any, params: TrainParams, checkpoints: Checkpoints, progress: Progress) -> TrainerState:
    """Train from the newest verified checkpoint to the end.

    Raises:
        Preempted: a signal came; the state is in the store.
    """
    for parameter in trainer.model.parameters():
        if parameter.requires_grad and not trainer.is_deepspeed_enabled:
            # TRL casts LoRA weights over a 4-bit base to bfloat16; float32 ones are what makes a resume bit-exact.
            parameter.data = parameter.data.float()
    if params.early_stopping_patience and trainer.args.eval_strategy != "no":
        trainer.add_callback(EarlyStoppingCallback(params.early_stopping_patience, params.early_stopping_threshold))
    trainer.remove_callback(PrinterCallback)
    output = Path(trainer.args.output_dir)
    step = checkpoints.restore(output)
    if step is not None:
        _log.info("going on from step %d", step)
        _repoint_best(output, step)
    with preempt.wait_for_save(), progress.task("train", total=0) as task:
        trainer.add_callback(_Line(checkpoints, task))
        try:
            trainer.train(resume_from_checkpoint=str(output / f"checkpoint-{step}") if step is not None else None)
        except BaseException:
            with contextlib.suppress(MedjobError):  # what was saved is worth keeping, whatever has happened since
                checkpoints.wait()
            raise
        checkpoints.wait()
    return trainer.state


def metrics_of(state: TrainerState, keeps_best: bool) -> dict[str, Any]:
    """What the marker says of a training: the curve's ends, and which checkpoint was published."""
    losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
    validations = [entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry]
    return {
        "steps": state.global_step,
        "published_step": (keeps_best and _best_step(state.best_model_checkpoint)) or state.global_step,
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
        "validation_loss": validations,
        "best_validation_loss": min(validations, default=None),
    }


def _repoint_best(output: Path, step: int) -> None:
    """Point the state's best checkpoint into this attempt's folder: the state was written in another one."""
    path = output / f"checkpoint-{step}" / "trainer_state.json"
    state = json.loads(path.read_text())
    best = _best_step(state.get("best_model_checkpoint"))
    if best is None:
        return
    if not (output / f"checkpoint-{best}").is_dir():
        raise InputError(f"the best checkpoint (step {best}) is damaged or gone", "delete the unfinished artifact to train anew")
    state["best_model_checkpoint"] = str(output / f"checkpoint-{best}")
    path.write_text(json.dumps(state, indent=2))


def _best_step(checkpoint: str | None) -> int | None:
    """Step of the best checkpoint that was saved. (`best_global_step` may be an evaluation between two saves.)"""
    return int(Path(checkpoint).name.rpartition("-")[2]) if checkpoint else None


class _Line(TrainerCallback):
    """Ties the trainer to ours: checkpoints go to the store, numbers to the progress, signals stop it after a save."""

    def __init__(self, checkpoints: Checkpoints, task: Task) -> None:
        self._checkpoints = checkpoints
        self._task = task
        self._numbers: dict[str, float] = {}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._task.begin(total=state.max_steps, done=state.global_step)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, float] | None = None, **kwargs: Any
    ) -> None:
        shown = ("loss", "eval_loss", "grad_norm", "rewards/accuracies", "rewards/margins")
        self._numbers |= {name: float(value) for name, value in (logs or {}).items() if name in shown}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._task.advance(1, **self._numbers)
        self._checkpoints.check()
        if preempt.requested():
            control.should_save = True
            control.should_training_stop = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        self._checkpoints.save(state.global_step, folder, best_step=_best_step(state.best_model_checkpoint))
