"""A model's `config.json`, read without loading a model library."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medjob.config.base import ModelRef
from medjob.config.store import StoreRef
from medjob.errors import ConfigError, MedjobError, RetryError
from medjob.plan.shape import ModelShape
from medjob.sources.buckets import naming, read_config
from medjob.sources.references import is_bucket, is_hub, model_location


def read_shape(ref: ModelRef, pins: Mapping[str, str], store: StoreRef) -> ModelShape:
    """The shape of a local folder's model, of a package's GGUF, or of one in a bucket or on a hub (its `config.json` alone is fetched).

    Raises:
        InputError: there is no such model.
        ConfigError: an architecture whose sizes are not known.
        RetryError: the hub or the bucket cannot be reached.
    """
    if is_bucket(ref):
        return ModelShape.from_config(_from_bucket(ref, store))
    if is_hub(ref):
        return ModelShape.from_config(_from_hub(ref, pins.get(ref.key, ref.revision)))
    path = model_location(ref.id)
    return ModelShape.from_config(
        _from_gguf(path) if path.is_file() else json.loads((path / "config.json").read_text())
    )


def _from_bucket(ref: ModelRef, store: StoreRef) -> dict[str, Any]:
    try:
        return dict(json.loads(read_config(ref, store)))
    except MedjobError as error:
        raise naming("run.base_model", ref, error) from None


def _from_hub(ref: ModelRef, revision: str | None) -> dict[str, Any]:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return dict(
            json.loads(Path(hf_hub_download(ref.id, "config.json", revision=revision)).read_text())
        )
    except (HfHubHTTPError, OSError) as error:
        text = " ".join(str(error).split())[:200]
        raise RetryError(
            f"run.base_model: {ref}: its config.json cannot be fetched: {text}",
            "check the id, HF_TOKEN, and the network",
        ) from None


def _from_gguf(path: Path) -> dict[str, Any]:
    """The sizes in a GGUF file's header, under transformers' names; its weights are unpacked when the model is loaded."""
    from gguf import GGUFReader

    reader = GGUFReader(path)

    def value(name: str) -> Any:
        field = reader.get_field(name)
        return field.contents() if field is not None else None

    family = str(value("general.architecture"))
    names = {
        "hidden_size": "embedding_length",
        "num_hidden_layers": "block_count",
        "intermediate_size": "feed_forward_length",
        "num_attention_heads": "attention.head_count",
        "num_key_value_heads": "attention.head_count_kv",
    }
    sizes = {ours: value(f"{family}.{theirs}") for ours, theirs in names.items()}
    if sizes["hidden_size"] is None:
        raise ConfigError(f"run.base_model: {path.name} names no sizes")
    tied = not any(tensor.name == "output.weight" for tensor in reader.tensors)
    return {
        "model_type": family,
        "vocab_size": len(value("tokenizer.ggml.tokens")),
        "tie_word_embeddings": tied,
        **sizes,
    }
