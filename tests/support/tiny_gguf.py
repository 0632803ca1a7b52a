"""The tiny model as a GGUF file, as llama.cpp would write it."""

import json
from pathlib import Path
from typing import Any

_LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_OTHERS = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}


def write_gguf(model: Path, file: Path) -> Path:
    """Write the model in the directory `model` to `file`."""
    from gguf import GGUFWriter
    from safetensors.torch import load_file

    config = json.loads((model / "config.json").read_text())
    writer = GGUFWriter(file, "llama")
    writer.add_name("tiny")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    _add_tokenizer(writer, model, config["vocab_size"])
    for name, tensor in load_file(model / "model.safetensors").items():
        rows = tensor.float().numpy()
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = "num_attention_heads" if "q_proj" in name else "num_key_value_heads"
            rows = _in_pairs(rows, config[heads])
        writer.add_tensor(_name_in_gguf(name), rows)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _add_tokenizer(writer: Any, model: Path, vocab_size: int) -> None:
    from gguf import TokenType

    tokenizer = json.loads((model / "tokenizer.json").read_text())
    special = {token["content"] for token in tokenizer["added_tokens"]}
    vocab = tokenizer["model"]["vocab"]
    tokens = sorted(vocab, key=vocab.__getitem__)
    tokens += [f"<|unused_{number}|>" for number in range(len(tokens), vocab_size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types(
        [TokenType.CONTROL if token in special else TokenType.NORMAL for token in tokens]
    )
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_eos_token_id(vocab["<|im_end|>"])
    writer.add_pad_token_id(vocab["<|endoftext|>"])
    writer.add_chat_template((model / "chat_template.jinja").read_text())


def _in_pairs(rows: Any, heads: int) -> Any:
    """Reorder the rows of q or k. llama.cpp rotates neighbouring pairs, and transformers halves."""
    halves = rows.reshape(heads, 2, -1, rows.shape[1])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def _name_in_gguf(name: str) -> str:
    parts = name.removesuffix(".weight")
    if parts in _OTHERS:
        return f"{_OTHERS[parts]}.weight"
    _, _, layer, part = parts.split(".", 3)
    return f"blk.{layer}.{_LAYER[part]}.weight"
