"""What a run starts from, and what a training trains."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medjob.config.base import ADAPTER_CONFIG
from medjob.config.run_file import Run
from medjob.errors import ConfigError, InputError
from medjob.sources.hub import hub_errors
from medjob.stage import StageContext, TrainingContext
from medjob.train.adapter_files import initial_weights
from medjob.train.adapters import add_adapter, token_ids
from medjob.train.model import ModelSpec, load_model, load_policy


def starting_adapter(context: StageContext[Any]) -> Path | None:
    """The directory of the adapter that the run starts from, on this disk; None for the base model
    itself."""
    if context.run.adapter is None:
        return None
    location = context.location(context.run.adapter)
    if not location.on_hub:
        return Path(location.path)
    from huggingface_hub import snapshot_download

    with hub_errors(location.path, "model"):  # `fetch` has filled the cache
        return Path(
            snapshot_download(location.path, revision=location.revision, local_files_only=True)
        )


def load_start(context: StageContext[Any], spec: ModelSpec) -> Any:
    """Load what the run starts from: the base model, with the adapter if there is one."""
    adapter = starting_adapter(context)
    return _load_start(context, spec, adapter) if adapter else load_model(spec)


def _load_start(
    context: StageContext[Any], spec: ModelSpec, adapter: Path, trainable: bool = False
) -> Any:
    try:
        return load_policy(spec, adapter, trainable)
    except InputError as error:
        base = json.loads((adapter / ADAPTER_CONFIG).read_bytes()).get("base_model_name_or_path")
        raise InputError(
            f"run.adapter: {context.run.adapter} does not fit run.base_model "
            f"({context.run.base_model}): {error.message}",
            f"its {ADAPTER_CONFIG} says that it adapts {base}",
        ) from None


def trainable_model(
    context: TrainingContext, spec: ModelSpec, tokenizer: Any, trained: Path | None = None
) -> tuple[Any, Mapping[str, Any]]:
    """Load the model to train: `trained`, or what the run starts from, with a new adapter if there
    is none. Also return the initial weights of a new adapter that were subtracted from the base.

    Args:
        trained: Artifact of an earlier training of this run.

    Raises:
        ConfigError: all weights are to be trained, and they are quantised; or the tokenizer has no
            such token as run.lora.trainable_token_indices names.
    """
    run = context.run
    folder = starting_adapter(context)
    if trained:
        return load_policy(spec, trained, trainable=True), {}
    if folder:
        return _load_start(context, spec, folder, trainable=True), {}
    model = load_model(spec)
    if run.method == "full":
        _refuse_quantized(model, run)
        return model, {}
    tokens = token_ids(tokenizer, run.lora.trainable_token_indices or ())
    model = add_adapter(model, run.lora, run.seed, tokens)
    return model, initial_weights(model)


def _refuse_quantized(model: Any, run: Run) -> None:
    """Raise ConfigError if all weights of the run are to be trained, and they are quantised."""
    if getattr(model, "is_quantized", False):
        raise ConfigError(
            f"run.method: full cannot train {run.base_model}, whose weights are quantised",
            "--set run.method=qlora",
        )
