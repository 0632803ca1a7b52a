"""What our SFT and DPO trainers share: small checkpoints, agreement on when to stop, live numbers."""

from __future__ import annotations

import json
import logging
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from medjob.config.train import SftParams, TrainParams
from medjob.errors import InputError, Preempted
from medjob.runtime.link import Link
from medjob.stage import Metrics, TrainingContext
from medjob.train.deepspeed import write_layout
from medjob.train.distributed import any_rank, barrier
from medjob.train.kernels import use_fused_kernels
from medjob.train.model import save_policy
from medjob.train.speed import Speed
from medjob.train.strategy import Strategy

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object

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


class LineTrainer(_Trainer):
    """Laid over TRL's trainers."""

    speed: Speed

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the adapter alone. ZeRO-1/2 would first copy the whole 4-bit base into each process's host memory."""
        if self.is_deepspeed_enabled and self._is_adapter and not self._shards_weights:
            self._save(output_dir or self.args.output_dir)
        else:
            super().save_model(output_dir, _internal_call)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_deepspeed_enabled and self._is_adapter:
            _without_frozen_state(self.model_wrapped)
        super()._save_optimizer_and_scheduler(output_dir)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The micro batches of a step, timed."""
        self.speed.step_begins()
        samples = super().get_batch_samples(*args, **kwargs)
        self.speed.data_came()
        return samples

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log to all trackers, with our numbers beside the loss."""
        if "loss" in logs:
            logs = logs | self.speed.numbers(getattr(self, "_total_train_tokens", 0))
        super().log(logs, *args, **kwargs)

    @property
    def _is_adapter(self) -> bool:
        return hasattr(self.model, "peft_config")

    @property
    def _shards_weights(self) -> bool:
        return bool(self.model_wrapped.zero_optimization_partition_weights())


def _without_frozen_state(engine: Any) -> None:
    """Keep the quantisation constants of a frozen base out of DeepSpeed's checkpoint: 0.13 GB for 8 B parameters, a rank."""
    trained = {
        name for name, parameter in engine.module.named_parameters() if parameter.requires_grad
    }
    whole = type(engine).module_state_dict

    def module_state_dict(*args: Any, **kwargs: Any) -> Any:
        return {
            name: value for name, value in whole(engine, *args, **kwargs).items() if name in trained
        }

    engine.module_state_dict = module_state_dict


def train_and_save(
    trainer: Any, rows: Any, params: TrainParams, context: TrainingContext, strategy: Strategy
) -> Metrics:
    """Train from the newest checkpoint to the end, and write the policy to publish: the best checkpoint's, or the last one's.

    `rows` are the training rows before they were packed.

    Raises:
        Preempted: as `train`.
    """
    trainer.speed = _speed(rows, params, context, strategy)
    state = train(trainer, params, context, strategy)
    published = published_checkpoint(state, params, context)
    if context.extras.link.world.is_main:
        save_policy(published, trainer.processing_class, context.output, context.run.base_model)
    return metrics_of(state, published)


def train(
    trainer: Any, params: TrainParams, context: TrainingContext, strategy: Strategy
) -> TrainerState:
    """Train from the newest checkpoint to the end.

    Raises:
        Preempted: some process was asked to stop; the state is saved, and handed to the parent.
    """
    link = context.extras.link
    for parameter in trainer.model.parameters():
        if parameter.requires_grad and not trainer.is_deepspeed_enabled:
            # TRL casts LoRA weights over a 4-bit base to bfloat16; float32 ones are what makes a resume bit-exact.
            parameter.data = parameter.data.float()
    if use_fused_kernels(trainer.model) and link.world.is_main:
        _log.info("fused kernels are in place (Liger)")
    if params.early_stopping_patience and trainer.args.eval_strategy != "no":
        trainer.add_callback(
            EarlyStoppingCallback(params.early_stopping_patience, params.early_stopping_threshold)
        )
    trainer.remove_callback(PrinterCallback)
    reporter = Reporter(link, trainer.speed, strategy)
    trainer.add_callback(reporter)
    trainer.train(resume_from_checkpoint=_checkpoint_to_resume(Path(trainer.args.output_dir), link))
    if reporter.stopped:
        raise Preempted(f"stopped after step {trainer.state.global_step}; the state is saved")
    return trainer.state


def _speed(rows: Any, params: TrainParams, context: TrainingContext, strategy: Strategy) -> Speed:
    """The clock, with the model operations of a token."""
    stage: Literal["sft", "dpo"] = "sft" if isinstance(params, SftParams) else "dpo"
    shape = strategy.shape
    flops = (
        shape.training_flops_per_token(context.run.method, _mean_length(rows), stage)
        if shape
        else 0.0
    )
    return Speed(flops, strategy.peak_flops if shape else None)


def _mean_length(rows: Any) -> float:
    """Mean tokens of a row; of DPO's, with one of the two answers."""
    some = rows.select(range(min(len(rows), 1000)))
    if "input_ids" in some.column_names:
        return sum(len(row["input_ids"]) for row in some) / len(some)
    return sum(
        len(row["prompt_ids"]) + (len(row["chosen_ids"]) + len(row["rejected_ids"])) / 2
        for row in some
    ) / len(some)


def published_checkpoint(
    state: TrainerState, params: TrainParams, context: TrainingContext
) -> Path:
    """The checkpoint to publish: the best, or the last. There is one of the last step: transformers saves when it ends."""
    step = (params.keeps_best and _best_step(state.best_model_checkpoint)) or state.global_step
    return context.work / "trainer" / f"checkpoint-{step}"


def metrics_of(state: TrainerState, published: Path) -> Metrics:
    """What the marker says of a training: the curve's ends, and which checkpoint was published."""
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


def _repoint_best(output: Path, step: int) -> None:
    """Point the state's best checkpoint into this attempt's folder: the state was written in another one."""
    path = output / f"checkpoint-{step}" / "trainer_state.json"
    state = json.loads(path.read_text())
    best = _best_step(state.get("best_model_checkpoint"))
    if best is None:
        return
    if not (output / f"checkpoint-{best}").is_dir():
        raise InputError(
            f"the best checkpoint (step {best}) is damaged or gone",
            "delete the unfinished artifact to train anew",
        )
    state["best_model_checkpoint"] = str(output / f"checkpoint-{best}")
    path.write_text(json.dumps(state, indent=2))


def _best_step(checkpoint: str | None) -> int | None:
    """Step of the best checkpoint that was saved. (`best_global_step` may be an evaluation between two saves.)"""
    return int(Path(checkpoint).name.rpartition("-")[2]) if checkpoint else None


class Reporter(TrainerCallback):
    """Ties the trainer to the parent: numbers and checkpoints go there, a request to stop is agreed on and followed."""

    def __init__(self, link: Link, speed: Speed, strategy: Strategy) -> None:
        self._link, self._speed, self._strategy = link, speed, strategy
        self._speaks = link.world.local_rank == 0
        self._numbers: dict[str, float] = {}
        self._saving_since = 0.0
        self.stopped = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._speaks:
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
        if self._speaks:
            self._link.step(state.global_step, self._speed.step_seconds, self._numbers)
        if any_rank(self._link.stop_requested):
            self.stopped = control.should_save = control.should_training_stop = True
        self._saving_since = time.perf_counter()

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        control.should_save = (
            control.should_save or control.should_training_stop
        )  # early stopping between two saves
        self._saving_since = time.perf_counter()

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        if self._link.world.is_main:
            # A copy of the SFT adapter, which DPO loads anew; ZeRO-3 writes other weights there, under names that no one can load.
            shutil.rmtree(folder / "ref", ignore_errors=True)
            write_layout(folder, self._strategy.zero, self._link.world.world_size)
        barrier()  # every process has written its part
        if self._speaks:
            self._link.saved(
                state.global_step,
                time.perf_counter() - self._saving_since,
                _best_step(state.best_model_checkpoint),
            )
