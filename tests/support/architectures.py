"""Random models of one or two layers, of the architectures that people fine-tune."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

B = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
GROUPED = {**B, "num_key_value_heads": 2}
GPT = {"vocab_size": 128, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
MOE = {**GROUPED, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MLA = {
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
}


def gemma3_config() -> Any:
    """The sizes of a tiny MedGemma."""
    from transformers import Gemma3Config

    return Gemma3Config(
        text_config={**GROUPED, "head_dim": 8},
        vision_config=VISION,
        mm_tokens_per_image=4,
        image_token_index=120,
        boi_token_index=121,
        eoi_token_index=122,
    )


def mllama_config() -> Any:
    """The sizes of a tiny Llama 3.2 Vision. Its second block attends to images."""
    from transformers import MllamaConfig

    text = {"cross_attention_layers": [1], "rope_scaling": {"rope_type": "default"}}
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_global_layers": 1,
        "attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
        "vision_output_dim": 32,
        "intermediate_layers_indices": [0],
        "max_num_tiles": 2,
        "supported_aspect_ratios": [[1, 1], [1, 2]],
    }
    return MllamaConfig(text_config={**GROUPED, **text, "pad_token_id": 0}, vision_config=vision)


def qwen2_vl_config() -> Any:
    """The sizes of a tiny Qwen2-VL."""
    from transformers import Qwen2VLConfig

    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 4}
    rope = {"type": "mrope", "mrope_section": [1, 1, 2]}
    return Qwen2VLConfig(text_config={**GROUPED, "rope_scaling": rope}, vision_config=vision)


def llava_config() -> Any:
    """The sizes of a tiny LLaVA, as in LLaVA-Med."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    vision = CLIPVisionConfig(**VISION)
    return LlavaConfig(
        text_config=LlamaConfig(**GROUPED), vision_config=vision, image_token_index=120
    )


def of_type(model_type: str, **sizes: Any) -> Callable[[], Any]:
    """Return a maker of a configuration."""

    def make() -> Any:
        from transformers import AutoConfig

        return AutoConfig.for_model(model_type, **sizes)

    return make


CONFIGS: dict[str, Callable[[], Any]] = {
    "gpt2": of_type("gpt2", **GPT),
    "gptj": of_type("gptj", **GPT, rotary_dim=4),
    "gpt_neox": of_type("gpt_neox", **B),
    "bloom": of_type("bloom", vocab_size=128, hidden_size=32, n_layer=2, n_head=4),
    "opt": of_type("opt", **B, ffn_dim=64, word_embed_proj_dim=16, max_position_embeddings=64),
    "biogpt": of_type("biogpt", **B, max_position_embeddings=64),
    "falcon": of_type(
        "falcon", vocab_size=128, hidden_size=32, num_hidden_layers=2, num_attention_heads=4
    ),
    "mpt": of_type("mpt", vocab_size=128, d_model=32, n_layers=2, n_heads=4, max_seq_len=64),
    "phi": of_type("phi", **B),
    "phi3": of_type("phi3", **B, pad_token_id=0),
    "gemma2": of_type("gemma2", **GROUPED, head_dim=8),
    "mamba": of_type("mamba", vocab_size=128, hidden_size=32, num_hidden_layers=2, state_size=4),
    "mixtral": of_type("mixtral", **GROUPED, num_local_experts=4),
    "qwen2_moe": of_type("qwen2_moe", **MOE, num_experts=4, shared_expert_intermediate_size=32),
    "qwen3_moe": of_type("qwen3_moe", **MOE, num_experts=4, head_dim=8),
    "olmoe": of_type("olmoe", **B, num_experts=4, num_experts_per_tok=2),
    "gpt_oss": of_type(
        "gpt_oss", **GROUPED, num_local_experts=4, num_experts_per_tok=2, head_dim=8
    ),
    "phimoe": of_type("phimoe", **GROUPED, num_local_experts=4),
    "deepseek_v3": of_type(
        "deepseek_v3",
        **{**MOE, **MLA, "num_key_value_heads": 4},
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
    ),
    "gemma3": gemma3_config,
    "mllama": mllama_config,
    "qwen2_vl": qwen2_vl_config,
    "llava": llava_config,
}


def make_architecture(name: str, folder: Path) -> Path:
    """Write a random model without a tokenizer to `folder`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    config = CONFIGS[name]()
    is_text = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and name != "mllama"
    torch.manual_seed(0)
    (AutoModelForCausalLM if is_text else AutoModelForImageTextToText).from_config(
        config
    ).save_pretrained(folder)
    return folder
