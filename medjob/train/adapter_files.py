"""The files of an adapter, in the form in which it is published."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medjob.config.base import ADAPTER_CONFIG, ADAPTER_WEIGHTS, ModelRef
from medjob.config.train import LoraParams
from medjob.plan.adapter import adapter_params

_SETS = ("exclude_modules", "modules_to_save", "target_modules")


def initial_weights(model: Any) -> dict[str, Any]:
    """Copies of the A and B of a new adapter, by their names in its file. Empty unless they were
    subtracted from the base."""
    from peft import get_peft_model_state_dict

    init = model.peft_config["default"].init_lora_weights
    if not LoraParams(init_lora_weights=init).changes_base:
        return {}
    weights = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {
        name: weight.detach().float().cpu().clone()
        for name, weight in weights.items()
        if ".lora_A." in name or ".lora_B." in name
    }


def publish_adapter(folder: Path, base: ModelRef, initial: Mapping[str, Any]) -> None:
    """Give a trainer's adapter the form in which later stages and servers load it: without local
    paths, in a fixed order, and on the original base.

    Args:
        initial: What `initial_weights` returned.
    """
    params = adapter_params(folder).published
    if initial:
        _add_initial_weights(folder / ADAPTER_WEIGHTS, initial)
    values = json.loads((folder / ADAPTER_CONFIG).read_text())
    changed = params.model_dump(
        include={"r", "lora_alpha", "rank_pattern", "alpha_pattern", "init_lora_weights"}
    )
    values |= changed | {"base_model_name_or_path": base.id, "revision": base.revision}
    for name in _SETS:  # PEFT writes sets, whose order changes from run to run
        if isinstance(values.get(name), list):
            values[name] = sorted(values[name])
    (folder / ADAPTER_CONFIG).write_text(json.dumps(values, indent=2, sort_keys=True))


def _add_initial_weights(file: Path, initial: Mapping[str, Any]) -> None:
    """Turn an adapter of a base without its initial weights into one of the original base.

    W - s B0 A0 + s B A = W + s [B, -B0] [A; A0], a plain adapter of twice the rank (PEFT's
    `subtract_mutated_init`).
    """
    import torch
    from safetensors.torch import load_file, save_file

    weights = load_file(file)
    for name, first in initial.items():
        trained = weights[name].float()
        pair = (trained, first) if ".lora_A." in name else (trained, -first)
        weights[name] = torch.cat(pair, dim=0 if ".lora_A." in name else 1).contiguous()
    save_file(weights, file, metadata={"format": "pt"})
