"""Adds LoRA adapters, and chooses the layers that they adapt."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from typing import Any

from medjob.config.train import LoraParams
from medjob.errors import ConfigError
from medjob.plan.shape import resolve_target_modules
from medjob.train.gptq import is_gptq_linear

_log = logging.getLogger(__name__)
# Routers choose experts. Training them on few rows unbalances the experts.
_ROUTER = re.compile(r"[._](router|gate|gating)(\.|$)")
_BLOCK = re.compile(r"\.\d+\.")
# Mamba multiplies with the weight of this layer itself, so an adapter would have no effect until it
# is merged (transformers 5.23).
_BYPASSED = ("dt_proj",)
# PEFT refuses out_proj of these architectures, whose fused kernels bypass it (PEFT 0.21).
_MAMBA = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")


def add_adapter(model: Any, params: LoraParams, seed: int) -> Any:
    """Add a new LoRA adapter to `model`. Its weights are float32, whatever the base's dtype."""
    from peft import LoraConfig, get_peft_model
    from transformers import set_seed
    from transformers.pytorch_utils import Conv1D

    set_seed(seed)
    names = target_modules(model, params.target_modules)
    chosen = {path: module for path, module in _adaptable(model) if _last(path) in names}
    _warn_of_experts(model, names)
    config = LoraConfig(
        r=params.r,
        lora_alpha=params.lora_alpha,
        lora_dropout=params.lora_dropout,
        target_modules=names,
        exclude_modules=_namesakes(model, names, set(chosen)) or None,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in chosen.values()),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def target_modules(model: Any, wanted: list[str] | None) -> list[str]:
    """Names of the layers to adapt: those in `wanted`, or all linear layers of each block except
    the routers of experts.

    If the model fuses q/k/v or gate/up into one layer, their names stand for the fused layer.

    Raises:
        ConfigError: no block has a layer of that name. PEFT accepts this silently if any other name
            matches.
    """
    paths = [path for path, _ in _adaptable(model)]
    if wanted is None:
        candidates = sorted({_last(path) for path in paths if not _ROUTER.search(path)})
        names = [name for name in candidates if not _means_experts(model, name)]
        if not names:
            raise ConfigError(
                f"run.method: found no linear layers to adapt in {type(model).__name__}",
                "use another base model, or --set run.method=full",
            )
        return names
    experts = [name for name in wanted if _means_experts(model, name)]
    if experts:
        raise ConfigError(
            f"run.lora.target_modules: {', '.join(experts)}: medjob trains no adapter on experts",
            "leave these names out, or --set run.method=full",
        )
    resolved = resolve_target_modules(wanted, sorted({_last(path) for path in paths}))
    fused = {name: real for name, real in resolved.items() if name != real}
    if fused:
        _log.info(
            "target_modules: %s",
            ", ".join(f"{name} is part of {real}" for name, real in fused.items()),
        )
    return sorted(set(resolved.values()))


def _adaptable(model: Any) -> Iterator[tuple[str, Any]]:
    """The linear layers in the blocks of the language model, by their paths.

    The head, the embeddings and their projections are outside of the blocks. The vision and audio
    encoders of a multimodal model are outside of the language model: rows are text, so their
    adapters would get no gradient.
    """
    decoder = model.get_decoder()
    prefix = next((path for path, module in model.named_modules() if module is decoder), "")
    head = model.get_output_embeddings()
    bypassed = (*_BYPASSED, *(("out_proj",) if model.config.model_type in _MAMBA else ()))
    # Blocks that attend to images (Llama 3.2 Vision). Text does not pass through them.
    skipped = tuple(
        path.removesuffix("cross_attn")
        for path, _ in model.named_modules()
        if _last(path) == "cross_attn"
    )
    for path, module in model.named_modules():
        if (
            f"{path}.".startswith(f"{prefix}." if prefix else "")
            and _BLOCK.search(path)
            and module is not head
            and _is_linear(module)
            and not path.startswith(skipped)
            and _last(path) not in bypassed
        ):
            yield path, module


def _is_linear(module: Any) -> bool:
    import torch
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, torch.nn.Linear | Conv1D) or is_gptq_linear(module)


def _namesakes(model: Any, names: list[str], chosen: set[str]) -> list[str]:
    """Paths of layers with one of these names that are not adapted, such as those of a vision
    encoder. PEFT matches names anywhere in the model."""
    return [
        path
        for path, _ in model.named_modules()
        if _last(path) in names and path not in chosen and _last(path) != path
    ] + [path for path in names if path in dict(model.named_children())]


def _last(path: str) -> str:
    return path.rpartition(".")[2]


def _means_experts(model: Any, name: str) -> bool:
    """Whether PEFT adapts the experts of a mixture instead of the linear layers of this name.

    It does so for DeepSeek-V3 and others, whose experts had linear layers of these names before
    transformers 5 (PEFT 0.21).
    """
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    if not _experts(model):
        return False
    config = LoraConfig(target_modules=[name])
    try:
        convert_peft_config_for_transformers(config, model, None)
    except ValueError:  # the name is one part of a fused tensor
        return True
    return bool(config.target_parameters)


def _experts(model: Any) -> dict[str, Any]:
    """Weights that hold all experts of a layer, as three-dimensional tensors."""
    return {
        path: parameter
        for path, parameter in model.named_parameters()
        if ".experts." in path and len(getattr(parameter, "ds_shape", parameter.shape)) == 3
    }


def _warn_of_experts(model: Any, names: list[str]) -> None:
    """Say that experts are not adapted.

    PEFT can adapt such tensors (`target_parameters`), but not together with dropout, and TRL's DPO
    trainer cannot copy such an adapter as its reference (TRL 1.16).
    """
    experts = _experts(model)
    if experts:
        _log.warning(
            "the adapter covers %s, but not the experts (%s); --set run.method=full trains them",
            ", ".join(names),
            ", ".join(sorted({_last(path) for path in experts})),
        )
