"""Sizes of a language model, from its `config.json`: parameters, and operations per token."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from medjob.config.base import MOST
from medjob.config.train import LoraParams, Method
from medjob.errors import ConfigError

Stage = Literal["sft", "dpo"]
StoredQuantization = Literal["bitsandbytes", "gptq"]

# Phi-3 and Phi-4-mini fuse layers: the usual name of a layer to the name of the fused one.
_FUSED = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")
# The tensor that each linear layer reads. Layers with the same value share it.
_INPUTS = {
    "q_proj": "attention's norm",
    "k_proj": "attention's norm",
    "v_proj": "attention's norm",
    "qkv_proj": "attention's norm",
    "o_proj": "attention",
    "gate_proj": "MLP's norm",
    "up_proj": "MLP's norm",
    "gate_up_proj": "MLP's norm",
    "down_proj": "gate x up",
}
# Bytes of scales per 4-bit weight. Double quantisation stores one byte per 64 weights and a float32
# per 256 of those bytes, 0.127 bits in total (QLoRA, Dettmers et al. 2023, section 3). GPTQ stores
# a float16 scale and a 4-bit zero per group, which usually has 128 weights.
_SCALE_BYTES = {"bitsandbytes": 1 / 64 + 4 / (64 * 256), "gptq": 2.5 / 128}
# Normalisations of width `hidden` in a block, by their number.
_BLOCK_NORMS = {
    2: ("input_layernorm", "post_attention_layernorm"),
    4: (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
}
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_intermediate_size")


@dataclass(frozen=True, slots=True)
class _Family:
    """Facts about a model family that are not in its `config.json`, or that are left out there
    because they are the defaults of transformers' configuration class (5.23)."""

    kv_heads: int | None = None
    head_dim: int | None = None
    tied: bool = False
    biased: tuple[str, ...] = ()
    """Linear layers that always have a bias."""
    optional_biases: Mapping[str, tuple[str, ...]] | None = None
    """A key of `config.json` to the linear layers that have a bias if it is true."""
    fused: bool = False
    block_norms: int = 2
    qk_norm: bool = False
    """Whether the queries and keys of each head are normalised."""


_ATTENTION_BIAS = {"attention_bias": _ATTENTION}
_GEMMA3 = _Family(4, 256, tied=True, optional_biases=_ATTENTION_BIAS, block_norms=4, qk_norm=True)
_FAMILIES = {
    # Includes SmolLM and SmolLM2.
    "llama": _Family(optional_biases=_ATTENTION_BIAS | {"mlp_bias": _MLP}),
    "mistral": _Family(8),
    "qwen2": _Family(32, biased=("q_proj", "k_proj", "v_proj")),  # includes Qwen2.5
    "qwen3": _Family(32, 128, optional_biases=_ATTENTION_BIAS, qk_norm=True),
    "phi3": _Family(fused=True),  # includes Phi-4-mini
    "gemma": _Family(16, 256, tied=True, optional_biases=_ATTENTION_BIAS),
    "gemma2": _Family(4, 256, tied=True, optional_biases=_ATTENTION_BIAS, block_norms=4),
    "gemma3_text": _GEMMA3,
    "smollm3": _Family(4, tied=True, optional_biases=_ATTENTION_BIAS | {"mlp_bias": _MLP}),
}


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A dense decoder of a known family. Sizes are numbers of elements."""

    family: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool
    """Whether the head shares the weight of the embedding."""
    fused: bool
    """Whether q, k and v are one linear layer, and gate and up another."""
    block_norms: int
    """Number of normalisations of width `hidden` in a block."""
    qk_norm: bool
    biased: frozenset[str]
    """Linear layers of a block that have a bias."""
    quantization: StoredQuantization | None
    """Format of the blocks' linear layers, if they are stored in 4 bits."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelShape:
        """Read the shape from the contents of a `config.json`.

        Raises:
            ConfigError: an unknown family, a mixture of experts, a stored quantisation other than
                4-bit, or a missing key.
        """
        family = _family(config)
        heads = _size(config, "num_attention_heads")
        hidden = _size(config, "hidden_size")
        optional = family.optional_biases or {}
        return cls(
            family=str(config["model_type"]),
            hidden=hidden,
            layers=_size(config, "num_hidden_layers"),
            heads=heads,
            kv_heads=_size(config, "num_key_value_heads", family.kv_heads or heads),
            head_dim=_size(config, "head_dim", family.head_dim or hidden // heads),
            intermediate=_size(config, "intermediate_size"),
            vocab=_size(config, "vocab_size"),
            tied=bool(config.get("tie_word_embeddings", family.tied)),
            fused=family.fused,
            block_norms=family.block_norms,
            qk_norm=family.qk_norm,
            biased=frozenset(family.biased).union(
                *(names for key, names in optional.items() if config.get(key))
            ),
            quantization=_stored_quantization(config.get("quantization_config")),
        )

    @property
    def query_size(self) -> int:
        """Width of all queries together, and of the output of attention."""
        return self.heads * self.head_dim

    @property
    def key_size(self) -> int:
        """Width of all keys together, and of all values."""
        return self.kv_heads * self.head_dim

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Linear layers of one block: name to (inputs, outputs)."""
        attention = {"q_proj": self.query_size, "k_proj": self.key_size, "v_proj": self.key_size}
        mlp = {"gate_proj": self.intermediate, "up_proj": self.intermediate}
        if self.fused:
            attention = {"qkv_proj": sum(attention.values())}
            mlp = {"gate_up_proj": sum(mlp.values())}
        return (
            {name: (self.hidden, size) for name, size in attention.items()}
            | {"o_proj": (self.query_size, self.hidden)}
            | {name: (self.hidden, size) for name, size in mlp.items()}
            | {"down_proj": (self.intermediate, self.hidden)}
        )

    def read_widths(self, names: Collection[str]) -> dict[str, int]:
        """Width of each tensor that these layers of a block read. Layers can share a tensor."""
        return {_INPUTS[name]: self.linears[name][0] for name in names}

    @property
    def linear_parameters(self) -> int:
        """Weights of the linear layers of all blocks, without biases. QLoRA quantises these."""
        return self.layers * sum(a * b for a, b in self.linears.values())

    @property
    def bias_parameters(self) -> int:
        """Biases of the linear layers of all blocks."""
        return self.layers * sum(self.linears[name][1] for name in self.biased)

    @property
    def norm_parameters(self) -> int:
        """Weights of all normalisations."""
        return (
            self.layers * (self.block_norms * self.hidden + 2 * self.head_dim * self.qk_norm)
            + self.hidden
        )

    @property
    def embedding_parameters(self) -> int:
        """Weights of the token embedding."""
        return self.vocab * self.hidden

    @property
    def head_parameters(self) -> int:
        """Weights of the head, or 0 if it shares the embedding's."""
        return 0 if self.tied else self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        """All weights and biases."""
        return (
            self.linear_parameters
            + self.bias_parameters
            + self.norm_parameters
            + self.embedding_parameters
            + self.head_parameters
        )

    def stored_bytes(self, unit: int, nf4: bool = False) -> tuple[float, float]:
        """Bytes of all weights, and of the scales of those in 4 bits.

        Args:
            unit: Bytes per weight that is not in 4 bits.
            nf4: Whether the model is quantised when it is loaded.
        """
        scheme = self.quantization or ("bitsandbytes" if nf4 else None)
        if scheme is None:
            return self.parameters * unit, 0
        other = self.parameters - self.linear_parameters
        weights = self.linear_parameters / 2 + other * unit
        return weights, self.linear_parameters * _SCALE_BYTES[scheme]

    @property
    def savable(self) -> dict[str, int]:
        """Modules that `run.lora.modules_to_save` can name: name to the number of their weights in
        the whole model."""
        in_blocks = dict.fromkeys(_BLOCK_NORMS[self.block_norms], self.hidden)
        if self.qk_norm:
            in_blocks |= {"q_norm": self.head_dim, "k_norm": self.head_dim}
        return (
            {"embed_tokens": self.embedding_parameters, "norm": self.hidden}
            | ({} if self.tied else {"lm_head": self.head_parameters})
            | {name: self.layers * size for name, size in in_blocks.items()}
        )

    def adapted(self, target_modules: Collection[str] | None) -> tuple[str, ...]:
        """Linear layers of a block that `run.lora.target_modules` names. None means all.

        Raises:
            ConfigError: a block has no layer of that name.
        """
        present = self.linears
        if target_modules is None:
            return tuple(present)
        wanted = resolve_target_modules(target_modules, present).values()
        return tuple(name for name in present if name in wanted)

    def lora_parameters(self, lora: LoraParams) -> int:
        """Weights of a LoRA adapter: r x (inputs + outputs) per adapted layer (Hu et al. 2021,
        section 4.1). DoRA adds one per output."""
        per_block = 0
        adapted = self.adapted(lora.target_modules)
        check_patterns(lora, adapted)
        for name in adapted:
            inputs, outputs = self.linears[name]
            per_block += lora.rank_of(name) * (inputs + outputs) + outputs * lora.use_dora
        return self.adapted_layers(lora) * per_block

    def adapted_layers(self, lora: LoraParams) -> int:
        """Number of blocks with an adapter.

        Raises:
            ConfigError: the model has no block of that index.
        """
        if lora.layers_to_transform is None:
            return self.layers
        check_layers(lora.layers_to_transform, self.layers)
        return len(set(lora.layers_to_transform))

    def saved_parameters(self, lora: LoraParams) -> int:
        """Weights that are trained as they are, beside the adapter: those of `modules_to_save`, and
        the rows of trained tokens.

        Raises:
            ConfigError: the model has no module of that name.
        """
        check_saved_modules(lora.saved_names, self.savable, self.tied)
        rows = len(lora.trainable_token_indices or ()) * (1 if self.tied else 2)
        return sum(self.savable[name] for name in lora.saved_names) + rows * self.hidden

    def trained_parameters(self, method: Method, lora: LoraParams) -> int:
        """Number of weights that a method trains."""
        if method == "full":
            return self.parameters
        return self.lora_parameters(lora) + self.saved_parameters(lora)

    def forward_flops_per_token(self, length: float) -> float:
        """Operations of a forward pass for one token of a row of `length` tokens.

        Each weight of the blocks and the head takes a multiplication and an addition. The embedding
        is a look-up and takes none. Attention takes 4 x layers x heads x head_dim x length. Every
        token counts as attending to the whole row, as in PaLM (Chowdhery et al. 2022, appendix B),
        although a causal kernel does half of that. Sliding windows are not subtracted.
        """
        return (
            2 * (self.linear_parameters + self.vocab * self.hidden)
            + 4 * self.layers * self.query_size * length
        )

    def training_flops_per_token(
        self, method: Method, mean_length: float, stage: Stage = "sft"
    ) -> float:
        """Model operations of a training step for one token. Recomputation is not counted, as in
        MFU.

        The backward pass costs as much as the forward pass for the gradients of activations, and as
        much again for those of weights: 6N in total (PaLM, appendix B). LoRA computes no weight
        gradients of the base, so 4N. Attention has no weights and always costs 3 passes. The
        adapter itself is left out: it is 0.5% of an 8B model at rank 16. DPO adds a forward pass of
        the reference. Its pairs count with the tokens of both sides.
        """
        attention = 4 * self.layers * self.query_size * mean_length
        linear = self.forward_flops_per_token(0)
        reference = linear + attention if stage == "dpo" else 0.0
        return (3 if method == "full" else 2) * linear + 3 * attention + reference

    def recompute_flops_per_token(self, checkpoint_every: int, mean_length: float) -> float:
        """Operations per token that activation checkpointing adds: a second forward pass of the
        checkpointed blocks."""
        blocks = self.forward_flops_per_token(mean_length) - 2 * self.vocab * self.hidden
        return blocks * self.checkpointed_layers(checkpoint_every) / self.layers

    def checkpointed_layers(self, every: int) -> int:
        """Number of blocks whose index is a multiple of `every` (transformers' `every_n_layers`).
        An `every` of 0 means none."""
        return math.ceil(self.layers / every) if every else 0


def check_layers(wanted: Iterable[int], layers: int) -> None:
    """Check the indices in `run.lora.layers_to_transform`.

    Raises:
        ConfigError: the model has fewer blocks. PEFT ignores such an index.
    """
    missing = sorted({index for index in wanted if index >= layers})
    if missing:
        raise ConfigError(
            f"run.lora.layers_to_transform: the model has no layer {', '.join(map(str, missing))}",
            f"it has the layers 0 to {layers - 1}",
        )


def check_patterns(lora: LoraParams, adapted: Collection[str]) -> None:
    """Check the names in `run.lora.rank_pattern` and `alpha_pattern`.

    Raises:
        ConfigError: no adapted module has that name. PEFT ignores it.
    """
    for key in ("rank_pattern", "alpha_pattern"):
        missing = sorted(set(getattr(lora, key)) - set(adapted))
        if missing:
            raise ConfigError(
                f"run.lora.{key}: the adapter does not cover {', '.join(missing)}",
                f"it covers {', '.join(adapted)}",
            )


def check_saved_modules(wanted: Collection[str], present: Collection[str], tied: bool) -> None:
    """Check the names in `run.lora.modules_to_save`.

    Args:
        present: Names of the modules that can be trained as a whole.
        tied: Whether the head shares the weight of the embedding.

    Raises:
        ConfigError: a name is not among them. PEFT ignores it.
    """
    missing = sorted(set(wanted) - set(present))
    if not missing:
        return
    if tied and "lm_head" in missing:
        raise ConfigError(
            "run.lora.modules_to_save: lm_head shares the weight of the embedding",
            "name embed_tokens instead, which trains both",
        )
    raise ConfigError(
        f"run.lora.modules_to_save: the model has no {', '.join(missing)} to train as a whole",
        f"it has {', '.join(sorted(present))}",
    )


def resolve_target_modules(wanted: Iterable[str], present: Collection[str]) -> dict[str, str]:
    """Map each name in `run.lora.target_modules` to a layer in `present`: to itself, or to the
    fused layer that replaces it.

    Raises:
        ConfigError: a name has no such layer. PEFT ignores it as long as another name matches.
    """
    resolved = {name: name if name in present else _FUSED.get(name, name) for name in wanted}
    missing = [name for name, layer in resolved.items() if layer not in present]
    if missing:
        raise ConfigError(
            f"run.lora.target_modules: the model has no {', '.join(missing)}",
            f"it has {', '.join(present)}",
        )
    return resolved


def _family(config: Mapping[str, Any]) -> _Family:
    name = str(config.get("model_type", ""))
    if name in _FAMILIES and not any(config.get(key) for key in _EXPERTS):
        return _FAMILIES[name]
    if "moe" in name or "mixtral" in name or any(config.get(key) for key in _EXPERTS):
        reason = "is a mixture of experts, which cannot be estimated"
    elif "text_config" in config:
        reason = "takes more than text, which cannot be estimated"
    else:
        reason = "is not a known family"
    raise ConfigError(
        f"run.base_model: model_type {name!r} {reason}", f"known: {', '.join(_FAMILIES)}"
    )


def _size(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key) or default
    if not isinstance(value, int) or not 1 <= value <= MOST:
        raise ConfigError(f"run.base_model: config.json has no usable {key} (got {value!r})")
    return value


def _stored_quantization(stored: Any) -> StoredQuantization | None:
    """Read the method from the `quantization_config` that transformers writes for a model that is
    stored quantised."""
    if not stored:
        return None
    method = stored.get("quant_method")
    if method == "bitsandbytes" and stored.get("load_in_4bit"):
        return "bitsandbytes"
    if method == "gptq" and stored.get("bits") == 4:
        return "gptq"
    raise ConfigError(
        f"run.base_model: unknown stored quantisation {method!r}",
        "use a base in 4-bit bitsandbytes or GPTQ format, or in bf16",
    )
