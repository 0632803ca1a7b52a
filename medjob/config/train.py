"""`run.lora`, `run.sft` and `run.dpo`, in the names of transformers, TRL and PEFT."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from medjob.config.base import Count, Fraction, Strict

Method = Literal["qlora", "lora", "full"]
Zero = Literal["none", "zero1", "zero2", "zero3"]
PositiveFloat = Annotated[float, Field(gt=0)]


class LoraParams(Strict):
    """PEFT's LoraConfig, as far as it is used."""

    r: Count = 16
    """Rank. 16 is QLoRA's customary value for 1-8 B models."""
    lora_alpha: PositiveFloat = 32
    """Scale: the update is multiplied by lora_alpha / r."""
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout before the adapter; 0 saves a copy of each activation."""
    target_modules: list[str] | None = None
    """Names of linear modules to adapt; each must exist in the model. Default: every linear layer of each block."""


class TrainParams(Strict):
    """What SFT and DPO have in common."""

    learning_rate: PositiveFloat
    """Peak learning rate."""
    global_batch_size: Count
    """Rows (pairs for DPO) per optimizer step over all devices; gradient accumulation is derived from it."""
    num_train_epochs: PositiveFloat = 1.0
    """Passes over the training rows; `max_steps` wins over it."""
    max_steps: Count | None = None
    """Optimizer steps. Default: as many as `num_train_epochs` takes."""
    max_length: Count
    """Longest row in tokens, prompt and answer together."""
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "cosine"
    """Learning rate schedule after the warm-up."""
    warmup_steps: Annotated[float, Field(ge=0)] = 0.05
    """Below 1: share of all steps; from 1 on: number of steps."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW's decoupled weight decay."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients are clipped to this norm."""
    optim: Literal[
        "adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit", "adafactor"
    ] = "adamw_torch_fused"
    """Optimizer. LoRA's optimizer state is tiny, so the 8-bit ones gain memory only with `full`."""
    eval_steps: Count | None = None
    """Optimizer steps between validations. Default: a tenth of all steps."""
    save_steps: Count | None = None
    """Optimizer steps between checkpoints. Default: `eval_steps`."""
    early_stopping_patience: Count | None = None
    """Stop after this many validations without a better loss. Default: never."""
    early_stopping_threshold: Annotated[float, Field(ge=0)] = 0.0
    """Smallest fall of the loss that counts as better."""
    load_best_model_at_end: bool | None = None
    """Publish the checkpoint with the lowest validation loss instead of the last. Default: true with early stopping."""

    @property
    def keeps_best(self) -> bool:
        """Whether the best checkpoint is published."""
        return (
            self.early_stopping_patience is not None
            if self.load_best_model_at_end is None
            else self.load_best_model_at_end
        )

    @model_validator(mode="after")
    def _best_needs_matching_steps(self) -> TrainParams:
        if (
            self.keeps_best
            and self.save_steps
            and (self.eval_steps is None or self.save_steps % self.eval_steps)
        ):
            raise ValueError(
                f"save_steps ({self.save_steps}) must be a multiple of eval_steps ({self.eval_steps}) to find the best checkpoint"
            )
        return self


class SftParams(TrainParams):
    """`run.sft`: supervised fine-tuning on the prepared answers (TRL's SFTTrainer)."""

    learning_rate: PositiveFloat = 2e-4
    """Peak learning rate. LoRA takes about 10 times that of full fine-tuning (TRL's PEFT guide)."""
    global_batch_size: Count = 16
    """Rows per optimizer step over all devices; gradient accumulation is derived from it."""
    max_length: Count = 2048
    """Longest row in tokens, prompt and answer together."""
    packing: bool = True
    """Several rows in one sequence, attention kept apart. Off in runs that count steps over single rows. Ignored on a CPU, where padding is faster."""
    overlong: Literal["drop", "truncate"] = "drop"
    """Rows over `max_length`: left out and counted, or cut at the end (they lose their final answer)."""


class DpoParams(TrainParams):
    """`run.dpo`: direct preference optimization from the SFT model (TRL's DPOTrainer)."""

    learning_rate: PositiveFloat = 5e-6
    """Peak learning rate (TRL's value for LoRA; 5e-7 to 1e-6 for `full`)."""
    global_batch_size: Count = 16
    """Pairs per optimizer step over all devices; gradient accumulation is derived from it."""
    max_length: Count = 2048
    """Longest row in tokens; pairs with a longer side are left out and counted."""
    beta: PositiveFloat = 0.1
    """Strength of the pull towards the SFT model (Rafailov et al. 2023; 0.1 is TRL's default)."""
    loss_type: Literal["sigmoid", "sigmoid_norm", "ipo", "hinge", "robust"] = "sigmoid"
    """TRL's name of the loss."""
    validation_fraction: Fraction = 0.1
    """Share of the pairs kept for validation, by a hash of the question."""
    min_pairs: Count = 8
    """Fewer pairs than this stop the stage with exit code 65: the judge kept too few."""
