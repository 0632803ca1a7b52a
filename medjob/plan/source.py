"""Read a model's `config.json` without loading a model library."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from medjob.artifacts.published import find_published
from medjob.config.base import ModelRef
from medjob.config.store import StoreRef
from medjob.errors import ConfigError, MedjobError
from medjob.plan.shape import ModelShape
from medjob.sources.buckets import read_model_config, with_run_file_key
from medjob.sources.hub import hub_errors
from medjob.sources.references import (
    artifact_of,
    is_bucket,
    is_hub,
    is_package,
    is_run,
    model_location,
)
from medjob.store import open_store

_HUB_TIMEOUT_SECONDS = 2.0


def read_shape(ref: ModelRef, pins: Mapping[str, str], store: StoreRef) -> ModelShape:
    """Read the shape of a model in a local directory, a package, a bucket, or on a hub. Its weights
    are not fetched.

    The sizes of the models named in jobs/ ship with medjob, in `model_configs.json`. Planning them
    needs no network, no token and no package. A model with a revision is always looked up.

    Raises:
        InputError: the model does not exist, or access to it is gated.
        ConfigError: an architecture whose sizes are unknown.
        RetryError: the hub or the bucket cannot be reached.
    """
    return ModelShape.from_config(_read_config(ref, pins, store))


def _read_config(ref: ModelRef, pins: Mapping[str, str], store: StoreRef) -> dict[str, Any]:
    if is_run(ref):
        return _from_run(ref, store)
    if is_bucket(ref):
        return _from_bucket(ref, store)
    if is_hub(ref) or is_package(ref):
        shipped = shipped_configs().get(ref.id)
        if shipped and not ref.revision:
            return shipped
    if is_hub(ref):
        return _from_hub(ref, pins.get(ref.key, ref.revision))
    path = model_location(ref.id)
    return _from_gguf(path) if path.is_file() else _from_file(path / "config.json")


def shipped_configs() -> dict[str, dict[str, Any]]:
    """The sizes of the models named in jobs/, by id: the fields of their public `config.json` that
    `ModelShape` reads."""
    text = resources.files("medjob.plan").joinpath("model_configs.json").read_text()
    return dict(json.loads(text))


def _from_file(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text()))


def _from_bucket(ref: ModelRef, store: StoreRef) -> dict[str, Any]:
    try:
        return dict(json.loads(read_model_config(ref, store)))
    except MedjobError as error:
        raise with_run_file_key("run.base_model", ref, error) from None


def _from_run(ref: ModelRef, store: StoreRef) -> dict[str, Any]:
    try:
        artifact, manifest = find_published(open_store(store), *artifact_of(ref))
    except MedjobError as error:
        raise with_run_file_key("run.base_model", ref, error) from None
    if not any(file.path == "config.json" for file in manifest.files):
        raise ConfigError(
            f"run.base_model: {ref.id} is a LoRA adapter, not a model",
            f"set run.adapter={ref.id}, and run.base_model to the model that it adapts",
        )
    return dict(json.loads(artifact.read(manifest, "config.json")))


def _from_hub(ref: ModelRef, revision: str | None) -> dict[str, Any]:
    try:
        with hub_errors(ref.id, "model"):
            return _from_file(_download_config(ref.id, revision))
    except MedjobError as error:
        raise with_run_file_key("run.base_model", ref, error) from None


def _download_config(repo_id: str, revision: str | None) -> Path:
    """Download `config.json` to the hub's cache, or find it there if the hub cannot be reached."""
    from huggingface_hub import (
        get_hf_file_metadata,
        hf_hub_download,
        hf_hub_url,
        try_to_load_from_cache,
    )

    url = hf_hub_url(repo_id, "config.json", revision=revision)
    try:
        # hf_hub_download (2.4) repeats its first request for 25 s if there is no network. This one
        # is made once.
        get_hf_file_metadata(url, timeout=_HUB_TIMEOUT_SECONDS)
    except Exception:
        cached = try_to_load_from_cache(repo_id, "config.json", revision=revision)
        if isinstance(cached, str):
            return Path(cached)
        raise
    return Path(hf_hub_download(repo_id, "config.json", revision=revision))


def _from_gguf(path: Path) -> dict[str, Any]:
    """Read the sizes from the header of a GGUF file, under transformers' names."""
    from gguf import GGUFReader

    reader = GGUFReader(path)

    def value(name: str) -> Any:
        field = reader.get_field(name)
        return field.contents() if field is not None else None

    family = str(value("general.architecture"))
    gguf_names = {
        "hidden_size": "embedding_length",
        "num_hidden_layers": "block_count",
        "intermediate_size": "feed_forward_length",
        "num_attention_heads": "attention.head_count",
        "num_key_value_heads": "attention.head_count_kv",
    }
    sizes = {key: value(f"{family}.{gguf_name}") for key, gguf_name in gguf_names.items()}
    if sizes["hidden_size"] is None:
        raise ConfigError(f"run.base_model: the header of {path.name} has no sizes")
    has_head = any(tensor.name == "output.weight" for tensor in reader.tensors)
    return {
        "model_type": family,
        "vocab_size": len(value("tokenizer.ggml.tokens")),
        "tie_word_embeddings": not has_head,
        **sizes,
    }
