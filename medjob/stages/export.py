"""export: merge the adapter into the trained model, for a serving engine. Runs on a CPU."""

from __future__ import annotations

import gc
import shutil
from http import HTTPStatus
from pathlib import Path
from typing import Any

from medjob.config.base import ADAPTER_CONFIG
from medjob.config.judge import ExportParams
from medjob.data.chat_template import chat_template_of
from medjob.data.render import Renderer
from medjob.errors import ConfigError, DataError
from medjob.generate.transformers_engine import end_tokens
from medjob.sources.hub import hub_errors
from medjob.sources.locations import Location
from medjob.stage import Metrics, RowContext
from medjob.train.integrity import check_finite
from medjob.train.model import (
    ModelSpec,
    dequantized,
    load_adapter,
    load_model,
    load_policy,
    load_tokenizer,
)

# How a multimodal base prepares images, sound and video.
_PROCESSOR_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)


def run(context: RowContext) -> Metrics:
    """Write the merged model and its tokenizer, and push them to a hub if the run asks for it.

    A server that reads the folder generates what `evaluate` did: with the same stop tokens and
    prompts, and greedily unless a request asks for sampling.

    Raises:
        ConfigError: the repository is public, and `run.export.private` is true.
        DataError: merged weights are not finite.
    """
    run = context.run
    _create_repository(run.export)
    base = context.location(run.base_model)
    spec = ModelSpec.base_of(run, base)
    folder = context.inputs[run.export.source]
    has_adapter = (folder / ADAPTER_CONFIG).is_file()
    model = _merge(spec, folder) if has_adapter else load_policy(spec, folder)
    tokenizer = load_tokenizer(base)
    renderer = Renderer(tokenizer, run.prompt)
    model.generation_config = _generation_config(model, tokenizer, renderer)
    tokenizer.chat_template = chat_template_of(tokenizer, run.prompt, renderer)
    model.save_pretrained(str(context.output), max_shard_size="5GB")
    tokenizer.save_pretrained(str(context.output))
    _copy_processor(base, context.output)
    check_finite(context.output, run.export.source)
    if run.export.hub_model_id:
        _push(context.output, run.export.hub_model_id)
    return {
        "parameters": model.num_parameters(),
        "source": run.export.source,
        "pushed_to": run.export.hub_model_id,
    }


def _merge(spec: ModelSpec, folder: Path) -> Any:
    """Merge the adapter into its base. A quantised base is dequantised first, because the adapter
    was trained on the quantised weights.

    The mean KL divergence from the trained policy is then 1.3e-6. It is 5e-4 after merging into the
    original weights, or after quantising the merged model to 4 bits again.
    """
    import torch

    model = dequantized(load_model(spec), getattr(torch, spec.dtype))
    policy = load_adapter(model, folder)
    try:
        merged = policy.merge_and_unload(safe_merge=True)
    except ValueError as error:  # PEFT checks each merged layer
        raise DataError(
            f"export: cannot merge the adapter: {error}",
            "the training diverged: lower its learning_rate, and train again",
        ) from None
    gc.collect()
    return merged


def _generation_config(model: Any, tokenizer: Any, renderer: Renderer) -> Any:
    """The configuration with which `evaluate` generates: the same stop tokens, and none of the base
    model's sampling defaults, such as Qwen2.5's repetition penalty."""
    from transformers import GenerationConfig

    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=end_tokens(model.generation_config, tokenizer, renderer),
        pad_token_id=tokenizer.pad_token_id,
    )


def _copy_processor(base: Location, folder: Path) -> None:
    """Copy the base's processor files, if it is multimodal."""
    from transformers.utils import cached_file

    if base.converted is not None:
        return
    for name in _PROCESSOR_FILES:
        file = cached_file(
            base.path,
            name,
            revision=base.revision,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        if file is not None:
            shutil.copyfile(file, folder / name)


def _create_repository(params: ExportParams) -> None:
    """Create the repository before the model is merged, so that a missing right is noticed early.

    Raises:
        ConfigError: it exists and is public, and the run file does not ask for that.
    """
    if params.hub_model_id is None:
        return
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    public = False
    with hub_errors(params.hub_model_id, "model"):
        try:
            api.create_repo(params.hub_model_id, private=params.private)
        except HfHubHTTPError as error:
            if error.response.status_code != HTTPStatus.CONFLICT:
                raise
            public = not api.model_info(params.hub_model_id).private
    if public and params.private:
        raise ConfigError(
            f"run.export.hub_model_id: the repository {params.hub_model_id} is public",
            "make it private, name another one, or publish the model with "
            "--set run.export.private=false",
        )


def _push(folder: Path, hub_model_id: str) -> None:
    from huggingface_hub import HfApi

    with hub_errors(hub_model_id, "model"):
        HfApi().upload_folder(repo_id=hub_model_id, folder_path=folder)
