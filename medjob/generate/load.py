"""Choose the engine of a stage, and load it with a model."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from medjob.config.base import ADAPTER_CONFIG
from medjob.config.run_file import RowResources
from medjob.config.train import UNSUPPORTED_BY_VLLM
from medjob.data.render import Renderer
from medjob.errors import ConfigError
from medjob.generate import vllm_engine
from medjob.generate.protocol import Engine
from medjob.generate.transformers_engine import (
    TransformersEngine,
    end_tokens,
    transformers_batches,
)
from medjob.generate.work import LazyEngine
from medjob.stage import RowContext
from medjob.train.device import this_device
from medjob.train.model import (
    ModelSpec,
    load_config,
    load_generation_config,
    model_directory,
    stored_method,
)

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Model:
    """A model whose weights are loaded when they are needed."""

    spec: ModelSpec
    tokenizer: Any
    renderer: Renderer
    weights: Callable[[], Any]
    """Loads the model for the engine `transformers`."""
    trained: Path | None = None
    """Directory of an adapter of `spec`, or of all weights; None for `spec` itself."""
    rank: int = 0
    """Largest rank of the adapters that the base gets in this stage, so that one copy of it serves
    all of them in vLLM."""

    @property
    def adapter(self) -> Path | None:
        """Directory of the adapter, if there is one."""
        has_one = self.trained is not None and (self.trained / ADAPTER_CONFIG).is_file()
        return self.trained if has_one else None


def largest_rank(*folders: Path | None) -> int:
    """Return the largest rank in the adapters of these directories; 0 if none has an adapter."""
    ranks = [0]
    for folder in folders:
        if folder is not None and (folder / ADAPTER_CONFIG).is_file():
            config = _adapter_config(folder)
            ranks += [config.get("r") or 0, *(config.get("rank_pattern") or {}).values()]
    return max(ranks)


def lazy_engine(context: RowContext, stage: str, model: Model) -> LazyEngine:
    """Return the engine that `resources.<stage>` names, with `model`.

    Raises:
        ConfigError: vLLM is asked for, and is not installed or does not load the model.
    """
    resources = cast("RowResources", context.resources)
    if _uses_vllm(f"resources.{stage}.engine", resources.engine, model):
        load = functools.partial(_load_vllm, model, context.run.seed, resources.gpus)
        return LazyEngine("vllm", vllm_engine.single_batches, load)
    return transformers_engine(context, model)


def transformers_engine(context: RowContext, model: Model) -> LazyEngine:
    """Return the engine `transformers` with `model`, whatever the resources name."""
    size = context.resources.batch_size
    continuous = this_device().kind == "cuda"

    def load() -> Engine:
        vllm_engine.release()
        return TransformersEngine(
            model.weights(), model.tokenizer, size, context.run.seed, model.renderer, continuous
        )

    batches = functools.partial(transformers_batches, size=size, continuous=continuous)
    return LazyEngine("transformers", batches, load)


def scoring_engine(context: RowContext, model: Model, engine: LazyEngine) -> LazyEngine:
    """Return the engine for `negative_log_likelihoods`: `engine`, unless that is vLLM with room for
    adapters, which has none."""
    if engine.name == "vllm" and model.rank:
        return transformers_engine(context, model)
    return engine


def _uses_vllm(key: str, engine: str, model: Model) -> bool:
    problem = _unsupported_by_vllm(model)
    if engine == "vllm":
        vllm_engine.check_installed(key)
        if problem:
            raise ConfigError(
                f"{key} is vllm, which does not load {problem}", f"set {key}: transformers"
            )
        return True
    if engine != "auto" or this_device().kind != "cuda" or not vllm_engine.is_usable():
        return False
    if problem:
        _log.info("%s: transformers, because vLLM does not load %s", key, problem)
    return problem is None


def _unsupported_by_vllm(model: Model) -> str | None:
    """What vLLM would refuse of a model, or load without; None if it can be used."""
    if model.adapter:
        config = _adapter_config(model.adapter)
        for name in (*UNSUPPORTED_BY_VLLM, "lora_bias"):
            if config.get(name):
                return f"adapters with {name} ({model.adapter.name} has one)"
    stored = getattr(load_config(model.spec.location), "quantization_config", None)
    if stored_method(stored) == "bitsandbytes":
        return f"weights that bitsandbytes has quantized ({model.spec.location.name})"
    return None


def _adapter_config(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / ADAPTER_CONFIG).read_bytes()))


def _load_vllm(model: Model, seed: int, gpus: int) -> Engine:
    spec = model.spec
    path, revision = model_directory(spec.location), spec.location.revision
    if model.trained and not model.adapter:
        path, revision = str(model.trained), None
    elif spec.load_in_4bit:
        _log.info(
            "vLLM has no NF4 weights: it uses the original ones of %s in %s%s",
            spec.location.name,
            spec.dtype,
            ", with the adapter that was trained on NF4" if model.adapter else "",
        )
    base = vllm_engine.Base(path, revision, spec.dtype, gpus, model.rank)
    ends = end_tokens(load_generation_config(path, revision), model.tokenizer, model.renderer)
    return vllm_engine.VllmEngine(base, model.tokenizer, seed, model.renderer, ends, model.adapter)
