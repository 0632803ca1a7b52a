"""Adds LoRA adapters, and chooses the layers that they adapt."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from medjob.config.train import LoraParams
from medjob.errors import ConfigError
from medjob.plan.shape import (
    check_layers,
    check_patterns,
    check_saved_modules,
    resolve_target_modules,
)
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


def add_adapter(model: Any, params: LoraParams, seed: int, tokens: Sequence[int] = ()) -> Any:
    """Add a new LoRA adapter to `model`. Its weights are float32, whatever the base's dtype.

    Initial weights that `changes_base` subtracts from the base are subtracted here, so that the
    model computes the same as before.

    Args:
        tokens: Ids of the tokens in `params.trainable_token_indices`.

    Raises:
        ConfigError: the model does not have what the parameters name, or PEFT cannot combine them.
    """
    from peft import get_peft_model
    from transformers import set_seed

    set_seed(seed)
    config = _config(model, params, tokens)
    try:
        return get_peft_model(model, config)
    except (TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"run.lora: PEFT cannot add this adapter: {reason}") from None


def _config(model: Any, params: LoraParams, tokens: Sequence[int]) -> Any:
    """PEFT's configuration of the adapter."""
    from peft import LoraConfig
    from transformers.pytorch_utils import Conv1D

    names = target_modules(model, params.target_modules)
    chosen = {path: module for path, module in _adaptable(model) if _last(path) in names}
    _warn_of_experts(model, names)
    check_patterns(params, names)
    _check_base(model, params, chosen)
    if params.layers_to_transform is not None:
        check_layers(params.layers_to_transform, model.config.get_text_config().num_hidden_layers)
    return LoraConfig(
        r=params.r,
        lora_alpha=params.lora_alpha,
        lora_dropout=params.lora_dropout,
        target_modules=names,
        layers_to_transform=params.layers_to_transform,
        rank_pattern=params.rank_pattern,
        alpha_pattern=params.alpha_pattern,
        use_rslora=params.use_rslora,
        use_dora=params.use_dora,
        init_lora_weights=params.init_lora_weights,
        exclude_modules=_namesakes(model, names, set(chosen)) or None,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in chosen.values()),
        task_type="CAUSAL_LM",
        **_saved_modules(model, params),
        **_trained_tokens(model, params, tokens),
    )


def _check_base(model: Any, params: LoraParams, adapted: Mapping[str, Any]) -> None:
    """Refuse initial weights that the base cannot give up.

    Args:
        adapted: The layers that get an adapter, by their paths.

    Raises:
        ConfigError: the base is stored in 4 bits, which cannot hold what is left of its weights, or
            a layer is narrower than the adapter.
    """
    if not params.changes_base:
        return
    key = f"run.lora.init_lora_weights: {params.init_lora_weights}"
    if getattr(model, "is_quantized", False):
        raise ConfigError(f"{key} needs a base that is not quantized", "use true or gaussian")
    for path, module in adapted.items():
        rank, most = params.rank_of(_last(path)), min(_weight_shape(module))
        if rank > most:
            raise ConfigError(
                f"{key}: the rank of {_last(path)} is at most {most} (got {rank})",
                "lower run.lora.r, or set run.lora.rank_pattern",
            )


def _weight_shape(module: Any) -> tuple[int, ...]:
    """Shape of a weight that ZeRO-3 may have sharded."""
    return tuple(getattr(module.weight, "ds_shape", module.weight.shape))


def _saved_modules(model: Any, params: LoraParams) -> dict[str, Any]:
    """PEFT's arguments for modules to train as a whole, with their paths: PEFT compares only the
    ends of names, so that `norm` would mean `input_layernorm` as well.

    Raises:
        ConfigError: the model has no such module.
    """
    if params.modules_to_save is None:
        return {}
    paths = _savable(model)
    present = sorted({_last(path) for path in paths})
    tied = _is_tied(model)
    check_saved_modules(params.modules_to_save, present, tied)
    embedding = model.get_input_embeddings()
    wanted = {
        path: module for path, module in paths.items() if _last(path) in params.modules_to_save
    }
    return {
        "modules_to_save": sorted(wanted),
        "ensure_weight_tying": tied and any(module is embedding for module in wanted.values()),
    }


def _savable(model: Any) -> dict[str, Any]:
    """Modules of the language model with weights of their own that get no adapter, by their paths:
    the embedding, the head unless it shares the embedding's weight, and normalisations."""
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    prefix = next((f"{path}." for path, module in model.named_modules() if module is decoder), "")
    return {
        path: module
        for path, module in model.named_modules()
        if (path.startswith(prefix) or module is head)
        and any(len(getattr(p, "ds_shape", p.shape)) < 3 for p in module.parameters(recurse=False))
        and not (_BLOCK.search(path) and _is_linear(module))
        and not (module is head and _is_tied(model))
    }


def _is_tied(model: Any) -> bool:
    """Whether the head shares the weight of the embedding."""
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def _trained_tokens(model: Any, params: LoraParams, tokens: Sequence[int]) -> dict[str, Any]:
    """PEFT's argument for tokens to train: their rows of the embedding and of the head. PEFT adds a
    head that shares the embedding's weight itself.

    Raises:
        ConfigError: the model has no such row, trains the rows twice, or has a head with a bias,
            which PEFT 0.21 leaves out of trained rows.
    """
    if not tokens:
        return {}
    key = "run.lora.trainable_token_indices"
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    rows = _weight_shape(embedding)[0]
    if max(tokens) >= rows:
        raise ConfigError(f"{key}: the embedding has no row {max(tokens)}", f"it has {rows} rows")
    layers = [path for path, module in model.named_modules() if module in (embedding, head)]
    saved = sorted({_last(path) for path in layers} & set(params.modules_to_save or ()))
    if saved:
        raise ConfigError(
            f"{key}: run.lora.modules_to_save trains all rows of {', '.join(saved)} already",
            "leave out one of the two",
        )
    if getattr(head, "bias", None) is not None:
        raise ConfigError(f"{key}: the head has a bias", "use run.lora.modules_to_save")
    if _is_tied(model):
        layers = [path for path, module in model.named_modules() if module is embedding]
    return {"trainable_token_indices": {path: sorted(set(tokens)) for path in layers}}


def token_ids(tokenizer: Any, wanted: Sequence[int | str]) -> list[int]:
    """The ids of the tokens in `run.lora.trainable_token_indices`.

    Raises:
        ConfigError: the tokenizer has no such token.
    """
    vocabulary = tokenizer.get_vocab()
    known = set(vocabulary.values())
    ids, missing = [], []
    for token in wanted:
        found = vocabulary.get(token) if isinstance(token, str) else token
        if found in known:
            ids.append(int(found))
        else:
            missing.append(str(token))
    if missing:
        special = ", ".join(tokenizer.get_added_vocab()) or "none"
        raise ConfigError(
            f"run.lora.trainable_token_indices: the tokenizer has no token {', '.join(missing)}",
            f"its added tokens: {special[:300]}",
        )
    return sorted(set(ids))


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
