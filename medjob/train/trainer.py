"""The common part of the SFT and DPO trainers: small checkpoints, a joint stop, live metrics."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from medjob.config.train import SftParams, TrainParams
from medjob.errors import ConfigError, DataError, InputError, Preempted
from medjob.runtime.link import Link
from medjob.stage import Metrics, TrainingContext
from medjob.train.deepspeed import write_layout
from medjob.train.distributed import any_rank, barrier
from medjob.train.divergence import Divergence
from medjob.train.integrity import check_finite
from medjob.train.kernels import use_fused_kernels
from medjob.train.model import save_policy
from medjob.train.patches import (
    AdapterCheckpoints,
    copy_trained_tokens,
    give_trained_head_a_bias,
    train_adapter_in_float32,
)
from medjob.train.speed import Speed
from medjob.train.strategy import Strategy

_log = logging.getLogger(__name__)
_SHOWN = (
    "loss",
    "eval_loss",
    "grad_norm",
    "tokens_per_second",
    "mfu",
    "memory_gib",
    "rewards/accuracies",
    "rewards/margins",
)


class TrainerMixin(AdapterCheckpoints):
    """Measures speed and logs it with the loss, and ends a training that diverges. Placed before
    TRL's trainers in the bases."""

    speed: Speed
    divergence: Divergence

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Get the micro batches of a step, and measure the wait for them."""
        self.speed.step_begins()
        samples = super().get_batch_samples(*args, **kwargs)
        self.speed.data_came()
        return samples

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log to all trackers, with speed and memory beside the loss."""
        if "loss" in logs:
            logs = logs | self.speed.numbers(getattr(self, "_total_train_tokens", 0))
        super().log(logs, *args, **kwargs)
        self.divergence.check_numbers(logs, self.state.global_step)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Save a checkpoint, unless its weights are not finite."""
        self.divergence.check_weights(self.model, self.state.global_step)
        super()._save_checkpoint(*args, **kwargs)


def train_and_save(
    trainer: Any,
    rows: Any,
    params: TrainParams,
    context: TrainingContext,
    strategy: Strategy,
    initial: Mapping[str, Any] = MappingProxyType({}),
) -> Metrics:
    """Train to the end, and write the best checkpoint's policy, or the last one's, for publishing.

    Args:
        rows: The training rows before packing.
        initial: Initial weights of the adapter that were subtracted from the base.

    Raises:
        DataError: the training diverged, or a setting needs validation rows that do not exist.
        Preempted: as `train`.
    """
    trainer.speed = _speed(rows, params, context, strategy)
    trainer.divergence = Divergence(_stage(params), scales_loss=trainer.args.fp16)
    state = train(trainer, params, context, strategy)
    trainer.divergence.check_end(state.global_step)
    published = published_checkpoint(state, params, context)
    if context.extras.link.world.is_main:
        base = context.run.base_model
        save_policy(published, trainer.processing_class, context.output, base, initial)
        check_finite(context.output, _stage(params))
    return metrics_of(state, published)


def train(
    trainer: Any, params: TrainParams, context: TrainingContext, strategy: Strategy
) -> TrainerState:
    """Train from the newest checkpoint to the end.

    Raises:
        Preempted: a process was asked to stop. The state is saved and the parent has it.
    """
    link = context.extras.link
    copy_trained_tokens(trainer.model)
    give_trained_head_a_bias(trainer.model)
    if not trainer.is_deepspeed_enabled:
        train_adapter_in_float32(trainer.model)
    if use_fused_kernels(trainer.model) and link.world.is_main:
        _log.info("using Liger's fused kernels")
    if params.early_stopping_patience and trainer.args.eval_strategy != "no":
        trainer.add_callback(
            EarlyStoppingCallback(params.early_stopping_patience, params.early_stopping_threshold)
        )
    trainer.remove_callback(PrinterCallback)
    reporter = Reporter(link, trainer.speed, strategy)
    if params.needs_validation:
        trainer.add_callback(ValidationCheck(f"run.{_stage(params)}", params.needs_validation))
    trainer.add_callback(reporter)
    checkpoint = _checkpoint_to_resume(Path(trainer.args.output_dir), link)
    if checkpoint and (state := _finished(checkpoint, params)):
        return state
    trainer.train(resume_from_checkpoint=checkpoint)
    if reporter.stopped:
        raise Preempted(f"stopped after step {trainer.state.global_step}; the state is saved")
    return trainer.state


def _speed(rows: Any, params: TrainParams, context: TrainingContext, strategy: Strategy) -> Speed:
    """Create the speedometer, with the model's FLOPs per token."""
    stage = _stage(params)
    shape = strategy.shape
    flops = (
        shape.training_flops_per_token(context.run.method, _mean_length(rows), stage)
        if shape
        else 0.0
    )
    return Speed(flops, strategy.peak_flops if shape else None)


def _stage(params: TrainParams) -> Literal["sft", "dpo"]:
    return "sft" if isinstance(params, SftParams) else "dpo"


def _mean_length(rows: Any) -> float:
    """Mean number of tokens per row. DPO rows count the prompt and the mean of both answers."""
    some = rows.select(range(min(len(rows), 1000)))
    if "input_ids" in some.column_names:
        return sum(len(row["input_ids"]) for row in some) / len(some)
    return sum(
        len(row["prompt_ids"]) + (len(row["chosen_ids"]) + len(row["rejected_ids"])) / 2
        for row in some
    ) / len(some)


def check_validation(
    context: TrainingContext, params: TrainParams, usable: int, left_out: int = 0
) -> None:
    """Check that the validation that the run asks for can take place.

    Args:
        usable: Number of validation rows.
        left_out: Number of those that are too long.

    Raises:
        DataError: no row is left, and a setting needs the validation loss.
    """
    stage = _stage(params)
    if left_out and context.extras.link.world.is_main:
        _log.warning(
            "%s: left out %d validation rows over %d tokens", stage, left_out, params.max_length
        )
    if usable or not params.needs_validation:
        return
    if left_out:
        reason = f"all {left_out} have over {params.max_length} tokens"
        hint = f"raise run.{stage}.max_length"
    else:
        reason = "there are none"
        key = "prepare.validation_rows" if stage == "sft" else "dpo.validation_fraction"
        hint = f"raise run.{key}, or use more rows"
    raise DataError(
        f"run.{stage}.{params.needs_validation} needs validation rows, but {reason}", hint
    )


def published_checkpoint(
    state: TrainerState, params: TrainParams, context: TrainingContext
) -> Path:
    """The checkpoint to publish: the best or the last one.

    transformers saves when a training ends, so the last step has a checkpoint.
    """
    step = (params.keeps_best and _best_step(state.best_model_checkpoint)) or state.global_step
    return context.work / "trainer" / f"checkpoint-{step}"


def metrics_of(state: TrainerState, published: Path) -> Metrics:
    """Metrics for the marker: first, last and best losses, and the published step."""
    losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
    validations = [entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry]
    return {
        "steps": state.global_step,
        "published_step": _best_step(published.name),
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
        "validation_loss": validations,
        "best_validation_loss": min(validations, default=None),
    }


def _checkpoint_to_resume(output: Path, link: Link) -> str | None:
    if link.resume_step is None:
        return None
    if link.world.local_rank == 0:
        _repoint_best(output, link.resume_step)
    barrier()
    return str(output / f"checkpoint-{link.resume_step}")


def _finished(checkpoint: str, params: TrainParams) -> TrainerState | None:
    """The state of a checkpoint that the last step saved; None if steps are left.

    The attempt that saved it could not publish it. transformers would take another step before it
    noticed that there is nothing left to do.
    """
    state = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
    stopping = state.stateful_callbacks.get("EarlyStoppingCallback", {}).get("attributes", {})
    waited = stopping.get("early_stopping_patience_counter", 0)
    patience = params.early_stopping_patience
    stopped_early = patience is not None and waited >= patience
    return state if state.global_step >= state.max_steps or stopped_early else None


def _repoint_best(output: Path, step: int) -> None:
    """Make the state's best checkpoint a path in this attempt's directory.

    An earlier attempt wrote the state with a path in its own directory.
    """
    path = output / f"checkpoint-{step}" / "trainer_state.json"
    state = json.loads(path.read_text())
    best = _best_step(state.get("best_model_checkpoint"))
    if best is None:
        return
    if not (output / f"checkpoint-{best}").is_dir():
        raise InputError(
            f"the best checkpoint (step {best}) is damaged or missing",
            "delete the unfinished artifact to train from the start",
        )
    state["best_model_checkpoint"] = str(output / f"checkpoint-{best}")
    path.write_text(json.dumps(state, indent=2))


def _best_step(checkpoint: str | None) -> int | None:
    """Step of the best saved checkpoint.

    `best_global_step` is not used: it may be an evaluation between two saves.
    """
    return int(Path(checkpoint).name.rpartition("-")[2]) if checkpoint else None


class ValidationCheck(TrainerCallback):
    """Ends a training at its start if it has too few steps for the validation that it needs."""

    def __init__(self, section: str, setting: str) -> None:
        self._section, self._setting = section, setting

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.eval_steps and state.eval_steps > state.max_steps:
            raise ConfigError(
                f"{self._section}.{self._setting} needs a validation, but the first one is at step "
                f"{state.eval_steps} (eval_steps) and the training has {state.max_steps} steps",
                f"lower {self._section}.eval_steps",
            )


class Reporter(TrainerCallback):
    """Sends metrics and checkpoints to the parent, and stops all processes at the same step."""

    def __init__(self, link: Link, speed: Speed, strategy: Strategy) -> None:
        self._link, self._speed, self._strategy = link, speed, strategy
        self._reports = link.world.local_rank == 0
        self._numbers: dict[str, float] = {}
        self._saving_since = 0.0
        self.stopped = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._reports:
            self._link.begin(total=state.max_steps, done=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        self._numbers |= {
            name: float(value) for name, value in (logs or {}).items() if name in _SHOWN
        }

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._speed.step_ended()
        if self._reports:
            self._link.step(state.global_step, self._speed.step_seconds, self._numbers)
        if any_rank(self._link.stop_requested):
            self.stopped = control.should_save = control.should_training_stop = True
        self._saving_since = time.perf_counter()

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # Early stopping may end the training between two saves.
        control.should_save = control.should_save or control.should_training_stop
        self._saving_since = time.perf_counter()

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        if self._link.world.is_main:
            # The copy of the SFT adapter that DPO uses as reference. A resumed run loads it again
            # from the artifact, and ZeRO-3 saves it under names that cannot be loaded.
            shutil.rmtree(folder / "ref", ignore_errors=True)
            write_layout(folder, self._strategy.zero, self._link.world.world_size)
        barrier()  # every process has saved its part
        if self._reports:
            self._link.saved(
                state.global_step,
                time.perf_counter() - self._saving_since,
                _best_step(state.best_model_checkpoint),
            )
