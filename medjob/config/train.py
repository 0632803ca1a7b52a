"""`run.lora`, `run.sft` and `run.dpo`, with the field names of transformers, TRL and PEFT."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from medjob.config.base import ADDED_LATER, MOST, Count, Fraction, Strict

Method = Literal["qlora", "lora", "full"]
Zero = Literal["none", "zero1", "zero2", "zero3"]
PositiveFloat = Annotated[float, Field(gt=0, le=1e6)]
AssistantTurns = Literal["all", "last"]
LearningRate = Annotated[float, Field(gt=0, le=1)]


class LoraParams(Strict):
    """LoRA adapter: the fields of PEFT's LoraConfig that medjob supports."""

    r: Annotated[int, Field(ge=1, le=8192)] = 16
    """Rank of the adapter. 16 is the usual value of QLoRA for models of 1 to 8 B parameters."""
    lora_alpha: PositiveFloat = 32
    """Scaling of the adapter: its output is multiplied by `lora_alpha` / `r`."""
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout probability before the adapter. 0 avoids storing a copy of each activation."""
    target_modules: list[str] | None = None
    """Names of the linear modules to adapt. Each must exist in the model. Default: every linear
    layer of each transformer block."""


class TrainParams(Strict):
    """Fields that SFT and DPO share."""

    learning_rate: LearningRate
    """Peak learning rate."""
    global_batch_size: Count
    """Rows per optimizer step across all devices. Gradient accumulation is derived from it."""
    num_train_epochs: PositiveFloat = 1.0
    """Passes over the training rows. `max_steps` takes precedence."""
    max_steps: Count | None = None
    """Number of optimizer steps. Default: derived from `num_train_epochs`."""
    max_length: Count
    """Maximum length of a row in tokens, including prompt and answer."""
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "cosine"
    """Learning rate schedule after warmup."""
    warmup_steps: Annotated[float, Field(ge=0, le=MOST)] = 0.05
    """Warmup: a number of steps if 1 or more, a share of all steps if below 1."""
    weight_decay: Annotated[float, Field(ge=0, le=10)] = 0.0
    """Decoupled weight decay of AdamW."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradient norm for clipping."""
    optim: Literal[
        "adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit", "adafactor"
    ] = "adamw_torch_fused"
    """Optimizer. The 8-bit ones save memory only if `method` is `full`, as LoRA's optimizer state
    is tiny."""
    eval_steps: Count | None = None
    """Optimizer steps between validations. Default: a tenth of all steps."""
    save_steps: Count | None = None
    """Optimizer steps between checkpoints. Must be a multiple of `eval_steps` if the best
    checkpoint is kept. Default: `eval_steps`."""
    early_stopping_patience: Count | None = None
    """Stop after this many validations without a lower loss. Default: no early stopping."""
    early_stopping_threshold: Annotated[float, Field(ge=0, le=1e6)] = 0.0
    """Minimum decrease of the validation loss that counts as an improvement."""
    load_best_model_at_end: bool | None = None
    """Publish the checkpoint with the lowest validation loss instead of the last one. Default: true
    if `early_stopping_patience` is set, otherwise false."""

    @property
    def keeps_best(self) -> bool:
        """Whether the best checkpoint is published."""
        return (
            self.early_stopping_patience is not None
            if self.load_best_model_at_end is None
            else self.load_best_model_at_end
        )

    @property
    def needs_validation(self) -> str | None:
        """The name of a setting that compares validation losses, if one is set."""
        if self.early_stopping_patience is not None:
            return "early_stopping_patience"
        return "load_best_model_at_end" if self.keeps_best else None

    @model_validator(mode="after")
    def _early_stopping_is_complete(self) -> TrainParams:
        if self.early_stopping_threshold and self.early_stopping_patience is None:
            raise ValueError(
                "early_stopping_threshold has no effect without early_stopping_patience"
            )
        if (
            self.needs_validation
            and self.max_steps
            and self.eval_steps
            and self.eval_steps > self.max_steps
        ):
            raise ValueError(
                f"{self.needs_validation} needs a validation, but the first one is at step "
                f"{self.eval_steps} (eval_steps) of {self.max_steps} (max_steps)"
            )
        return self

    @model_validator(mode="after")
    def _best_needs_matching_steps(self) -> TrainParams:
        if (
            self.keeps_best
            and self.save_steps
            and (self.eval_steps is None or self.save_steps % self.eval_steps)
        ):
            raise ValueError(
                f"save_steps ({self.save_steps}) must be a multiple of "
                f"eval_steps ({self.eval_steps}) "
                "to keep the best checkpoint"
            )
        return self


class SftParams(TrainParams):
    """`run.sft`: supervised fine-tuning on the prepared rows, with TRL's SFTTrainer."""

    learning_rate: LearningRate = 2e-4
    """Peak learning rate. LoRA needs about 10 times the rate of full fine-tuning (TRL's PEFT
    guide)."""
    global_batch_size: Count = 16
    """Rows per optimizer step across all devices. Gradient accumulation is derived from it."""
    max_length: Count = 2048
    """Maximum length of a row in tokens, including prompt and answer. See `overlong` for longer
    rows."""
    packing: bool = True
    """Pack several rows into one sequence, without attention between them. Turn it off to reproduce
    runs that count steps over single rows. Ignored on a CPU, where padding is faster."""
    overlong: Literal["drop", "truncate"] = "drop"
    """What to do with rows longer than `max_length`. `drop`: leave them out and count them.
    `truncate`: cut off the end. A dialogue then ends with the last answer that fits; if none fits,
    the first one loses its end."""
    assistant_turns: Annotated[AssistantTurns, ADDED_LATER] = "all"
    """Which answers of a dialogue are trained: `all`, or only the `last` one. The others are
    context. Use `last` if the data has a row for each answer, with the earlier exchanges before it:
    `all` would train the earlier answers several times."""


class DpoParams(TrainParams):
    """`run.dpo`: direct preference optimization of the SFT model, with TRL's DPOTrainer."""

    learning_rate: LearningRate = 5e-6
    """Peak learning rate. 5e-6 is TRL's value for LoRA; use 5e-7 to 1e-6 if `method` is `full`."""
    global_batch_size: Count = 16
    """Pairs per optimizer step across all devices. Gradient accumulation is derived from it."""
    max_length: Count = 2048
    """Maximum length of a row in tokens. Pairs with a longer answer are left out and counted."""
    beta: PositiveFloat = 0.1
    """How strongly DPO is held close to the SFT model (Rafailov et al. 2023). 0.1 is TRL's
    default."""
    loss_type: Literal["sigmoid", "sigmoid_norm", "ipo", "hinge", "robust"] = "sigmoid"
    """Loss function, by its name in TRL."""
    validation_fraction: Fraction = 0.1
    """Share of the pairs used for validation, selected by a hash of the question."""
    min_pairs: Count = 8
    """Minimum number of pairs. If the judge kept fewer, the stage stops with exit code 65."""
