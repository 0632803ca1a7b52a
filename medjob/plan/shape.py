"""Sizes of a language model, read from its `config.json`: parameters by kind, and floating-point operations of a token."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from medjob.config.train import Method
from medjob.errors import ConfigError

Stage = Literal["sft", "dpo"]
StoredQuantization = Literal["bitsandbytes", "gptq"]

# What a fused layer is called, for names of the layers that it replaces (Phi-3 and Phi-4-mini).
FUSED = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")
# What a linear layer reads; layers of one value share the tensor.
_READS = dict.fromkeys(("q_proj", "k_proj", "v_proj", "qkv_proj"), "attention's norm") | {
    "o_proj": "attention"
}
_READS |= dict.fromkeys(("gate_proj", "up_proj", "gate_up_proj"), "MLP's norm") | {
    "down_proj": "gate x up"
}
# Bytes of constants for a 4-bit weight: double quantisation keeps one byte for 64 weights and a float32 for 256 of those, 0.127 bits in
# all (QLoRA, Dettmers et al. 2023, section 3); GPTQ keeps a float16 scale and a 4-bit zero for its customary 128.
_CONSTANTS = {"bitsandbytes": 1 / 64 + 4 / (64 * 256), "gptq": 2.5 / 128}
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_intermediate_size")


@dataclass(frozen=True, slots=True)
class _Family:
    """What a family's `config.json` does not say, or leaves out where it is the default of transformers' configuration class (5.23)."""

    kv_heads: int | None = None
    head_dim: int | None = None
    tied: bool = False
    biased: tuple[str, ...] = ()
    """Linear layers that always have a bias."""
    optional_biases: Mapping[str, tuple[str, ...]] | None = None
    """Key of `config.json` to the linear layers that have a bias where it is true."""
    fused: bool = False
    block_norms: int = 2
    qk_norm: bool = False
    """Whether queries and keys are normalised, head by head."""


_ATTENTION_BIAS = {"attention_bias": _ATTENTION}
_GEMMA3 = _Family(4, 256, tied=True, optional_biases=_ATTENTION_BIAS, block_norms=4, qk_norm=True)
_FAMILIES = {
    "llama": _Family(
        optional_biases=_ATTENTION_BIAS | {"mlp_bias": _MLP}
    ),  # SmolLM and SmolLM2 too
    "mistral": _Family(8),
    "qwen2": _Family(32, biased=("q_proj", "k_proj", "v_proj")),  # Qwen2.5 too
    "qwen3": _Family(32, 128, optional_biases=_ATTENTION_BIAS, qk_norm=True),
    "phi3": _Family(fused=True),  # Phi-4-mini too
    "gemma": _Family(16, 256, tied=True, optional_biases=_ATTENTION_BIAS),
    "gemma2": _Family(4, 256, tied=True, optional_biases=_ATTENTION_BIAS, block_norms=4),
    "gemma3_text": _GEMMA3,
    "smollm3": _Family(4, tied=True, optional_biases=_ATTENTION_BIAS | {"mlp_bias": _MLP}),
}


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A dense decoder of one of the known families. Sizes are numbers of elements."""

    family: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool
    """Whether the head is the embedding."""
    fused: bool
    """Whether q/k/v, and gate/up, are one linear layer."""
    block_norms: int
    """Normalisations of width `hidden` in a block."""
    qk_norm: bool
    biased: frozenset[str]
    """Linear layers of a block that have a bias."""
    quantization: StoredQuantization | None
    """How the linear layers of the blocks are stored in 4 bits, if they are."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelShape:
        """The shape that a `config.json` describes.

        Raises:
            ConfigError: a family that is not known, a mixture of experts, a stored quantisation other than 4-bit, a key that is missing.
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
            kv_heads=config.get("num_key_value_heads") or family.kv_heads or heads,
            head_dim=config.get("head_dim") or family.head_dim or hidden // heads,
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
        """Width of all queries, and of what attention returns."""
        return self.heads * self.head_dim

    @property
    def key_size(self) -> int:
        """Width of all keys, and of all values."""
        return self.kv_heads * self.head_dim

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Linear layers of one block: name to (in, out)."""
        attention = {"q_proj": self.query_size, "k_proj": self.key_size, "v_proj": self.key_size}
        mlp = {"gate_proj": self.intermediate, "up_proj": self.intermediate}
        if self.fused:
            attention, mlp = (
                {"qkv_proj": sum(attention.values())},
                {"gate_up_proj": sum(mlp.values())},
            )
        return (
            {name: (self.hidden, size) for name, size in attention.items()}
            | {"o_proj": (self.query_size, self.hidden)}
            | {name: (self.hidden, size) for name, size in mlp.items()}
            | {"down_proj": (self.intermediate, self.hidden)}
        )

    def read_widths(self, names: Collection[str]) -> dict[str, int]:
        """Width of each tensor that these layers of a block read."""
        return {_READS[name]: self.linears[name][0] for name in names}

    @property
    def linear_parameters(self) -> int:
        """Weights of the linear layers of all blocks, which are what QLoRA quantises."""
        return self.layers * sum(a * b for a, b in self.linears.values())

    @property
    def bias_parameters(self) -> int:
        """Biases of those layers."""
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
        """Weights of the head; 0 where it is the embedding."""
        return 0 if self.tied else self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        """All of them."""
        return (
            self.linear_parameters
            + self.bias_parameters
            + self.norm_parameters
            + self.embedding_parameters
            + self.head_parameters
        )

    def stored_bytes(self, unit: int, nf4: bool = False) -> tuple[float, float]:
        """Bytes of all weights, and of the constants of those in 4 bits; `unit` bytes for the others. `nf4`: quantise when loading."""
        if scheme := self.quantization or ("bitsandbytes" if nf4 else None):
            other = self.parameters - self.linear_parameters
            return self.linear_parameters / 2 + other * unit, self.linear_parameters * _CONSTANTS[
                scheme
            ]
        return self.parameters * unit, 0

    def adapted(self, target_modules: Collection[str] | None) -> tuple[str, ...]:
        """Linear layers of a block that `run.lora.target_modules` names; all of them for None.

        Raises:
            ConfigError: a name that a block does not have.
        """
        present = self.linears
        if target_modules is None:
            return tuple(present)
        wanted = {name if name in present else FUSED.get(name, name) for name in target_modules}
        if missing := sorted(wanted - set(present)):
            raise ConfigError(
                f"run.lora.target_modules: the model has no {', '.join(missing)}",
                f"it has {', '.join(present)}",
            )
        return tuple(name for name in present if name in wanted)

    def lora_parameters(self, r: int, target_modules: Collection[str] | None = None) -> int:
        """Weights of a LoRA adapter of rank `r`: r x (in + out) for each adapted layer (Hu et al. 2021, section 4.1)."""
        return (
            self.layers * r * sum(sum(self.linears[name]) for name in self.adapted(target_modules))
        )

    def trained_parameters(
        self, method: Method, r: int, target_modules: Collection[str] | None = None
    ) -> int:
        """Weights that a method trains."""
        return self.parameters if method == "full" else self.lora_parameters(r, target_modules)

    def forward_flops_per_token(self, length: float) -> float:
        """Operations of a forward pass for one token of a row of `length` tokens.

        A multiplication and an addition for each weight of the blocks and the head (not the embedding, which is looked up), and
        4 x layers x heads x head_dim x length for attention. As in PaLM (Chowdhery et al. 2022, appendix B) every token is counted
        as attending to the whole row, though a causal kernel does half of that. Sliding windows are not taken off.
        """
        return (
            2 * (self.linear_parameters + self.vocab * self.hidden)
            + 4 * self.layers * self.query_size * length
        )

    def training_flops_per_token(
        self, method: Method, mean_length: float, stage: Stage = "sft"
    ) -> float:
        """Model operations of a training step for one token, which is what MFU counts: nothing that is recomputed.

        The backward pass costs as much again for the gradients of activations, and again for those of weights (6N in all: PaLM,
        appendix B). LoRA has no weight gradients of the base, so 4N; attention has no weights and costs 3 passes always. The adapter
        itself is left out (0.5 % of an 8B model at rank 16). DPO adds the reference's forward pass; its pairs count with both sides.
        """
        attention = 4 * self.layers * self.query_size * mean_length
        linear = self.forward_flops_per_token(0)
        reference = linear + attention if stage == "dpo" else 0.0
        return (3 if method == "full" else 2) * linear + 3 * attention + reference

    def recompute_flops_per_token(self, checkpoint_every: int, mean_length: float) -> float:
        """What activation checkpointing adds: the forward pass of the checkpointed blocks (0: of none; see `checkpointed_layers`)."""
        blocks = self.forward_flops_per_token(mean_length) - 2 * self.vocab * self.hidden
        return blocks * self.checkpointed_layers(checkpoint_every) / self.layers

    def checkpointed_layers(self, every: int) -> int:
        """Blocks whose index is a multiple of `every` (transformers' `every_n_layers`); 0 for none."""
        return math.ceil(self.layers / every) if every else 0


def _family(config: Mapping[str, Any]) -> _Family:
    name = str(config.get("model_type", ""))
    if name in _FAMILIES and not any(config.get(key) for key in _EXPERTS):
        return _FAMILIES[name]
    if "moe" in name or "mixtral" in name or any(config.get(key) for key in _EXPERTS):
        reason = "is a mixture of experts, whose memory and speed are not modelled"
    elif "text_config" in config:
        reason = "takes more than text, and is not modelled"
    else:
        reason = "is not a family whose sizes are known"
    raise ConfigError(
        f"run.base_model: model_type {name!r} {reason}", f"known are {', '.join(_FAMILIES)}"
    )


def _size(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or value < 1:
        raise ConfigError(f"run.base_model: config.json has no usable {key} (got {value!r})")
    return value


def _stored_quantization(stored: Any) -> StoredQuantization | None:
    """The method in `quantization_config`, which transformers writes beside a model that is stored quantised."""
    if not stored:
        return None
    method = stored.get("quant_method")
    if method == "bitsandbytes" and stored.get("load_in_4bit"):
        return "bitsandbytes"
    if method == "gptq" and stored.get("bits") == 4:
        return "gptq"
    raise ConfigError(
        f"run.base_model: stored quantisation {method!r} is not known",
        "use a 4-bit bitsandbytes or GPTQ base, or a bf16 one",
    )
