"""`run.lora`, `run.sft` and `run.dpo`, with the field names of transformers, TRL and PEFT."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator

from medjob.config.base import ADDED_LATER, MOST, Count, CountOrZero, Fraction, Strict

Method = Literal["qlora", "lora", "full"]
Zero = Literal["none", "zero1", "zero2", "zero3"]
PositiveFloat = Annotated[float, Field(gt=0, le=1e6)]
LearningRate = Annotated[float, Field(gt=0, le=1)]


Rank = Annotated[int, Field(ge=1, le=8192)]
_INITS = r"^(gaussian|olora|pissa(_niter_[1-9]\d?)?)$"
# Initial weights of PEFT that medjob does not offer, and why.
_NO_ROWS = "needs the gradients or activations of training rows before the training"
_REFUSED_INITS = {
    "corda": _NO_ROWS,
    "eva": _NO_ROWS,
    "lora_ga": _NO_ROWS,
    "loftq": "needs the weights of the base before and after its quantization",
    "mica": "freezes half of the adapter",
    "orthogonal": "does not work on 4-bit weights (PEFT 0.21)",
}


def _known_init(value: Any) -> Any:
    """Refuse initial weights that do not exist, or that medjob cannot reproduce."""
    if value is True or (isinstance(value, str) and re.fullmatch(_INITS, value)):
        return value
    usable = "true, gaussian, olora, pissa or pissa_niter_4"
    reason = f": it {_REFUSED_INITS[value]}" if value in _REFUSED_INITS else ""
    raise ValueError(f"must be {usable} (got {value!r}{reason})")


Init = Annotated[
    Literal[True] | str,
    BeforeValidator(_known_init),
    WithJsonSchema({"anyOf": [{"const": True}, {"type": "string", "pattern": _INITS}]}),
]


class LoraParams(Strict):
    """LoRA adapter: the fields of PEFT's LoraConfig that medjob supports."""

    r: Rank = 16
    """Rank of the adapter. 16 is the usual value of QLoRA for models of 1 to 8 B parameters."""
    lora_alpha: PositiveFloat = 32
    """Scaling of the adapter: its output is multiplied by `lora_alpha` / `r`."""
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout probability before the adapter. 0 avoids storing a copy of each activation."""
    target_modules: list[str] | None = None
    """Names of the linear modules to adapt. Each must exist in the model. Default: every linear
    layer of each transformer block."""
    layers_to_transform: Annotated[list[CountOrZero] | None, ADDED_LATER] = None
    """Indices of the transformer blocks to adapt, from 0. Default: all of them."""
    rank_pattern: Annotated[dict[str, Rank], ADDED_LATER] = Field(default_factory=dict)
    """Ranks that differ from `r`, by the name of the module, such as `{down_proj: 32}`."""
    alpha_pattern: Annotated[dict[str, PositiveFloat], ADDED_LATER] = Field(default_factory=dict)
    """Scalings that differ from `lora_alpha`, by the name of the module."""
    use_rslora: Annotated[bool, ADDED_LATER] = False
    """Scale by `lora_alpha` / sqrt(`r`) instead of `lora_alpha` / `r` (rsLoRA, Kalajdzievski 2023),
    so that high ranks learn as fast as low ones."""
    use_dora: Annotated[bool, ADDED_LATER] = False
    """Train the length of each output's weights apart from their direction (DoRA, Liu et al. 2024).
    Helps at low ranks, and needs more time and memory. vLLM serves it only after `export`."""
    init_lora_weights: Annotated[Init, ADDED_LATER] = True
    """Initial weights. `true`: Kaiming-uniform A, and B of zeros. `gaussian`: the same with a
    normal A. `pissa`, `pissa_niter_4` (a fast approximation, here of 4 iterations) and `olora`: the
    main directions of the base's own weights, which are subtracted from the base during SFT. These
    need `method: lora`, and are published as a plain adapter of twice the rank that fits the
    original base."""
    modules_to_save: Annotated[list[str] | None, ADDED_LATER] = None
    """Names of modules to train as a whole beside the adapter, such as `embed_tokens`, `lm_head` or
    `norm`. Their optimizer state makes `embed_tokens` and `lm_head` expensive. If the head shares
    the embedding's weight, `embed_tokens` trains both."""
    trainable_token_indices: Annotated[list[CountOrZero | str] | None, ADDED_LATER] = None
    """Tokens whose rows of the embedding and of the head are trained, as ids or as text, such as
    `<think>`. For special tokens that the base model has hardly seen."""

    @property
    def changes_base(self) -> bool:
        """Whether the initial weights are subtracted from the base's."""
        return str(self.init_lora_weights).startswith(("olora", "pissa"))

    @property
    def published(self) -> LoraParams:
        """The adapter that SFT publishes and DPO continues. One whose initial weights were
        subtracted from the base has twice the rank: the trained and the initial weights."""
        if not self.changes_base:
            return self.model_copy(update={"init_lora_weights": True})
        growth = math.sqrt(2) if self.use_rslora else 2
        return self.model_copy(
            update={
                "init_lora_weights": True,
                "r": 2 * self.r,
                "lora_alpha": growth * self.lora_alpha,
                "rank_pattern": {name: 2 * r for name, r in self.rank_pattern.items()},
                "alpha_pattern": {name: growth * a for name, a in self.alpha_pattern.items()},
            }
        )

    @property
    def saved_names(self) -> frozenset[str]:
        """Names in `modules_to_save`, without the paths that a saved adapter has."""
        return frozenset(name.rpartition(".")[2] for name in self.modules_to_save or ())

    def rank_of(self, module: str) -> int:
        """Rank of the adapter on the modules of this name."""
        return self.rank_pattern.get(module, self.r)

    @model_validator(mode="after")
    def _lists_are_not_empty(self) -> LoraParams:
        for name in ("layers_to_transform", "modules_to_save", "trainable_token_indices"):
            if getattr(self, name) == []:
                raise ValueError(f"{name} is an empty list; leave it out")
        return self


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
    `truncate`: cut off the end, which loses the final answer."""


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
