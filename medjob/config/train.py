"""`run.lora`, `run.sft` and `run.dpo`, with the field names of transformers, TRL and PEFT."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator

from medjob.config.base import ADDED_LATER, MOST, Count, CountOrZero, Strict

Method = Literal["qlora", "lora", "full"]
Zero = Literal["none", "zero1", "zero2", "zero3"]
PreferenceLoss = Literal[
    "sigmoid",
    "sigmoid_norm",
    "ipo",
    "hinge",
    "robust",
    "exo_pair",
    "nca_pair",
    "bco_pair",
    "sppo_hard",
    "apo_zero",
    "apo_down",
    "discopop",
]
PositiveFloat = Annotated[float, Field(gt=0, le=1e6)]
AssistantTurns = Literal["all", "last"]
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
    is_known = isinstance(value, str) and value in _REFUSED_INITS
    reason = f": it {_REFUSED_INITS[value]}" if is_known else ""
    raise ValueError(f"must be {usable} (got {value!r}{reason})")


Init = Annotated[
    Literal[True] | str,
    BeforeValidator(_known_init),
    WithJsonSchema({"anyOf": [{"const": True}, {"type": "string", "pattern": _INITS}]}),
]


UNSUPPORTED_BY_VLLM = ("use_dora", "modules_to_save", "trainable_token_indices")


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
    def unsupported_by_vllm(self) -> str | None:
        """Name of a setting whose adapters vLLM refuses, or loads without the trained tokens; None
        if there is none (vllm/lora/peft_helper.py)."""
        return next((name for name in UNSUPPORTED_BY_VLLM if getattr(self, name)), None)

    @property
    def saved_names(self) -> frozenset[str]:
        """Names in `modules_to_save`, without the paths that a saved adapter has."""
        return frozenset(name.rpartition(".")[2] for name in self.modules_to_save or ())

    def rank_of(self, module: str) -> int:
        """Rank of the adapter on the modules of this name."""
        return self.rank_pattern.get(module, self.r)

    @model_validator(mode="after")
    def _lists_are_not_empty(self) -> LoraParams:
        for name in (
            *("target_modules", "layers_to_transform"),
            *("modules_to_save", "trainable_token_indices"),
        ):
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
    `truncate`: cut off the end. A dialogue then ends with the last answer that fits; if none fits,
    the first one loses its end."""
    assistant_turns: Annotated[AssistantTurns, ADDED_LATER] = "all"
    """Which answers of a dialogue are trained: `all`, or only the `last` one. The others are
    context. Use `last` if the data has a row for each answer, with the earlier exchanges before it:
    `all` would train the earlier answers several times."""


class DpoParams(TrainParams):
    """`run.dpo`: direct preference optimization with TRL's DPOTrainer, of the SFT model or, if the
    run has no stage `sft`, of the base model."""

    pairs: Annotated[Literal["judge", "data", "both"], ADDED_LATER] = "judge"
    """Where the preference pairs come from. `judge`: the candidates, as the judge scored them.
    `data`: the rows of `run.prepare.preference_sources`, which have a chosen and a rejected answer.
    `both`: all of them."""

    learning_rate: LearningRate = 5e-6
    """Peak learning rate. 5e-6 is TRL's value for LoRA; use 5e-7 to 1e-6 if `method` is `full`."""
    global_batch_size: Count = 16
    """Pairs per optimizer step across all devices. Gradient accumulation is derived from it."""
    max_length: Count = 2048
    """Maximum length of a row in tokens. Pairs with a longer answer are left out and counted."""
    beta: PositiveFloat = 0.1
    """How strongly DPO is held close to the SFT model (Rafailov et al. 2023). 0.1 is TRL's
    default."""
    loss_type: PreferenceLoss = "sigmoid"
    """Loss function, by its name in TRL. TRL's `aot` is left out: it sorts the pairs of a micro
    batch, so the result would depend on the GPUs."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5), ADDED_LATER] = 0.0
    """Share of pairs that are assumed to be labelled the wrong way round, for `loss_type: robust`
    (Chowdhury et al. 2024) and `exo_pair` (Ji et al. 2024, who use 1e-3). No other loss uses it."""
    rpo_alpha: Annotated[PositiveFloat | None, ADDED_LATER] = None
    """Weight of an additional loss: the negative log-likelihood of the chosen answers, per token
    (Iterative RPO, Pang et al. 2024, with 1). It keeps their probability from falling. Default: no
    such loss."""
    validation_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the pairs used for validation, selected by a hash of the question."""
    min_pairs: Count = 8
    """Minimum number of pairs. If there are fewer, the stage stops with exit code 65."""

    @model_validator(mode="after")
    def _label_smoothing_has_an_effect(self) -> DpoParams:
        if self.label_smoothing and self.loss_type not in ("robust", "exo_pair"):
            raise ValueError(
                f"label_smoothing has no effect with loss_type {self.loss_type}; use robust or "
                "exo_pair, or leave it out"
            )
        if self.loss_type == "exo_pair" and not self.label_smoothing:
            raise ValueError("loss_type exo_pair needs label_smoothing above 0, such as 1e-3")
        return self

    @property
    def uses_judge(self) -> bool:
        """Whether the judge makes pairs."""
        return self.pairs != "data"

    @property
    def uses_data(self) -> bool:
        """Whether rows of the data are pairs."""
        return self.pairs != "judge"
