"""The arguments that SFTConfig and DPOConfig share."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

from medjob.config.train import TrainParams
from medjob.errors import ConfigError
from medjob.plan.settings import EVALUATION_ROWS
from medjob.stage import TrainingContext
from medjob.train.deepspeed import deepspeed_config
from medjob.train.device import this_device
from medjob.train.strategy import Strategy


def training_arguments(
    context: TrainingContext, params: TrainParams, strategy: Strategy, *, name: str, validates: bool
) -> dict[str, Any]:
    """Build the arguments of the stage `name`.

    Create the config from them before loading the model: ZeRO-3 shards it while it loads.

    Raises:
        ConfigError: an experiment tracker is not installed.
    """
    _check_trackers(context.report_to)
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(context.tensorboard / name)
    return {
        "output_dir": str(context.work / "trainer"),
        "report_to": list(context.report_to) or "none",
        "seed": context.run.seed,
        "data_seed": context.run.seed,
        "logging_steps": 1,
        "logging_first_step": True,
        # Otherwise a loss of NaN is logged as the mean of the losses before it.
        "logging_nan_inf_filter": False,
        "disable_tqdm": True,
        **_optimization(params),
        **_schedule(params, validates),
        **_devices(context, params, strategy),
    }


def _optimization(params: TrainParams) -> dict[str, Any]:
    return {
        "learning_rate": params.learning_rate,
        "num_train_epochs": params.num_train_epochs,
        "max_steps": params.max_steps or -1,
        "max_length": params.max_length,
        "lr_scheduler_type": params.lr_scheduler_type,
        "warmup_steps": params.warmup_steps,
        "weight_decay": params.weight_decay,
        "max_grad_norm": params.max_grad_norm,
        "optim": params.optim,
    }


def _schedule(params: TrainParams, validates: bool) -> dict[str, Any]:
    """When to validate and save.

    `load_best_model_at_end` is not used: it would need every node's shards on every node's disk.
    The stage publishes the best checkpoint instead.
    """
    eval_steps = params.eval_steps or 0.1  # below 1: a fraction of all steps
    return {
        "eval_strategy": "steps" if validates else "no",
        "eval_steps": eval_steps,
        "save_strategy": "steps",
        "save_steps": params.save_steps or eval_steps,
        "metric_for_best_model": "eval_loss" if validates else None,
        "greater_is_better": False,
        # Otherwise early stopping counts from zero after a resume.
        "restore_callback_states_from_checkpoint": True,
    }


def _devices(context: TrainingContext, params: TrainParams, strategy: Strategy) -> dict[str, Any]:
    """Settings that depend on the devices. They do not change what is computed."""
    micro = strategy.micro_batch_size
    world_size = context.extras.link.world.world_size
    every = strategy.checkpoint_every
    # Reentrant under ZeRO-3, which gathers weights in the backward pass: TRL sets it too late
    # (transformers 5.19).
    checkpointing: dict[str, Any] = {"use_reentrant": strategy.zero == "zero3"}
    if every > 1:  # DPO's trainer does not accept this key (TRL 1.16)
        checkpointing["every_n_layers"] = every
    return {
        "per_device_train_batch_size": micro,
        "per_device_eval_batch_size": max(micro, EVALUATION_ROWS),
        "gradient_accumulation_steps": params.global_batch_size // (micro * world_size),
        "gradient_checkpointing": every > 0,
        "gradient_checkpointing_kwargs": checkpointing,
        "deepspeed": deepspeed_config(strategy.zero, strategy.load_universal),
        "ddp_find_unused_parameters": False,
        "torch_compile": context.resources.torch_compile,
        **this_device().precision(context.run.dtype),
    }


def _check_trackers(report_to: tuple[str, ...]) -> None:
    missing = [name for name in report_to if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"cluster.reportTo: {', '.join(missing)} is not installed",
            "pip install 'medjob[trackers]', or --set cluster.reportTo=[]",
        )
